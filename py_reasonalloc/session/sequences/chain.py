"""One text in the making among others: `Chain`; what a step did for it: `Event`."""

from __future__ import annotations

import codecs
import itertools
import time
from collections import deque
from typing import Any, NamedTuple

from ..thinking import Thinking
from .drawing import Drawer
from .request import Request, TokenLogprob

#: The model ended its text, max_tokens were reached, the context is full, somebody cancelled it,
#: it failed: `Chain.error` says how. The first four as in `session.generate`.
STOP, LENGTH, CONTEXT, INTERRUPTED = "stop", "length", "context", "interrupted"
FAILED = "failed"

_numbers = itertools.count()


class Chain:
    """A text in the making; made by `Sequences.add` and `Sequences.fork`.

    Attributes
    ----------
    id : int
        A number of its own.
    request : Request
        What it was made for.
    tokens : list of int
        Generated so far, without the token that ended the text.
    prompt_logprobs : list of TokenLogprob
        Of the prompt's tokens from the second on, if asked for; complete once the prompt is read.
    stop_reason : str or None
        "stop", "length", "context", "interrupted" or "failed"; None while it goes on.
    error : Exception or None
        Why it failed.
    seq_id : int or None
        Its sequence in the context; None while it waits and once it has ended.
    n_read : int
        Tokens that its sequence holds.
    n_reused : int
        Of the prompt, not read anew: copied from another chain or a snapshot.
    thinking : Thinking or None
        What is known about its thinking, if that is limited.
    stats : ra_stats or None
        Of its sequence when it ended; None before, with the stock cache, and if it never had one.
    made, started, first, ended : float or None
        time.perf_counter() when it was asked for, got a sequence, had its first token, ended.
    """

    def __init__(self, llama: Any, request: Request) -> None:
        self.id = next(_numbers)
        self.request = request
        self.tokens: list[int] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.stop_reason: str | None = None
        self.error: Exception | None = None
        self.seq_id: int | None = None
        self.n_read = 0
        self.n_reused = 0
        self.stats: Any = None
        self.made = time.perf_counter()
        self.started: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        self.drawer = Drawer(llama, request)
        self.source: Chain | None = None  # whose prompt this one gets
        self.n_forgotten = 0
        self.stops: frozenset[int] = frozenset()  # where snapshots of its prompt are taken
        self.is_cancelled = False
        self._pieces = llama.pieces()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._forced: deque[int] = deque()
        think = request.think
        self.thinking = None if think is None else Thinking(llama, think, request.prompt)
        self._limit_thinking(True)

    def cancel(self) -> None:
        """End it before the next step; may be called from any thread, and twice."""
        self.is_cancelled = True

    @property
    def n_known(self) -> int:
        """Tokens of the prompt and of the text so far."""
        return len(self.request.prompt) + len(self.tokens)

    def known(self, start: int, end: int) -> list[int]:
        """Return prompt and text so far, positions [start, end)."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.tokens[start - len(prompt) : end - len(prompt)]
        return [*prompt, *self.tokens][start:end]

    @property
    def is_reading(self) -> bool:
        """More than the newest token is to be decoded next, or the prompt is not read yet."""
        return self.n_known - self.n_read > 1 or not self.tokens

    def draw(self, ctx: Any, row: int, n_vocab: int) -> int:
        """Return the next token: one that is forced, or drawn from a row of logits."""
        if not self._forced:
            return self.drawer.draw(ctx, row, n_vocab)
        token = self._forced.popleft()
        self.drawer.accept(token)
        return token

    def take(self, token: int) -> None:
        """Append a token to the text."""
        if self.first is None:
            self.first = time.perf_counter()
        self.tokens.append(token)
        if self.thinking is not None:
            self._decoder.decode(self._pieces[token])
            self.thinking.add(token)
            self._limit_thinking(self._decoder.getstate()[0] == b"")

    def _limit_thinking(self, is_whole: bool) -> None:
        if self.thinking is not None and self.thinking.is_due(is_whole):
            self._forced = deque(self.thinking.forced)

    def follow(self, other: Chain, is_twin: bool) -> None:
        """Start with the text that another chain has.

        Parameters
        ----------
        is_twin : bool
            Draw as it does from here on, too.
        """
        for token in other.tokens:
            self.take(token)
            if not is_twin:
                self.drawer.accept(token)
        if is_twin:
            self.drawer.close()
            self.drawer = other.drawer.clone()
        self._forced = deque(other._forced)
        self.prompt_logprobs = list(other.prompt_logprobs)
        self.first = None

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Note that it is over and free its sampler."""
        self.stop_reason, self.error = reason, error
        self.ended = time.perf_counter()
        self.seq_id = None
        self.drawer.close()


class Event(NamedTuple):
    """What a step did for one chain.

    Attributes
    ----------
    chain : Chain
        Its `stop_reason` is set if this was its last event.
    token : int or None
        The next token of its text; None: the text ended without one more.
    logprob : TokenLogprob or None
        Of that token, if asked for.
    """

    chain: Chain
    token: int | None
    logprob: TokenLogprob | None = None
