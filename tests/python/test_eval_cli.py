"""`reasonalloc-eval` as a user runs it, on the demo model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from py_reasonalloc.errors import ConfigError
from py_reasonalloc.eval.cli import main
from py_reasonalloc.eval.results import read_results
from py_reasonalloc.profiles import profiles_folder

ROOT = Path(__file__).resolve().parents[2]
#: Short texts: they are cut off, which is no matter here.
QUICK = ("--max-tokens", "60", "--limit", "6", "--buffer", "16")
ARMS = ("--methods", "full,rkv,reasonalloc+kv=q8_0", "--budgets", "112,128")


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "py_reasonalloc.eval.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,  # type: ignore[call-overload]
    )


def run(*arguments: object) -> tuple[int, str, str]:
    with start(*arguments) as process:
        try:
            out, err = process.communicate(timeout=300)
        except BaseException:
            process.kill()
            raise
    return process.returncode, out, err


def without_times(row: object) -> dict[str, object]:
    return {k: v for k, v in row.to_json().items() if not k.endswith("_seconds")}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run in one process."""
    path = tmp_path_factory.mktemp("eval") / "one.jsonl"
    code, out, err = run("demo", "-o", path, *QUICK, *ARMS)
    assert code == 0, err
    return path, out


def test_one_row_per_text_with_the_engines_counts(finished) -> None:
    path, out = finished
    rows = read_results(path).rows
    assert len(rows) == 5 * 6 == len({row.key for row in rows})
    for row in rows:
        assert row.n_generated <= 60 and row.stop in ("end", "length", "loop")
        assert row.decode_seconds > 0
        if row.budget == 0:
            assert row.n_evicted == 0 == row.n_compressions
            assert row.peak_tokens >= row.n_prompt + row.n_generated - 1
        else:
            assert row.peak_tokens <= row.budget + 16
            element = {"rkv": 2.0, "reasonalloc+kv=q8_0": 34 / 32}[row.method]
            assert row.kv_bytes == 6 * 4 * (row.budget + 16) * 32 * 2 * element
            n_cached = row.n_prompt + row.n_generated
            assert (row.n_evicted > 0) == (n_cached > row.budget + 17) or row.n_evicted > 0
            assert (row.n_compressions > 0) == (row.n_evicted > 0)
    # the table shows every arm
    assert all(name in out for name in ("full", "rkv", "reasonalloc+kv=q8_0"))


def test_seeds_are_the_same_in_every_arm(finished) -> None:
    seeds: dict[str, set[int]] = {}
    for row in read_results(finished[0]).rows:
        seeds.setdefault(row.problem, set()).add(row.seed)
    assert len(seeds) == 6 and all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == 6


def test_processes_find_what_one_process_finds(finished, tmp_path) -> None:
    path = tmp_path / "two.jsonl"
    code, _, err = run("demo", "-o", path, *QUICK, *ARMS, "--jobs", 2, "--threads", 1)
    assert code == 0, err
    first = {row.key: without_times(row) for row in read_results(finished[0]).rows}
    second = {row.key: without_times(row) for row in read_results(path).rows}
    assert first == second


def test_a_finished_run_decodes_nothing_and_can_be_extended(finished, tmp_path) -> None:
    path = tmp_path / "more.jsonl"
    path.write_bytes(finished[0].read_bytes())
    code, out, err = run("demo", "-o", path, *QUICK, *ARMS)
    assert code == 0, err
    assert path.read_bytes() == finished[0].read_bytes()
    code, _, err = run("demo", "-o", path, *QUICK, "--methods", "snapkv", "--budgets", "128")
    assert code == 0, err
    assert len(read_results(path).rows) == 36
    code, out, _ = run("report", path)
    assert code == 0 and "snapkv" in out


@pytest.mark.parametrize("jobs", [1, 2])
def test_kill_and_resume_lose_and_double_nothing(finished, tmp_path, jobs) -> None:
    path, rng, n_kills = tmp_path / "killed.jsonl", random.Random(jobs), 0
    arguments = ("demo", "-o", path, *QUICK, *ARMS, "--jobs", jobs, "--threads", 1)
    known: dict[object, object] = {}
    while n_kills < 4:
        process = start(*arguments, start_new_session=True)
        n_before = len(known)
        wanted = n_before + rng.randint(1, 6)
        while process.poll() is None and (
            not path.exists() or path.read_bytes().count(b"\n") - 1 < wanted
        ):
            time.sleep(0.005)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        n_kills += 1
        if rng.random() < 0.5 and path.exists():  # a power cut in the middle of a line
            with path.open("ab") as stream:
                stream.write(b'{"method": "rkv", "bud')
        rows = {row.key: without_times(row) for row in read_results(path).rows}
        assert known.items() <= rows.items()
        known = rows
    assert n_kills >= 2
    code, _, err = run(*arguments)
    assert code == 0, err
    rows = read_results(path).rows
    assert len(rows) == 30
    expected = {row.key: without_times(row) for row in read_results(finished[0]).rows}
    assert {row.key: without_times(row) for row in rows} == expected


def test_interrupt_ends_promptly_and_keeps_what_is_done(tmp_path) -> None:
    path = tmp_path / "stopped.jsonl"
    process = start("demo", "-o", path, *ARMS, "--limit", 50, "--jobs", 2, start_new_session=True)
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert 2 <= len(read_results(path).rows) < 250


def here(*arguments: object) -> None:
    """Run the command in this process."""
    main.main([str(argument) for argument in arguments], standalone_mode=False)


def test_a_profile_file_that_has_changed_is_refused(tmp_path, capsys) -> None:
    profile, path = tmp_path / "p.json", tmp_path / "r.jsonl"
    shipped = [profiles_folder() / f"demo-reasoner{end}.json" for end in ("", "-horizon")]
    profile.write_bytes(shipped[0].read_bytes())
    command = ["demo", "-o", path, "--max-tokens", 5, "--methods"]
    own = [*command, f"wave+profile={profile}@96", "--limit"]
    here(*own, 1, "--profile", shipped[0])
    rows = read_results(path).rows
    profile.write_bytes(shipped[1].read_bytes())
    with pytest.raises(ConfigError, match=f"before {profile} changed"):
        here(*own, 2, "--profile", shipped[0])
    assert read_results(path).rows == rows and len(rows[0].profile) == 16
    # the common profile is nobody's yet
    here(*command, "rkv@96", "--limit", 1, "--profile", shipped[1])
    with pytest.raises(ConfigError, match=r"profile = \[2.813.* there, \[34"):
        here(*command, "reasonalloc@96", "--limit", 1, "--profile", shipped[1])
    here(*command, "reasonalloc@96", "--limit", 1, "--profile", shipped[0])
    assert [row.profile is None for row in read_results(path).rows] == [False, True, False]


def test_other_settings_are_refused(finished) -> None:
    path = finished[0]
    before = path.read_bytes()
    for option, value, name in (
        ("--max-tokens", 61, "max_tokens"),
        ("--seed", 1, "seed"),
        ("--buffer", 17, "buffer"),
        ("--protect-prompt", "off", "protect_prompt"),
        ("--level", 1, "dataset"),
        ("--temp", 0.5, "temp"),
        ("--shuffle-seed", 1, "shuffle_seed"),
    ):
        code, _, err = run("demo", "-o", path, *QUICK, *ARMS, option, value)
        assert (code, err.count("\n")) == (2, 1), err
        assert name in err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no model"),
        (["demo"], 2, "pass -o"),
        (
            ["missing.gguf", "-o", "x.jsonl", "--dataset", "demo", "--budgets", 99],
            1,
            "no such file",
        ),
        (["README.md", "-o", "x.jsonl", "--dataset", "demo", "--budgets", 99], 1, "not a GGUF"),
        (["demo", "-o", "x.jsonl", "--budgets", "64,x"], 2, "budgets = '64,x' is not a list"),
        (["demo", "-o", "x.jsonl", "--budgets", "0"], 2, "is not a list"),
        (["demo", "-o", "x.jsonl"], 2, "rkv needs a budget"),
        (["demo", "-o", "x.jsonl", "--budgets", 40], 2, "rkv@40: budget"),
        (["demo", "-o", "x.jsonl", "--methods", "best"], 2, "method = 'best' is unknown"),
        (
            ["demo", "-o", "x.jsonl", "--budgets", 128, "--samples", 2],
            2,
            "samples are all the same",
        ),
        (
            ["demo", "-o", "x.jsonl", "--budgets", 128, "--protect-prompt", "most"],
            2,
            "auto, off, all or",
        ),
        (["demo", "-o", "no/such/folder/x.jsonl", "--budgets", 128], 2, "folder"),
        (["demo", "-o", "x.jsonl", "--budgets", 128, "--profile", "none.json"], 2, "none.json"),
        (["demo", "-o", "x.jsonl", "--budgets", 128, "--kv-type", "q3"], 2, "'q3' is unknown"),
        (["demo", "-o", "x.jsonl", "--budgets", 128, "--dataset", "no.jsonl"], 2, "no.jsonl"),
        (["demo", "-o", "x.jsonl", "--budgets", 128, "--server", "no.txt"], 2, "no.txt"),
        (["report", "no.jsonl"], 2, "no.jsonl"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, code, message) -> None:
    here = [str(tmp_path / a) if a == "x.jsonl" else a for a in map(str, arguments)]
    found, out, err = run(*here)
    assert (found, err.count("\n")) == (code, 1), err
    assert message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_methods_are_listed() -> None:
    code, out, _ = run("--list-methods")
    assert code == 0
    for name in ("full", "rkv", "snapkv", "random", "pyramid-rkv", "wave", "reasonalloc"):
        assert f"\n{name} " in f"\n{out}"


def test_texts_are_kept_where_asked(tmp_path) -> None:
    path = tmp_path / "texts.jsonl"
    code, _, err = run(
        "demo", "-o", path, "--limit", 1, "--methods", "full", "--max-tokens", 900, "--keep-texts"
    )
    assert code == 0, err
    (row,) = read_results(path).rows
    assert row.correct and "</think>" in row.text and row.stop == "end"
    assert json.loads(path.read_text().splitlines()[0])["settings"]["dataset"].startswith("demo")
