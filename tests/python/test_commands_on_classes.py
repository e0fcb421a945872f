"""Commands on models of which only some layers have a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from py_reasonalloc.engine.stats import engine_stats
from py_reasonalloc.run.calibrate import Settings, calibrate
from py_reasonalloc.session.config import BudgetConfig
from py_reasonalloc.session.generate import Sampling
from py_reasonalloc.session.reason_llama import ReasonLlama

PROMPT = "Alice has 3 apples and 4 pears and eats one of them. How many are left?"


@pytest.fixture(scope="module")
def windows(make_gguf: Any) -> Path:
    """Gemma 3 with twelve layers: ten have a window, layers 5 and 11 grow."""
    return make_gguf(arch="gemma3", n_layer=12, head_dim=64, n_ctx_train=1024)


def settings(**others: Any) -> Settings:
    return Settings(steps=160, buffer=16, sampling=Sampling(temp=0.0), n_threads=1, **others)


@pytest.mark.parametrize("layers", ["wave", "error", "uniform"])
def test_a_profile_is_of_the_layers_that_have_a_budget(windows: Path, layers: str) -> None:
    profile = calibrate(windows, [PROMPT], settings(curves=layers == "error"))
    assert profile.n_head_kv == (0, 0, 0, 0, 0, 2) * 2
    assert [il for il, demand in enumerate(profile.demand) if demand > 0] == [5, 11]
    if profile.head_error is not None:
        assert len(profile.head_error.values) == 4
        assert all(max(row) > 0.0 for row in profile.head_error.values)
    policy = "triattention" if layers == "uniform" else "rkv"
    config = BudgetConfig(40, policy=policy, buffer=16, window=8, layers=layers, profile=profile)
    with ReasonLlama(windows, budget=config, n_ctx=256) as llama:
        llama.eval(llama.tokenize(PROMPT.encode() * 2))
        assert engine_stats(llama.ctx).n_compressions > 0
        held = [len(layer) for layer in llama.kv_stats().layers]
        assert held == [0, 0, 0, 0, 0, 2] * 2
