"""How far an evaluation has come: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO, TypeVar

import click

from ..eval.cases.rows import Row, arm_label

#: Seconds between two lines where stderr is not a terminal.
LINE_SECONDS = 60.0

_Self = TypeVar("_Self", bound="Meter")


class Meter:
    """Shows on stderr how far something is; use it in a ``with`` block.

    Parameters
    ----------
    n_left : int
        Units of work.
    label : str
        What is done.
    unit : str
        What is counted, in the plural.
    stream : file, optional
        Default: stderr.
    clock : callable
        Returns seconds.
    """

    def __init__(
        self,
        n_left: int,
        label: str,
        unit: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock, self._n_left, self._n_new = clock, n_left, 0
        self._label, self._unit = label, unit
        self._bar: Any = None
        if self._stream.isatty() and n_left > 0:
            self._bar = click.progressbar(
                length=n_left,
                label=self._label,
                item_show_func=lambda text: text,
                file=self._stream,
                width=24,
            )

    def __enter__(self: _Self) -> _Self:
        self._start = self._shown = self._clock()
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *caught: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*caught)

    def advance(self, n: int, text: str) -> None:
        """Count units that are done, and show it, with a word about them, if it is time."""
        self._n_new += n
        if self._bar is not None:
            self._bar.update(n, text)
            return
        now = self._clock()
        if now - self._shown < LINE_SECONDS or self._n_new == 0:
            return
        self._shown = now
        seconds = (now - self._start) / self._n_new * (self._n_left - self._n_new)
        click.echo(
            f"{self._label}: {self._n_new} of {self._n_left} {self._unit}, {_time(seconds)} left; "
            f"{text}",
            file=self._stream,
        )


class Progress(Meter):
    """Counts rows of an evaluation.

    Parameters
    ----------
    n_left : int
        Texts to write.
    n_arms : int
        What they are for.
    done : iterable of Row
        Rows of runs before: they count for the share of right answers, not for the time left.
    stream, clock
        See `Meter`.
    """

    def __init__(
        self,
        n_left: int,
        n_arms: int,
        done: Iterable[Row],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._right: dict[str, list[bool]] = {}
        for row in done:
            self._count(row)
        n_before = sum(map(len, self._right.values()))
        label = f"{n_arms} arm{'' if n_arms == 1 else 's'}"
        label += f", {n_before} done before" if n_before else ""
        super().__init__(n_left, label, "texts", stream, clock)

    def add(self, row: Row) -> None:
        """Count a row, and show it if it is time."""
        name = self._count(row)
        right = self._right[name]
        self.advance(1, f"{name} {sum(right) / len(right):.0%} of {len(right)}")

    def _count(self, row: Row) -> str:
        name = arm_label(row.method, row.budget)
        self._right.setdefault(name, []).append(row.correct)
        return name


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
