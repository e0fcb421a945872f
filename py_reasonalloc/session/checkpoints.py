"""Snapshots of budgeted sequences in RAM, found by the tokens that they stand for.

Nothing here knows a session or which sequence a snapshot is of: a snapshot that was taken of one
sequence of a context can be put into any other. When one may be taken so that going on from it is
what reading the whole prompt would be: `py_reasonalloc.session.reading`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings

#: Bytes that a session's snapshots may take together unless told otherwise: 256 MiB.
DEFAULT_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A sequence as it was after some of its tokens.

    Attributes
    ----------
    state : ndarray of uint8
        What `read_sequence` returned.
    n_protect : int or None
        Protected positions under which its tokens were read; None: it would be the same under any,
        because nothing was evicted yet and the split over the layers does not hang on them.
    """

    state: npt.NDArray[np.uint8]
    n_protect: int | None = None

    def fits(self, n_protect: int) -> bool:
        """Return whether a prompt with that many protected positions can go on from it."""
        return self.n_protect in (None, n_protect)


@dataclass(frozen=True, eq=False)
class Found:
    """A snapshot, and how many tokens of the prompt it stands for."""

    n_tokens: int
    snapshot: Snapshot


class Checkpoints:
    """Snapshots up to a limit in bytes; what was not used for longest goes first.

    All of them must be of contexts of one configuration. Not thread-safe.

    Parameters
    ----------
    limit : int
        Bytes; 0: nothing is kept.
    """

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        self._kept: dict[bytes, Snapshot] = {}  # by the tokens; the one used last is the last
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, tokens: Sequence[int], n_protect: int) -> Found | None:
        """Return the snapshot of the longest prefix of `tokens` that fits; None: there is none.

        Parameters
        ----------
        tokens : sequence of int
            What may be reused. Of a prompt leave out the last token: it has to be decoded.
        n_protect : int
            Positions that the prompt protects.
        """
        wanted = _key(tokens)
        fitting = (
            key
            for key, snapshot in self._kept.items()
            if wanted.startswith(key) and snapshot.fits(n_protect)
        )
        best = max(fitting, key=len, default=None)
        if best is None:
            return None
        self._kept[best] = snapshot = self._kept.pop(best)
        return Found(len(best) // _TOKEN.itemsize, snapshot)

    def keep(self, tokens: Sequence[int], snapshot: Snapshot) -> bool:
        """Keep a snapshot of these tokens, if it is not larger than the limit.

        One of the same tokens under another protection is replaced, unless it fits any.
        """
        key, size = _key(tokens), snapshot.state.nbytes + len(tokens) * _TOKEN.itemsize
        if size > self.limit:
            return False
        former = self._kept.pop(key, None)
        if former is not None:
            self.n_bytes -= former.state.nbytes + len(key)
            if former.n_protect is None:
                snapshot, size = former, former.state.nbytes + len(key)
        self._kept[key] = snapshot
        self.n_bytes += size
        while self.n_bytes > self.limit:
            oldest = next(iter(self._kept))
            self.n_bytes -= self._kept.pop(oldest).state.nbytes + len(oldest)
        return True

    def clear(self) -> None:
        """Forget all snapshots."""
        self._kept.clear()
        self.n_bytes = 0


_TOKEN = np.dtype("<i4")


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=_TOKEN).tobytes()


def read_sequence(ctx: Any, seq_id: int = 0) -> npt.NDArray[np.uint8] | None:
    """Return the state of one sequence of a llama_context, [bytes]; None: it has none to give."""
    size = int(bindings.llama_state_seq_get_size(ctx, seq_id))
    state = np.empty(size, dtype=np.uint8)
    n_written = int(bindings.llama_state_seq_get_data(ctx, _address(state), size, seq_id))
    return state if 0 < n_written == size else None


def write_sequence(ctx: Any, state: npt.NDArray[np.uint8], seq_id: int = 0) -> bool:
    """Put such a state into a sequence; False: it does not fit, and the sequence is empty."""
    return bool(bindings.llama_state_seq_set_data(ctx, _address(state), state.nbytes, seq_id))


def _address(state: npt.NDArray[np.uint8]) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
