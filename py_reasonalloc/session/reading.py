"""How much of a prompt need not be read: because the cache holds it, or a checkpoint does.

A prompt is read in pieces, and a compression runs before a piece that some head has no room for. So
a cache is what reading a prompt leaves only if its tokens came in the same pieces: the same tokens
one at a time are compressed elsewhere, and rounded differently. Pieces end at multiples of n_batch
and, counted from there, of n_ubatch. After whole pieces the cache does not depend on what follows,
nor on how long it is, and a snapshot taken there is an exact prefix of any prompt with these tokens
- if as many positions are protected. How many, is no matter before the first compression, where an
allocator does not split the budget over the layers by it.

What a session holds is gone on from in three cases:

- The prompt begins with all of it: the conversation goes on, from the cache that decoding left.
- It is the prompt, and has just been read.
- Nothing was ever evicted, nor would be while the prompt is read: a longer tail is cut off, as with
  the stock cache.

Else the longest checkpoint serves, or the prompt is read from its first token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as bindings

from ..engine import bindings as c
from ..engine.stats import engine_stats
from .checkpoints import Checkpoints, Found, Snapshot, read_sequence, write_sequence
from .protection import n_protectable, protect, splits_by_protection

#: Checkpoints inside a prompt are at least so many tokens apart, and at most so many in number.
LEAST_DISTANCE, MOST_INSIDE = 512, 8


class Pieces:
    """Where pieces of a prompt end.

    Parameters
    ----------
    n_batch : int
        Tokens of a decode call.
    n_ubatch : int
        Tokens that the engine takes of it at once.
    """

    def __init__(self, n_batch: int, n_ubatch: int) -> None:
        self._n_batch, self._n_ubatch = n_batch, n_ubatch

    def last_end(self, n: int) -> int:
        """Return the last position, at most `n`, at which a piece of a longer prompt ends."""
        return n - n % self._n_batch % self._n_ubatch

    def calls(self, start: int, end: int, stops: Sequence[int] = ()) -> list[int]:
        """Return the ends of the decode calls for tokens [start, end), `stops` being among them."""
        first = start - start % self._n_batch + self._n_batch
        return sorted({*range(first, end, self._n_batch), *stops, end})

    def stops(self, start: int, end: int) -> list[int]:
        """Return where checkpoints of a prompt of `end` tokens are taken, beyond `start`."""
        step = max(LEAST_DISTANCE, -(-end // MOST_INSIDE))
        places = {self.last_end(n) for n in (*range(step, end, step), end - 1)}
        return sorted(place for place in places if place > start)


class PromptReader:
    """Lets a budgeted session go on from as much of a prompt as it can.

    Parameters
    ----------
    limit : int
        Bytes of checkpoints; 0: none.

    Attributes
    ----------
    store : Checkpoints
        Those that there are.
    n_reused : int
        Tokens of the last prompt that were not read.
    """

    def __init__(self, limit: int) -> None:
        self.store = Checkpoints(limit)
        self.n_reused = 0
        self._range: tuple[int, int] | None = None  # of the prompt that is about to be read

    def begin(self, session: Any, tokens: Sequence[int]) -> None:
        """Bring the session to where a prompt is gone on from, and set what is protected.

        Raises
        ------
        BudgetError
            The budget cannot hold the protected prompt.
        """
        self._range = None
        wanted = session.config.n_protect(len(tokens))
        found = None if session.is_traced else self.store.find(tokens[:-1], wanted)
        n_held = _n_usable(session, tokens)
        if n_held > 0 and (found is None or found.n_tokens < n_held):
            protect(session, n_protectable(session, tokens))
            if session.n_tokens > 0:
                self.n_reused = n_held
                return
        protect(session, wanted)
        session.clear()
        if found is not None:
            self._restore(session, tokens, found, wanted)
        self.n_reused = session.n_tokens
        self._range = session.n_tokens, len(tokens)

    def _restore(self, session: Any, tokens: Sequence[int], found: Found, n_protect: int) -> None:
        n = found.n_tokens
        if not write_sequence(session.ctx, found.snapshot.state) or session.n_cached() != n:
            session.clear()
            return
        c.check(c.ra_set_protect(session.ctx, 0, n_protect))
        session.input_ids[:n] = tokens[:n]
        session.n_tokens = n

    def calls(self, session: Any, n: int) -> Iterator[tuple[int, bool]]:
        """Yield the end of each decode call for the next `n` tokens; and if to `keep` there."""
        start, end = session.n_tokens, session.n_tokens + n
        begun, self._range = self._range, None
        if begun != (start, end):
            yield end, False  # no prompt, or one that goes on from what decoding left
            return
        pieces = pieces_of(session)
        stops = pieces.stops(start, end) if self.store.limit > 0 else []
        for place in pieces.calls(start, end, stops):
            yield place, place in stops

    def keep(self, session: Any) -> None:
        """Take a checkpoint of what the session holds."""
        state = read_sequence(session.ctx)
        if state is None:
            return
        is_free = engine_stats(session.ctx).n_compressions == 0
        if splits_by_protection(session.config):
            is_free = False
        tokens = session.input_ids[: session.n_tokens]
        self.store.keep(tokens, Snapshot(state, None if is_free else session.n_protect))


def pieces_of(session: Any) -> Pieces:
    """Return where pieces end in a session's context."""
    n_ubatch = min(int(bindings.llama_n_ubatch(session.ctx)), session.config.buffer)
    return Pieces(session.n_batch, n_ubatch)


def _n_usable(session: Any, tokens: Sequence[int]) -> int:
    """Return how many of a prompt's tokens the session may go on after; see above."""
    n = min(session.n_tokens, len(tokens))
    differs = np.asarray(tokens[:n]) != session.input_ids[:n]
    n_shared = int(differs.argmax()) if differs.any() else n
    if n_shared == session.n_tokens < len(tokens):
        return n_shared
    if n_shared == session.n_tokens == len(tokens) and not session._requires_eval:
        return n_shared
    if engine_stats(session.ctx).n_compressions > 0:
        return 0
    capacity = session.n_cached() + int(c.ra_room(session.ctx, 0))
    return n_shared if len(tokens) <= capacity else 0
