"""Full disks, closed streams, too little memory, aborts: one line each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TIMEOUT
from processes import (
    FAILURE,
    USAGE,
    Done,
    assert_refused,
    posix,
)

# --- standard output ------------------------------------------------------------------------------


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", ["demo", "-n", 3]),
        ("run", ["demo", "-n", 3, "--json"]),
        ("run", ["demo", "--dry-run"]),
        ("run", ["--help"]),
        ("run", ["--list-policies"]),
        ("inspect", ["TRACE"]),
        ("eval", ["--list-methods"]),
        ("eval", ["report", "RESULTS"]),
        ("profile", ["--compare", "PROFILE", "PROFILE"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_full_or_closed_output_is_one_line(call, written, name, arguments) -> None:
    arguments = [written.get(argument, argument) for argument in arguments]
    what = f"reasonalloc-{name}"
    if "report" in arguments:
        what += " report"
    done = call(name, *arguments, shell='"$0" "$@" >/dev/full')
    full = "standard output: cannot be written: No space left on device"
    assert_refused(done, FAILURE, full, what)
    done = call(name, *arguments, shell='exec "$0" "$@" >&-')
    assert_refused(done, FAILURE, "standard output is closed", what)


@pytest.fixture(scope="module")
def written(call, tmp_path_factory) -> dict[str, Path]:
    """Files that commands show."""
    folder = tmp_path_factory.mktemp("written")
    files = {"TRACE": folder / "t.jsonl", "RESULTS": folder / "r.jsonl"}
    assert call("run", "demo", "-n", 200, "--trace", files["TRACE"]).code == 0
    done = call("eval", "demo", "--methods", "full", "--limit", 1, "-o", files["RESULTS"])
    assert done.code == 0, done
    return files | {"PROFILE": next((ROOT / "profiles").glob("*.json"))}


@posix
def test_a_closed_error_stream_hurts_nothing(call, tmp_path) -> None:
    trace = tmp_path / "t.jsonl"
    done = call("run", "demo", "-n", 200, "--trace", trace, shell='exec "$0" "$@" 2>&-')
    assert (done.code, done.err) == (0, b"")
    assert done.out.startswith(b"<think>")
    assert call("inspect", trace).code == 0  # nothing of the summary got into it


@posix
def test_results_that_cannot_be_read_back(call) -> None:
    done = call("eval", "demo", "-o", "/dev/null")
    assert_refused(done, USAGE, "/dev/null: not a regular file", "reasonalloc-eval")


# --- aborts ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits differ")
def test_too_little_memory_is_one_line(call) -> None:
    """Just below what a run takes: no abort, and no debugger's words on standard output."""

    def run(limit: int) -> Done:
        """Run with so many KiB of address space."""
        shell = f'export OPENBLAS_NUM_THREADS=1; ulimit -c 0 -v {limit}; "$0" "$@"'
        return call("run", "demo", "-n", 40, "--threads", 1, shell=shell)

    too_little, enough = 100_000, 1_600_000
    while enough - too_little > 12_000:
        limit = (enough + too_little) // 2
        too_little, enough = (limit, enough) if run(limit).code else (too_little, limit)
    found = [run(too_little), run(too_little - 20_000)]
    for done in found:
        assert done.code == FAILURE, done
        assert len(done.err.splitlines()) == 1, done
        assert b"gdb" not in done.out and b"LWP" not in done.out
    assert any(b"memory" in done.err for done in found)


ABORT = """
import sys
from py_reasonalloc.engine.aborts import end_on_abort
from py_reasonalloc.engine.ggml import load_ggml
from py_reasonalloc.engine.modelfile import open_vocabulary
from py_reasonalloc.engine.prompts import tokenize

end_on_abort("name")
with open_vocabulary(sys.argv[1]) as model:
    load_ggml()["ggml_abort"](b"/build/of/x.c", 12, b"it broke")
"""


def test_an_abort_is_one_line(odd_files) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABORT, odd_files["plain"]], capture_output=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stdout) == (FAILURE, b"")
    assert done.stderr == b"name: llama.cpp gave up: x.c:12: it broke\n"
