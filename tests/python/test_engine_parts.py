"""The part of a budgeted memory that is llama.cpp's own goes where our part goes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import Engine
from llama_cpp import llama_cpp as lib
from test_architectures import program  # noqa: F401  (a fixture)
from test_engine_classes import save
from test_engine_parity import random_tokens

from py_reasonalloc.engine import bindings as c

SMALL = {"buffer": 16, "policy": "rkv"}
TOKENS = [t % 100 for t in random_tokens(150)]


@pytest.fixture(scope="module")
def windows(make_gguf: Any) -> Path:
    """Gemma 3 with six layers: five have a window of 64 tokens, the last grows."""
    return make_gguf(arch="gemma3", n_layer=6, head_dim=64, n_ctx_train=1024)


@pytest.fixture(scope="module")
def hybrid(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return save(program, tmp_path_factory.mktemp("hybrid"), "granitehybrid", "dense")


def state_of(engine: Engine) -> bytes:
    size = lib.llama_state_get_size(engine.ctx)
    buffer = (ctypes.c_uint8 * size)()
    assert lib.llama_state_get_data(engine.ctx, buffer, size) == size
    return bytes(buffer)


def load(engine: Engine, state: bytes) -> bool:
    buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    done = lib.llama_state_set_data(engine.ctx, buffer, len(state)) == len(state)
    engine.n_pos = engine.length(0)
    return bool(done)


@pytest.mark.parametrize("kind", ["windows", "hybrid"])
def test_a_loaded_state_goes_on_like_the_saved_one(kind: str, request: Any) -> None:
    path = request.getfixturevalue(kind)
    # f32, for windows are restored to other cells: sums are in another order
    exact = {"kv": "f32", "flash_attn": False}
    with Engine(path, 40, n_ctx=256, config=SMALL, **exact) as saved:
        saved.decode_each(TOKENS[:100])
        assert saved.stats().n_compressions > 2
        assert saved.stats().stock_bytes > 0
        state = state_of(saved)
        expected = saved.decode_each(TOKENS[100:130])
    with Engine(path, 40, n_ctx=256, config=SMALL, **exact) as loaded:
        assert load(loaded, state)
        assert loaded.n_pos == 100
        got = loaded.decode_each(TOKENS[100:130])
        np.testing.assert_allclose(got, expected, atol=1e-3)
        # cut in the middle of the stock part: nothing is left of either
        assert not load(loaded, state[:-40])
        assert loaded.n_pos == 0


@pytest.mark.parametrize("kind", ["windows", "hybrid"])
def test_what_is_planned_is_allocated(kind: str, request: Any) -> None:
    with Engine(request.getfixturevalue(kind), 40, n_ctx=256, config=SMALL) as engine:
        stats = engine.stats()
        sizes = [ctypes.c_int64() for _ in range(3)]
        c.check(c.ra_memory_breakdown(engine.ctx, *map(ctypes.byref, sizes)))
        own = stats.kv_bytes + stats.window_bytes
        # buffers are padded by some bytes per tensor
        assert 0 <= sizes[1].value - own - stats.stock_bytes < 4096
        heads = [
            c.ra_n_head_kv(engine.ctx, il) for il in range(lib.llama_model_n_layer(engine.model))
        ]
        assert stats.n_layer == sum(n > 0 for n in heads) < len(heads)
        rows = [engine.head(il, ih) for il, n in enumerate(heads) for ih in range(n)]
        assert stats.kv_bytes == sum(head.capacity * head.row_bytes for head in rows)


@pytest.mark.parametrize("layers", ["pyramid", "wave"])
def test_layers_without_a_budget_are_no_part_of_the_split(make_gguf: Any, layers: str) -> None:
    path = make_gguf(arch="gemma3", n_layer=12, head_dim=64, n_ctx_train=1024)
    demand = (ctypes.c_double * 12)(*[1000.0] * 5, 30.0, *[1000.0] * 5, 90.0)
    config: dict[str, Any] = {"buffer": 16, "layer_alloc": layers}
    if layers == "wave":
        config.update(layer_demand=demand, n_layer_demand=12)
    with Engine(path, 60, n_ctx=256, config=config) as engine:
        budgets = {
            il: [engine.head(il, ih).budget for ih in range(c.ra_n_head_kv(engine.ctx, il))]
            for il in range(12)
        }
        assert [il for il in budgets if budgets[il]] == [5, 11]
        assert sum(budgets[5] + budgets[11]) == 4 * 60
        # pyramid: falls with depth; the wave follows the demand
        assert (budgets[5] > budgets[11]) == (layers == "pyramid")


def test_a_tail_goes_while_the_window_is_whole(windows: Path) -> None:
    config = {**SMALL, "buffer": 64}
    with Engine(windows, 200, n_batch=64, n_ubatch=64, config=config) as engine:
        engine.decode(TOKENS[:60])
        first = engine.decode_each(TOKENS[60:70])
        assert engine.remove(60)
        np.testing.assert_allclose(engine.decode_each(TOKENS[60:70]), first, atol=1e-5)
        # 64 tokens of window and a micro-batch, padded: older cells are overwritten in time
        engine.decode_each((TOKENS * 3)[:400])
        assert not engine.remove(100)
        assert engine.remove(0)
        assert engine.n_pos == 0


def test_a_recurrent_state_has_no_past(hybrid: Path) -> None:
    with Engine(hybrid, 200, n_ctx=256) as engine:
        first = engine.decode_each(TOKENS[:20])
        assert not engine.remove(10)
        assert "cannot go back to position 10" in c.last_error()
        assert engine.n_pos == 20
        assert engine.remove(0)
        np.testing.assert_array_equal(engine.decode_each(TOKENS[:20]), first)


@pytest.mark.parametrize("arch", ["granitehybrid dense", "qwen3next moe", "falcon-h1 dense"])
def test_sequences_of_a_model_with_recurrent_layers(
    program: Path,  # noqa: F811
    tmp_path: Path,
    arch: str,
) -> None:
    """Prompts of other lengths beside steps of others, steps, a copy, states: each as if alone."""
    path = save(program, tmp_path, *arch.split())
    texts = {0: TOKENS[:90], 1: TOKENS[::-1][:70], 2: TOKENS[30:110]}
    exact: dict[str, Any] = {"kv": "f32", "flash_attn": False, "config": SMALL}
    alone = {}
    for i, text in texts.items():
        with Engine(path, 40, n_ctx=256, **exact) as engine:
            alone[i] = engine.decode_each(text)
            assert engine.stats().n_compressions > 0

    def close(got: Any, i: int, begin: int) -> None:
        np.testing.assert_allclose(got, alone[i][begin : begin + len(got)], atol=1e-2)

    with Engine(path, 40, n_ctx=768, n_seq_max=3, **exact) as engine:
        close(engine.decode_many([(1, texts[1][:40])])[0], 1, 0)
        # 0 reads its prompt while 1 takes a step and 2 begins
        first = engine.decode_many([(1, texts[1][40:41]), (0, texts[0][:37]), (2, texts[2][:5])])
        for got, (i, begin) in zip(first, ((1, 40), (0, 0), (2, 0))):
            close(got, i, begin)
        n_done = {0: 37, 1: 41, 2: 5}
        for _ in range(28):
            step = [(i, texts[i][n : n + 1]) for i, n in n_done.items()]
            for got, i in zip(engine.decode_many(step), n_done):
                close(got, i, n_done[i])
                n_done[i] += 1
        assert min(engine.stats(i).n_compressions for i in (0, 1)) > 0
        lib.llama_memory_seq_rm(engine.memory, 2, -1, -1)
        lib.llama_memory_seq_cp(engine.memory, 0, 2, -1, -1)
        for n in range(n_done[0], n_done[0] + 10):
            step = [(0, texts[0][n : n + 1]), (2, texts[0][n : n + 1])]
            for got in engine.decode_many(step):
                close(got, 0, n)
        # the third goes back to nothing; the others stay as they are
        lib.llama_memory_seq_rm(engine.memory, 2, -1, -1)
        close(engine.decode_many([(2, texts[2][:20])])[0], 2, 0)
        close(engine.decode_many([(1, texts[1][n_done[1] :])])[0], 1, n_done[1])


def test_sequences_of_a_model_with_windows(windows: Path) -> None:
    others = TOKENS[::-1]
    exact = {"kv": "f32", "flash_attn": False}
    with Engine(windows, 40, n_ctx=256, config=SMALL, **exact) as engine:
        alone = engine.decode_each(TOKENS[:90])
    with Engine(windows, 40, n_ctx=512, n_seq_max=2, config=SMALL, **exact) as engine:
        both = []
        for a, b in zip(TOKENS[:90], others[:90]):
            both.append(engine.decode_many([(0, [a]), (1, [b])])[0])
        np.testing.assert_allclose(np.concatenate(both), alone, atol=1e-2)
        lib.llama_memory_seq_rm(engine.memory, 1, -1, -1)
        lib.llama_memory_seq_cp(engine.memory, 0, 1, -1, -1)
        mine, copy = engine.decode_many([(0, [5]), (1, [5])])
        np.testing.assert_allclose(mine, copy, atol=1e-4)


def test_merging_is_refused_for_latent_rows(program: Path, tmp_path: Path) -> None:  # noqa: F811
    path = save(program, tmp_path, "deepseek2", "moe")
    with pytest.raises(RuntimeError, match="merging averages values"):
        Engine(path, 64, config={"merge": 1})


GEMMA3 = os.environ.get("REASONALLOC_GEMMA3", "")


@pytest.mark.slow
@pytest.mark.skipif(not GEMMA3, reason="REASONALLOC_GEMMA3 names no GGUF file of Gemma 3 270M")
def test_gemma_3() -> None:
    """Fifteen of its 18 layers have a window of 512 tokens."""
    text = b"The history of mathematics deals with the origin of discoveries. The first of them was"
    tokens = (ctypes.c_int32 * 100)()
    with Engine(GEMMA3, n_ctx=1024) as stock:
        vocab = lib.llama_model_get_vocab(stock.model)
        n = lib.llama_tokenize(vocab, text, len(text), tokens, 100, True, True)
        prompt = tokens[:n]
        expected = stock.greedy(prompt, 300)
    with Engine(GEMMA3, 512, n_ctx=1024) as engine:
        assert engine.greedy(prompt, 300) == expected
    for budget in (64, 128, 256):
        with Engine(GEMMA3, budget, n_ctx=1024, config={"buffer": 64}) as engine:
            engine.greedy(prompt, 340)
            stats = engine.stats()
            assert (stats.n_layer, stats.n_compressions > 0) == (3, True)
            assert stats.kv_bytes == 3 * (budget + 64) * (256 + 256) * 2
            assert stats.stock_bytes == 15 * 1024 * (256 + 256) * 2
    # the windows, too: as long as they fit, and with less
    for budget_swa in (448, 128):
        config = {"buffer": 64, "budget_swa": budget_swa}
        with Engine(GEMMA3, 256 if budget_swa == 128 else 512, n_ctx=1024, config=config) as engine:
            found = engine.greedy(prompt, 300)
            stats = engine.stats()
            n_rows = 3 * (stats.budget + 64) + 15 * (budget_swa + 64)
            assert (stats.kv_bytes, stats.stock_bytes) == (n_rows * (256 + 256) * 2, 0)
            assert (stats.n_compressions > 0) == (budget_swa == 128)
            assert found == expected or budget_swa == 128
