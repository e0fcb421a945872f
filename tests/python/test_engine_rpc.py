"""A budget on a device of another process, over loopback: the text is that of this one's CPU.

ggml's own RPC server serves its CPU, whose functions are those of this process: so logits, states
and compressions must be the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from devices import ON_CPU, TestDevices, needs_devices, params_on
from engine import Engine
from llama_cpp import llama_cpp as lib
from rpc import server
from test_engine_devices import METHODS, TOKENS, UNEVEN, assert_same, goes_on_alike, run
from test_engine_parity import random_tokens

from py_reasonalloc.engine import bindings as c
from py_reasonalloc.task.shipped import DEMO_MODEL

pytestmark = needs_devices


@pytest.fixture(scope="module")
def remote() -> Iterator[int]:
    with server() as device:
        yield device


def test_a_budget_that_holds_all_tokens(remote: int) -> None:
    texts = []
    for budget, params in (
        (None, ON_CPU),
        (None, params_on([remote])),
        (400, params_on([remote])),
    ):
        with Engine(DEMO_MODEL, budget, n_ctx=512, model_params=params) as engine:
            texts.append(engine.greedy(random_tokens(40), 200))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("method", METHODS)
def test_small_budgets(remote: int, method: str) -> None:
    config = METHODS[method]
    expected = run(DEMO_MODEL, ON_CPU, config=config)
    assert_same(run(DEMO_MODEL, params_on([remote]), config=config), expected)


def test_half_of_the_model_there(remote: int) -> None:
    """And half of it on a device here; what is saved there goes on here."""
    expected = run(DEMO_MODEL, ON_CPU, kv="q8_0", config=UNEVEN)
    both = params_on([remote, TestDevices().all[0]])
    found = run(DEMO_MODEL, both, kv="q8_0", config=UNEVEN)
    assert_same(found, expected)
    state = run(DEMO_MODEL, both, config=UNEVEN)[2]
    goes_on_alike(DEMO_MODEL, state, ON_CPU, both)


def test_windows(remote: int, make_gguf: Any) -> None:
    path = make_gguf(arch="gemma3", n_layer=6, head_dim=64, n_ctx_train=1024)
    tokens = [token % 100 for token in TOKENS]
    arguments = {"config": UNEVEN, "n_ubatch": 64}
    expected = run(path, ON_CPU, tokens, **arguments)
    assert_same(run(path, params_on([remote]), tokens, **arguments), expected)


def test_sequences(remote: int) -> None:
    """The server forgets its graphs when a buffer goes: no sequence may rely on them."""
    config = {**UNEVEN, "layer_alloc": "pyramid"}
    found = []
    for params in (ON_CPU, params_on([remote])):
        with Engine(
            DEMO_MODEL, 48, n_ctx=256, n_seq_max=2, config=config, model_params=params
        ) as engine:
            engine.decode_many([(0, TOKENS[:100])])
            engine.decode_many([(0, [5])])
            c.check(c.ra_set_protect(engine.ctx, 1, 20))  # other pools for sequence 1
            logits = engine.decode_many([(0, [6])])
            lib.llama_memory_seq_cp(engine.memory, 0, 1, -1, -1)  # and back again
            logits += engine.decode_many([(0, TOKENS[:60]), (1, TOKENS[:60])])
            np.testing.assert_array_equal(logits[1], logits[2])
            found.append(np.concatenate(logits))
    np.testing.assert_array_equal(found[0], found[1])
