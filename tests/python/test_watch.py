"""``--watch`` shows what the engine holds; text and exit codes are those of a run."""

from __future__ import annotations

import json
import os
import sys

import pytest
from conftest import TIMEOUT

from py_reasonalloc.run.options import RunOptions
from py_reasonalloc.run.runner import run
from py_reasonalloc.run.watch import Frame, Watcher
from py_reasonalloc.session.config import BudgetConfig
from py_reasonalloc.session.steering import Sampling
from py_reasonalloc.task.problems import SAMPLE_PROBLEM
from py_reasonalloc.trace.read import read_trace

USAGE, INTERRUPTED = 2, 130


@pytest.mark.parametrize("is_traced", [False, True])
def test_what_is_shown_is_what_the_engine_holds(demo_model, tmp_path, is_traced) -> None:
    frames: list[Frame] = []

    def check(frame: Frame) -> None:
        frames.append(frame)
        stats = watcher._llama.kv_stats()
        for il, layer in enumerate(stats.layers):
            for ih, head in enumerate(layer):
                assert frame.snapshot.budgets[il][ih] == head.budget
                assert frame.n_held(il, ih) == len(stats.kept_positions(il, ih))
        assert len(frame.pieces) == len(frame.share) == frame.snapshot.n_pos
        assert (frame.n_evicted, frame.n_compressions) == (stats.n_evicted, stats.n_compressions)

    watcher = Watcher(check, interval=0.0)
    options = RunOptions(
        model=demo_model,
        config=BudgetConfig(budget=64, buffer=16, heads="adaptive"),
        max_tokens=120,
        sampling=Sampling(temp=0.0),
        trace=tmp_path / "t.jsonl" if is_traced else None,
    )
    report = run(options, SAMPLE_PROBLEM.prompt, lambda piece: None, watcher)
    assert len(frames) > 120
    last = frames[-1]
    assert last.n_evicted == report["n_evicted"] > 0
    assert 0 < last.n_last < last.n_evicted and last.n_last_pos < report["n_pos"]
    # the last token was drawn, never decoded
    whole = "".join(last.pieces)
    assert report["text"].startswith(whole.partition("<|assistant|>")[2])
    assert 0 <= last.share.min() < last.share.max() == 1
    assert run(options, SAMPLE_PROBLEM.prompt, lambda piece: None)["text"] == report["text"]
    if is_traced:
        assert len(read_trace(tmp_path / "t.jsonl").compressions) == report["n_compressions"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--watch"], "--watch needs a terminal on standard error"),
        (["--watch", "--no-budget"], "--no-budget and --watch exclude each other"),
        (["--watch", "--dry-run"], "--watch and --dry-run exclude each other"),
        (["--watch", "--chat", "--trace", "t"], "--watch, --chat and --trace exclude each other"),
    ],
)
def test_refused(cli, arguments, reason) -> None:
    done = cli("demo", *arguments)
    assert (done.returncode, done.stdout) == (USAGE, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("reasonalloc-run: ") and reason in line


@pytest.fixture
def terminal():
    """Return a function that runs a shell's line on a terminal: (what it showed, exit code)."""
    pexpect = pytest.importorskip("pexpect")
    started = []

    def start(line: str, *arguments: str, lines: int = 40):
        child = pexpect.spawn(
            "bash",
            # pexpect sets the size when the child runs already: on a busy machine too late
            ["-c", f"stty rows {lines} cols 100; {line}", *arguments],
            env={**os.environ, "TERM": "xterm-256color"},
            dimensions=(lines, 100),
            encoding="utf-8",
            codec_errors="replace",  # the terminal's ^C may come inside a character
            timeout=TIMEOUT,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def ended(child) -> tuple[str, int]:
    import pexpect

    child.expect(pexpect.EOF)
    child.wait()
    return child.before, child.exitstatus


pty = pytest.mark.skipif(sys.platform == "win32", reason="of POSIX")


@pty
@pytest.mark.parametrize("lines", [40, 12])
def test_on_a_terminal(terminal, command, cli, lines) -> None:
    plain = cli("demo").stdout
    child = terminal('exec "$0" "$@"', *command, "demo", "--watch", lines=lines)
    child.expect("tokens in .*? evicted")
    child.expect("layer 1 " if lines > 20 else "  1 ")
    shown, code = ended(child)
    assert code == 0
    assert plain.replace("\n", "\r\n") in shown  # the whole text, once the view is over
    assert "compressions in" in shown.rpartition(plain[-20:].rstrip())[2]
    assert "Traceback" not in shown


@pty
def test_the_text_may_go_elsewhere(terminal, command, cli, tmp_path) -> None:
    plain, report = cli("demo").stdout, json.loads(cli("demo", "--json").stdout)
    file = tmp_path / "out"
    _, code = ended(terminal(f'exec "$0" "$@" >"{file}"', *command, "demo", "--watch"))
    assert (code, file.read_text()) == (0, plain)
    _, code = ended(terminal(f'exec "$0" "$@" >"{file}"', *command, "demo", "--watch", "--json"))
    found = json.loads(file.read_text())
    assert code == 0 and (found["text"], found["n_evicted"]) == (
        report["text"],
        report["n_evicted"],
    )


@pty
@pytest.mark.usefixtures("foreground")
def test_ctrl_c(terminal, command, make_gguf) -> None:
    model = str(make_gguf(n_ctx_train=1 << 20))
    child = terminal('exec "$0" "$@"', *command, model, "-p", "hi", "--watch", "--budget", "32")
    child.expect("evicted, ")
    child.sendintr()
    shown, code = ended(child)
    assert code == INTERRUPTED and "stopped by Ctrl-C" in shown and "Traceback" not in shown


@pty
def test_a_conversation_that_is_watched(terminal, command) -> None:
    lines = "Given P is three; P plus five gives W. What is W?\n" * 2
    child = terminal(f'printf "%s" "{lines}" | "$0" "$@"', *command, "demo", "--chat", "--watch")
    shown, code = ended(child)
    assert code == 0 and shown.count("</think>\r\nThe answer is") >= 2
    assert "evicted" in shown and "layer 1" in shown
