"""`reasonalloc-inspect`: what it shows, in pipes and terminals, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from sessions import SMALL, complete
from traces import small_trace

from py_reasonalloc import ReasonLlama
from py_reasonalloc.trace.format import Compression, Header, LayerCompression, State, Trace, runs_of
from py_reasonalloc.trace.read import read_trace
from py_reasonalloc.trace.view import ASCII_BARS, Style, chosen_heads, heat_map, marked_text, shrunk

FAILURE, USAGE = 1, 2
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def traced(make_gguf, tmp_path_factory) -> Path:
    """A trace file of 120 tokens after a prompt of 6."""
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    with ReasonLlama(make_gguf(), **SMALL) as llama, llama.trace_to(path, 6):
        complete(llama)
    return path


@pytest.fixture(scope="module")
def inspect():
    """Return a function that runs `reasonalloc-inspect` with its output in a pipe."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "py_reasonalloc.commands.inspect", *map(str, arguments)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=60,
            cwd=ROOT,
            env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "60", **environment},
            check=False,
        )

    return run


def test_page(inspect, traced) -> None:
    done = inspect(traced)
    assert (done.returncode, done.stderr) == (0, "")
    trace = read_trace(traced)
    n = len(trace.compressions)
    assert "2 layers, 2 KV heads each" in done.stdout
    assert f"prompt of 6 tokens, {len(trace.tokens)} tokens in all, {n} compressions" in done.stdout
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.startswith("  layer")]
    assert rows == [f"  layer {il}  {'▅' * n}  32..32" for il in range(2)]
    start = next(i for i, line in enumerate(lines) if line.startswith("'"))
    text, shades = lines[start + 1 :: 2], lines[start + 2 :: 2]
    assert "".join(text) == "".join(trace.pieces)
    assert all(len(line) <= 60 for line in lines[start + 1 :])
    share = trace.snapshot().share(chosen_heads(trace, None, None))
    marks = "".join(shade.ljust(len(line)) for line, shade in zip(text, shades))
    # the first piece, <s>, has three letters
    assert [" ░▒▓█".index(mark) for mark in marks[2:]] == np.ceil(share * 4).astype(int).tolist()


def test_one_head_after_a_compression(inspect, tmp_path) -> None:
    path = small_trace(tmp_path / "t.jsonl")
    done = inspect(path, "--layer", 0, "--head", 1, "--at", 1)
    assert done.returncode == 0, done.stderr
    page = done.stdout
    assert "text after compression 1, layer 0, head 1:" in page
    assert "8 tokens: 3 in the cache, 5 evicted" in page
    tail = page.splitlines()[-4:]
    assert tail == ["<s>ab␊", "███", "def␛[31m�g", "  ████████"]
    assert "layer 1" not in page
    rows = [line for line in page.splitlines() if line.startswith("  layer 0 head")]
    assert rows == ["  layer 0 head 0  ██  5..5", "  layer 0 head 1  ▁▁  3..3"]


def test_without_unicode(inspect, tmp_path) -> None:
    done = inspect(small_trace(tmp_path / "t"), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert ASCII_BARS[0] in done.stdout and "###" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_in_a_terminal_only(tmp_path, no_color) -> None:
    import pty

    path = small_trace(tmp_path / "t.jsonl", model="evil\x1b]0;title\x07")
    main, side = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "py_reasonalloc.commands.inspect", str(path)]
    with subprocess.Popen(command, stdout=side, cwd=ROOT, env=environment) as process:
        os.close(side)
        output = b""
        while True:
            try:
                more = os.read(main, 65536)
            except OSError:  # what Linux says at the end
                break
            output += more
            if not more:
                break
    os.close(main)
    assert process.returncode == 0
    assert (b"\x1b[48;5;" in output) == (no_color == "")
    assert b"\x1b]" not in output and b"\x07" not in output and b"\x1b[31m" not in output


@pytest.mark.parametrize(
    ("arguments", "code", "pattern"),
    [
        (["--head", 0], USAGE, "--head needs --layer"),
        (["--layer", 2], USAGE, "--layer 2 is out of range: the trace has layers 0 to 1"),
        (["--layer", 1, "--head", 1], USAGE, "--head 1 is out of range: layer 1 has 1 KV heads"),
        (["--at", 3], USAGE, "--at 3 is out of range: the trace has 2 compressions"),
        (["--at", 0], USAGE, "0 is not in the range"),
        (["--plot", "p.pdf"], USAGE, "must end in .png or .svg"),
        (["--frobnicate"], USAGE, "No such option"),
    ],
)
def test_usage(inspect, tmp_path, arguments, code, pattern) -> None:
    done = inspect(small_trace(tmp_path / "t.jsonl"), *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert len(done.stderr.splitlines()) == 1 and pattern in done.stderr
    assert done.stderr.startswith("reasonalloc-inspect: ")


def test_files_that_cannot_be_read(inspect, tmp_path) -> None:
    path = small_trace(tmp_path / "t.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    for name, pattern in ((path, "truncated or damaged: line 4"), ("no.jsonl", "No such file")):
        done = inspect(name)
        assert (done.returncode, done.stdout) == (FAILURE, "")
        assert len(done.stderr.splitlines()) == 1 and pattern in done.stderr


def test_an_early_end_is_shown(inspect, tmp_path) -> None:
    path = small_trace(tmp_path / "t.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    done = inspect(path)
    assert done.returncode == 0, done.stderr
    assert "note: the trace has no end" in done.stdout
    assert "no compression took place" in done.stdout


def test_a_long_run_fits_the_width() -> None:
    values = np.arange(1000).reshape(2, 500)
    assert shrunk(values, 7).shape == (2, 7)
    assert shrunk(values, 7).mean(axis=1) == pytest.approx(values.mean(axis=1), rel=0.01)
    runs = (runs_of(np.arange(3)),)
    records = [
        Compression(i, 10 + i, (LayerCompression(0, (3 + i % 5,), runs),)) for i in range(300)
    ]
    header = Header("m", (1,), 4, 4, 1, 1, "rkv", "uniform", "uniform", None, ((4,),))
    for line in heat_map(Trace(header, tuple(records)), Style(width=50)):
        assert len(line) <= 60
    wide = Trace(header, (State(3, 3, (runs,)),), (1, 2, 3), ("漢", "字", "x"))
    assert marked_text(wide, wide.snapshot(), [(0, 0)], Style())[-1] == "█████"


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed (extra: plot)")
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(inspect, traced, tmp_path, suffix) -> None:
    path = tmp_path / f"p{suffix}"
    done = inspect(traced, "--plot", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    done = inspect(traced, "--plot", tmp_path / "no" / f"p{suffix}")
    assert done.returncode == FAILURE and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(HAS_MATPLOTLIB, reason="matplotlib is installed")
def test_plot_without_matplotlib(inspect, traced, tmp_path) -> None:
    done = inspect(traced, "--plot", tmp_path / "p.png")
    assert done.returncode == FAILURE
    assert done.stderr == ("reasonalloc-inspect: --plot needs matplotlib: pip install matplotlib\n")
