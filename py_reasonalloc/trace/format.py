"""Trace files: what a budgeted cache kept at every compression, as JSON Lines.

A line is one JSON object; a file whose first bytes say so is gzip. In this order:

header
    ``{"reasonalloc_trace": 1, "model": ..., "n_head_kv": [...], ...}``, see `Header`.
compression
    ``{"step": 3, "n_pos": 144, "layers": [{"il": 0, "budgets": [...], "kept": [...]}]}``, see
    `Compression`. The budget of a layer is the sum of its heads'. Layers that were not compressed
    are left out: they went on holding what they held, and all positions since.
state
    ``{"state": 20, "n_same": 12, "held": [[...]]}``, see `State`: the cache was cut, emptied or
    loaded, or was not empty when the trace began. Any number, anywhere after the header.
end
    ``{"end": 160, "tokens": [...], "pieces": [...], "held": [[...]]}``: the length of the sequence,
    its tokens, the text of each, and what the heads held.

Positions of a head are a flat list ``[gap, length, gap, length, ...]``: so many positions left out,
so many held, and so on from position 0. `write` and `read` do the files; none of them needs the
native library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..engine.errors import TraceError

FORMAT = 1
MAGIC = "reasonalloc_trace"
#: Positions [start, stop) that are held, ascending and apart: int32 [n_runs, 2].
if TYPE_CHECKING:
    Runs = npt.NDArray[np.int32]
else:  # numpy 1.20 has no NDArray
    Runs = np.ndarray
#: ``held[il][ih]``
Held = tuple[tuple[Runs, ...], ...]


@dataclass(frozen=True)
class Header:
    """What was traced.

    Attributes
    ----------
    model : str
        Its name.
    n_head_kv : tuple of int
        KV heads of each layer.
    budget, buffer, sinks, window : int
        As configured, tokens; see `BudgetConfig`.
    policy, layer_alloc, head_alloc : str
        Names.
    n_prompt : int or None
        Tokens of the prompt; None if unknown.
    budgets : tuple of tuple of int
        ``budgets[il][ih]`` when the trace began, tokens.
    """

    model: str
    n_head_kv: tuple[int, ...]
    budget: int
    buffer: int
    sinks: int
    window: int
    policy: str
    layer_alloc: str
    head_alloc: str
    n_prompt: int | None
    budgets: tuple[tuple[int, ...], ...]

    @property
    def n_layer(self) -> int:
        """Layers of the model."""
        return len(self.n_head_kv)


@dataclass(frozen=True)
class LayerCompression:
    """One layer of a compression.

    Attributes
    ----------
    il : int
        Layer.
    budgets : tuple of int
        Tokens of each KV head.
    kept : tuple of Runs
        What each KV head kept.
    """

    il: int
    budgets: tuple[int, ...]
    kept: tuple[Runs, ...]

    def kept_positions(self, ih: int) -> npt.NDArray[np.int32]:
        """Return the positions that head `ih` kept, ascending, [n_kept]."""
        return positions_of(self.kept[ih])


@dataclass(frozen=True)
class Compression:
    """One compression.

    Attributes
    ----------
    step : int
        Its number since the cache was last empty, from 0.
    n_pos : int
        Length of the sequence at that time, tokens.
    layers : tuple of LayerCompression
        The layers that were compressed, ascending.
    """

    step: int
    n_pos: int
    layers: tuple[LayerCompression, ...]


@dataclass(frozen=True)
class State:
    """What the whole cache held at some time.

    Attributes
    ----------
    n_pos : int
        Length of the sequence.
    n_same : int
        Positions below it stand for the same tokens as before.
    held : Held
        Positions of every head.
    """

    n_pos: int
    n_same: int
    held: Held


@dataclass(frozen=True)
class Snapshot:
    """The cache after one record.

    Attributes
    ----------
    n_pos : int
        Length of the sequence.
    n_text : int
        Positions below it stand for the tokens in the file.
    budgets : tuple of tuple of int
        ``budgets[il][ih]``, tokens.
    held : Held
        Positions of every head.
    """

    n_pos: int
    n_text: int
    budgets: tuple[tuple[int, ...], ...]
    held: Held

    def share(self, heads: Sequence[tuple[int, int]]) -> npt.NDArray[np.float64]:
        """Return the share of the heads ``(il, ih)`` that hold each position, [n_pos], 0 to 1."""
        edges = np.zeros(self.n_pos + 1, dtype=np.int64)
        for il, ih in heads:
            runs = self.held[il][ih]
            np.add.at(edges, runs[:, 0], 1)
            np.add.at(edges, runs[:, 1], -1)
        return np.cumsum(edges[:-1]) / max(len(heads), 1)


class Replay:
    """The cache over time: takes records as they come.

    Parameters
    ----------
    budgets : tuple of tuple of int
        ``budgets[il][ih]`` of the empty cache, tokens.
    """

    def __init__(self, budgets: Sequence[tuple[int, ...]]) -> None:
        self._budgets = list(budgets)
        self._held = list(_nothing([len(layer) for layer in budgets]))
        self._n_pos = 0

    def take(self, record: Compression | State) -> None:
        """Go on to a record."""
        if isinstance(record, State):
            self._held = list(record.held)
        else:
            self._held = list(self._held_at(record.n_pos))
            for layer in record.layers:
                self._held[layer.il] = layer.kept
                self._budgets[layer.il] = layer.budgets
        self._n_pos = record.n_pos

    def snapshot(self, n_pos: int, n_text: int) -> Snapshot:
        """Return the cache when the sequence has `n_pos` tokens, all since the record being held.

        Parameters
        ----------
        n_text : int
            See `Snapshot`.
        """
        return Snapshot(n_pos, n_text, tuple(self._budgets), self._held_at(n_pos))

    def _held_at(self, n_pos: int) -> Held:
        new = self._n_pos, n_pos
        return tuple(tuple(_extended(runs, *new) for runs in layer) for layer in self._held)


@dataclass(frozen=True)
class Trace:
    """A whole file.

    Attributes
    ----------
    header : Header
        What was traced.
    records : tuple of Compression or State
        In order of time. The end of the file is a State as well.
    tokens, pieces : tuple
        Of the text, [n_pos]; empty if the file has no end.
    notes : tuple of str
        What a reader should know about the file.
    """

    header: Header
    records: tuple[Compression | State, ...]
    tokens: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def compressions(self) -> tuple[Compression, ...]:
        """The compressions, in order of time."""
        return tuple(record for record in self.records if isinstance(record, Compression))

    def snapshots(self) -> Iterator[tuple[Compression | State, Snapshot]]:
        """Yield every record and the cache after it."""
        n_texts: list[int] = []
        n_same = len(self.tokens)
        for record in reversed(self.records):
            n_texts.append(min(n_same, record.n_pos))
            if isinstance(record, State):
                n_same = min(n_same, record.n_same)
        replay = Replay(self.header.budgets)
        for record, n_text in zip(self.records, reversed(n_texts)):
            replay.take(record)
            yield record, replay.snapshot(record.n_pos, n_text)

    def snapshot(self, after: int | None = None) -> Snapshot:
        """Return the cache after compression number `after`, from 1, or at the end of the file.

        Raises
        ------
        TraceError
            No such compression.
        """
        n = 0
        last = Snapshot(0, 0, self.header.budgets, _nothing(self.header.n_head_kv))
        for record, snapshot in self.snapshots():
            last = snapshot
            n += isinstance(record, Compression)
            if n == after and isinstance(record, Compression):
                return last
        if after is not None:
            raise TraceError(f"there is no compression {after}: the trace has {n}")
        return last


def _nothing(n_head_kv: Sequence[int]) -> Held:
    return tuple(tuple(np.empty((0, 2), np.int32) for _ in range(n)) for n in n_head_kv)


def _extended(runs: Runs, start: int, stop: int) -> Runs:
    """Return runs and the positions [start, stop) after them."""
    if start >= stop:
        return runs
    if len(runs) > 0 and runs[-1, 1] == start:
        runs = runs.copy()
        runs[-1, 1] = stop
        return runs
    return np.concatenate([runs, np.array([[start, stop]], np.int32)])


def runs_of(positions: npt.NDArray[np.int32]) -> Runs:
    """Return ascending positions [n] as runs."""
    if len(positions) == 0:
        return np.empty((0, 2), np.int32)
    ends = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate([[0], ends + 1])]
    stops = positions[np.concatenate([ends, [len(positions) - 1]])] + 1
    return np.stack([starts, stops], axis=1).astype(np.int32)


def positions_of(runs: Runs) -> npt.NDArray[np.int32]:
    """Return the positions of runs, ascending, [n]."""
    parts = [np.arange(start, stop, dtype=np.int32) for start, stop in runs]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def flat_of(runs: Runs) -> list[int]:
    """Return runs as the file has them: gap, length, gap, length, ..."""
    flat: list[int] = np.diff(runs.reshape(-1), prepend=0).tolist()
    return flat
