"""Bytes: reported, allocated and by the formula they are one number; memory is flat."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from engine import KV_TYPES, Engine
from test_engine_parity import random_tokens

from py_reasonalloc.engine import bindings as c

# bytes of a row of 64 values
ROW_BYTES = {
    "f32": 256,
    "f16": 128,
    "bf16": 128,
    "q8_0": 68,
    "q5_1": 48,
    "q5_0": 44,
    "q4_1": 40,
    "q4_0": 36,
    "iq4_nl": 36,
}
MODEL = {"arch": "llama", "n_layer": 3, "n_head": 4, "n_head_kv": 2, "head_dim": 64}


def breakdown(engine: Engine) -> tuple[int, int, int]:
    """Bytes of weights, cache and compute buffers, from the allocated buffers."""
    values = [ctypes.c_int64() for _ in range(3)]
    c.check(c.ra_memory_breakdown(engine.ctx, *(ctypes.byref(v) for v in values)))
    return values[0].value, values[1].value, values[2].value


@pytest.mark.parametrize("kv", ROW_BYTES)
@pytest.mark.parametrize("budgets", [None, [40, 50, 33, 90, 64, 13]])
def test_reported_bytes_are_the_formula(make_gguf, kv: str, budgets: list[int] | None) -> None:
    path = make_gguf(**MODEL, n_ctx_train=32768)
    config = {"buffer": 32} if budgets is None else {"buffer": 32, "head_budgets": budgets}
    slots = sum((b + 32) for b in (budgets or [64] * 6))
    expected = slots * 2 * ROW_BYTES[kv]
    with Engine(path, 64, kv, config=config) as engine:
        stats = engine.stats()
        assert stats.kv_bytes == expected
        window = 3 * 4 * 64 * 4 * 8  # layers, heads, head size, f32, queries
        assert stats.window_bytes == window
        allocated = breakdown(engine)[1]
        assert expected + window <= allocated <= expected + window + 64 * 9  # tensor alignment
        capacity = sum(engine.head(il, ih).capacity for il in range(3) for ih in range(2))
        assert capacity == slots
        engine.decode([5] * 300)
        assert engine.stats().kv_bytes == expected
        assert breakdown(engine)[1] == allocated
        assert engine.stats().kv_bytes_full == 300 * 6 * 2 * ROW_BYTES[kv]
        assert c.ra_row_bytes(engine.ctx) == 6 * 2 * ROW_BYTES[kv]


def test_plan_without_a_context_is_the_engine_s(make_gguf) -> None:
    path = make_gguf(**MODEL, n_ctx_train=1024)
    shape = c.ra_shape(3, 2, 64, 64, KV_TYPES["q8_0"], KV_TYPES["q8_0"])
    config = c.ra_config_default_params()
    config.budget = 200
    with Engine(path, 200, "q8_0") as engine:
        planned = c.ra_plan_kv_bytes(ctypes.byref(shape), ctypes.byref(config))
        assert planned == engine.stats().kv_bytes
        engine.decode([5] * 77)
        full = c.ra_plan_kv_bytes_full(ctypes.byref(shape), 77)
        assert full == engine.stats().kv_bytes_full
    config.budget = 5
    assert c.ra_plan_kv_bytes(ctypes.byref(shape), ctypes.byref(config)) == -1
    assert "too small" in c.last_error()


def test_context_length_costs_nothing(make_gguf) -> None:
    """Cache and compute buffers do not depend on how far the positions may run."""
    sizes = set()
    for n_ctx_train in (1024, 131072):
        with Engine(make_gguf(**MODEL, n_ctx_train=n_ctx_train), 64, n_batch=64) as engine:
            sizes.add(breakdown(engine)[1:])
    assert len(sizes) == 1


@pytest.mark.parametrize("attention", ["head", "layer"])
@pytest.mark.parametrize("n_ubatch", [16, 64])
def test_compute_buffers_are_reserved_once(make_gguf, attention: str, n_ubatch: int) -> None:
    """Heads that all differ in length need no more than what was reserved for the worst case."""
    path = make_gguf(**{**MODEL, "n_head": 16, "n_head_kv": 8}, n_ctx_train=4096)
    config = {"buffer": 64, "head_alloc": "adaptive", "attention": attention}
    with Engine(path, 64, n_ubatch=n_ubatch, config=config) as engine:
        reserved = breakdown(engine)[2]
        for _ in range(3):
            engine.decode(random_tokens(400))
            engine.decode_each(random_tokens(100))
        budgets = [engine.head(0, ih).budget for ih in range(8)]
        assert len(set(budgets)) > 4
        assert breakdown(engine)[2] == reserved


FLAT_SCRIPT = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from engine import Engine

unit = 1 if sys.platform == "darwin" else 1024
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

tokens = np.random.default_rng(0).integers(4, 260, 8192)
with Engine(sys.argv[1], 64, "f16", n_batch=64, n_ubatch=32, config={"buffer": 32}) as engine:
    for token in tokens[:512]:
        engine.decode([int(token)])
    start, stats = peak(), engine.stats()
    for token in tokens[512:]:
        engine.decode([int(token)])
    end = engine.stats()
    assert end.n_pos == 8192 and end.n_compressions > 200 and end.peak_tokens == 96
    assert (end.kv_bytes, end.window_bytes) == (stats.kv_bytes, stats.window_bytes)
    assert end.scratch_bytes == stats.scratch_bytes
    print(peak() - start)
"""


def test_memory_is_flat_over_8192_tokens(make_gguf) -> None:
    path = make_gguf(**MODEL, n_ctx_train=32768)
    command = [sys.executable, "-c", FLAT_SCRIPT, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    growth = int(done.stdout)
    print(f"growth of the process over tokens 512 to 8192: {growth / 2**20:.2f} MiB")
    assert growth < 2 * 2**20
