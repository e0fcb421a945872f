"""examples/desktop in a window of a virtual display, used as a person would."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TIMEOUT
from virtual_display import display, require_tkinter

APP = ROOT / "examples" / "desktop" / "app.py"


def app(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    require_tkinter()
    base = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    return subprocess.run(
        [sys.executable, APP, *map(str, arguments)],
        env={**base, **environment},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
        check=False,
    )


def test_a_person_types_reads_and_stops() -> None:
    with display() as name:
        done = app("--selftest", "--budget", 96, DISPLAY=name)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["was_stopped"] is True and report["n_evicted"] > 0
    asked, _, answer = report["text"].partition("\n")
    assert asked.startswith("> Given ") and answer.startswith("<think>\nLet me work")
    assert answer.rstrip().endswith("[stopped]") and "The answer is" not in answer
    # 96 + 16 tokens of 6 layers and 4 heads, K and V of 32 values of f16
    assert report["kv_bytes"] == 112 * 6 * 4 * 2 * 32 * 2
    assert f"a cache of {report['kv_bytes']:,} bytes" in report["status"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["no.gguf"], "no.gguf: no such file"), (["--budget", "3"], "budget 3 is too small")],
)
def test_a_model_that_cannot_be_opened(arguments, reason) -> None:
    with display() as name:
        done = app("--selftest", *arguments, DISPLAY=name)
    assert (done.returncode, done.stderr) == (1, "")
    assert reason in json.loads(done.stdout)["error"]


def test_no_display() -> None:
    done = app()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no window can be opened")
    assert len(done.stderr.splitlines()) == 1
