"""``reasonalloc-run --chat``: lines in, answers out, and what begins with a slash is for us.

On a terminal an error is one line and the conversation goes on. Lines that come from elsewhere (a
pipe, a file) are a script: its first error ends it, with the exit code that a run would have.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Union

from ..engine.cache import user_cache
from ..engine.errors import ConfigError, LibraryError, ReasonAllocError
from ..engine.usertext import argument_text, path_text
from ..output.console import EXIT_INTERRUPTED
from .run_screen import FoldingScreen, PlainScreen, note, require, write_out

if TYPE_CHECKING:
    from ..run.chat import Chat
    from ..run.options import RunOptions
    from ..run.watch import Watcher
    from .run_watch import WatchScreen

    AnyScreen = Union[FoldingScreen, PlainScreen, WatchScreen]

HELP = """\
/clear        begin a new conversation
/stats        what the last turn took, and what the cache holds
/thoughts     the thinking of the last answer
/save FILE    keep the conversation
/load FILE    go on with one that was kept
/budget N     go on with N tokens per layer and KV head; the conversation is read anew
/help         this
/exit         leave, as Ctrl-D does
Anything else is for the model; Alt-Enter begins a new line, Ctrl-C ends an answer."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
#: What is asked for on a terminal.
PROMPT = "> "


def chat(options: RunOptions, first: str | None, as_json: bool, is_watched: bool) -> int:
    """Hold a conversation until its input ends; returns the exit code.

    Parameters
    ----------
    first : str or None
        The first message.
    as_json : bool
        Print each turn's report, one JSON object a line, instead of its text.
    is_watched : bool
        Show the cache while an answer comes.
    """
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        require(("prompt_toolkit", "rich"), "--chat on a terminal")
    from ..engine.log import LogCapture
    from ..run.chat import Chat

    with LogCapture(forward=options.verbose):
        conversation = Chat(options)
    with conversation, _trace(conversation):
        loop = _Loop(conversation, as_json, is_terminal, is_watched)
        if is_terminal:
            _greet(conversation)
        try:
            return loop.run(first, _terminal_lines() if is_terminal else _script_lines())
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED


def _trace(chat: Chat) -> contextlib.AbstractContextManager[None]:
    trace = chat.options.trace
    return contextlib.nullcontext() if trace is None else chat.llama.trace_to(trace)


def _greet(chat: Chat) -> None:
    config = chat.options.config
    cache = "the full cache" if config is None else f"{config.budget} tokens per head"
    note(f"[{path_text(chat.options.model.name)}, {cache}; /help lists commands]")
    if not chat.has_template:
        note("[no chat template: messages and answers are joined as they are]")


def _script_lines() -> Iterator[str]:
    stream = sys.stdin.buffer if sys.stdin is not None else []
    for i, line in enumerate(stream):
        try:
            yield line.decode("utf-8-sig" if i == 0 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise ConfigError(f"standard input: line {i + 1} is not UTF-8 text") from None


def _terminal_lines() -> Iterator[str]:
    """Yield what is typed, with line editing and the history of former conversations."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    with contextlib.suppress(OSError):  # a folder that cannot be written
        file = user_cache() / "chat_history"
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        history = FileHistory(str(file))
    # where answers go to a file, what is typed must not
    output = None if sys.stdout.isatty() else create_output(stdout=sys.stderr)
    session: PromptSession[str] = PromptSession(
        history=history,
        key_bindings=keys,
        output=output,
        completer=WordCompleter(COMMANDS, sentence=True),
        complete_while_typing=False,
    )
    while True:
        try:
            yield session.prompt(PROMPT, prompt_continuation="  ")
        except KeyboardInterrupt:
            note("[/exit or Ctrl-D leaves]")
        except EOFError:
            return


class _Loop:
    """Takes lines and does what they say."""

    def __init__(self, chat: Chat, as_json: bool, is_terminal: bool, is_watched: bool) -> None:
        self.chat, self._as_json, self._is_terminal = chat, as_json, is_terminal
        self._is_watched = is_watched
        self._commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/stats": self._stats,
            "/thoughts": self._thoughts,
            "/save": self._save,
            "/load": self._load,
            "/budget": self._budget,
            "/help": lambda _: note(HELP),
        }

    def run(self, first: str | None, lines: Iterator[str]) -> int:
        if first is not None:
            self._do(first, self._say)
        for line in lines:
            name, _, rest = line.strip().partition(" ")
            if name in ("/exit", "/quit"):
                break
            if line.startswith("/") and "\n" not in line:
                self._do(rest.strip(), self._commands.get(name, self._unknown(name)))
            elif line.strip():
                self._do(line, self._say)
        return 0

    def _do(self, text: str, action: Callable[[str], None]) -> None:
        try:
            action(text)
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
        except (ReasonAllocError, LibraryError, MemoryError) as error:
            if not self._is_terminal:
                raise
            note(f"reasonalloc-run: {' '.join(str(error).split())}")

    def _say(self, text: str) -> None:
        from ..session.generate import INTERRUPTED

        text = argument_text(text, "the message")
        screen, watcher = self._screen()
        try:
            report = self.chat.say(text, screen, watcher)
            screen.end()
        finally:
            screen.close()
        if self._as_json:
            write_out(json.dumps(report, ensure_ascii=False) + "\n")
        if not self._is_terminal and report["stop_reason"] == INTERRUPTED:
            raise KeyboardInterrupt  # of a script it ends all
        if self._is_terminal and report["stop_reason"] not in ("stop", "stop_string"):
            from ..run.report import STOPS

            note(f"[end: {STOPS[report['stop_reason']]}]")
        if self.chat.options.verbose:
            note(_timing(report))

    def _screen(self) -> tuple[AnyScreen, Watcher | None]:
        if self._is_watched:
            from .run_watch import WatchScreen

            screen = WatchScreen(is_silent=self._as_json)
            return screen, screen.watcher
        if self._is_terminal and sys.stdout.isatty() and not self._as_json:
            return FoldingScreen(), None
        return PlainScreen(is_silent=self._as_json), None

    # --- commands --------------------------------------------------------------------------------

    def _unknown(self, name: str) -> Callable[[str], None]:
        def refuse(_: str) -> None:
            raise ConfigError(f"{name!r} is no command: /help lists them")

        return refuse

    def _clear(self, _: str) -> None:
        self.chat.clear()
        note("[a new conversation]")

    def _stats(self, _: str) -> None:
        from ..run.report import summary

        chat = self.chat
        n_pos = chat.llama.n_cached()
        note(f"[{_count(chat.n_turns, 'turn')}, {n_pos} of {chat.llama.n_ctx()} tokens]")
        if chat.report is not None:
            note(summary(chat.report))
            note(_timing(chat.report))

    def _thoughts(self, _: str) -> None:
        report = self.chat.report
        thinking = report["thinking"].strip() if report is not None else ""
        note(thinking or "[no thinking to show]")

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        self.chat.save(path)
        note(f"[{_count(len(self.chat.messages), 'message')} in {path_text(path)}]")

    def _load(self, name: str) -> None:
        self.chat.load(_path(name, "/load"))
        note(f"[{_count(len(self.chat.messages), 'message')}, {_count(self.chat.n_turns, 'turn')}]")

    def _budget(self, text: str) -> None:
        if self.chat.options.trace is not None:
            raise ConfigError("/budget and --trace exclude each other")
        try:
            budget = int(text)
        except ValueError:
            raise ConfigError(f"/budget takes a number of tokens, not {text!r}") from None
        self.chat.set_budget(budget)
        note(f"[budget {budget}: {self.chat.llama.kv_stats().kv_bytes} bytes of cache]")


def _path(name: str, command: str) -> str:
    if not name:
        raise ConfigError(f"{command} needs a file's name")
    return os.path.expanduser(name)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _timing(report: dict[str, Any]) -> str:
    first = report["first_token_seconds"]
    begin = "no token came" if first is None else f"first token after {first:.2f} s"
    return (
        f"[{begin}: {report['n_read']} of {report['n_prompt']} tokens read; "
        f"{report['n_generated']} generated, {report['tokens_per_second']:.1f} tokens/s]"
    )
