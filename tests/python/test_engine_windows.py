"""A budget for the layers with a sliding window, too (budget_swa).

The random models here have windows of 64 tokens. Where the budget holds the window, all is as in
stock llama.cpp, however long the text; NumPy judges smaller ones in test_engine_classes.py.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from engine import Engine
from llama_cpp import llama_cpp as lib
from test_architectures import program  # noqa: F401  (a fixture)
from test_engine_bytes import breakdown
from test_engine_classes import save
from test_engine_memory import get_state, set_state
from test_engine_parity import random_tokens

from py_reasonalloc.engine import bindings as c

WINDOW = 64
N_LAYER = 6
BUFFER = 16


@pytest.fixture(params=["gemma2", "gemma3"])
def path(request: pytest.FixtureRequest, make_gguf) -> Path:
    return make_gguf(arch=request.param, n_layer=N_LAYER, n_head=4, n_head_kv=2, head_dim=64)


def windows_of(engine: Engine, budget_swa: int) -> list[int]:
    """Layers with a window; the others have a budget of 300."""
    budgets = [engine.head(il, 0).budget for il in range(N_LAYER)]
    assert set(budgets) == {300, min(budget_swa, WINDOW)}
    return [il for il in range(N_LAYER) if budgets[il] != 300]


@pytest.mark.parametrize(
    ("kv", "flash_attn", "tolerance"),
    [("f32", False, 1e-4), ("f16", True, 2e-3), ("q8_0", True, 2e-2)],
)
@pytest.mark.parametrize("policy", ["rkv", "loss", "triattention"])
def test_as_stock_while_the_window_fits(path, kv, flash_attn, tolerance, policy) -> None:
    """A prompt of three windows, then token by token; tokens out of the window go."""
    tokens = random_tokens(260)
    config = {"buffer": BUFFER, "budget_swa": 200, "policy": policy, "merge": int(policy == "loss")}
    runs = []
    for budget in (None, 300):
        with Engine(path, budget, kv, flash_attn=flash_attn, config=config) as engine:
            runs.append([engine.decode(tokens[:200]), engine.decode_each(tokens[200:])])
            if budget is not None:
                stats = engine.stats()
                for il in range(N_LAYER):
                    is_window = il in windows_of(engine, 200)
                    for ih in range(2):
                        kept = engine.kept(il, ih)
                        n = len(kept)
                        assert np.array_equal(kept, np.arange(len(tokens) - n, len(tokens)))
                        assert WINDOW <= n <= WINDOW + BUFFER if is_window else n == len(tokens)
    assert stats.n_compressions >= 10 and stats.n_evicted > 0
    assert stats.stock_bytes == 0
    for stock, own in zip(*runs):
        assert np.abs(stock - own).max() < tolerance * np.abs(stock).max()


def test_off_is_as_before(path) -> None:
    """Without budget_swa the windows stay where they were."""
    with Engine(path, 300, config={"buffer": BUFFER, "budget_swa": 0}) as engine:
        heads = [c.ra_n_head_kv(engine.ctx, il) for il in range(N_LAYER)]
        assert 0 < heads.count(0) < N_LAYER
        assert engine.stats().stock_bytes > 0


@pytest.mark.parametrize("head_alloc", ["uniform", "adaptive"])
def test_what_is_out_of_the_window_goes_first(path, head_alloc: str) -> None:
    """Sinks and the protected prompt, too; what is in it is chosen from by its budget."""
    config = {"buffer": BUFFER, "budget_swa": 24, "head_alloc": head_alloc, "n_protect": 100}
    with Engine(path, 300, config=config) as engine:
        windows = windows_of(engine, 24)
        engine.trace()
        engine.decode(random_tokens(150))
        engine.decode_each(random_tokens(150, seed=1))
        n_dead = n_chosen = 0
        for event in engine.traces:
            if event.il not in windows:
                assert all(keep[:100].all() for keep in event.keep)
                continue
            assert sum(event.budgets) <= 2 * 24
            for pos, score, keep in zip(event.positions, event.scores, event.keep):
                dead = pos <= event.n_pos - WINDOW
                assert np.array_equal(np.isneginf(score), dead)
                assert not keep[dead].any()
                sinks = (pos < 4) & ~dead
                assert keep[sinks].all()
                n_dead += int(dead.sum())
                n_chosen += int((~dead & ~keep).sum())
        assert n_dead > 100 and n_chosen > 100


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_bytes(path, kv: str) -> None:
    """Formula, engine and allocation agree, and a dry run is told the same."""
    row = {"f16": 128, "q8_0": 68}[kv]
    with Engine(path, 300, kv, config={"buffer": BUFFER, "budget_swa": 24}) as engine:
        n_window = len(windows_of(engine, 24))
        n_rows = (N_LAYER - n_window) * (300 + BUFFER) + n_window * (24 + BUFFER)
        stats = engine.stats()
        assert stats.kv_bytes == 2 * n_rows * 2 * row
        heads = [engine.head(il, ih) for il in range(N_LAYER) for ih in range(2)]
        assert stats.kv_bytes == sum(head.capacity * head.row_bytes for head in heads)
        allocated = breakdown(engine)[1]
        own = stats.kv_bytes + stats.window_bytes
        assert own <= allocated <= own + 64 * 3 * N_LAYER
        engine.decode(random_tokens(200))
        assert breakdown(engine)[1] == allocated
        full = 2 * 2 * row * ((N_LAYER - n_window) * 200 + n_window * WINDOW)
        assert engine.stats().kv_bytes_full == full
        assert c.ra_row_bytes(engine.ctx) == 2 * 2 * row * (N_LAYER - n_window)


@pytest.mark.parametrize("head_alloc", ["uniform", "adaptive"])
def test_compute_buffers_are_reserved_once(path, head_alloc: str) -> None:
    config = {"buffer": BUFFER, "budget_swa": 40, "head_alloc": head_alloc}
    with Engine(path, 48, n_ubatch=BUFFER, config=config) as engine:
        reserved = breakdown(engine)[2]
        for _ in range(3):
            engine.decode(random_tokens(150))
            engine.decode_each(random_tokens(60))
        assert breakdown(engine)[2] == reserved


def test_layers_are_split_without_the_windows(path) -> None:
    config = {"buffer": BUFFER, "budget_swa": 24, "layer_alloc": "pyramid", "pyramid_beta": 4.0}
    with Engine(path, 100, config=config) as engine:
        budgets = [engine.head(il, 0).budget for il in range(N_LAYER)]
    grown = [budget for budget in budgets if budget != 24]
    assert sum(grown) == 100 * len(grown) and 0 < len(grown) < N_LAYER
    assert grown == sorted(grown, reverse=True)


def test_state_round_trip(path) -> None:
    tokens = random_tokens(220)
    config = {"buffer": BUFFER, "budget_swa": 24}
    with Engine(path, 48, config=config) as engine:
        engine.decode(tokens[:170])
        state = get_state(engine)
        expected = engine.decode_each(tokens[170:])
        kept = [engine.kept(il, 1) for il in range(N_LAYER)]
    with Engine(path, 48, config=config) as engine:
        assert set_state(engine, state) == len(state)
        engine.n_pos = 170
        # look-alikes are compared anew
        assert np.abs(engine.decode_each(tokens[170:]) - expected).max() < 1e-3
        assert all(np.array_equal(engine.kept(il, 1), kept[il]) for il in range(N_LAYER))
    for other in ({"budget_swa": 0}, {"budget_swa": 25}):
        with Engine(path, 48, config=config | other) as engine:
            assert set_state(engine, state) == 0
            assert "saved" in c.last_error() and "\n" not in c.last_error()


def test_a_dropped_tail_leaves_no_trace(path) -> None:
    """Also where the tail had moved tokens out of the window."""
    tokens = random_tokens(140)
    config = {"buffer": BUFFER, "budget_swa": 24}
    runs = []
    for n_dropped in (0, 5):
        with Engine(path, 48, config=config) as engine:
            engine.decode_each(tokens[:92])
            room = c.ra_room(engine.ctx, 0)
            assert 5 < room < BUFFER
            for token in random_tokens(n_dropped, seed=3):
                engine.decode([token])
            assert engine.remove(92)
            assert engine.n_pos == 92
            runs.append(engine.decode_each(tokens[92:]))
            assert not engine.remove(50)
            assert "start the sequence anew" in c.last_error()
    assert np.array_equal(*runs)


def test_together_as_alone(path) -> None:
    """Sequences side by side, and a copy, decode what each does alone."""
    tokens = [random_tokens(150, seed=i) for i in range(2)]
    config = {"buffer": BUFFER, "budget_swa": 24, "head_alloc": "adaptive"}
    alone = []
    for text in tokens:
        with Engine(path, 48, config=config) as engine:
            engine.decode(text[:90])
            alone.append(engine.decode_each(text[90:]))
    with Engine(path, 48, config=config, n_seq_max=3) as engine:
        engine.decode_many([(i, tokens[i][:90]) for i in range(2)])
        lib.llama_memory_seq_cp(engine.memory, 1, 2, -1, -1)
        for step in range(60):
            texts = (tokens[0], tokens[1], tokens[1])
            runs = [(i, [text[90 + step]]) for i, text in enumerate(texts)]
            rows = engine.decode_many(runs)
            for row, expected in zip(rows, (alone[0], alone[1], alone[1])):
                off = np.abs(row[0] - expected[step]).max()
                assert off < 1e-3 * np.abs(expected).max()


def test_refusals(make_gguf, program: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = make_gguf(arch="llama")
    windowed = make_gguf(arch="gemma2", n_layer=N_LAYER)
    cases = [
        (plain, {}, "this 'llama' model has none: leave it out"),
        (
            save(program, tmp_path, "llama4", "moe"),
            {},
            "'llama4' attends within chunks of 8192",
        ),
        (windowed, {"policy": "triattention", "centres": None}, "which no profile has"),
    ]
    for model, more, message in cases:
        config = {"budget_swa": 40, **more}
        if "centres" in config:
            table = (ctypes.c_float * 3)()
            config |= {"centres": table, "n_centres": 3}
        with pytest.raises(RuntimeError, match=message) as caught:
            Engine(model, 64, config=config)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="budget_swa 12 is too small: the sinks"):
        Engine(windowed, 64, config={"budget_swa": 12})
