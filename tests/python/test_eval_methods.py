"""Names of methods, and the caches they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from py_reasonalloc import BudgetConfig, ConfigError
from py_reasonalloc.eval.cases.methods import (
    Arm,
    Common,
    method_names,
    parse_arms,
    profile_digest,
    profile_of,
    setup_of,
)
from py_reasonalloc.profile.lookup import find_profile
from py_reasonalloc.session.centres import needs_centres
from py_reasonalloc.session.config import policy_names


def common(**fields: object) -> Common:
    values = {
        "buffer": 16,
        "sinks": 4,
        "window": 8,
        "n_protect": 0,
        "kv_type": "f16",
        "profile": None,
    }
    return Common(**(values | fields))  # type: ignore[arg-type]


def test_every_policy_is_a_method_with_uniform_budgets() -> None:
    for name in (policy for policy in policy_names() if not needs_centres(policy)):
        config = setup_of(Arm(name, 128), common()).config
        assert config == BudgetConfig(budget=128, policy=name, buffer=16)
    assert set(policy_names()) < set(method_names())


def test_methods_of_the_paper(demo_model) -> None:
    profile = find_profile(demo_model)
    settings = common(profile=profile, n_protect=50, kv_type="q8_0")
    expected = {
        "pyramid-rkv": ("pyramid", "uniform"),
        "wave": ("wave", "uniform"),
        "adaptive": ("uniform", "adaptive"),
        "reasonalloc": ("wave", "adaptive-literal"),
    }
    for name, (layers, heads) in expected.items():
        setup = setup_of(Arm(name, 200), settings)
        assert setup.config is not None
        assert (setup.config.policy, setup.config.layers, setup.config.heads) == (
            "rkv",
            layers,
            heads,
        )
        assert (setup.config.protect_prompt, setup.kv_type) == (50, "q8_0")
    assert setup_of(Arm("full", 0), settings) == (None, "q8_0")


def test_profiles_have_names_and_digests(demo_model) -> None:
    names = {
        "rkv": None,
        "full": None,
        "adaptive": None,
        "of-a-later-version": None,
        "rkv+profile=p.json": None,
        "wave": "",
        "reasonalloc+mu=0.5": "",
        "reasonalloc+layers=uniform": None,
        "h2o+layers=wave": "",
        "wave+lambda=0.5+profile=a/p.json": "a/p.json",
    }
    assert {method: profile_of(method) for method in names} == names
    profile = find_profile(demo_model)
    assert profile is not None
    digest = profile_digest(setup_of(Arm("wave", 200), common(profile=profile)))
    assert digest is not None and len(digest) == 16
    for changes, is_same in (
        ({"date": "2020-01-01", "name": "x"}, True),
        ({"gamma": 1.0}, False),
        ({"demand": (1.0, *profile.demand[1:])}, False),
    ):
        other = common(profile=replace(profile, **changes))
        assert (profile_digest(setup_of(Arm("reasonalloc", 96), other)) == digest) == is_same
    for arm in (Arm("rkv", 64), Arm("full", 0)):
        assert profile_digest(setup_of(arm, common(profile=profile))) is None


def test_options_win_over_what_all_arms_share(demo_model) -> None:
    arm = Arm("reasonalloc+policy=snapkv+lambda=0.5+mu=0.5+buffer=32+kv=q4_0", 200)
    setup = setup_of(arm, common(profile=find_profile(demo_model)))
    config = setup.config
    assert config is not None
    assert (config.policy, config.lambda_, config.mu, config.buffer) == ("snapkv", 0.5, 0.5, 32)
    assert setup.kv_type == "q4_0"


def test_arms_of_methods_and_budgets() -> None:
    arms = parse_arms(["full", "rkv", "snapkv", "rkv+kv=q4_0@500", "full+kv=q8_0"], [64, 128])
    assert [str(arm) for arm in arms] == [
        "full",
        "rkv+kv=q4_0@500",
        "full+kv=q8_0",
        "rkv@64",
        "snapkv@64",
        "rkv@128",
        "snapkv@128",
    ]
    assert parse_arms(["full"], []) == (Arm("full", 0),)


@pytest.mark.parametrize(
    ("methods", "budgets", "message"),
    [
        ([], [64], "no method"),
        (["rvk"], [64], "method = 'rvk' is unknown: must be one of full, rkv"),
        (["rkv"], [], "rkv needs a budget"),
        (["rkv+lambda"], [64], "'lambda' is no option"),
        (["rkv+alpha=1"], [64], "'alpha=1' is no option: must be KEY=VALUE of policy"),
        (["rkv+lambda=x"], [64], "lambda = 'x' is not a number"),
        (["rkv+window=8+window=9"], [64], "window is given twice"),
        (["rkv", "rkv"], [64], "rkv@64: given twice"),
        (["rkv@64", "rkv"], [64], "rkv@64: given twice"),
        (["rkv@-1"], [], "'-1' is not a number of tokens"),
        (["full@64"], [], "the full cache has no budget"),
        (["full+lambda=0.5"], [], "the full cache has no option but kv"),
    ],
)
def test_bad_arms_are_named(methods, budgets, message) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+").replace("*", r"\*")):
        parse_arms(methods, budgets)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (Arm("reasonalloc", 64), "reasonalloc needs a profile"),
        (Arm("rkv", 8), "rkv@8: "),
        (Arm("rkv+kv=q3", 64), "cache type = 'q3' is unknown"),
        (Arm("rkv+lambda=7", 64), r"rkv\+lambda=7@64: lambda"),
    ],
)
def test_bad_caches_are_named(arm, message) -> None:
    with pytest.raises(ConfigError, match=message):
        setup_of(arm, common())


@pytest.mark.parametrize(
    ("label", "fields"),
    [
        ("loss+merge=1+decay=0.8", {"policy": "loss", "merge": True, "decay": 0.8}),
        ("mass+bias_max=2", {"policy": "mass", "bias_max": 2.0}),
        ("mass+heads=error", {"policy": "mass", "heads": "error"}),
        ("rkv+heads=adaptive-literal", {"policy": "rkv", "heads": "adaptive-literal"}),
        ("loss+merge=1+layers=error", {"policy": "loss", "merge": True, "layers": "error"}),
    ],
)
def test_what_policies_and_allocators_take_is_part_of_a_method(demo_model, label, fields) -> None:
    (arm,) = parse_arms([f"{label}@128"], [])
    assert arm == Arm(label, 128)
    profile = find_profile(demo_model) if fields.get("layers") == "error" else None
    expected = BudgetConfig(budget=128, buffer=16, profile=profile, **fields)
    assert setup_of(arm, common(profile=profile)).config == expected
