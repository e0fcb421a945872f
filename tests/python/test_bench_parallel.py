"""`reasonalloc-bench --parallel`: many sequences in one context, measured for what they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llama_cpp import llama_cpp as bindings

from py_reasonalloc.bench import fill
from py_reasonalloc.bench.engine import Engine
from py_reasonalloc.bench.jobs import Arm, Job
from py_reasonalloc.bench.measure import PARALLEL, Settings
from py_reasonalloc.bench.parallel import (
    PRODUCTS,
    STOCK,
    measure_group,
    plan_parallel,
    summarize_parallel,
)
from py_reasonalloc.sizes import Shape, full_bytes

ROOT = Path(__file__).resolve().parents[2]
USAGE = 2


def job_of(path: Path, arm: Arm, folder: Path, **more) -> Job:
    return Job(PARALLEL, arm, str(path), 1, folder=str(folder), **more)


@pytest.mark.parametrize("budget", [None, 32])
def test_every_sequence_has_the_depth(make_gguf, tmp_path, budget) -> None:
    arm = Arm("a", budget=budget, buffer=16, n_ubatch=16)
    with Engine(job_of(make_gguf(), arm, tmp_path, depth=200, n_tokens=8, n_seq=3)) as engine:
        engine.open_context(512)
        start = fill.skip(engine)
        engine.read(200 - start, start)
        engine.share()
        assert len(engine.step(5, 200)) == 5
        last = [bindings.llama_memory_seq_pos_max(engine.memory, seq_id) for seq_id in range(3)]
        assert last == [204, 204, 204]
        if budget is None:
            engine.take_back(200)
            last = [bindings.llama_memory_seq_pos_max(engine.memory, i) for i in range(3)]
            assert last == [199, 199, 199]
        else:
            stats = engine.stats()
            assert stats.n_seq == 3
            # 64 tokens before, and a compression per buffer, copied with the sequence
            assert stats.n_compressions >= 3
        engine.read(4, 200 if budget is None else 205)  # batches of one sequence still work


def test_contexts_take_turns(make_gguf, tmp_path) -> None:
    settings = Settings(
        model=make_gguf(),
        depths=(64,),
        budgets=(32,),
        stock_types=("f16",),
        buffer=16,
        n_buffers=2,
        parallel=(1, 3),
        parallel_depth=300,
    )
    (group,) = plan_parallel(settings)
    assert [(job.n_seq, job.n_at_once, job.depth) for job in group.jobs] == [
        *((1, 1, 300), (3, 1, 300)),
        *((1, 1, 0), (1, 3, 0)),
        *((1, 1, 300), (3, 1, 300)),
    ]
    rows = [{**row, "repetition": 0} for row in measure_group(group, 2, 16)]
    assert [row["what"] for row in rows] == ["budget"] * 2 + [PRODUCTS] * 2 + [STOCK] * 2
    for row in rows:
        assert len(row["seconds"]) == 2
        assert all(seconds > 0 for seconds in row["seconds"])
        is_ours = row["budget"] is not None
        assert row["n_steps"] == (16 if is_ours else 4)
        assert (row["compress_seconds"] > 0) == is_ours
    shape = Shape(n_layer=2, n_head_kv=2, head_dim=32)
    one, three = summarize_parallel(rows)
    assert (one["n_seq"], three["n_seq"]) == (1, 3)
    formula = 48 * 2 * 2 * 2 * 32 * 2  # tokens, layers, KV heads, K and V, values, bytes
    for n, line in ((1, one), (3, three)):
        assert line["cache_bytes"] == line["cache_bytes_formula"] == n * formula
        assert line["stock_depth"] == 300
        assert line["stock_cache_bytes"] == n * full_bytes(shape, 512, "f16")
    assert one["over_one"] == one["most"] == one["of_most"] == (1.0, 1.0, 1.0)
    seconds = [row["seconds"] for row in rows]
    ratios = sorted(3 * a / b for a, b in zip(seconds[0], seconds[1]))
    assert three["over_one"][1:] == pytest.approx(ratios)
    speeds = sorted(3 * 16 / s for s in seconds[1])
    assert three["tokens_per_second"][1:] == pytest.approx(speeds)
    of_stock = sorted(16 / 4 * b / a for a, b in zip(seconds[1], seconds[5]))
    assert three["over_stock"][1:] == pytest.approx(of_stock)


def test_contexts_that_cannot_be_made_say_why(make_gguf, tmp_path) -> None:
    settings = Settings(
        model=make_gguf(head_dim=48),
        depths=(8,),
        budgets=(32,),
        stock_types=("f16",),
        kv_type="q8_0",
        parallel=(1, 2),
        parallel_depth=8,
    )
    (group,) = plan_parallel(settings)
    (row,) = measure_group(group, 1, 128)
    assert row["kind"] == PARALLEL
    assert "does not divide n_embd_head_k=48" in row["error"]


def bench(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
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


def test_the_command(tmp_path) -> None:
    path = tmp_path / "report.json"
    done = bench(
        tmp_path,
        *("--shape", "demo", "--threads", 1, "--parts", "parallel", "--parallel", "1,4"),
        *("--parallel-depth", 256, "--budgets", 48, "--buffer", 16, "--buffers", 1),
        *("--stock", "q4_0", "--repeat", 1, "--json", path),
    )
    assert done.returncode == 0, done.stderr
    assert "## Side by side" in done.stdout
    assert "## Decoding" not in done.stdout
    report = json.loads(path.read_text())
    lines = report["summary"]["parallel"]
    assert [(line["arm"], line["n_seq"]) for line in lines] == [("budget 48", 1), ("budget 48", 4)]
    assert "--parallel 1,4 --parallel-depth 256" in report["command"]


def test_products_alone(tmp_path) -> None:
    path = tmp_path / "report.json"
    done = bench(
        tmp_path,
        *("--shape", "demo", "--threads", 1, "--parts", "parallel", "--parallel", "1,2,8"),
        *("--budgets", "none", "--stock", "f16", "--buffers", 1, "--repeat", 1, "--json", path),
    )
    assert done.returncode == 0, done.stderr
    assert "seconds are the processor's" in done.stdout
    lines = json.loads(path.read_text())["summary"]["parallel"]
    assert [line["n_seq"] for line in lines] == [1, 2, 8]
    for line in lines:
        assert line["products_tokens_per_second"][0] > 0
        assert line["tokens_per_second"] is line["cache_bytes"] is line["over_stock"] is None
    assert lines[2]["most"][0] == pytest.approx(
        lines[2]["products_tokens_per_second"][0] / lines[0]["products_tokens_per_second"][0]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parallel", "1,x"], "--parallel '1,x' is not a list of numbers"),
        (["--parallel", "0,2"], "--parallel 0,2: every number must be 1 to"),
        (["--parallel", "none"], "--parallel none: every number must be 1 to"),
        (["--parallel", "4000"], "--parallel 4000: every number must be 1 to 256"),
        (["--parallel", "2", "--parts", "decode"], "--parallel: --parts leaves parallel out"),
        (["--parts", "parallel"], "--parts parallel needs --parallel N,N,..., e.g. 1,2,4,8"),
        (["--parallel", "2", "--parallel-depth", "0"], "'--parallel-depth'"),
    ],
)
def test_bad_input(tmp_path, arguments, words) -> None:
    done = bench(tmp_path, "--shape", "demo", *arguments)
    assert (done.returncode, done.stdout) == (USAGE, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("reasonalloc-bench: ")
    assert words in line
