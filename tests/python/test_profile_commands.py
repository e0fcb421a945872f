"""Layer profiles from the command line: probes, comparison, pictures, runs that take one."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from profile_data import GOOD

from py_reasonalloc import ConfigError, ProfileError
from py_reasonalloc.commands import profile as profile_cli
from py_reasonalloc.commands.run import run as run_cli
from py_reasonalloc.engine.identity import read_identity
from py_reasonalloc.profile.files import (
    Profile,
    compare,
)
from py_reasonalloc.profile.lookup import cached_path, save_to_cache
from py_reasonalloc.profile.plot import bar, terminal_plot
from py_reasonalloc.run.probes import MATHS, MAX_PROMPTS, default_prompts, read_prompts

pytestmark = pytest.mark.usefixtures("cache")

# --- probes, comparison, pictures ----------------------------------------------------------------


def test_probes(make_gguf, demo_model, tmp_path) -> None:
    assert default_prompts(read_identity(make_gguf()), 0) == MATHS
    demo = read_identity(demo_model)
    assert len(MATHS) == len(default_prompts(demo, 0)) == MAX_PROMPTS
    assert not set(default_prompts(demo, 0)) & set(default_prompts(demo, 1))
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two \n")
    assert read_prompts(path) == ("one", "two")
    for content, message in [("\n \n", "holds no prompt"), ("x\n" * 9, "holds 9 prompts, at most")]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_prompts(path)


def test_compare() -> None:
    def profile(*demand: float) -> Profile:
        return dataclasses.replace(GOOD, n_layer=len(demand), demand=demand)

    same = compare(profile(1, 5, 3), profile(10, 50, 30))
    assert same.rank_correlation == pytest.approx(1) and same.l1 == pytest.approx(0)
    other = compare(profile(1, 2, 3), profile(3, 2, 1))
    assert other.rank_correlation == pytest.approx(-1)
    assert other.l1 == pytest.approx(4 / 6)
    # ties share their rank: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert compare(profile(1, 2, 2, 9), profile(1, 5, 3, 6)).rank_correlation == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )
    assert compare(profile(1, 0), profile(0, 1)).l1 == pytest.approx(2)
    assert math.isnan(compare(profile(2, 2), profile(1, 2)).rank_correlation)
    with pytest.raises(ProfileError, match="profiles of 2 and 3 layers"):
        compare(profile(1, 2), profile(1, 2, 3))


def test_terminal_plot() -> None:
    assert (bar(1.0, 4), bar(0.5, 4), bar(0.03125, 4), bar(0.0, 4)) == ("████", "██", "▏", "")
    lines = terminal_plot(dataclasses.replace(GOOD, demand=(15.5, 31.0)), width=10).splitlines()
    assert "93% of the attention" in lines[0]
    assert lines[1:] == ["0 █████      15.5", "1 ██████████ 31.0"]


# --- the commands --------------------------------------------------------------------------------


def test_run_takes_the_profile_that_fits(cli, make_gguf, good_file, cache) -> None:
    path = make_gguf()
    arguments = (path, "-p", "hello", "-n", 4, "--budget", 64)

    def split(*more):
        done = cli(*arguments, *more, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["layers"], found["heads"], found["profile"]

    assert split() == ("uniform", "uniform", None)
    assert "no profile fits this model" in cli(*arguments).stderr.splitlines()[-1]
    save_to_cache(GOOD, read_identity(path))
    cached = str(cached_path(read_identity(path)))
    assert split() == ("uniform", "uniform", None)  # it has no curves
    assert split("--layers", "wave") == ("wave", "uniform", cached)
    assert split("--method", "paper") == ("wave", "adaptive-literal", cached)
    wave = cli(*arguments, "--layers", "wave").stderr
    assert f"wave by profile {cached}" in wave.splitlines()[-1]
    assert split("--profile", good_file, "--heads", "adaptive") == (
        "wave",
        "adaptive",
        str(good_file),
    )
    assert split("--layers", "pyramid") == ("pyramid", "uniform", None)
    dry = json.loads(cli(*arguments, "--layers", "wave", "--dry-run", "--json").stdout)
    assert (dry["layers"], dry["profile"]) == ("wave", cached)
    assert dry["layer_bytes"][0] < dry["layer_bytes"][1]


def test_run_with_a_table(cli, make_gguf) -> None:
    arguments = (make_gguf(), "-p", "hello", "-n", 4, "--json")
    found = json.loads(cli(*arguments, "--layers", "80,48").stdout)
    assert (found["layers"], found["budget"], found["profile"]) == ([80, 48], 64, None)


def test_demo_says_its_profile(cli) -> None:
    done = cli("demo", "-n", 8)
    assert done.returncode == 0
    says = done.stderr.splitlines()[-1]
    assert says == "[layers: error by profile demo-reasoner-horizon; heads: uniform]"


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--layers", "best"], "layers = 'best' is unknown: must be one of uniform, pyramid, wave"),
        (["--heads", "best"], "heads = 'best' is unknown: must be one of uniform, adaptive"),
        (["--layers", "wave"], "layers = 'wave' needs a profile, and none fits .*calibrate"),
        (["--layers", "wave", "--profile", "none"], "--layers wave and --profile none exclude"),
        (["--layers", "64,x"], "layers = '64,x' is not a list of numbers"),
        (["--layers", "64,64,64"], "layers has 3 budgets, .* has 2 layers"),
        (["--layers", "64,12"], r"layer_budgets\[1\]"),
        (["--layers", "64,64", "--budget", 80], "--layers gives 64 tokens on average, --budget 80"),
        (["--profile", "none.json"], "none.json: cannot be read: No such file"),
        (["--profile", "README.md"], "README.md: truncated or not JSON"),
        (["--profile", "profiles/demo-reasoner.json"], "n_layer: 6, but .* has 2 layers"),
        (["--no-budget", "--profile", "auto"], "--no-budget and --profile exclude each other"),
        (["--no-budget", "--layers", "wave"], "--no-budget and --layers exclude each other"),
    ],
)
def test_run_errors(in_process, make_gguf, arguments, pattern) -> None:
    code, out, err = in_process(run_cli, make_gguf(), "-p", "hi", *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(pattern, err), err


def test_compare_command(in_process, good_file, tmp_path) -> None:
    other = tmp_path / "other.json"
    dataclasses.replace(GOOD, name="other", demand=(31.0, 10.5)).save(other)
    code, out, err = in_process(profile_cli.run, "--compare", good_file, other)
    assert (code, err) == (0, "")
    assert "rank correlation   -1.000" in out
    assert f"L1 of the shares   {2 * 20.5 / 41.5:.3f}" in out


@pytest.mark.parametrize(
    ("arguments", "code", "pattern"),
    [
        ([], 2, "no model"),
        (["demo"], 2, "nowhere to write"),
        (["none.gguf", "-o", "x.json"], 1, "none.gguf: no such file"),
        (["README.md", "-o", "x.json"], 1, "README.md: not a GGUF file"),
        (["demo", "-o", "no/such/folder/x.json"], 2, "its folder does not exist"),
        (["demo", "-o", "x.json", "--prompts", "none.txt"], 2, "none.txt: cannot be read"),
        (["demo", "-o", "x.json", "--rho", "1.5"], 2, "rho = 1.5 is out of range"),
        (["demo", "-o", "x.json", "--steps", "0"], 2, "steps = 0 is out of range"),
        (["demo", "-o", "x.json", "--seed", "-1"], 2, "seed = -1 is out of range"),
        (["demo", "-o", "x.json", "--plot", "x.gif"], 2, "plot = 'x.gif' must end in .png"),
        (["--compare", "README.md", "README.md"], 2, "README.md: truncated or not JSON"),
        (["demo", "--compare", "a", "b"], 2, "--compare takes two profiles, no model"),
    ],
)
def test_profile_errors(in_process, arguments, code, pattern) -> None:
    found, out, err = in_process(profile_cli.run, *arguments)
    assert (found, out) == (code, "")
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("reasonalloc-profile: ")
    assert re.search(pattern, lines[0]), lines[0]


def test_pictures(in_process, good_file, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "both.svg"
    code, _, err = in_process(profile_cli.run, "--compare", good_file, good_file, "--plot", picture)
    assert (code, err) == (0, "")
    first = picture.read_bytes()
    assert b"<svg" in first
    in_process(profile_cli.run, "--compare", good_file, good_file, "--plot", picture)
    assert picture.read_bytes() == first
