"""`reasonalloc-bench` measures what it says: caches at a depth, bytes, and the whole command."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from py_reasonalloc import StateError
from py_reasonalloc.bench import child, curves, fill
from py_reasonalloc.bench.engine import Engine
from py_reasonalloc.bench.jobs import N_WARM, Arm, Job
from py_reasonalloc.bench.measure import run_job
from py_reasonalloc.bench.scaling import n_cells
from py_reasonalloc.bench.turns import N_PAIRS, Group, take_turns
from py_reasonalloc.bench.weights import write_model
from py_reasonalloc.sizes import Shape, budget_bytes, full_bytes

ROOT = Path(__file__).resolve().parents[2]
FAILURE, USAGE = 1, 2
CACHE_SHAPE = Shape(n_layer=2, n_head_kv=2, head_dim=32)  # of make_gguf()
STOCK, OURS = Arm("stock f16"), Arm("budget 32", budget=32, buffer=16, n_ubatch=16)


def job_of(path: Path, arm: Arm, folder: Path, **more) -> Job:
    return Job("decode", arm, str(path), 1, folder=str(folder), **more)


# --- reaching a depth ------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_repeated_rows_are_those_that_were_decoded(make_gguf, tmp_path, kv_type) -> None:
    depth = 128 + 3 * 128 + 50
    job = job_of(make_gguf(), Arm("stock", kv_type=kv_type), tmp_path, depth=depth)
    with Engine(job) as engine:
        engine.open_context(1024)
        start = fill.skip(engine)
        assert start == depth - 128
        n_cached = fill.bindings.llama_memory_seq_pos_max(engine.memory, 0) + 1
        assert n_cached == start
        path = str(tmp_path / "state").encode()
        tokens = (fill.bindings.llama_token * 1)()
        assert fill.bindings.llama_state_seq_save_file(engine.ctx, path, 0, tokens, 0)
        [(_, found)] = fill._caches((tmp_path / "state").read_bytes(), start)
        pieces = [rows for _, rows in found]
        assert len(pieces) == 1 + 2 * 2  # K and V of 2 layers
        for rows in pieces[1:]:
            n_bytes = len(rows) // start
            block = rows[: 128 * n_bytes]
            assert any(block)
            assert rows == (block * 4)[: len(rows)]
        engine.read(depth - start, start)
        assert len(engine.step(4, depth)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_windows_get_their_latest_rows(make_gguf, tmp_path) -> None:
    """Gemma 3 with six layers: five have a window of 64 tokens, the last one grows."""
    path = make_gguf(arch="gemma3", n_layer=6)
    depth = 1000
    with Engine(job_of(path, Arm("stock", n_ubatch=16), tmp_path, depth=depth)) as engine:
        engine.open_context(2048)
        start = fill.skip(engine)
        assert start == depth - 128
        saved = str(tmp_path / "state").encode()
        tokens = (fill.bindings.llama_token * 1)()
        assert fill.bindings.llama_state_seq_save_file(engine.ctx, saved, 0, tokens, 0)
        full, windows = fill._caches((tmp_path / "state").read_bytes(), start)
        assert (full[0], windows[0]) == (start, 64)  # what the window hides is not saved
        assert (len(full[1]), len(windows[1])) == (1 + 2, 1 + 2 * 5)
        engine.read(depth - start, start)
        engine.step(4, depth)
        engine.take_back(depth)
        assert len(engine.step(4, depth)) == 4
        n_bytes = engine.sizes()["cache_bytes"]
    n_row = 2 * 2 * 32 * 2  # K and V of two heads of 32 values, f16
    assert n_bytes == n_row * (2048 + 5 * 256)


def test_one_thread_in_turns_is_timed_by_the_processor(make_gguf, tmp_path) -> None:
    turns = dataclasses.replace(job_of(make_gguf(), STOCK, tmp_path), kind="turns")
    for job, clock in (
        (turns, time.process_time),
        (dataclasses.replace(turns, n_threads=2), time.perf_counter),
        (dataclasses.replace(turns, kind="decode"), time.perf_counter),
    ):
        with Engine(job) as engine:
            assert engine._clock() is clock


def test_the_cache_of_a_budget_counts_windows(make_gguf, tmp_path) -> None:
    path = make_gguf(arch="gemma3", n_layer=6)
    found = run_job(job_of(path, OURS, tmp_path, depth=300, n_tokens=16))
    n_row = 2 * 2 * 32 * 2
    assert found["row_bytes"] == n_row
    assert found["swa_bytes"] == 5 * 256 * n_row
    assert found["cache_bytes"] == (32 + 16) * n_row + found["swa_bytes"]


def test_rows_of_another_layout_are_refused(make_gguf, tmp_path) -> None:
    with Engine(job_of(make_gguf(), STOCK, tmp_path)) as engine:
        engine.open_context(512)
        engine.read(8, 0)
        path = tmp_path / "state"
        tokens = (fill.bindings.llama_token * 1)()
        fill.bindings.llama_state_seq_save_file(engine.ctx, str(path).encode(), 0, tokens, 0)
    block = path.read_bytes()
    out = io.BytesIO()
    fill.repeat_state(block, 8, 20, out)
    assert len(out.getvalue()) > len(block)
    for damaged in (block[:-1], block[:20], block + b"x", block[:12] + b"\x02" + block[13:]):
        with pytest.raises(StateError):
            fill.repeat_state(damaged, 8, 20, io.BytesIO())
    with pytest.raises(StateError):
        fill.repeat_state(block, 7, 20, io.BytesIO())


@pytest.mark.parametrize("is_decoded", [False, True])
def test_a_budgeted_cache_is_in_its_steady_state(make_gguf, tmp_path, is_decoded) -> None:
    job = job_of(make_gguf(), OURS, tmp_path, depth=500, n_tokens=48, is_decoded=is_decoded)
    with Engine(job) as engine:
        engine.open_context(1024)
        start = fill.skip(engine)
        assert start == (0 if is_decoded else 500 - 32 - 2 * 16)
        engine.read(500 - start, start, 128)
        before = engine.stats()
        assert before.n_pos == 500
        assert before.n_compressions > 0
        engine.step(48, 500)
        after = engine.stats()
    assert after.n_compressions - before.n_compressions == 3
    assert after.n_entries == before.n_entries
    assert after.peak_tokens == 48


# --- one measurement -------------------------------------------------------------------------


def test_bytes_are_those_of_the_formula(make_gguf, tmp_path) -> None:
    path = make_gguf()
    for kv_type in ("f16", "q8_0"):
        job = job_of(path, Arm("s", kv_type=kv_type), tmp_path, depth=700, n_tokens=16)
        stock = child.measure_decode(job)
        assert stock["cache_bytes"] == full_bytes(CACHE_SHAPE, n_cells(700, 16), kv_type)
        arm = Arm("b", kv_type=kv_type, budget=64)
        ours = child.measure_decode(job_of(path, arm, tmp_path, depth=300, n_tokens=16))
        assert ours["cache_bytes"] == budget_bytes(CACHE_SHAPE, 64, kv_type)
        assert ours["row_bytes"] * (64 + 128) == ours["cache_bytes"]
        assert ours["weights_bytes"] == stock["weights_bytes"] > 0
        assert ours["compute_bytes"] > 0
        assert ours["scratch_bytes"] > 0


def test_a_measurement_in_its_own_process(make_gguf, tmp_path) -> None:
    row = run_job(job_of(make_gguf(), OURS, tmp_path, depth=200, n_tokens=32))
    assert "error" not in row
    assert row["n_tokens"] == 32
    assert row["n_compressions"] == 2
    assert 0 < row["compress_seconds"] < row["seconds"]
    assert row["longest_token_seconds"] >= row["median_token_seconds"] > 0
    if sys.platform == "linux":
        assert row["rss_peak_bytes"] > row["rss_loaded_bytes"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("arm", [STOCK, Arm("b", budget=64, n_ubatch=128)])
def test_a_full_batch_uses_what_is_reserved(tmp_path, arm) -> None:
    """Within a tenth and a constant: nothing of any size is missing from the engine's report."""
    shape = dataclasses.replace(curves.shape_of(curves.Point("")), n_layer=2, n_vocab=60000)
    path = tmp_path / "m.gguf"
    write_model(path, "m", shape, "q4_0")
    job = job_of(path, arm, tmp_path, depth=300, n_tokens=16, is_batch_filled=True)
    row = run_job(job)
    names = ("cache", "window", "scratch", "compute", "logits")
    reserved = sum(row[f"{name}_bytes"] for name in names)
    assert row["logits_bytes"] == arm.n_ubatch * 60000 * 4
    used = row["rss_full_batch_bytes"] - row["rss_loaded_bytes"]
    assert 0.9 * reserved < used < 1.1 * reserved + (12 << 20)


def test_prompts_are_read_into_an_empty_cache(make_gguf) -> None:
    row = child.measure_prompt(Job("prompt", OURS, str(make_gguf()), 1, prompts=(40, 100)))
    assert [prompt["n_prompt"] for prompt in row["prompts"]] == [40, 100]
    for prompt in row["prompts"]:
        assert prompt["first_token_seconds"] >= prompt["seconds"] > 0
    assert row["prompts"][0]["compress_seconds"] == 0
    assert row["prompts"][1]["compress_seconds"] > 0


def test_a_failed_measurement_is_one_line(make_gguf, tmp_path) -> None:
    path = make_gguf(head_dim=48)
    row = run_job(job_of(path, Arm("b", kv_type="q8_0", budget=64), tmp_path, depth=10))
    assert "does not divide n_embd_head_k=48" in row["error"]
    row = run_job(job_of(tmp_path / "none.gguf", STOCK, tmp_path))
    assert re.fullmatch(r".*none\.gguf: no such file", row["error"])


def test_a_killed_measurement_is_told(make_gguf, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    row = run_job(job_of(make_gguf(), STOCK, tmp_path))
    assert row == {"error": "ended by SIGKILL (out of memory?)"}


def test_another_build_needs_none_of_our_functions(make_gguf, tmp_path) -> None:
    library = os.environ.get("REASONALLOC_STOCK_LIB")
    if not library:
        pytest.skip("REASONALLOC_STOCK_LIB names no unpatched build")
    arm = Arm("unpatched", library=library)
    row = run_job(job_of(make_gguf(), arm, tmp_path, depth=300, n_tokens=8))
    assert row["seconds"] > 0
    assert row["cache_bytes"] is None


# --- turns -----------------------------------------------------------------------------------


def test_contexts_take_turns(make_gguf, tmp_path) -> None:
    path = str(make_gguf())

    def job(arm: Arm, depth: int) -> Job:
        return Job("turns", arm, path, 1, depth=depth, n_tokens=48, folder=str(tmp_path))

    group = Group("budget 32", [job(OURS, 400), job(OURS, 100), job(STOCK, 48), job(STOCK, 0)])
    rows = take_turns(group, 3, 16)
    assert [(row["arm"], row["depth"]) for row in rows] == [
        *(("budget 32", depth) for depth in (400, 100)),
        *(("stock f16", depth) for depth in (48, 0)),
    ]
    for row in rows:
        assert len(row["seconds"]) == 3
        assert all(seconds > 0 for seconds in row["seconds"])
        # one compression per buffer, and all of it inside the timed steps
        is_ours = row["budget"] is not None
        assert 0 < row["compress_seconds"] < sum(row["seconds"]) or not is_ours
        assert row["compress_seconds"] == 0 or is_ours


def test_turns_with_another_build(make_gguf, tmp_path) -> None:
    library = os.environ.get("REASONALLOC_STOCK_LIB")
    if not library:
        pytest.skip("REASONALLOC_STOCK_LIB names no unpatched build")
    arms = (STOCK, Arm("unpatched", library=library))
    path = str(make_gguf())
    jobs = [Job("turns", arm, path, 1, depth=8, n_tokens=16, folder=str(tmp_path)) for arm in arms]
    rows = take_turns(Group("unpatched", jobs), 1, 16)
    assert [row["arm"] for row in rows] == ["stock f16", "unpatched"]
    assert all(len(row["seconds"]) == N_PAIRS for row in rows)


def test_turns_that_fail_say_why(make_gguf, tmp_path) -> None:
    path = str(make_gguf(head_dim=48))
    arm = Arm("budget 64 q8_0", kv_type="q8_0", budget=64)
    jobs = [Job("turns", a, path, 1, n_tokens=16, folder=str(tmp_path)) for a in (STOCK, arm)]
    (row,) = take_turns(Group("g", jobs), 1, 16)
    assert row["arm"] == "g"
    assert "does not divide n_embd_head_k=48" in row["error"]


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that runs the real command with a cache folder of its own."""
    folder = tmp_path_factory.mktemp("cache")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "py_reasonalloc.commands.bench", *map(str, arguments)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            cwd=ROOT,
            env={**os.environ, "REASONALLOC_CACHE_DIR": str(folder)},
            check=False,
        )

    return run


def test_short_run(bench, tmp_path) -> None:
    """All of it on the demo shape: nothing about the clock is asserted but that it ran."""
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"report.{name}" for name in ("json", "md", "svg")}
    done = bench(
        *("--shape", "demo", "--quick", "--threads", 1, "--depths", "64,300", "--budgets", 48),
        *("--buffer", 16, "--prompts", 100, "--splits", "even,uneven", "--stock", "f16,q4_0"),
        *("--json", files["json"], "--markdown", files["md"], "--plot", files["svg"]),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == files["md"].read_text()
    assert "## Failed" not in done.stdout
    report = json.loads(files["json"].read_text())
    assert set(report) == {
        *("format_version", "date", "command", "shape", "weights", "machine", "settings"),
        *("summary", "scaling", "rows"),
    }
    assert report["settings"]["n_threads"] == 1
    assert str(tmp_path) not in report["command"]
    assert all("error" not in row for row in report["rows"])
    lines = {(line["arm"], line["depth"]): line for line in report["summary"]["decode"]}
    arms = ("stock f16", "budget 48", "budget 48 uneven", "stock q4_0")
    assert set(lines) == {
        *((arm, depth) for arm in arms for depth in (64, 300)),
        ("stock f16", 0),
        ("stock f16, pieces of 16", 0),
    }
    shape = Shape(n_layer=6, n_head_kv=4, head_dim=32)
    for (arm, depth), line in lines.items():
        assert len(line["tokens_per_second"]) == 3
        assert line["cache_bytes"] > 0
        if arm.startswith("budget"):
            assert line["cache_bytes"] == line["cache_bytes_formula"]
            assert line["over_reference"][0] > 0
            assert line["over_reference_at_limit"][0] > 0
            assert 0 < line["compress_share"][0] < 1
        else:
            n = n_cells(depth, 16)
            assert line["cache_bytes"] == full_bytes(shape, n, arm.split()[1].rstrip(","))
    uneven = lines["budget 48 uneven", 300]
    assert uneven["smallest_head_budget"] < 48 < uneven["largest_head_budget"]
    assert {line["arm"] for line in report["summary"]["prompt"]} == {
        "stock f16",
        "stock f16, pieces of 16",
        "budget 48",
        "budget 48 uneven",
    }
    assert [line["arm"] for line in report["summary"]["load"]] == [
        "ReasonLlama, no budget",
        "budget 48",
    ]
    turns = [
        (line["arm"], line["depth"], line["against_depth"]) for line in report["summary"]["turns"]
    ]
    assert turns == [
        *(("budget 48", 300, depth) for depth in (300, 64, 0)),
        *(("budget 48 uneven", 300, depth) for depth in (300, 64, 0)),
    ]
    titles = ("## Decoding", "## Memory", "## Decoding in turns", "## Prompts", "## Loading")
    for title in titles:
        assert title in done.stdout
    assert files["svg"].read_text().startswith("<?xml")


def test_llama_bench_beside(bench, make_gguf, tmp_path) -> None:
    fake = tmp_path / "llama-bench"
    fake.write_text('#!/bin/sh\necho "$@" >> "$0.log"\necho \'[{"avg_ts": 100.0}]\'\n')
    fake.chmod(0o755)
    done = bench(
        *("--shape", make_gguf(), "--depths", "20,3000", "--budgets", "none", "--stock", "q8_0"),
        *("--buffer", 8, "--prompts", 30, "--repeat", 1, "--threads", 1, "--llama-bench", fake),
        *("--json", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["weights"] is None
    pairs = {line["what"]: line for line in report["summary"]["llama_bench"]}
    assert set(pairs) == {"decode at depth 0", "decode at depth 20", "prompt of 30"}
    assert all(line["ours_over_llama_bench"][0] > 0 for line in pairs.values())
    calls = (tmp_path / "llama-bench.log").read_text().splitlines()
    assert all(f"-m {make_gguf()} -r 1 -o json" in call for call in calls)
    assert all("-ctk q8_0 -ctv q8_0 -t 1" in call for call in calls)
    assert calls[-1].endswith("-p 30 -n 0 -d 0")


def assert_refused(done, code: int, pattern: str) -> None:
    """Check exit code and that stderr is exactly one line that matches, but for progress."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [x for x in done.stderr.splitlines() if not re.match(r"(writing random|measuring)", x)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("reasonalloc-bench: ")
    assert re.search(pattern, lines[0]), lines[0]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], r"Missing option '--shape'"),
        (["--shape", "big"], r"shape = 'big' is unknown: must be one of r1-qwen-1\.5b"),
        (["--shape", "demo", "--weights", "q3"], r"'q3' is not one of"),
        (["--shape", "m.gguf", "--weights", "f16"], r"--weights is for the named shapes"),
        (["--shape", "demo", "--depths", "1,x"], r"--depths '1,x' is not a list of numbers"),
        (["--shape", "demo", "--depths", "-5"], r"--depths -5: every number must be 0 to"),
        (["--shape", "demo", "--depths", "none"], r"--depths none: there must be one"),
        (["--shape", "demo", "--depths", 1 << 30], r"every number must be 0 to 1048576"),
        (["--shape", "demo", "--budgets", "0"], r"--budgets 0: every number must be 1 to"),
        (["--shape", "demo", "--budgets", "5"], r"budget 5 is too small"),
        (["--shape", "demo", "--buffer", "0"], r"buffer = 0 is out of range"),
        (["--shape", "demo", "--policy", "best"], r"policy = 'best' is unknown"),
        (["--shape", "demo", "--stock", "f16,q3"], r"cache type = 'q3' is unknown"),
        (["--shape", "demo", "--kv-type", "q3"], r"cache type = 'q3' is unknown"),
        (["--shape", "demo", "--splits", "odd"], r"--splits 'odd' is unknown: must be one of even"),
        (["--shape", "demo", "--prompts", ""], r"--prompts '' is not a list of numbers"),
        (["--shape", "demo", "--parts", "all"], r"--parts 'all' is unknown: must be of decode"),
        (["--shape", "demo", "--repeat", 0], r"--repeat.*0 is not in the range"),
        (["--shape", "demo", "--threads", 0], r"--threads.*0 is not in the range"),
        (["--shape", "demo", "--json", "no/such/x.json"], r"no/such/x\.json: .*folder does not"),
        (["--shape", "demo", "--plot", "x.gif"], r"plot = 'x\.gif' must end in"),
        (["--shape", "demo", "--llama-bench", "no/such"], r"--llama-bench no/such: no such file"),
        (["--shape", "demo", "--unpatched", "no/such"], r"--unpatched no/such: no such folder"),
    ],
)
def test_bad_input(bench, arguments, pattern) -> None:
    assert_refused(bench(*arguments), USAGE, pattern)


def test_missing_and_damaged_models(bench, make_gguf, tmp_path) -> None:
    assert_refused(bench("--shape", tmp_path / "m.gguf"), FAILURE, r"m\.gguf: no such file")
    path = tmp_path / "half.gguf"
    whole = make_gguf().read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = bench("--shape", path, "--quick", "--budgets", 32)
    assert_refused(done, FAILURE, r"half\.gguf.*(damaged|not within the file|cannot be loaded)")


def test_a_binary_that_is_no_llama_bench(bench, make_gguf, tmp_path) -> None:
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\necho hello\n")
    fake.chmod(0o755)
    done = bench("--shape", make_gguf(), "--quick", "--llama-bench", fake)
    assert_refused(done, FAILURE, r"fake printed no figures: is it a llama-bench\?")


def test_what_cannot_run_does_not_stop_the_rest(bench, make_gguf) -> None:
    done = bench(
        *("--shape", make_gguf(arch="mamba"), "--depths", 8, "--budgets", 32, "--buffer", 8),
        *("--stock", "f16", "--prompts", "none", "--repeat", 1, "--threads", 1),
    )
    assert done.returncode == 0, done.stderr
    assert "- decode, budget 32, depth 8: no context could be made:" in done.stdout
    assert "- load, budget 32: " in done.stdout
    assert "architecture 'mamba' is not supported" in done.stdout
    assert "| stock f16 | 8 |" in done.stdout


def test_warm_up_precedes_the_clock() -> None:
    """The context has room for the tokens before, the warm-up, and the timed ones."""
    assert n_cells(512, 128) == 768 >= 512 + N_WARM + 128
