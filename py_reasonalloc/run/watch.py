"""A cache to look at while a text is made: its budgets and what it holds, from the trace."""

from __future__ import annotations

import codecs
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.stats import engine_stats
from ..session.reason_llama import ReasonLlama
from ..trace.format import Compression, Replay, Snapshot, State

#: Tokens at the end of the text that are shown at most.
N_TAIL = 2000


@dataclass(frozen=True)
class Frame:
    """The cache at one time.

    Attributes
    ----------
    snapshot : Snapshot
        Budgets and positions of every head.
    kv_bytes, kv_bytes_full : int
        Of the cache, and of a full one for as many tokens.
    n_compressions, n_evicted : int
        So far; entries, that is token x layer x head.
    n_last : int
        Entries that the last compression evicted, and the length of the sequence at that time:
    n_last_pos : int
        see there.
    pieces : tuple of str
        Text of the last tokens, `N_TAIL` at most, [n].
    share : [n]
        Share of all heads that hold each of them, 0 to 1.
    """

    snapshot: Snapshot
    kv_bytes: int
    kv_bytes_full: int
    n_compressions: int
    n_evicted: int
    n_last: int
    n_last_pos: int
    pieces: tuple[str, ...]
    share: npt.NDArray[np.float64]

    def n_held(self, il: int, ih: int) -> int:
        """Return how many tokens a head holds."""
        return n_held(self.snapshot, il, ih)


def n_held(snapshot: Snapshot, il: int, ih: int) -> int:
    """Return how many tokens a head of a snapshot holds."""
    return int(np.diff(snapshot.held[il][ih], axis=1).sum())


class Watcher:
    """Follows a session's cache, and shows it from time to time.

    Parameters
    ----------
    show : callable
        Gets a `Frame`, in the thread that decodes.
    interval : float
        Least time between two of them, seconds.
    """

    def __init__(self, show: Callable[[Frame], None], interval: float = 0.1) -> None:
        self._show, self._interval = show, interval
        self._shown = -interval

    def begin(self, llama: ReasonLlama) -> None:
        """Begin with a session's cache as it is."""
        stats = llama.kv_stats()
        budgets = tuple(tuple(head.budget for head in layer) for layer in stats.layers)
        self._llama, self._replay = llama, Replay(budgets)
        self._heads = [(il, ih) for il, layer in enumerate(budgets) for ih in range(len(layer))]
        self._n_last = self._n_last_pos = 0

    def take(self, record: Compression | State) -> None:
        """Take a record of the trace."""
        before = self._replay.snapshot(record.n_pos, 0)
        self._replay.take(record)
        if isinstance(record, Compression):
            after = self._replay.snapshot(record.n_pos, 0)
            self._n_last = sum(n_held(before, *h) - n_held(after, *h) for h in self._heads)
            self._n_last_pos = record.n_pos
        self.step()

    def step(self) -> None:
        """Show the cache, if it is time to."""
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._show(self.frame())
            self._shown = time.monotonic()

    def end(self) -> None:
        """Show it once more."""
        self._show(self.frame())

    def frame(self) -> Frame:
        """Return the cache as it is now."""
        llama = self._llama
        n_pos = min(llama.n_cached(), llama.n_tokens)
        snapshot = self._replay.snapshot(n_pos, n_pos)
        stats = engine_stats(llama.ctx)
        first = max(n_pos - N_TAIL, 0)
        table = llama.pieces(special=True)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return Frame(
            snapshot=snapshot,
            kv_bytes=stats.kv_bytes,
            kv_bytes_full=stats.kv_bytes_full,
            n_compressions=stats.n_compressions,
            n_evicted=stats.n_evicted,
            n_last=self._n_last,
            n_last_pos=self._n_last_pos,
            pieces=tuple(decoder.decode(table[token]) for token in llama.input_ids[first:n_pos]),
            share=snapshot.share(self._heads)[first:],
        )


@contextlib.contextmanager
def watched(
    llama: ReasonLlama, watcher: Watcher | None, trace: Path | None = None, n_prompt: int = 0
) -> Any:
    """Show a session's cache to a watcher inside the block, write its trace, or both, or neither.

    Raises
    ------
    NotFoundError
        The session has no budget.
    TraceError
        The file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if watcher is not None:
            watcher.begin(llama)
        if trace is not None and watcher is not None:
            stack.enter_context(llama.trace_to(trace, n_prompt, watcher.take))
        elif trace is not None:
            stack.enter_context(llama.trace_to(trace, n_prompt))
        elif watcher is not None:
            stack.enter_context(llama.trace(watcher.take, watcher.take))
        yield
        if watcher is not None:
            watcher.end()
