"""Sessions in several threads, and after a fork."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import pytest
from llama_cpp import LogitsProcessorList
from llama_cpp import llama_cpp as bindings
from sessions import GREEDY, SMALL, complete, fresh

from py_reasonalloc import (
    ContextError,
    ReasonLlama,
)
from py_reasonalloc.engine.log import LogCapture
from py_reasonalloc.session import turns

# --- threads -------------------------------------------------------------------------------------

OPEN_IN_THREADS = """
import os, sys, threading
from py_reasonalloc import ReasonLlama
before = [os.fstat(fd).st_ino for fd in (1, 2)], sys.stdout, sys.stderr
failed = []
def work(i):
    try:
        for _ in range(6):
            with ReasonLlama(sys.argv[1], budget=32, buffer=16, n_threads=1) as llama:
                assert [os.fstat(fd).st_ino for fd in (1, 2)] == before[0]
                llama("hello", max_tokens=3)
    except BaseException as error:
        failed.append(repr(error))
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
assert ([os.fstat(fd).st_ino for fd in (1, 2)], sys.stdout, sys.stderr) == before
print("out"); print("err", file=sys.stderr)
"""


def test_sessions_made_in_several_threads_leave_the_output_alone(make_gguf) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPEN_IN_THREADS, str(make_gguf())],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_output_of_other_threads_goes_on_while_a_session_opens(make_gguf, tmp_path) -> None:
    """The descriptors are not even redirected for a moment."""
    stop, path = threading.Event(), tmp_path / "out"
    with path.open("w") as file:
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            n_written = 0

            def write() -> None:
                nonlocal n_written
                while not stop.is_set():
                    n_written += os.write(1, b"x")

            thread = threading.Thread(target=write)
            thread.start()
            for _ in range(20):
                ReasonLlama(make_gguf(), **SMALL).close()
            stop.set()
            thread.join()
        finally:
            os.dup2(saved, 1)
            os.close(saved)
    assert path.stat().st_size == n_written > 0


def current_callback() -> int | None:
    callback = bindings.llama_log_callback()
    bindings.llama_log_get(ctypes.byref(callback), ctypes.byref(ctypes.c_void_p()))
    return ctypes.cast(callback, ctypes.c_void_p).value


def test_log_captures_that_overlap_restore_what_was_there(make_gguf) -> None:
    before, entered, leave = current_callback(), threading.Event(), threading.Event()

    def other() -> None:
        with LogCapture(forward=False):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with LogCapture(forward=False):
        thread.start()
        assert entered.wait(30)
    assert current_callback() != before  # the other thread's block goes on
    leave.set()
    thread.join()
    assert current_callback() == before


def test_a_log_line_goes_to_the_thread_it_comes_from(tmp_path) -> None:
    logs = {}

    def load(name: str) -> None:
        with LogCapture(forward=False) as log:
            barrier.wait(30)
            params = bindings.llama_model_default_params()
            assert not bindings.llama_model_load_from_file(str(tmp_path / name).encode(), params)
            barrier.wait(30)
        logs[name] = log.errors

    names, barrier = ("first", "second"), threading.Barrier(2)
    threads = [threading.Thread(target=load, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        other = next(each for each in names if each != name)
        assert any(name in line for line in logs[name])
        assert not any(f"/{other}" in line for line in logs[name])


def test_one_session_in_several_threads(make_gguf) -> None:
    prompts = [f"prompt {i}" for i in range(6)]
    expected = [fresh(make_gguf, prompt)[:60] for prompt in prompts]
    found: dict[int, list[str]] = {}
    with ReasonLlama(make_gguf(), **SMALL) as llama:

        def work(i: int) -> None:
            texts = []
            for _ in range(3):
                texts.append(complete(llama, prompts[i], max_tokens=60))
                chunks = llama(prompts[i], max_tokens=60, stream=True, **GREEDY)
                texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))
                llama.kv_stats()
                llama.tokenize(b"hello")
            found[i] = texts

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: [text] * 6 for i, text in enumerate(expected)}


def test_a_text_of_another_thread_is_waited_for(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        stream = llama("hello", max_tokens=80, stream=True, **GREEDY)
        pieces = [next(stream)["choices"][0]["text"]]
        other: list[str] = []
        thread = threading.Thread(target=lambda: other.append(complete(llama, "other")))
        thread.start()
        pieces += [chunk["choices"][0]["text"] for chunk in stream]
        thread.join()
    assert "".join(pieces) == fresh(make_gguf, "hello")[:80]
    assert other == [fresh(make_gguf, "other")]


def test_a_dropped_text_is_not_waited_for(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        for _ in llama("hello", max_tokens=80, stream=True, **GREEDY):
            break
        other: list[str] = []
        thread = threading.Thread(target=lambda: other.append(complete(llama, "other")))
        thread.start()
        thread.join(turns.PATIENCE / 2)
        assert other == [fresh(make_gguf, "other")]


def test_a_text_that_nobody_asks_for_is_given_up(make_gguf, monkeypatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.2)
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        stream = llama("hello", max_tokens=80, stream=True, **GREEDY)
        next(stream)
        other: list[str] = []
        thread = threading.Thread(target=lambda: other.append(complete(llama, "other")))
        thread.start()
        thread.join(60)
        assert other == [fresh(make_gguf, "other")]
        with pytest.raises(ContextError, match="used for something else"):
            next(stream)


@pytest.mark.parametrize(
    "use",
    [
        lambda llama: complete(llama, "other"),
        lambda llama: llama.eval([5]),
        lambda llama: llama.clear(),
        lambda llama: next(llama.generate([5, 6])),
    ],
    ids=["completion", "eval", "clear", "generate"],
)
def test_two_texts_of_one_thread(make_gguf, use) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        stream = llama("hello", max_tokens=80, stream=True, **GREEDY)
        next(stream)
        use(llama)
        with pytest.raises(ContextError, match="used for something else"):
            next(stream)
        assert complete(llama) == fresh(make_gguf, "hello")


def test_a_text_goes_on_after_a_look(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        pieces = []
        for chunk in llama("hello", max_tokens=80, stream=True, **GREEDY):
            pieces.append(chunk["choices"][0]["text"])
            llama.kv_stats()
            llama.memory_use()
            llama.detokenize(llama.tokenize(b"x"))
            llama.save_state()
        assert "".join(pieces) == fresh(make_gguf, "hello")[:80]


def test_a_callback_may_use_the_session(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:

        def look(tokens, scores):
            assert llama.kv_stats().n_pos == llama.n_cached() == len(tokens)
            return scores

        text = complete(llama, logits_processor=LogitsProcessorList([look]))
        assert text == fresh(make_gguf, "hello")


# --- fork ----------------------------------------------------------------------------------------

FORK = """
import os, sys
from py_reasonalloc import ContextError, ReasonLlama
llama = ReasonLlama(sys.argv[1], budget=32, buffer=16)
llama("hello", max_tokens=3)
child = os.fork()
if child == 0:
    try:
        llama("hello", max_tokens=3)
    except ContextError as error:
        print(error, flush=True)
        llama.close()
        del llama
        with ReasonLlama(sys.argv[1], budget=32, buffer=16, n_threads=1, n_threads_batch=1) as own:
            print(len(own("hello", max_tokens=3)["choices"][0]["text"]), flush=True)
        sys.exit(0)
    os._exit(1)
status = os.waitpid(child, 0)[1]
print(len(llama("hello", max_tokens=3)["choices"][0]["text"]))
sys.exit(os.waitstatus_to_exitcode(status) if hasattr(os, "waitstatus_to_exitcode") else status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_cannot_use_the_session(make_gguf) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(make_gguf())],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("the session belongs to the process that this one was forked from")
    assert lines[1:] == ["3", "3"] and done.stderr == ""
