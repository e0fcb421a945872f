"""The script that does all GPU checks in one call, rehearsed without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "check.sh"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    done = run("--backend", "cpu", "--python", sys.executable, tmp_path, "-k", "match_stock")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in (tmp_path / "tests.log").read_text()
    report = json.loads((tmp_path / "bench.json").read_text())
    arms = {line["arm"] for line in report["summary"]["decode"]}
    assert {"budget 48", "budget 48 uneven, head", "budget 48 uneven, layer"} <= arms
    assert "## Decoding in turns" in (tmp_path / "bench.md").read_text()


@pytest.mark.slow
def test_a_stage_that_fails_is_named(tmp_path: Path) -> None:
    done = run("--backend", "cpu", "--python", sys.executable, tmp_path, "-k", "no_such_test")
    assert done.returncode == 1
    assert "failed: engine tests, 0 layers on the GPU" in done.stderr
    assert (tmp_path / "bench.json").is_file()


@pytest.mark.parametrize(
    "arguments", [(), ("--backend", "tpu", "x"), ("--fast", "x"), ("--backend",)]
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
