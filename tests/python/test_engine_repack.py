"""Rows gathered by a graph, as on a GPU, end up where moves in memory put them, bit for bit."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from engine import KV_TYPES, Engine, aborting
from llama_cpp import llama_cpp as lib
from test_engine_graphs import describe, parse
from test_engine_memory import get_state, snapshot
from test_engine_parity import random_tokens

from py_reasonalloc.engine import bindings as c

SHAPES = {
    "gqa64": {"arch": "llama", "n_layer": 2, "n_head": 4, "n_head_kv": 2, "head_dim": 64},
    "gqa32": {"arch": "qwen3", "n_layer": 2, "n_head": 16, "n_head_kv": 8, "head_dim": 32},
    "holes": {"arch": "deci", "n_layer": 3, "n_head": 4, "n_head_kv": (4, 0, 2), "head_dim": 64},
}
ADAPTIVE = {"buffer": 16, "head_alloc": "adaptive"}


def gather_always(engine: Engine, on: bool = True) -> None:
    """Pack pools in host memory as those on a device are packed."""
    assert c._lib.ra_debug_gather_always(ctypes.c_void_p(engine.ctx), int(on)) == 0


def watch(engine: Engine) -> list[str]:
    """Nodes of the graphs of compressions from now on, as `describe` has them."""
    nodes: list[str] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    def on_node(user, node) -> None:
        nodes.append(describe(node))

    engine._watch_cb = on_node  # keep it alive
    assert c._lib.ra_debug_watch_scores(ctypes.c_void_p(engine.ctx), on_node, None) == 0
    return nodes


def gathers(nodes: list[str]) -> list[tuple]:
    """Sources of the gathers of cached rows; scores gather keys too, as f32."""
    found = [src for op, _, src in map(parse, nodes) if op == "GET_ROWS"]
    return [src for src in found if src[0][0] != "f32"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv", KV_TYPES)
def test_caches_are_the_same_bits(make_gguf, shape: str, kv: str) -> None:
    """States (counters, positions, every row of K and V) after many compressions, and logits."""
    path = make_gguf(**SHAPES[shape], n_ctx_train=1024)
    tokens = random_tokens(300)
    with (
        Engine(path, 40, kv, config=ADAPTIVE) as moved,
        Engine(path, 40, kv, config=ADAPTIVE) as gathered,
    ):
        gather_always(gathered)
        nodes = watch(gathered)
        for part in (tokens[:90], tokens[90:91], tokens[91:]):
            logits = [
                e.decode(part) if len(part) != 209 else e.decode_each(part)
                for e in (moved, gathered)
            ]
            assert np.array_equal(*logits)
            assert get_state(moved) == get_state(gathered)
        assert gathered.stats().n_compressions > 10
        # rows of 34, 22 or 18 bytes are not made of whole words: packed in a host copy
        is_whole = not (shape == "gqa32" and kv in ("q8_0", "q5_0", "q4_0", "iq4_nl"))
        assert bool(gathers(nodes)) == is_whole
        assert all(src[0][0] == "i32" and src[1][0] == "i32" for src in gathers(nodes))


def test_budgets_that_move_segments_both_ways(make_gguf) -> None:
    path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    config = {"buffer": 16}
    with Engine(path, 64, config=config) as moved, Engine(path, 64, config=config) as gathered:
        gather_always(gathered)
        for step, budgets in enumerate([(64, 64), (100, 28), (20, 108), (64, 64), (13, 115)]):
            tokens = random_tokens(90, seed=step)
            for engine in (moved, gathered):
                assert engine.set_head_budgets(0, budgets) == 0
                engine.decode(tokens)
            assert get_state(moved) == get_state(gathered)
        assert gathered.head(0, 0).budget == 13


@pytest.mark.parametrize("policy", ["random", "rkv", "h2o"])
@pytest.mark.parametrize("kv", ["f16", "q4_0"])
def test_scratch_is_planned_and_reserved_once(make_gguf, policy: str, kv: str) -> None:
    path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    planned, at_first = [], []
    for on in (False, True):
        with Engine(path, 40, kv, config={**ADAPTIVE, "policy": policy}) as engine:
            gather_always(engine, on)
            planned.append(c.ra_planned_scratch_bytes(engine.ctx))
            engine.decode([5])
            at_first.append(engine.stats().scratch_bytes)
            engine.decode(random_tokens(200))
            engine.decode_each(random_tokens(100))
            assert engine.stats().n_compressions > 10
            assert engine.stats().scratch_bytes == at_first[-1]
    assert planned == at_first
    assert planned[1] > planned[0]
    if policy == "random":
        n_rows = 2 * (40 + 16)
        pool = n_rows * {"f16": 128, "q4_0": 36}[kv]  # K or V: one after the other
        assert pool <= planned[1] - planned[0] <= pool + 4 * n_rows * 2 + 16384


def test_switching_in_the_middle(make_gguf) -> None:
    path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    tokens = random_tokens(200)
    with Engine(path, 40, config=ADAPTIVE) as engine, Engine(path, 40, config=ADAPTIVE) as other:
        for i, on in enumerate((True, False, True, False)):
            gather_always(engine, on)
            part = tokens[50 * i : 50 * (i + 1)]
            assert np.array_equal(engine.decode_each(part), other.decode_each(part))
        assert get_state(engine) == get_state(other)


def test_an_aborted_gather_empties_the_cache(make_gguf) -> None:
    """Rows half moved are not decoded with: the sequence starts anew, and says so."""
    path: Path = make_gguf(**SHAPES["gqa64"], n_ctx_train=1024)
    outcomes = set()
    with Engine(path, 40, config={**ADAPTIVE, "policy": "random"}) as engine:
        for n_calls in range(1, 30):
            engine.clear()
            gather_always(engine)
            engine.decode(random_tokens(56))
            with aborting(engine.ctx, n_calls):
                status = lib.llama_decode(
                    engine.ctx, lib.llama_batch_get_one((lib.llama_token * 1)(7), 1)
                )
            n_pos = engine.stats().n_pos
            engine.n_pos = n_pos
            if n_pos == 0:
                assert "the cache was emptied" in c.last_error()
                assert engine.stats().n_entries == 0
            else:
                assert n_pos == (57 if status == 0 else 56)
            outcomes.add(n_pos)
            assert np.isfinite(engine.decode(random_tokens(120))).all()
            assert snapshot(engine)["n_pos"] == n_pos + 120
    assert outcomes >= {0, 56}
