"""`BudgetConfig`: ranges, defaults, and what reaches the library."""

from __future__ import annotations

import dataclasses
import re

import gguf
import pytest
from conftest import ROOT

from py_reasonalloc import BudgetConfig, BudgetError, ConfigError, NotFoundError
from py_reasonalloc.engine import bindings as c
from py_reasonalloc.session.config import KV_TYPES, MAX_TOKENS, MAX_WINDOW, kv_type_id, policy_names

NATIVE_NAMES = {
    "budget": "budget",
    "buffer": "buffer",
    "sinks": "n_sink",
    "window": "n_window",
    "lambda_": "lambda_",
    "sim_threshold": "sim_threshold",
    "pool_kernel": "pool_kernel",
    "policy_seed": "seed",
    "budget_swa": "budget_swa",
    "n_draft": "n_draft",
    "n_query": "n_query",
}


def test_defaults_are_the_librarys() -> None:
    native = c.ra_config_default_params()
    config = BudgetConfig()
    for name, native_name in NATIVE_NAMES.items():
        assert getattr(config, name) == pytest.approx(getattr(native, native_name)), name
    assert (config.policy, config.merge) == ("rkv", False)
    assert (native.policy, native.merge) == (b"rkv", 0)
    assert native.n_protect == 0 and config.protect_prompt == "off"
    assert (config.layers, config.heads) == ("uniform", "uniform")
    assert (native.layer_alloc, native.head_alloc) == (b"uniform", b"uniform")
    assert (config.attention, native.attention) == ("auto", b"auto")
    assert (config.mu, config.pyramid_beta) == (native.mu, native.pyramid_beta)


def test_values_reach_the_library() -> None:
    config = BudgetConfig(
        budget=100,
        policy="random",
        buffer=10,
        sinks=2,
        window=5,
        protect_prompt=40,
        lambda_=0.5,
        sim_threshold=0.25,
        pool_kernel=3,
        policy_seed=2**64 - 1,
        layers=[90, 110],
        head_budgets=[80, 100, 100, 120],
        attention="layer",
        budget_swa=30,
        n_draft=6,
        n_query=20,
    )
    native = config.to_native()
    for name, native_name in NATIVE_NAMES.items():
        assert getattr(native, native_name) == getattr(config, name), name
    assert (native.policy, native.n_protect) == (b"random", 40)
    assert native.attention == b"layer"
    assert native.layer_budgets[: native.n_layer_budgets] == [90, 110]
    assert native.head_budgets[: native.n_head_budgets] == [80, 100, 100, 120]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget = 0 is out of range: must be 1 to 16777216"),
        ({"budget": 2**31}, "budget = 2147483648 is out of range: must be 1 to 16777216"),
        ({"budget": 2**64 + 64}, "budget = 18446744073709551680 is out of range"),
        ({"budget": 12.5}, "budget = 12.5 must be a whole number"),
        ({"budget": True}, "budget = True must be a whole number"),
        ({"buffer": 0}, "buffer = 0 is out of range: must be 1 to 16777216"),
        ({"sinks": -1}, "sinks = -1 is out of range: must be 0 to 16777216"),
        ({"window": 1025}, "window = 1025 is out of range: must be 1 to 1024"),
        ({"lambda_": 1.5}, "lambda_ = 1.5 is out of range: must be 0 to 1"),
        ({"lambda_": float("nan")}, "lambda_ = nan is out of range: must be 0 to 1"),
        ({"sim_threshold": -2}, "sim_threshold = -2 is out of range: must be -1 to 1"),
        ({"pool_kernel": 4}, "pool_kernel = 4 must be odd"),
        ({"policy_seed": -1}, "policy_seed = -1 is out of range"),
        (
            {"protect_prompt": "most"},
            "protect_prompt = 'most' must be 'off', 'all', 'auto' or a number",
        ),
        ({"protect_prompt": -2}, "protect_prompt = -2 is out of range"),
        ({"protect_prompt": None}, "protect_prompt = None must be a whole number"),
        ({"layers": [64, 0]}, r"layers\[1\] = 0 is out of range"),
        ({"layers": []}, "layers is an empty list"),
        ({"layers": 7}, "layers = 7 must be a list of whole numbers"),
        ({"layers": "wave"}, "layers = 'wave' needs a profile"),
        ({"profile": 7}, "profile = 7 must be a Profile or the path of one"),
        ({"gamma": -1}, "gamma = -1 is out of range: must be 0 to 16"),
        ({"clip_lo": 2}, "clip_lo = 2 is out of range: must be 0 to 1"),
        ({"clip_hi": 0.5}, r"clip_hi = 0.5 is out of range: must be 1 to 1e\+06"),
        ({"mu": float("nan")}, "mu = nan is out of range: must be 0 to 1"),
        ({"pyramid_beta": 0}, r"pyramid_beta = 0 is out of range: must be 1 to 1e\+06"),
        ({"policy": 3}, "policy = 3 must be a name"),
        ({"attention": None}, "attention = None must be a name"),
        ({"budget_swa": -1}, "budget_swa = -1 is out of range"),
        ({"budget_swa": None}, "budget_swa = None must be a whole number"),
    ],
)
def test_out_of_range(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        BudgetConfig(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"budget": 12},
        {"budget": 64, "sinks": 56},
        {"budget": 64, "protect_prompt": 56},
        {"budget": 64, "layers": [64, 12]},
        {"budget_swa": 12},
    ],
)
def test_budget_below_what_must_stay(arguments) -> None:
    with pytest.raises(BudgetError, match="too small|out of range"):
        BudgetConfig(**arguments)


def test_the_smallest_budget_is_allowed() -> None:
    assert BudgetConfig(budget=13).budget == 13
    assert BudgetConfig(budget_swa=13, protect_prompt=99).budget_swa == 13
    assert BudgetConfig(budget=64, protect_prompt=55).n_protect(60) == 55


def test_unknown_names() -> None:
    with pytest.raises(NotFoundError, match=r"policy = 'x' is unknown: must be one of rkv, "):
        BudgetConfig(policy="x")
    with pytest.raises(NotFoundError, match="heads = 'x' is unknown: must be one of uniform, ad"):
        BudgetConfig(heads="x")
    with pytest.raises(NotFoundError, match="layers = 'x' is unknown: must be one of uniform, py"):
        BudgetConfig(layers="x")
    with pytest.raises(NotFoundError, match="attention = 'x' is unknown: must be one of auto, he"):
        BudgetConfig(attention="x")
    assert {"rkv", "snapkv", "streaming", "random"} <= set(policy_names())


def test_protected_tokens_never_exceed_the_prompt() -> None:
    assert BudgetConfig().n_protect(9) == 0
    assert BudgetConfig(protect_prompt="all").n_protect(9) == 9
    assert BudgetConfig(protect_prompt=5).n_protect(9) == 5
    half = BudgetConfig(budget=64, protect_prompt="auto")
    assert (half.n_protect(9), half.n_protect(500), half.to_native().n_protect) == (9, 26, 0)
    assert BudgetConfig(layers=(30, 98), protect_prompt="auto").n_protect(500) == 9
    assert BudgetConfig(protect_prompt=50).n_protect(9) == 9


def test_is_frozen_and_hashable() -> None:
    config = BudgetConfig(layers=[64, 64], budget=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 3
    assert len({config, BudgetConfig(layers=(64, 64), budget=64)}) == 1


def test_limits_are_the_headers() -> None:
    header = (ROOT / "native" / "include" / "reasonalloc.h").read_text()
    assert re.search(r"RA_MAX_TOKENS \(1 << (\d+)\)", header)[1] == str(MAX_TOKENS.bit_length() - 1)
    assert re.search(r"RA_MAX_WINDOW (\d+)", header)[1] == str(MAX_WINDOW)


def test_cache_types_are_ggmls() -> None:
    for name, number in KV_TYPES.items():
        assert gguf.GGMLQuantizationType[name.upper()] == number
        assert kv_type_id(name) == number
    assert kv_type_id(6) == 6
    with pytest.raises(ConfigError, match="cache type = 'Q8' is unknown"):
        kv_type_id("Q8")
