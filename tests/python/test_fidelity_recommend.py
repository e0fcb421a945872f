"""The smallest cache that is close enough: found, kept in a profile, taken by a run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from py_reasonalloc.commands import profile as profile_cli
from py_reasonalloc.commands import run as cli
from py_reasonalloc.engine.errors import ConfigError, ProfileError
from py_reasonalloc.engine.identity import read_identity
from py_reasonalloc.eval.cases.methods import Arm, Setup
from py_reasonalloc.eval.results.statistics import Estimate
from py_reasonalloc.fidelity.recommend import recommend, recommended_cache
from py_reasonalloc.fidelity.report import Metric
from py_reasonalloc.profile.files import Recommendation, load_profile, profiles_folder
from py_reasonalloc.profile.lookup import find_profile, find_profiles, save_to_cache
from py_reasonalloc.session.config import BudgetConfig
from py_reasonalloc.task.problems import generate_problem

SHIPPED = profiles_folder() / "demo-reasoner.json"
FOUND = Recommendation(
    target_kl=0.3,
    method="adaptive+kv=q8_0",
    budget=96,
    buffer=16,
    sinks=2,
    window=12,
    kv_type="q8_0",
    kl=0.2,
    kl_high=0.29,
    n_tokens=500,
    tool_version="0.1.0",
    command="reasonalloc-profile m.gguf --recommend",
)


pytestmark = pytest.mark.usefixtures("cache")


def arm(method: str, budget: int, n_bytes: int, kl: float, high: float, **changes):
    fields = {"source": "own", "n_never": 0, "n_tokens": 300} | changes
    return SimpleNamespace(
        method=method,
        budget=budget,
        kv_bytes=n_bytes,
        kl=Metric(Estimate(kl, 0, high), None),
        **fields,
    )


def chosen(*arms, target: float = 0.1) -> tuple[str, int] | None:
    setups = {Arm(a.method, a.budget): Setup(BudgetConfig(64), "f16") for a in arms}
    found = recommend(SimpleNamespace(arms=arms), SimpleNamespace(setups=setups), target)
    return None if found is None else (found.method, found.budget)


def test_the_smallest_cache_that_stays_below() -> None:
    rkv = [arm("rkv", b, 10 * b, 6 / b, 8 / b) for b in (64, 96, 128, 256)]
    assert chosen(*rkv) == ("rkv", 96)
    # the upper end counts, not the mean
    assert chosen(*rkv, target=0.07) == ("rkv", 128)
    # fewer bytes win, whatever the budget is called
    assert chosen(*rkv, arm("rkv+kv=q8_0", 128, 700, 0.05, 0.07)) == ("rkv+kv=q8_0", 128)
    # of equally large ones the closer one
    assert chosen(*rkv, arm("h2o", 96, 960, 0.03, 0.08)) == ("h2o", 96)
    assert chosen(*rkv, target=0.01) is None


def test_luck_and_idleness_do_not_count() -> None:
    # a small cache that is below by chance, while a larger one of the same method is not
    assert chosen(
        arm("rkv", 64, 640, 0.05, 0.09),
        arm("rkv", 96, 960, 0.1, 0.2),
        arm("rkv", 128, 1280, 0.04, 0.06),
    ) == ("rkv", 128)
    assert chosen(arm("rkv", 64, 640, 0.0, 0.0, n_never=1)) is None
    # with texts of the model's own, files do not count
    own, file = arm("rkv", 64, 640, 0.2, 0.3), arm("rkv", 64, 640, 0.01, 0.02, source="text")
    assert chosen(file, own) is None and chosen(file) == ("rkv", 64)


def test_a_profile_keeps_it(tmp_path) -> None:
    profile = load_profile(SHIPPED)
    assert profile.recommendation is None  # older profiles have none
    with_it = replace(profile, recommendation=FOUND)
    with_it.save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == with_it
    value = json.loads((tmp_path / "p.json").read_text())
    for name, bad in (("budget", 0), ("kv_type", "q3"), ("target_kl", 0), ("more", 1)):
        value["recommendation"] = {**FOUND._asdict(), name: bad}
        (tmp_path / "bad.json").write_text(json.dumps(value))
        with pytest.raises(ProfileError, match="recommendation"):
            load_profile(tmp_path / "bad.json")


def test_the_first_profile_that_recommends_is_taken(demo_model) -> None:
    with pytest.raises(ProfileError, match="no profile that fits .* recommends a budget: measure"):
        recommended_cache(demo_model, "auto")
    with pytest.raises(ProfileError, match="demo-reasoner.json recommends no budget: measure"):
        recommended_cache(demo_model, SHIPPED)
    best = find_profile(demo_model)
    assert best == find_profiles(demo_model)[0] and len(find_profiles(demo_model)) == 2
    save_to_cache(replace(best, recommendation=FOUND), read_identity(demo_model))
    config, kv_type, source = recommended_cache(demo_model, "auto")
    assert (config.budget, config.buffer, config.sinks, config.window) == (96, 16, 2, 12)
    assert (config.policy, config.layers, config.heads, kv_type) == (
        "rkv",
        "uniform",
        "adaptive",
        "q8_0",
    )
    assert source.endswith("(KL 0.200, target 0.3)")
    bad = FOUND._replace(method="gone")
    save_to_cache(replace(best, recommendation=bad), read_identity(demo_model))
    with pytest.raises(ProfileError, match="cannot be used: method = 'gone' is unknown"):
        recommended_cache(demo_model, "auto")


def test_from_measuring_to_running(in_process, tmp_path) -> None:
    path, prompts = tmp_path / "p.json", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(generate_problem(1, i, level=2).prompt for i in range(2)))
    measure = (profile_cli.run, "demo", "-o", path, "--cache", "--recommend", "--prompts", prompts)
    options = ("--steps", 150, "--threads", 1, "--temp", 0, "--budgets", 72)
    code, out, err = in_process(*measure, *options, "--target-kl", 1e-6)
    compared = re.findall(r"^(\S+) +72 ", out, re.MULTILINE)  # the profile has error curves
    assert sorted(compared) == ["loss-error", "loss-error+kv=q8_0", "rkv", "rkv+kv=q8_0"]
    options += ("--methods", "rkv")
    code, out, err = in_process(*measure, *options, "--target-kl", 1e-6)
    assert code == 1 and "No cache of these stays within KL 1e-06" in out, err
    assert load_profile(path).recommendation is None
    code, out, err = in_process(*measure, *options, "--target-kl", 5)
    assert code == 0 and "keeps the model's own text within KL 5: rkv with budget 72" in out, err
    found = load_profile(path).recommendation
    assert found is not None and (found.method, found.budget, found.buffer) == ("rkv", 72, 16)
    assert 0 < found.kl <= found.kl_high <= 5 and "--recommend --target-kl=5" in found.command
    auto = ("demo", "--budget", "auto", "--protect-prompt", 8)
    code, out, err = in_process(cli.run, *auto, "-n", 40, "--threads", 1, "--json")
    report = json.loads(out)
    assert code == 0 and (report["budget"], report["buffer"], report["policy"]) == (72, 16, "rkv")
    assert report["heads"] == "uniform" and "target 5" in report["recommended_by"]
    code, out, err = in_process(cli.run, *auto, "-n", 2, "--threads", 1)
    assert code == 0 and "as recommended by" in err
    code, out, err = in_process(cli.run, *auto, "--dry-run")
    assert code == 0 and "as recommended by" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "best"], "budget = 'best' must be a number of tokens, or auto"),
        (["--budget", "auto"], "no profile that fits"),
        (["--budget", "auto", "--policy", "rkv"], "--budget auto and --policy exclude each other"),
        (["--budget", "auto", "--set", "mu=0.5"], "--budget auto and --set exclude each other"),
        (["--budget", "auto", "--no-budget"], "--budget auto and --no-budget exclude each other"),
        (["--budget", "auto", "--profile", "none"], "--budget auto and --profile none exclude"),
    ],
)
def test_runs_that_are_refused(in_process, arguments, message) -> None:
    code, out, err = in_process(cli.run, "demo", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-kl", 1], "--target-kl goes with --recommend"),
        (["--budgets", "64"], "--budgets goes with --recommend"),
        (["--recommend", "--target-kl", 0], "--target-kl = 0 is out of range"),
    ],
)
def test_measurements_that_are_refused(in_process, tmp_path, arguments, message) -> None:
    code, out, err = in_process(profile_cli.run, "demo", "-o", tmp_path / "p.json", *arguments)
    assert (code, out) == (2, "") and message in err


def test_a_target_is_a_number_above_0() -> None:
    with pytest.raises(ConfigError, match="target_kl = nan"):
        chosen(target=float("nan"))
