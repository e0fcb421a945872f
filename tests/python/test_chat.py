"""``--chat``: turns that go on in one cache, scripts of lines, and a real terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import TIMEOUT
from gguf_factory import CHAT_TEMPLATE

from py_reasonalloc.engine.errors import BudgetError, ConfigError, ContextFullError
from py_reasonalloc.run.chat import Chat, read_messages
from py_reasonalloc.run.options import RunOptions
from py_reasonalloc.session.config import BudgetConfig
from py_reasonalloc.session.marks import Thoughts
from py_reasonalloc.session.steering import Sampling
from py_reasonalloc.session.thinking import ThinkLimit

FAILURE, USAGE = 1, 2
FIRST = "Given P is three; P plus five gives W. What is W?"
SECOND = "Given P is four; P plus five gives W. What is W?"


class Recorder:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.raw, self.thinking, self.answer = "", "", ""

    def piece(self, text: str) -> None:
        self.raw += text

    def part(self, text: str, is_thought: bool) -> None:
        if is_thought:
            self.thinking += text
        else:
            self.answer += text


def options_of(model: Path, **changes: object) -> RunOptions:
    given = {
        "config": BudgetConfig(budget=160, buffer=16, protect_prompt="auto"),
        "profile": "auto",
        "sampling": Sampling(temp=0.0),
        **changes,
    }
    return RunOptions(model=model, **given)


# --- tags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("tags", "is_open", "text", "thinking", "answer"),
    [
        (("<t>", "</t>"), False, "<t>\na < b</t>\n\nyes\n", "a < b", "yes\n"),
        (("<t>", "</t>"), True, "\na</t>b", "a", "b"),
        (("", "</t>"), False, "a</tb</t>c", "a</tb", "c"),
        (("<t>", "</t>"), False, "one<t>two</t>three<t>", "two", "onethree"),
        (("<t>", "</t>"), False, "<t>never ends </", "never ends </", ""),
        (None, False, "\n<t>a</t>", "", "\n<t>a</t>"),
    ],
)
def test_thoughts(size, tags, is_open, text, thinking, answer) -> None:
    thoughts, parts = Thoughts(tags, is_open), []
    for i in range(0, len(text), size):
        parts += thoughts.feed(text[i : i + size])
    parts += thoughts.rest()
    assert (thoughts.thinking, thoughts.answer) == (thinking, answer)
    assert "".join(part for part, is_thought in parts if is_thought) == thinking
    assert "".join(part for part, is_thought in parts if not is_thought) == answer


# --- turns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [160, None])
def test_a_second_turn_reads_what_is_new(demo_model, budget) -> None:
    config = None if budget is None else BudgetConfig(budget, buffer=16, protect_prompt="auto")
    with Chat(options_of(demo_model, config=config)) as chat:
        screen = Recorder()
        first = chat.say(FIRST, screen)
        assert first["n_read"] == first["n_prompt"]
        assert screen.raw == first["text"]
        assert (screen.thinking, screen.answer) == (first["thinking"], first["answer"])
        assert first["answer"] == "The answer is eight." and "<think>" not in first["thinking"]
        assert 0 < first["first_token_seconds"] < 60
        second = chat.say(SECOND, Recorder())
        assert second["answer"] == "The answer is nine."
        n_before = first["n_prompt"] + first["n_generated"]
        assert second["n_prompt"] > n_before
        assert second["n_read"] == second["n_prompt"] - n_before < first["n_prompt"] + 3
        assert chat.n_turns == 2
        if budget is not None:
            assert second["n_evicted"] > 0
        chat.clear()
        again = chat.say(FIRST, Recorder())
        assert (again["text"], again["n_prompt"]) == (first["text"], first["n_prompt"])


def test_the_prompt_is_what_the_template_makes_of_all_messages(demo_model) -> None:
    with Chat(options_of(demo_model)) as chat:
        chat.say(FIRST, Recorder())
        chat.say(SECOND, Recorder())
        text = chat.llama.detokenize(chat.llama.input_ids[: chat.llama.n_tokens], special=True)
        said = [message["content"] for message in chat.messages]
        wanted = (
            f"<|user|>{said[0]}<|assistant|>{said[1]}<|end|><|user|>{said[2]}<|assistant|>{said[3]}"
        )
        assert text.decode() == f"<s>{wanted}"


def test_another_budget(demo_model) -> None:
    with Chat(options_of(demo_model)) as chat:
        first = chat.say(FIRST, Recorder())
        chat.set_budget(64)
        second = chat.say(SECOND, Recorder())
        assert (first["budget"], second["budget"]) == (160, 64)
        assert second["n_read"] == second["n_prompt"]
        assert second["kv_bytes"] < first["kv_bytes"]
        for bad, error in ((0, ConfigError), (12, BudgetError)):
            with pytest.raises(error):
                chat.set_budget(bad)
        assert chat.say(FIRST, Recorder())["budget"] == 64  # the session is there, as it was


def test_saved_and_loaded(demo_model, tmp_path) -> None:
    file = tmp_path / "chat.json"
    with Chat(options_of(demo_model)) as chat:
        chat.say(FIRST, Recorder())
        chat.save(file)
        wanted = chat.say(SECOND, Recorder())
    with Chat(options_of(demo_model)) as chat:
        chat.load(file)
        assert (chat.n_turns, chat.messages[0]["content"]) == (1, FIRST)
        found = chat.say(SECOND, Recorder())
    assert found["n_prompt"] == wanted["n_prompt"] == found["n_read"]
    assert found["answer"] == wanted["answer"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        (b"", "not a conversation"),
        (b"\xff{}", "not a conversation"),
        (b"[1]", "not a conversation"),
        (b'{"reasonalloc_chat": 2}', "format 2 is not known"),
        (b'{"reasonalloc_chat": 1}', "is damaged"),
        (b'{"reasonalloc_chat": 1, "messages": [{"role": "dog", "content": ""}]}', "is damaged"),
        (b'{"reasonalloc_chat": 1, "messages": [{"role": "user", "content": 1}]}', "is damaged"),
    ],
)
def test_no_conversation(tmp_path, content, reason) -> None:
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_messages(file)


def test_what_a_turn_refuses_leaves_the_conversation(make_gguf) -> None:
    model = make_gguf(chat_template=CHAT_TEMPLATE, n_ctx_train=256)
    with Chat(options_of(model, max_tokens=8)) as chat:
        chat.say("hello", Recorder())
        before = list(chat.messages)
        with pytest.raises(ContextFullError, match="the context ends at 256: /clear"):
            chat.say("x" * 300, Recorder())
        with pytest.raises(ConfigError, match="empty"):
            chat.say(" ", Recorder())
        assert chat.messages == before
        assert chat.say("again", Recorder())["n_generated"] == 8


def test_a_model_without_a_template(make_gguf) -> None:
    with Chat(options_of(make_gguf(), max_tokens=8)) as chat:
        first = chat.say("hello", Recorder())
        second = chat.say("and?", Recorder())
        assert not chat.has_template
        assert second["n_prompt"] == first["n_prompt"] + 8 + len("and?")
        # one token more: the last one of a text was not decoded yet
        assert second["n_read"] == len("and?") + 1
    with pytest.raises(ConfigError, match="system is for a chat template"):
        Chat(options_of(make_gguf(), system="Be brief."))


def test_a_limit_of_thinking(demo_model) -> None:
    with Chat(options_of(demo_model, think=ThinkLimit(10))) as chat:
        for text in (FIRST, SECOND):
            report = chat.say(text, Recorder())
            assert (report["n_thought"], report["is_thought_cut"]) == (10, True)
            assert len(report["thinking"]) < 100 < len(report["answer"])


def test_turns_on_a_real_model(smollm2) -> None:
    with Chat(options_of(smollm2, system="You answer in one word.", max_tokens=12)) as chat:
        first = chat.say("What is the capital of France?", Recorder())
        assert "Paris" in first["answer"] and first["thinking"] == ""
        second = chat.say("And of Italy?", Recorder())
        n_new = second["n_prompt"] - first["n_prompt"] - first["n_generated"]
        assert first["stop_reason"] == "stop" and second["n_read"] == n_new < 20
        assert chat.messages[0] == {"role": "system", "content": "You answer in one word."}


# --- lines from elsewhere -------------------------------------------------------------------------


def test_a_script(cli, tmp_path) -> None:
    file, trace = tmp_path / "c.json", tmp_path / "t.jsonl"
    lines = f"{FIRST}\n\n/stats\n/thoughts\n{SECOND}\n/save {file}\n/help\n/exit\nnever read\n"
    done = cli("demo", "--chat", "--trace", trace, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("</think>\nThe answer is eight.\n") == 1
    assert done.stdout.endswith("</think>\nThe answer is nine.\n")
    assert done.stdout.startswith("<think>\n") and done.stdout.count("<think>") == 2
    notes = done.stderr.splitlines()
    assert re.match(r"\[1 turn, \d+ of \d+ tokens\]", notes[0])
    assert any(note.startswith("[first token after") for note in notes)
    assert "So W is eight as asked." in notes
    assert f"[4 messages in {file}]" in notes and "/clear        begin a new conversation" in notes
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == [
        "user",
        "assistant",
    ] * 2
    again = cli("demo", "--chat", "--json", "-p", FIRST, stdin=f"/load {file}\n{FIRST}\n")
    reports = [json.loads(line) for line in again.stdout.splitlines()]
    assert reports[0]["answer"] == "The answer is eight."
    assert reports[1]["n_prompt"] > 2 * reports[0]["n_prompt"]
    assert "[4 messages, 2 turns]" in again.stderr
    assert '"step"' in trace.read_text()


@pytest.mark.parametrize(
    ("options", "lines", "code", "reason"),
    [
        ([], "/what\n", USAGE, "'/what' is no command: /help lists them"),
        ([], "/save\n", USAGE, "/save needs a file's name"),
        ([], "/budget lots\n", USAGE, "/budget takes a number of tokens, not 'lots'"),
        ([], "/load /no/such\n", USAGE, "/no/such: cannot be read"),
        (["--ctx", 256], "x " * 300, FAILURE, "the context ends at 256: /clear begins"),
        (["-f", "-"], "", USAGE, "--chat and -f - exclude each other"),
        (["--system", "x"], "hi\n", USAGE, "takes no system message"),
    ],
)
def test_a_script_that_fails(cli, options, lines, code, reason) -> None:
    done = cli("demo", "--chat", *options, stdin=lines)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("reasonalloc-run: ") and reason in line


@pytest.mark.usefixtures("foreground")
@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_ctrl_c_ends_a_script(command, make_gguf) -> None:
    import signal
    import subprocess

    model = make_gguf(n_ctx_train=1 << 20, chat_template=CHAT_TEMPLATE)
    with subprocess.Popen(
        [*command, model, "--chat", "--budget", "32", "--temp", "0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        process.stdin.write(b"hello\nand?\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors) == (130, b"")
    assert text.endswith(b"\n")


def test_nobody_reads(command) -> None:
    import subprocess

    shell = 'exec "$0" "$@" >/dev/full' if Path("/dev/full").exists() else 'exec "$0" "$@" >&-'
    done = subprocess.run(
        ["bash", "-c", shell, *command, "demo", "--chat"],
        input=FIRST, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == FAILURE
    (line,) = done.stderr.splitlines()
    assert line.startswith("reasonalloc-run: standard output")


def test_dry_run(cli) -> None:
    done = cli("demo", "--chat", "--dry-run", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["n_prompt"] == 0


# --- a terminal -----------------------------------------------------------------------------------

pty = pytest.mark.skipif(sys.platform == "win32", reason="of POSIX")


@pytest.fixture
def terminal(command, tmp_path):
    """Return a function that starts the command on a terminal of its own."""
    pexpect = pytest.importorskip("pexpect")
    started = []

    def start(*arguments: object):
        names = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100"}
        environment = {**os.environ, **names, "REASONALLOC_CACHE_DIR": str(tmp_path)}
        environment.pop("NO_COLOR", None)
        child = pexpect.spawn(
            command[0],
            [*command[1:], *map(str, arguments)],
            env=environment,
            dimensions=(40, 100),
            encoding="utf-8",
            timeout=TIMEOUT,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


@pty
@pytest.mark.usefixtures("foreground")
def test_on_a_terminal(terminal, tmp_path) -> None:
    from py_reasonalloc.task.problems import SAMPLE_PROBLEM

    child = terminal("demo", "--chat", "--verbose", "--no-budget")
    child.expect("full cache; /help lists commands")
    child.expect(r">.*\x1b\[\?25h")
    child.send(FIRST + "\r")
    child.expect(r"\x1b\[2;3m.*Let me work")  # dim and italic while it goes on
    child.expect(r"\x1b\[2m\[thought for \d+\.\d s, \d+ words; /thoughts shows them\]")
    assert "</think>" not in child.before
    child.expect("The answer is eight.")
    child.expect(r"first token after \d+\.\d\d s: (\d+) of \1 tokens read")
    child.send("/helpx\x7f\r")  # a key that deletes
    child.expect("go on with one that was kept")
    child.send("\x1b[A\x1b[A\r")  # twice up in the history
    child.expect("The answer is eight.")
    child.expect(r"first token after \d+\.\d\d s: \d+ of \d+ tokens read")
    child.send("/bogus\r")
    child.expect("'/bogus' is no command")
    child.send("/thoughts\r")
    child.expect("So W is eight as asked.")
    child.send("\x03")
    child.expect("/exit or Ctrl-D leaves")
    child.send("/clear\r")
    child.expect("a new conversation")
    child.send(SAMPLE_PROBLEM.prompt + "\r")
    child.expect("The answer is ")
    child.send("/stats\r")
    child.expect(r"1 turn, (\d+) of")
    child.send("/exit\r")
    child.expect(__import__("pexpect").EOF)
    child.wait()
    assert child.exitstatus == 0
    history = tmp_path / "chat_history"
    assert FIRST in history.read_text() and history.stat().st_mode & 0o077 == 0


@pty
@pytest.mark.usefixtures("foreground")
def test_ctrl_c_ends_the_text_on_a_terminal(terminal, make_gguf) -> None:
    """Of a model whose text never ends; the demo's is over before a key is pressed."""
    model = make_gguf(chat_template=CHAT_TEMPLATE, n_ctx_train=1 << 20)
    child = terminal(model, "--chat", "--budget", "32", "--buffer", "16", "--threads", "1")
    child.expect("/help lists commands")
    child.expect(r">.*\x1b\[\?25h")
    child.send("hello\r")
    child.expect(r"\x1b\[\?2004l")  # the line was taken
    child.expect(r"[^\x1b]{40}")  # text
    child.sendintr()
    child.expect(r"end: stopped by Ctrl-C")
    child.send("/stats\r")
    child.expect(r"1 turn, (\d+) of")
    child.send("/exit\r")
    child.expect(__import__("pexpect").EOF)
    child.wait()
    assert child.exitstatus == 0


@pty
@pytest.mark.usefixtures("foreground")
def test_an_error_ends_no_conversation_on_a_terminal(terminal) -> None:
    child = terminal("demo", "--chat", "--ctx", 256)
    child.expect(r">.*\x1b\[\?25h")
    child.send("Given " * 300 + "\r")
    child.expect("the context ends at 256: /clear begins a new one")
    child.send(FIRST + "\r")
    child.expect("The answer is eight.")
    child.send("\x04")
    child.expect(__import__("pexpect").EOF)
    child.wait()
    assert child.exitstatus == 0


def test_a_missing_package_is_named() -> None:
    from py_reasonalloc.commands.run_screen import require

    require(("json",), "--chat")
    with pytest.raises(ConfigError, match=r"--chat needs no_such and nor_this: pip install '\.\[c"):
        require(("json", "no_such", "nor_this"), "--chat")
