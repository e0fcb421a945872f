"""The two ways to attend to uneven heads give the same logits: one op per head, one per layer."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from engine import Engine
from llama_cpp import llama_cpp as lib
from test_engine_graphs import describe, parse
from test_engine_parity import random_tokens

from py_reasonalloc.engine import bindings as c

# the same rows by the same kernel (on x86-64 the logits are the same bits); they are of size 10
TOLERANCE = 2e-4

SHAPES = {
    "gqa64": {"arch": "llama", "n_head": 4, "n_head_kv": 2, "head_dim": 64},
    "gqa32": {"arch": "qwen3", "n_head": 16, "n_head_kv": 8, "head_dim": 32},
    "mha96": {"arch": "llama", "n_head": 3, "n_head_kv": 3, "head_dim": 96},
    "mqa64": {"arch": "qwen2", "n_head": 4, "n_head_kv": 1, "head_dim": 64},
    "holes": {"arch": "deci", "n_layer": 3, "n_head": 4, "n_head_kv": (4, 0, 2)},
}


class Attention:
    """Flash attention nodes of every graph: sizes of queries, keys and mask."""

    def __init__(self) -> None:
        self.ops: list[tuple[list[int], list[int], list[int]]] = []
        self.n_graphs = 0

        @lib.ggml_backend_sched_eval_callback
        def on_eval(node, ask, user) -> bool:
            if ask:
                op, _, sources = parse(describe(node))
                if op == "FLASH_ATTN_EXT":
                    self.ops.append((sources[0][1], sources[1][1], sources[3][1]))
            return False

        self.callback = on_eval

    def by_layer(self) -> list[tuple[list[int], list[int], list[int]]]:
        return [op for op in self.ops if op[0][3] > 1]


def decode(path, attention: str, tokens: list[int], budget: int = 40, **kwargs):
    """Logits of a prompt of 90 tokens and of the rest, one by one; and what was attended."""
    seen = Attention()
    config = {"buffer": 16, "head_alloc": "adaptive", "attention": attention}
    config |= kwargs.pop("config", {})
    with Engine(path, budget, config=config, cb_eval=seen.callback, **kwargs) as engine:
        engine.trace()
        logits = np.concatenate([engine.decode(tokens[:90]), engine.decode_each(tokens[90:])])
        kept = [event.keep for event in engine.traces]
        assert engine.stats().n_compressions > 5
        return logits, kept, seen


def assert_same(path, **kwargs) -> Attention:
    """Both ways decode the same; returns what "layer" attended."""
    tokens = random_tokens(220)
    by_head, kept, seen = decode(path, "head", tokens, **kwargs)
    assert not seen.by_layer()
    by_layer, kept_too, seen = decode(path, "layer", tokens, **kwargs)
    assert np.abs(by_head - by_layer).max() < TOLERANCE
    assert len(kept) == len(kept_too)
    return seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv", ["f16", "q8_0", "f32"])
def test_logits_are_those_of_one_op_per_head(make_gguf, shape: str, kv: str) -> None:
    seen = assert_same(make_gguf(**SHAPES[shape], n_ctx_train=1024), kv=kv)
    # one KV head is never uneven
    assert bool(seen.by_layer()) == (shape != "mqa64")
    for q, k, mask in seen.by_layer():
        assert (q[1], mask) == (1, [k[1], 1, 1, q[3]])


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize(
    "budgets",
    [
        [13, 260, 60, 300, 20, 29, 150, 41],
        [300, 200, 100, 50, 25, 20, 15, 13],
        [13, 15, 20, 25, 50, 100, 200, 300],
        [600, 13, 13, 13, 13, 13, 13, 600],
        [13, 13, 13, 900, 13, 13, 13, 13],
    ],
)
def test_windows_of_any_table_of_budgets(make_gguf, budgets: list[int], kv: str) -> None:
    """Windows stay in the pool, wherever the long and the short segments are."""
    path = make_gguf(**{**SHAPES["gqa32"], "n_layer": 2}, n_ctx_train=2048)
    tokens = random_tokens(1150)
    config = {"head_alloc": "uniform", "head_budgets": budgets + [40, 50, 33, 61, 40, 40, 40, 39]}
    logits = {}
    for attention in ("head", "layer"):
        seen = Attention()
        both = {"buffer": 16, "attention": attention, **config}
        with Engine(path, 40, kv, n_batch=2048, config=both, cb_eval=seen.callback) as engine:
            logits[attention] = np.concatenate(
                [engine.decode(tokens[:1100]), engine.decode_each(tokens[1100:])]
            )
            assert engine.stats().n_compressions > 5
    # from 512 rows on, the CPU takes another kernel for one op per head
    tolerance = TOLERANCE if max(budgets) + 16 < 512 else 2e-2
    assert np.abs(logits["head"] - logits["layer"]).max() < tolerance
    slots = [sum(b + 16 for b in table) for table in (budgets, config["head_budgets"][8:])]
    rows = {k[1] for _, k, _ in seen.by_layer()}
    assert rows and max(rows) <= max(slots)


def test_windows_are_narrower_than_the_pool(make_gguf) -> None:
    """Budgets like those of adaptive heads; rows are padded for GPUs where the pool has them."""
    path = make_gguf(**{**SHAPES["gqa32"], "n_layer": 1}, n_ctx_train=4096)
    budgets = [200, 340, 250, 300, 220, 310, 180, 248]
    config = {"head_alloc": "uniform", "head_budgets": budgets}
    _, _, seen = decode(path, "layer", random_tokens(600), budget=256, config=config)
    n_slots = sum(b + 16 for b in budgets)
    assert {k[1] for _, k, _ in seen.by_layer()} == {768, 1280} and 0.6 * n_slots > 1280


def test_a_graph_serves_many_steps(make_gguf) -> None:
    """A decoded token does not build a new graph: its attention keeps its shape."""
    path = make_gguf(**SHAPES["gqa64"], n_layer=2, n_ctx_train=1024)
    config = {"buffer": 64, "attention": "layer", "head_budgets": [70, 30, 60, 33]}
    n_reused = {}
    for attention in ("head", "layer"):
        with Engine(path, 50, config={**config, "attention": attention}) as engine:
            engine.decode(random_tokens(200))
            lib.llama_perf_context_reset(engine.ctx)
            engine.decode_each(random_tokens(128))
            n_reused[attention] = lib.llama_perf_context(engine.ctx).n_reused
    assert n_reused["layer"] == n_reused["head"] > 100


def test_without_flash_attention_it_is_one_op_per_head(make_gguf) -> None:
    tokens = random_tokens(220)
    path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    by_head, _, _ = decode(path, "head", tokens, flash_attn=False)
    by_layer, _, seen = decode(path, "layer", tokens, flash_attn=False)
    assert np.array_equal(by_head, by_layer)
    assert not seen.ops


def test_auto_is_one_op_per_head_on_a_cpu(make_gguf) -> None:
    tokens = random_tokens(220)
    path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    by_head, _, _ = decode(path, "head", tokens)
    for name in ("auto", None):
        auto, _, seen = decode(path, "head", tokens, config={"attention": name})
        assert np.array_equal(by_head, auto)
        assert not seen.by_layer()


def compute_bytes(engine: Engine) -> int:
    values = [ctypes.c_int64() for _ in range(3)]
    c.check(c.ra_memory_breakdown(engine.ctx, *(ctypes.byref(v) for v in values)))
    return values[2].value


@pytest.mark.parametrize("shape", ["gqa64", "gqa32", "holes"])
@pytest.mark.parametrize("n_ubatch", [1, 64])
def test_the_reserved_buffers_hold(make_gguf, shape: str, n_ubatch: int) -> None:
    """No graph needs more than the worst case that was reserved, whatever the heads are given."""
    path = make_gguf(**SHAPES[shape], n_ctx_train=1024)
    config = {"buffer": 16, "head_alloc": "adaptive", "attention": "layer"}
    with Engine(path, 40, n_batch=64, n_ubatch=n_ubatch, config=config) as engine:
        reserved = compute_bytes(engine)
        engine.decode(random_tokens(60))
        engine.decode_each(random_tokens(300))
        assert engine.stats().n_compressions > 10
        assert compute_bytes(engine) == reserved


def test_unknown_names_are_refused(make_gguf) -> None:
    with pytest.raises(Exception, match="unknown attention 'both': use auto, head or layer"):
        Engine(make_gguf(**SHAPES["gqa64"]), 40, config={"attention": "both"})
