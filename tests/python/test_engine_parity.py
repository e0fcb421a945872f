"""With room for every token, the budgeted cache computes what stock llama.cpp computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine import Engine
from gguf_factory import ModelSpec, write_gguf

# Same rows, same operations; the number of masked rows differs, and with it the order of sums in
# float16 accumulators. Logits of the test models are of size 10.
TOLERANCE = 0.03

SHAPES = {
    "gqa64": {"arch": "llama", "n_head": 4, "n_head_kv": 2, "head_dim": 64},
    "mqa32": {"arch": "qwen2", "n_head": 4, "n_head_kv": 1, "head_dim": 32},
    "mha96": {"arch": "llama", "n_head": 2, "n_head_kv": 2, "head_dim": 96},
    "gqa128": {"arch": "qwen3", "n_head": 6, "n_head_kv": 3, "head_dim": 128},
    "mha256": {"arch": "llama", "n_head": 2, "n_head_kv": 2, "head_dim": 256},
    "holes": {"arch": "deci", "n_layer": 3, "n_head": 4, "n_head_kv": (4, 0, 2)},
}


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(4, 260, n)]


def largest_difference(path: Path, tokens: list[int], config: dict, **kwargs: object) -> float:
    """Prompt of 100 tokens at once, the rest one by one; largest difference of any logit."""
    with Engine(path, **kwargs) as stock, Engine(path, 400, config=config, **kwargs) as ours:
        worst = np.abs(stock.decode(tokens[:100]) - ours.decode(tokens[:100])).max()
        for token in tokens[100:]:
            worst = max(worst, np.abs(stock.decode([token]) - ours.decode([token])).max())
        stats = ours.stats()
        assert stats.n_evicted == 0
        assert stats.n_pos == len(tokens)
        return float(worst)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv,flash_attn", [("f16", True), ("f16", False), ("q8_0", True)])
def test_logits_match_stock(make_gguf, shape: str, kv: str, flash_attn: bool) -> None:
    path = make_gguf(**SHAPES[shape], n_ctx_train=1024)
    assert (
        largest_difference(path, random_tokens(160), {}, kv=kv, flash_attn=flash_attn) < TOLERANCE
    )


@pytest.mark.parametrize(
    "kv,flash_attn",
    [
        *(("f32", True), ("f32", False), ("bf16", True), ("bf16", False), ("q4_0", True)),
        *(("q4_1", True), ("q5_0", True), ("q5_1", True), ("iq4_nl", True)),
    ],
)
def test_cache_types_match_stock(make_gguf, kv: str, flash_attn: bool) -> None:
    path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    assert (
        largest_difference(path, random_tokens(160), {}, kv=kv, flash_attn=flash_attn) < TOLERANCE
    )


@pytest.mark.parametrize("attention", ["head", "layer"])
@pytest.mark.parametrize("kv,flash_attn", [("f16", True), ("f16", False), ("q8_0", True)])
def test_ragged_heads_match_stock(make_gguf, kv: str, flash_attn: bool, attention: str) -> None:
    """Unequal budgets take one attention per KV head, or one over the layer's pool."""
    path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    config = {"head_budgets": [300, 417, 390, 301], "attention": attention}
    worst = largest_difference(path, random_tokens(260), config, kv=kv, flash_attn=flash_attn)
    assert worst < TOLERANCE


@pytest.mark.parametrize("kv,flash_attn", [("f16", True), ("f16", False), ("q8_0", True)])
def test_greedy_text_of_the_demo_model(demo_model: Path, kv: str, flash_attn: bool) -> None:
    """300 greedy tokens of the shipped model are the same, and so are their logits."""
    from py_reasonalloc.task.problems import SAMPLE_PROBLEM

    kwargs = {"kv": kv, "flash_attn": flash_attn}
    with Engine(demo_model, **kwargs) as stock, Engine(demo_model, 1024, **kwargs) as ours:
        prompt = demo_prompt(stock, SAMPLE_PROBLEM)
        text = stock.greedy(prompt, 300)
        assert ours.greedy(prompt, 300) == text
        assert len(set(text)) > 10  # not one token for ever
        stock.clear()
        ours.clear()
        assert np.abs(stock.decode_each(text) - ours.decode_each(text)).max() < 0.1


def demo_prompt(engine: Engine, problem: object) -> list[int]:
    """Tokens of a demo problem's prompt, in the model's own format."""
    from llama_cpp import llama_cpp as lib

    text = problem.chat_prompt.encode()
    vocab = lib.llama_model_get_vocab(engine.model)
    tokens = (lib.llama_token * 4096)()
    n = lib.llama_tokenize(vocab, text, len(text), tokens, 4096, True, True)
    assert n > 0
    return list(tokens[:n])


LOGITS_SCRIPT = """
import ctypes, sys
import numpy as np
from llama_cpp import llama_cpp as lib

@lib.llama_log_callback
def silent(level, text, user):
    pass

lib.llama_log_set(silent, ctypes.c_void_p(0))
params = lib.llama_model_default_params()
params.n_gpu_layers = 0
model = lib.llama_model_load_from_file(sys.argv[1].encode(), params)
params = lib.llama_context_default_params()
params.n_ctx, params.n_threads, params.flash_attn_type = 1024, 1, 1
ctx = lib.llama_init_from_model(model, params)
n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
tokens = [int(t) for t in sys.argv[3].split(",")]
rows = []
for token in tokens:
    array = (lib.llama_token * 1)(token)
    assert lib.llama_decode(ctx, lib.llama_batch_get_one(array, 1)) == 0
    rows.append(np.ctypeslib.as_array(lib.llama_get_logits(ctx), (n_vocab,)).copy())
np.save(sys.argv[2], np.array(rows))
"""


def stock_logits(path: Path, out: Path, tokens: list[int], lib_path: str | None) -> np.ndarray:
    """Logits of the stock cache in a process of its own that never names ReasonAlloc."""
    env = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"}
    lib_path = lib_path or os.environ.get("LLAMA_CPP_LIB_PATH")
    env |= {"LLAMA_CPP_LIB_PATH": lib_path} if lib_path else {}
    command = [sys.executable, "-c", LOGITS_SCRIPT, str(path), str(out), ",".join(map(str, tokens))]
    subprocess.run(command, check=True, env=env)
    return np.load(out)


def test_no_budget_is_stock_bit_for_bit(make_gguf, tmp_path: Path) -> None:
    """A context without a budget, made beside budgeted ones, equals one of an untouched process."""
    path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    tokens = random_tokens(140)
    expected = stock_logits(path, tmp_path / "stock.npy", tokens, None)
    with Engine(path, 64) as budgeted, Engine(path, n_ctx=1024) as stock:
        budgeted.decode(tokens)
        assert np.array_equal(expected, stock.decode_each(tokens))


def test_no_budget_equals_an_unpatched_build(tmp_path: Path) -> None:
    """REASONALLOC_STOCK_LIB names the folder of an unpatched build of the pinned llama.cpp."""
    unpatched = os.environ.get("REASONALLOC_STOCK_LIB")
    if not unpatched:
        pytest.skip("REASONALLOC_STOCK_LIB is not set: no unpatched build at hand")
    path = write_gguf(tmp_path / "m.gguf", ModelSpec(**SHAPES["gqa64"], n_ctx_train=1024))
    tokens = random_tokens(140)
    patched = stock_logits(path, tmp_path / "a.npy", tokens, None)
    assert np.array_equal(patched, stock_logits(path, tmp_path / "b.npy", tokens, unpatched))
