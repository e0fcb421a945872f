"""Make the pictures of docs/: the chat and the live view in a real terminal, the desktop example.

    pip install '.[test]' pyte && python docs/screenshots.py

The terminal is a pseudo-terminal that pyte draws and rich writes as SVG; the window opens on a
virtual display (Xvfb) that Pillow copies, and is left out where there is none.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COMMAND = shutil.which("reasonalloc-run", path=str(Path(sys.executable).parent))
PROBLEM = "Given P is three; P plus five gives W; W plus P gives L. What is L?"


class Terminal:
    """A command on a terminal of so many lines and columns."""

    def __init__(self, lines: int, columns: int, *arguments: str) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.Stream(self._screen)
        self._folder = tempfile.TemporaryDirectory()
        environment = {
            **os.environ,
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "REASONALLOC_CACHE_DIR": self._folder.name,
        }
        environment.pop("NO_COLOR", None)
        self._child = pexpect.spawn(
            str(COMMAND),
            list(arguments),
            env=environment,
            dimensions=(lines, columns),
            encoding="utf-8",
            cwd=ROOT,
        )

    def until(self, *texts: str, timeout: float = 120) -> None:
        """Read until all these texts are on the screen."""
        end = time.monotonic() + timeout
        while not all(any(text in line for line in self._screen.display) for text in texts):
            if time.monotonic() > end:
                raise TimeoutError("\n".join(self._screen.display))
            try:
                self._stream.feed(self._child.read_nonblocking(4096, timeout=1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                break

    def type(self, text: str) -> None:
        """Type a line."""
        self._child.send(text + "\r")

    def save(self, path: Path, title: str) -> None:
        """Write what is on the screen as SVG."""
        console = Console(
            record=True,
            width=self._screen.columns,
            file=open(os.devnull, "w"),  # noqa: SIM115 - until the end of the process
            force_terminal=True,
            color_system="truecolor",
        )
        n_used = max(i for i, line in enumerate(self._screen.display) if line.strip()) + 1
        for y in range(n_used):
            row = Text(no_wrap=True, overflow="crop")
            cells = [self._screen.buffer[y][x] for x in range(self._screen.columns)]
            # words apart: each has a place of its own in the picture, whatever font there is
            for (style, _), same in itertools.groupby(cells, lambda c: (_style(c), c.data == " ")):
                row.append("".join(cell.data for cell in same), style=style)
            row.rstrip()
            console.print(row)
        # a name of its own, so that the same screen gives the same file
        console.save_svg(str(path), title=title, unique_id=path.stem)

    def close(self) -> None:
        """End the command."""
        self._child.close(force=True)
        self._folder.cleanup()


def _style(cell: pyte.screens.Char) -> Style:
    """Return rich's style of a cell; dim is not among what pyte keeps."""

    def colour(name: str) -> str | None:
        if name == "default":
            return None
        known = {"brown": "yellow"}  # as pyte calls it
        return f"#{name}" if len(name) == 6 and name not in known else known.get(name, name)

    return Style(
        color=colour(cell.fg), bgcolor=colour(cell.bg), bold=cell.bold, italic=cell.italics
    )


def chat() -> None:
    """A conversation: an answer, what it took, and one that is still being thought about."""
    from py_reasonalloc.task.problems import SAMPLE_PROBLEM

    terminal = Terminal(30, 104, "demo", "--chat")
    try:
        terminal.until("> ")
        terminal.type(PROBLEM)
        terminal.until("The answer is")
        terminal.type("/stats")
        terminal.until("1 turn,", "first token after")
        terminal.type(SAMPLE_PROBLEM.prompt)
        terminal.until("Check: ")
        terminal.save(HERE / "chat.svg", "reasonalloc-run demo --chat")
    finally:
        terminal.close()


def watch() -> None:
    """The live view of the demo's problem, some way into its chain of thought."""
    terminal = Terminal(28, 100, "demo", "--watch")
    try:
        terminal.until("Check: ten minus nine")
        terminal.save(HERE / "watch.svg", "reasonalloc-run demo --watch")
    finally:
        terminal.close()


def desktop() -> None:
    """The window of examples/desktop, some way into its answer."""
    sys.path.insert(0, str(ROOT / "examples" / "desktop"))
    sys.path.insert(0, str(ROOT / "tests" / "python"))
    from PIL import ImageGrab
    from virtual_display import display

    from py_reasonalloc.task.problems import SAMPLE_PROBLEM

    with display() as name:
        os.environ["DISPLAY"] = name
        import tkinter

        import app

        window = app.App(tkinter.Tk(), app.Worker(str(app.DEMO_MODEL), 96))
        window.root.geometry("+0+0")
        _update(window, lambda: str(window.ask_button["state"]) == "normal")
        window.entry.insert(0, SAMPLE_PROBLEM.prompt)
        window.ask()
        _update(window, lambda: window.cache is not None and window.cache.n_pos > 280)
        size = window.root.winfo_width(), window.root.winfo_height()
        picture = ImageGrab.grab((0, 0, *size), xdisplay=name)
        picture.quantize(32).save(HERE / "desktop.png", optimize=True)
        window.quit()
        window.root.mainloop()


def _update(window: Any, is_there: Callable[[], bool]) -> None:
    while not is_there():
        window.root.update()
        time.sleep(0.01)
    window.root.update()


def main() -> int:
    """Make all pictures."""
    chat()
    watch()
    if shutil.which("Xvfb"):
        desktop()
    else:
        print("no Xvfb: desktop.png is left as it is", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
