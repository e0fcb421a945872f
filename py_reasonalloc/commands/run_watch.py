"""``--watch``: the cache on a terminal while the text comes, drawn with rich on standard error."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from ..engine.errors import ConfigError
from ..output.text import printable, size
from ..run.watch import Frame, Watcher
from .run_screen import require, write_out

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: Budgets from the smallest to the largest.
BARS = "▁▂▃▄▅▆▇█"
#: Columns of a head's cell: tokens held of its budget.
CELL = 9
#: Text, by the share of heads that hold it, from none to all; as reasonalloc-inspect shades it.
SHADES = (
    "color(244)",
    "color(16) on color(153)",
    "color(16) on color(111)",
    "color(231) on color(69)",
    "color(231) on color(19)",
)
#: Lines that are kept for the text at least.
N_TEXT = 6


def check_watch(no_budget: bool) -> None:
    """Raise ConfigError unless there is something to watch, and a terminal to watch it on."""
    if no_budget:
        raise ConfigError("--no-budget and --watch exclude each other: nothing is evicted")
    require(("rich",), "--watch")
    if sys.stderr is None or not sys.stderr.isatty():
        raise ConfigError("--watch needs a terminal on standard error")


class WatchScreen:
    """The view on standard error; the text goes to standard output.

    Where that is a terminal, too, the text is part of the view, and printed when it is over.

    Parameters
    ----------
    is_silent : bool
        Print no text.
    """

    def __init__(self, is_silent: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True, highlight=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._is_silent, self._is_held = is_silent, sys.stdout.isatty()
        self._text: list[str] = []
        self._last: Frame | None = None
        self.watcher = Watcher(self._show)

    def _show(self, frame: Frame) -> None:
        if self._last is None:
            self._live.start()
        self._last = frame
        self._live.update(draw(frame, self._console, has_text=True), refresh=True)

    def piece(self, text: str) -> None:
        """Take a piece of the text."""
        if self._is_held or self._is_silent:
            self._text.append(text)
        else:
            write_out(text)

    def part(self, text: str, is_thought: bool) -> None:
        """Leave it: `piece` had it."""

    def end(self) -> None:
        """Leave the budgets as they are in the end, and print the text."""
        self.close()
        if not self._is_silent:
            write_out("".join(self._text) + "\n")

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""
        if self._last is not None:
            with contextlib.suppress(OSError):
                last = draw(self._last, self._console, has_text=False)
                self._live.update(last, refresh=True)
                self._live.stop()
            self._last = None


def draw(frame: Frame, console: Console, has_text: bool) -> Any:
    """Return the view: what was evicted, the budgets, the end of the text."""
    from rich.console import Group
    from rich.panel import Panel

    n_rows = console.height - N_TEXT - 7 if has_text else max(console.height - 4, 8)
    table = budgets(frame, console.width - 4, n_rows)
    parts: list[Any] = [Panel(table, title=headline(frame), title_align="left")]
    if has_text:
        n_lines = max(console.height - len(table.split()) - 6, 1)
        tail = text_tail(frame, console.width - 4, n_lines)
        title = "text, shaded by the share of heads that hold it"
        parts.append(Panel(tail, title=title, title_align="left"))
    return Group(*parts)


def headline(frame: Frame) -> str:
    """Return in one line what the cache takes and what left it."""
    said = (
        f"{frame.snapshot.n_pos} tokens in {size(frame.kv_bytes)}, full "
        f"{size(frame.kv_bytes_full)}; {frame.n_evicted} evicted"
    )
    if frame.n_last_pos:
        said += f", {frame.n_last} of them at token {frame.n_last_pos}"
    return said


def budgets(frame: Frame, width: int, n_rows: int) -> Text:
    """Return the heads of each layer: tokens held of the budget, or bars where that is too much."""
    from rich.text import Text

    layers = frame.snapshot.budgets
    n_heads = max(map(len, layers), default=0)
    largest = max((budget for layer in layers for budget in layer), default=1)
    is_wide = len(layers) <= n_rows and 9 + n_heads * CELL <= width
    n_columns = 1 if is_wide else max(width // (n_heads + 5), 1)
    n_lines = -(-len(layers) // n_columns)
    lines: list[Text] = []
    for i in range(n_lines):
        line = Text(no_wrap=True)
        for il in range(i, len(layers), n_lines):
            line.append(f"layer {il:<3}" if is_wide else f"{il:>3} ", style="dim")
            for ih, budget in enumerate(layers[il]):
                held = frame.n_held(il, ih)
                style = "green" if held <= budget else "yellow"  # until the next compression
                level = round(budget / largest * (len(BARS) - 1))
                cell = f"{BARS[level]}{held}/{budget}".ljust(CELL) if is_wide else BARS[level]
                line.append(cell, style=style)
            if not is_wide:
                line.append(" " * (n_heads - len(layers[il]) + 1))
        lines.append(line)
    return Text("\n").join(lines)


def text_tail(frame: Frame, width: int, n_lines: int) -> Text:
    """Return the end of the text, wrapped, each token shaded by the share of heads that hold it."""
    from rich.text import Text

    rows: list[Text] = [Text()]
    for piece, share in zip(frame.pieces, frame.share.tolist()):
        level = SHADES[min(int(-(-share * 4 // 1)), 4)]
        for char in piece:
            if char == "\n":
                rows.append(Text())
                continue
            if rows[-1].cell_len >= width - 1:
                rows.append(Text())
            rows[-1].append(printable(char), style=level)
    return Text("\n").join(rows[-n_lines:])
