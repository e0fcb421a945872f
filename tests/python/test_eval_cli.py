"""`reasonalloc-eval` as a user runs it, on the demo model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from py_reasonalloc import __version__
from py_reasonalloc.eval.results.file import read_results

ROOT = Path(__file__).resolve().parents[2]
#: Short texts: they are cut off, which is no matter here.
QUICK = ("--max-tokens", "60", "--limit", "6", "--buffer", "16", "--threads", "1")
ARMS = ("--methods", "full,rkv,reasonalloc+kv=q8_0", "--budgets", "112,128")


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "py_reasonalloc.commands.eval", *map(str, arguments)],
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
        assert row.version == __version__
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


@pytest.mark.usefixtures("foreground")
def test_interrupt_ends_promptly_and_keeps_what_is_done(tmp_path) -> None:
    path = tmp_path / "stopped.jsonl"
    arguments = ("demo", "-o", path, *ARMS, "--limit", 50, "--jobs", 2)
    with start(*arguments, start_new_session=True) as process:
        try:
            while not path.exists() or path.read_bytes().count(b"\n") < 3:
                assert process.poll() is None
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert 2 <= len(read_results(path).rows) < 250


def test_methods_are_listed() -> None:
    code, out, _ = run("--list-methods")
    assert code == 0
    for name in ("full", "rkv", "snapkv", "random", "pyramid-rkv", "wave", "reasonalloc"):
        assert f"\n{name} " in f"\n{out}"


def test_texts_are_kept_where_asked(tmp_path) -> None:
    path = tmp_path / "texts.jsonl"
    code, _, err = run(
        "demo",
        "-o",
        path,
        *QUICK,
        "--limit",
        1,
        "--methods",
        "full",
        "--max-tokens",
        900,
        "--keep-texts",
    )
    assert code == 0, err
    (row,) = read_results(path).rows
    assert row.correct and "</think>" in row.text and row.stop == "end"
    assert json.loads(path.read_text().splitlines()[0])["settings"]["dataset"].startswith("demo")
