"""Rows of a results file, as the tests of `eval.results.file` write them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import ROOT

from py_reasonalloc.eval.cases.rows import Row
from py_reasonalloc.eval.results.file import ResultsFile, read_results

SETTINGS: dict[str, Any] = {
    "model": "demo.gguf",
    "temp": 0.6,
    "raw": False,
    "profile": [1.5, 2.0],
    "shuffle_seed": None,
}
ROW = Row(
    method="rkv+lambda=0.5",
    budget=128,
    problem="7",
    sample=0,
    seed=3,
    gold="\\frac{1}{2}",
    answer=None,
    correct=False,
    n_prompt=20,
    n_generated=300,
    stop="loop",
    n_protect=20,
    peak_tokens=144,
    kv_bytes=1 << 20,
    n_evicted=170,
    n_compressions=9,
    prompt_seconds=0.1,
    decode_seconds=2.5,
    compress_seconds=0.01,
)


def numbered(i: int, **changes: Any) -> Row:
    return replace(ROW, problem=str(i), **changes)


def write_three(path: Path) -> Path:
    """Write a file with three rows."""
    with ResultsFile.open(path, SETTINGS) as file:
        for i in range(3):
            file.append(numbered(i))
    return path


def problems(path: Path) -> list[str]:
    return [row.problem for row in read_results(path).rows]


_CHILD = """
import json, random, sys
from dataclasses import replace
from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.results.file import ResultsFile
from py_reasonalloc.eval.cases.rows import Row

path, mode, settings, row = sys.argv[1:]
row = Row(**json.loads(row))
try:
    with ResultsFile.open(path, json.loads(settings)) as file:
        if mode == "hold":
            print("open", flush=True)
            sys.stdin.read()
        for i in range(len(file.done), 100_000 if mode == "append" else 0):
            text = "x" * random.randrange(1 << random.randrange(17))
            file.append(replace(row, problem=str(i), text=text))
            print(i, flush=True)
except ConfigError as error:
    print(error, flush=True)
"""


def child(path: Path, mode: str, **options: Any) -> subprocess.Popen[str]:
    arguments = [path, mode, json.dumps(SETTINGS), json.dumps(ROW.to_json())]
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, *map(str, arguments)], text=True, cwd=ROOT, **options
    )
