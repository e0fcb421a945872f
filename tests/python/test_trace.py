"""Traces: what is written equals what the engine holds; nothing is lost when it stops early."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from engine import Engine
from llama_cpp import llama_cpp as bindings
from sessions import SMALL, complete
from traces import as_lists

from py_reasonalloc import ComputeError, ConfigError, NotFoundError, ReasonLlama
from py_reasonalloc.trace.format import Compression, State
from py_reasonalloc.trace.read import read_trace
from py_reasonalloc.trace.view import Style, chosen_heads, marked_text
from py_reasonalloc.trace.write import check_target

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


def held_now(llama: ReasonLlama) -> list[list[list[int]]]:
    stats = llama.kv_stats()
    return [
        [stats.kept_positions(il, ih).tolist() for ih in range(len(layer))]
        for il, layer in enumerate(stats.layers)
    ]


@pytest.fixture(scope="module")
def traced(make_gguf, tmp_path_factory) -> Path:
    """A trace file of 120 tokens after a prompt of 6."""
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    with ReasonLlama(make_gguf(), **SMALL) as llama, llama.trace_to(path, 6):
        complete(llama)
    return path


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_trace_equals_the_engines(make_gguf, tmp_path, heads, suffix) -> None:
    path = tmp_path / f"t{suffix}"
    with ReasonLlama(make_gguf(), **{**SMALL, "policy": "rkv"}, heads=heads) as llama:
        prompt = llama.tokenize(b"what is it? " * 8)
        with llama.trace_to(path, len(prompt)):
            stream = llama.generate(prompt, temp=0.0)
            tokens = [next(stream) for _ in range(100)]
        final = held_now(llama)
        text = llama.detokenize([*prompt, *tokens[:-1]], special=True).decode()
    trace = read_trace(path)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == (suffix == ".jsonl.gz")
    assert trace.notes == ()
    assert list(trace.tokens) == [*prompt, *tokens[:-1]]
    assert "".join(trace.pieces) == text
    assert as_lists(trace.snapshot().held) == final

    config = {"head_alloc": heads, "buffer": 16}
    with Engine(make_gguf(), budget=32, config=config, n_ubatch=16) as engine:
        engine.trace()
        engine.decode(prompt)
        engine.decode_each(tokens[:-1])
        expected = engine.traces
    found = [(done, layer) for done in trace.compressions for layer in done.layers]
    assert len(found) == len(expected) > 10
    for (done, layer), other in zip(found, expected):
        assert (done.step, done.n_pos, layer.il) == (other.i_compression, other.n_pos, other.il)
        assert list(layer.budgets) == other.budgets
        for ih in range(2):
            assert layer.kept_positions(ih).tolist() == other.kept(ih).tolist()
    if heads == "adaptive":
        assert len({layer.budgets for _, layer in found}) > 1


def test_header(make_gguf, traced) -> None:
    header = read_trace(traced).header
    assert header.model
    assert (header.n_layer, header.n_head_kv, header.n_prompt) == (2, (2, 2), 6)
    assert (header.budget, header.buffer, header.sinks, header.window) == (32, 16, 4, 8)
    assert (header.policy, header.layer_alloc, header.head_alloc) == ("loss", "uniform", "uniform")
    assert header.budgets == ((32, 32), (32, 32))


def test_layers_without_a_compression_go_on(make_gguf, tmp_path) -> None:
    """Uneven layers are compressed at different times; snapshots are complete all the same."""
    path = tmp_path / "t.jsonl"
    counts, states = [], []
    with ReasonLlama(make_gguf(n_layer=3), **{**SMALL, "layers": [20, 32, 44]}) as llama:

        def check(done: Compression) -> None:
            counts.append(len(done.layers))
            states.append((llama.n_cached(), held_now(llama)))

        with llama.trace(check):
            complete(llama)
        with pytest.raises(NotFoundError), ReasonLlama(make_gguf(), None, n_ctx=64) as stock:
            stock.trace(check).__enter__()
        llama.reset()
        with llama.trace_to(path):
            complete(llama)
    assert min(counts) < 3
    trace = read_trace(path)
    snapshots = [s for r, s in trace.snapshots() if isinstance(r, Compression)]
    states = states[-len(snapshots) :]
    for snapshot, (n_pos, held) in zip(snapshots[1:], states[1:]):
        grown = [
            [[*positions, *range(snapshot.n_pos, n_pos)] for positions in layer]
            for layer in as_lists(snapshot.held)
        ]
        assert grown == held


def test_a_second_prompt_and_a_cut(make_gguf, tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        complete(llama, "before the trace", 60)
        with llama.trace_to(path):
            complete(llama, "first of all", 60)
            complete(llama, "first of two", 20)
            llama.n_tokens -= 3
            llama.eval([65, 66])
            state = llama.save_state()
            llama.eval([67] * 60)
            llama.load_state(state)
        final, tokens = held_now(llama), llama.input_ids[: llama.n_cached()].tolist()
    trace = read_trace(path)
    states = [record for record in trace.records if isinstance(record, State)]
    assert len(states) >= 4 and trace.notes == ()
    assert list(trace.tokens) == tokens
    assert as_lists(trace.snapshot().held) == final
    snapshots = [snapshot for _, snapshot in trace.snapshots()]
    assert snapshots[0].n_text == 0  # of another text
    assert snapshots[-1].n_text == snapshots[-1].n_pos == len(tokens)
    page = marked_text(trace, trace.snapshot(1), chosen_heads(trace, None, None), Style())
    assert "not in the file" in "\n".join(page)


def test_an_aborted_decode(make_gguf, tmp_path) -> None:
    path, calls = tmp_path / "t.jsonl", []

    @bindings.ggml_abort_callback
    def abort(_):
        calls.append(1)
        return len(calls) > 60

    with ReasonLlama(make_gguf(), **SMALL, n_batch=256) as llama:
        tokens = llama.tokenize(b"hello" * 40)
        with llama.trace_to(path):
            bindings.llama_set_abort_callback(llama.ctx, abort, None)
            with pytest.raises(ComputeError):
                llama.eval(tokens)
            never = ctypes.cast(None, bindings.ggml_abort_callback)
            bindings.llama_set_abort_callback(llama.ctx, never, None)
            llama.eval(tokens[llama.n_tokens :])
        n_compressions, final = llama.kv_stats().n_compressions, held_now(llama)
    trace = read_trace(path)
    assert [done.step for done in trace.compressions] == list(range(n_compressions))
    assert list(trace.tokens) == tokens
    assert as_lists(trace.snapshot().held) == final


def test_a_callback(make_gguf) -> None:
    seen: list[Compression] = []
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        with llama.trace(seen.append):
            text = complete(llama)
            with pytest.raises(ConfigError, match="running already"):
                llama.trace_to("x.jsonl").__enter__()
        n = llama.kv_stats().n_compressions
        assert len(seen) == n > 3
        llama.reset()
        llama.clear()
        assert complete(llama) == text
        assert len(seen) == n  # nothing after the block

        def fail(done: Compression) -> None:
            raise KeyError(done.step)

        llama.clear()
        with llama.trace(fail), pytest.raises(KeyError):
            complete(llama)
        llama.clear()
        assert complete(llama) == text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(cli, make_gguf) -> None:
    done = cli(make_gguf(), "-p", "hi", "-n", 100, "--budget", 32, "--trace", "/dev/full")
    assert done.returncode == FAILURE
    assert done.stderr == (
        "reasonalloc-run: /dev/full: the trace cannot be written: No space left on device\n"
    )


# --- reasonalloc-run -----------------------------------------------------------------------------


def test_command_line(cli, make_gguf, tmp_path) -> None:
    path = tmp_path / "t.jsonl.gz"
    arguments = (make_gguf(), "-p", "hello", "-n", 80, "--budget", 32, "--buffer", 16, "--json")
    done = cli(*arguments, "--temp", 0, "--trace", path)
    assert (done.returncode, done.stderr) == (0, "")
    report, trace = json.loads(done.stdout), read_trace(path)
    assert report["trace"] == str(path)
    assert len(trace.compressions) == report["n_compressions"] > 0
    assert (len(trace.tokens), trace.header.n_prompt) == (report["n_pos"], report["n_prompt"])
    assert json.loads(cli(*arguments, "--temp", 0).stdout)["text"] == report["text"]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--trace", "MODEL"], "would replace a file"),
        (["--trace", "t", "--no-budget"], "--trace and --no-budget exclude each other"),
    ],
)
def test_command_line_refuses(cli, make_gguf, arguments, pattern) -> None:
    model = make_gguf()
    before = model.read_bytes()
    arguments = [str(model) if argument == "MODEL" else argument for argument in arguments]
    done = cli(model, "-p", "hi", *arguments)
    assert done.returncode == USAGE
    assert len(done.stderr.splitlines()) == 1 and pattern in done.stderr
    assert model.read_bytes() == before


def test_targets_are_checked_early(tmp_path) -> None:
    assert check_target(tmp_path / "t.jsonl") == tmp_path / "t.jsonl"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="no folder"):
        check_target(tmp_path / "no" / "t.jsonl")
    with pytest.raises(ConfigError, match="is a folder"):
        check_target(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped(command, make_gguf, tmp_path, number, suffix) -> None:
    path = tmp_path / f"t.jsonl{suffix}"
    arguments = (make_gguf(n_ctx_train=1 << 20), "-p", "hello", "--budget", 32, "--buffer", 16)
    with subprocess.Popen(
        [*command, *map(str, arguments), "--temp", "0", "--threads", "1", "--trace", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        bufsize=0,
    ) as process:
        text = b""
        while len(text) < 150:
            text += process.stdout.read(50)
        process.send_signal(number)
        more, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors and b"Exception" not in errors
    trace = read_trace(path)
    assert len(trace.compressions) >= 6
    assert [done.step for done in trace.compressions] == list(range(len(trace.compressions)))
    if number == signal.SIGINT:
        assert process.returncode == INTERRUPTED and trace.notes == ()
        assert (
            "".join(trace.pieces)
            == "<s>hello" + (text + more).decode()[:-1][: len(trace.pieces) - 6]
        )
    else:
        assert "has no end" in trace.notes[-1] and trace.tokens == ()
        assert marked_text(trace, trace.snapshot(), [(0, 0)], Style())
