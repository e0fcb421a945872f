"""Where the text of a chat goes: a terminal that folds thinking away, or plain standard output."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from typing import Any

import click

from ..engine.errors import ConfigError

#: Lines of thinking that are shown while it goes on.
N_LINES = 8
#: Least time between two drawings of it, seconds: drawing takes longer than a small model's token.
INTERVAL = 0.05


def require(packages: tuple[str, ...], option: str) -> None:
    """Raise ConfigError if a package that an option needs is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{option} needs {' and '.join(missing)}: pip install '.[chat]' in the checkout, or "
            f"pip install {' '.join(missing)}"
        )


def write_out(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class PlainScreen:
    """The text as it comes, tags and all, to standard output."""

    def __init__(self, is_silent: bool = False) -> None:
        self._is_silent = is_silent

    def piece(self, text: str) -> None:
        """Write a piece."""
        if not self._is_silent:
            write_out(text)

    def part(self, text: str, is_thought: bool) -> None:
        """Leave it: `piece` had it."""

    def end(self) -> None:
        """End the line."""
        if not self._is_silent:
            write_out("\n")

    def close(self) -> None:
        """Nothing is to be left."""


class FoldingScreen:
    """A terminal: thinking is dimmed, its last lines shown, and folded into one when it is over."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._live: Any = None
        self._thinking = ""
        self._began = self._drawn = 0.0

    def piece(self, text: str) -> None:
        """Leave it: `part` has it."""

    def part(self, text: str, is_thought: bool) -> None:
        """Show some text."""
        if is_thought and self._console.is_dumb_terminal:
            write_out(text)
        elif is_thought:
            self._think(text)
        else:
            self._fold()
            write_out(text)

    def _think(self, text: str) -> None:
        from rich.live import Live

        if self._live is None:
            self._began, self._thinking = time.monotonic(), ""
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._thinking += text
        now = time.monotonic()
        if now - self._drawn >= INTERVAL:
            self._draw()
            self._drawn = now

    def _draw(self) -> None:
        self._live.update(thinking_tail(self._thinking, self._console.width - 1), refresh=True)

    def _fold(self) -> None:
        if self._live is None:
            return
        self._draw()
        live, self._live = self._live, None
        live.stop()
        seconds = time.monotonic() - self._began
        n_words = len(self._thinking.split())
        self._console.print(
            f"[thought for {seconds:.1f} s, {n_words} words; /thoughts shows them]",
            style="dim",
            markup=False,
        )

    def end(self) -> None:
        """End the turn."""
        self._fold()
        write_out("\n")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None


def thinking_tail(text: str, width: int) -> Any:
    """Return the last lines of thinking, wrapped and dimmed, for rich."""
    from rich.text import Text

    lines: list[str] = []
    for line in text.split("\n")[-N_LINES:]:
        lines += [line[i : i + width] for i in range(0, max(len(line), 1), width)]
    return Text("\n".join(lines[-N_LINES:]), style="dim italic", no_wrap=True, overflow="crop")


def note(text: str) -> None:
    """Say something that is no text of the model's, on standard error."""
    click.echo(text, err=True)
