"""Any policy with any layer allocator and any head allocator, in the engine, within its bytes."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from engine import Engine
from test_engine_parity import demo_prompt, random_tokens

from py_reasonalloc.engine import bindings as c

POLICIES = [c.ra_policy_name(i).decode() for i in range(c.ra_policy_count())]
LAYER_ALLOCS = [c.ra_alloc_name(0, i).decode() for i in range(c.ra_alloc_count(0))]
HEAD_ALLOCS = [c.ra_alloc_name(1, i).decode() for i in range(c.ra_alloc_count(1))]

BUDGET, BUFFER = 48, 32


#: All splits with two policies, and all policies with two splits.
METHODS = [
    (policy, layers, heads)
    for policy, layers, heads in itertools.product(POLICIES, LAYER_ALLOCS, HEAD_ALLOCS)
    if policy in ("rkv", "loss") or (layers, heads) in (("uniform", "uniform"), ("error", "error"))
]


def method_config(policy: str, layers: str, heads: str, n_layer: int, n_head_kv: int) -> dict:
    config = {
        "policy": policy,
        "layer_alloc": layers,
        "head_alloc": heads,
        "buffer": BUFFER,
        "seed": 3,
    }
    if layers == "wave":
        demand = (ctypes.c_double * n_layer)(*[10.0 + 7.0 * (il % 3) for il in range(n_layer)])
        config |= {"layer_demand": demand, "n_layer_demand": n_layer}
    if layers == "error":
        n_heads = n_layer * n_head_kv
        curves = [4.0 ** (i % 3) / (1 + j) for i in range(n_heads) for j in range(3)]
        config |= {
            "head_error": (ctypes.c_double * len(curves))(*curves),
            "n_head_error": len(curves),
            "error_grid": (ctypes.c_int32 * 3)(12, 40, 100),
            "n_error_grid": 3,
            "error_base": 12,
        }
    if policy == "loss":
        config["merge"] = 1
    return config


def check_budgets(engine: Engine, n_layer: int, n_head_kv: int) -> None:
    """Budgets sum to the total, per layer to what its pool holds; segments do not overlap."""
    heads = [[engine.head(il, ih) for ih in range(n_head_kv)] for il in range(n_layer)]
    assert sum(h.budget for layer in heads for h in layer) <= n_layer * n_head_kv * BUDGET
    for layer in heads:
        for left, right in zip(layer, layer[1:]):
            assert right.offset == left.offset + left.capacity
        assert all(h.budget >= 13 and h.used <= h.capacity == h.budget + BUFFER for h in layer)


@pytest.mark.parametrize("policy,layers,heads", METHODS)
def test_every_method_on_the_demo_model(demo_model, policy: str, layers: str, heads: str) -> None:
    from llama_cpp import llama_cpp as lib

    from py_reasonalloc.task.problems import SAMPLE_PROBLEM

    with Engine(demo_model, n_ctx=256) as probe:
        n_layer = lib.llama_model_n_layer(probe.model)
        n_head_kv = lib.llama_model_n_head_kv(probe.model)
    config = method_config(policy, layers, heads, n_layer, n_head_kv)
    with Engine(demo_model, BUDGET, config=config) as engine:
        prompt = demo_prompt(engine, SAMPLE_PROBLEM)
        engine.decode([1])
        engine.clear()
        start = engine.stats()
        engine.greedy(prompt, 400)
        end = engine.stats()
        assert end.n_pos == len(prompt) + 400
        assert end.n_compressions >= 10
        assert end.n_evicted > 0
        assert (end.kv_bytes, end.window_bytes) == (start.kv_bytes, start.window_bytes)
        assert end.n_entries <= n_layer * n_head_kv * (BUDGET + BUFFER)
        check_budgets(engine, n_layer, n_head_kv)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_bytes_stay_while_heads_trade_capacity(make_gguf, kv: str) -> None:
    """Thousands of tokens, budgets of heads far apart and changing: same bytes, same totals."""
    path = make_gguf(arch="llama", n_head=8, n_head_kv=4, head_dim=64, n_ctx_train=8192)
    config = {"head_alloc": "adaptive", "policy": "rkv", "buffer": BUFFER, "mu": 0.25}
    with Engine(path, BUDGET, kv, config=config) as engine:
        n_bytes = engine.stats().kv_bytes
        seen = set()
        rng = np.random.default_rng(0)
        for step in range(60):
            # skew: tell the layer to give one head nearly everything, another nearly nothing
            table = np.full(4, 13)
            table[rng.integers(4)] = 4 * BUDGET - 39
            assert engine.set_head_budgets(step % 2, table.tolist()) == 0
            engine.decode(random_tokens(50, seed=step))
            check_budgets(engine, 2, 4)
            seen.add(tuple(engine.head(il, ih).budget for il in range(2) for ih in range(4)))
        assert engine.stats().n_pos == 3000
        assert engine.stats().kv_bytes == n_bytes
        assert len(seen) > 20


def test_value_guard_keeps_outliers(make_gguf) -> None:
    """With the guard on, more tokens stay that the random policy would have dropped."""
    path = make_gguf(arch="qwen2", n_head=4, n_head_kv=2, head_dim=32, n_ctx_train=1024)
    tokens = random_tokens(200)
    kept = {}
    for guard in (0.0, 1.5):
        config = {"policy": "random", "buffer": 16, "value_guard": guard, "n_guard": 4}
        with Engine(path, 40, config=config) as engine:
            engine.trace()
            engine.decode(tokens)
            forced = [int(np.isposinf(s).sum()) for t in engine.traces for s in t.scores]
            kept[guard] = max(forced)
            assert engine.stats().n_evicted > 0
    assert kept[0.0] == 12  # sinks and window
    assert 12 < kept[1.5] <= 16
