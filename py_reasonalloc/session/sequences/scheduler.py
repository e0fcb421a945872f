"""Continuous batching: `Sequences` decodes the texts of many requests in one context."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from llama_cpp import llama_cpp as bindings

from ...engine.errors import ComputeError, ConfigError, ContextFullError, ReasonAllocError
from ...engine.stats import engine_stats
from ..protection import set_protect
from ..steering import Sampling
from .cells import Cells
from .chain import CONTEXT, FAILED, INTERRUPTED, LENGTH, STOP, Chain, Event
from .counts import Counts
from .drawing import check_grammar, logits_row
from .pieces import Piece, compose
from .prefixes import Prefixes, begin
from .request import Request, TokenLogprob, token_logprob

#: Tokens of prompts in a step while texts go on: what one delays the others by.
PROMPT_STEP = 128
#: Times that a chain is read anew after failed batches before it is given up.
MAX_FORGOTTEN = 2


class Sequences:
    """The texts of many requests, decoded side by side in the sequences of one context.

    Every call of `step` reads the weights once for all of them. A request enters at any step and
    leaves at any; those that have no sequence yet wait in order. All calls but `Chain.cancel` must
    come from one thread at a time, and the session must not be used for anything else until
    `close`: that empties it.

    Parameters
    ----------
    llama : ReasonLlama
        An open session; its `n_seq_max` is the number of texts at a time.
    prompt_step : int or None
        Most tokens of prompts that a step reads while texts go on; at least one micro-batch. None:
        prompts are read in batches of their own, so rounding is the one of each alone.
    prefixes : Prefixes, optional
        Where prompts are looked up before they are read.

    Attributes
    ----------
    n_ctx : int
        Most tokens of one text with its prompt: the session's context, or with the stock cache,
        whose rows the sequences share, an equal part of it.
    counts : Counts
        What was done so far.
    """

    def __init__(
        self, llama: Any, *, prompt_step: int | None = PROMPT_STEP, prefixes: Prefixes | None = None
    ) -> None:
        llama.clear()
        self._llama, self._prefixes, self._is_apart = llama, prefixes, prompt_step is None
        prompt_step = llama.n_batch if prompt_step is None else prompt_step
        self._n_vocab = llama.n_vocab()
        n_ubatch = llama.context_params.n_ubatch
        if llama.config is None:  # nothing hangs on where its micro-batches end
            n_ubatch = min(n_ubatch, max(prompt_step, 1))
        self._sizes = (llama.n_batch, n_ubatch, max(prompt_step, n_ubatch))
        self.n_seq_max: int = llama.n_seq_max
        self.n_ctx: int = llama._n_ctx
        if llama.config is None:
            self.n_ctx //= self.n_seq_max
        if self.n_seq_max > llama.n_batch:
            raise ConfigError(f"n_batch = {llama.n_batch} must be at least {self.n_seq_max} here")
        self.counts = Counts()
        self._waiting: deque[Chain] = deque()
        self._live: dict[int, Chain] = {}  # sequence -> who has it
        self._followers: dict[int, list[Chain]] = {}  # chain -> who wants its prompt
        self._is_torn = False  # a step was interrupted
        self._cells = Cells(llama)

    # --- what is to be done ----------------------------------------------------------------------

    def add(self, request: Request) -> Chain:
        """Take a request; the next steps decode it as soon as a sequence is free.

        Raises
        ------
        ConfigError
            It holds tokens that there are not, or a grammar that cannot be read.
        ContextFullError
            Its prompt is longer than `n_ctx`.
        BudgetError
            The budget cannot hold its protected prompt.
        """
        self.check(request)
        chain = Chain(self._llama, request)
        self._waiting.append(chain)
        self.counts.n_added += 1
        return chain

    def check(self, request: Request) -> None:
        """Raise what `add` would."""
        if len(request.prompt) > self.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(request.prompt)} tokens, more than the {self.n_ctx} "
                "of a sequence"
            )
        request.check_tokens(self._n_vocab)
        check_grammar(self._llama, request.grammar)

    def fork(self, chain: Chain, sampling: Sampling | None = None) -> Chain:
        """Take a second text with a chain's prompt and what it has generated so far.

        Its sequence is copied; a prompt that is not read yet is read once for both. Where no
        sequence is free then, the copy waits and is read on its own.

        Parameters
        ----------
        sampling : Sampling, optional
            How it draws from here on; None: as the chain does, from the same state.

        Raises
        ------
        ConfigError
            The chain is over.
        """
        if chain.stop_reason is not None:
            raise ConfigError("a chain that is over cannot be forked")
        request = chain.request
        if sampling is not None:
            request = dataclasses.replace(request, sampling=sampling)
        twin = Chain(self._llama, request)
        if chain.tokens:
            twin.follow(chain, sampling is None)
        self.counts.n_added += 1
        free = self._free()
        if not chain.tokens:
            twin.source = chain.source or chain
            self._followers.setdefault(twin.source.id, []).append(twin)
            if chain.seq_id is not None:
                self._seat_followers(twin.source)
        elif free and chain.seq_id is not None:
            self._seat(twin, free[0])
            self._copy(chain, twin)
        else:
            self._waiting.appendleft(twin)
        return twin

    @property
    def n_running(self) -> int:
        """Chains that have a sequence."""
        return len(self._live)

    @property
    def n_waiting(self) -> int:
        """Chains that have none yet."""
        return len(self._waiting) + sum(
            chain.seq_id is None for chains in self._followers.values() for chain in chains
        )

    @property
    def is_idle(self) -> bool:
        """There is nothing to do."""
        return not self._live and not self._waiting

    # --- a step ----------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Decode once for all chains and draw each one's next token.

        A chain's failure ends that chain only: a batch that fails is decoded again chain by chain.

        Returns
        -------
        list of Event
            At most one token for each chain.
        """
        llama = self._llama
        with llama._turns.move(llama._require_open):
            if self._is_torn:
                for chain in self._live.values():
                    self._take_back(chain)
            self._is_torn = True
            events = self._drop_cancelled()
            full = [c for c in self._live.values() if c.n_read == self.n_ctx and not c.is_reading]
            events += [self._end(chain, CONTEXT) for chain in full]
            events += self._admit()
            for pieces in compose(list(self._live.values()), *self._sizes, self._is_apart):
                try:
                    rows = self._cells.decode(pieces)
                    self.counts.n_steps += 1
                except ComputeError:
                    for piece in pieces:
                        events += self._alone(piece)
                else:
                    events += self._after(pieces, rows)
            self._is_torn = False
        return events

    def run(self) -> Iterator[Event]:
        """Step until nothing is left to do; yield what the steps return."""
        while not self.is_idle:
            yield from self.step()

    def _drop_cancelled(self) -> list[Event]:
        events = []
        everyone = [*self._live.values(), *self._waiting]
        for chains in self._followers.values():
            everyone += [chain for chain in chains if chain.seq_id is None]
        for chain in everyone:
            if chain.is_cancelled and chain.stop_reason is None:
                events.append(self._end(chain, INTERRUPTED))
        return events

    def _free(self) -> list[int]:
        return [seq_id for seq_id in range(self.n_seq_max) if seq_id not in self._live]

    def _admit(self) -> list[Event]:
        events = []
        while self._waiting and (free := self._free()):
            chain = self._waiting.popleft()
            self._seat(chain, free[0])
            try:
                begin(self._llama, chain, free[0], self._prefixes)
                self.counts.n_reused += chain.n_reused
            except ReasonAllocError as error:
                events.append(self._end(chain, FAILED, error))
                continue
            self._seat_followers(chain)
        return events

    def _seat(self, chain: Chain, seq_id: int) -> None:
        chain.seq_id = seq_id
        chain.started = time.perf_counter()
        self._live[seq_id] = chain

    def _seat_followers(self, chain: Chain) -> None:
        """Give sequences to those that want a chain's prompt; who gets none reads it alone."""
        for follower in self._followers.get(chain.id, ()):
            if follower.seq_id is None and follower.stop_reason is None:
                free = self._free()
                if not free:
                    break
                self._seat(follower, free[0])
        left = [f for f in self._followers.pop(chain.id, ()) if f.stop_reason is None]
        seated = [follower for follower in left if follower.seq_id is not None]
        if seated:
            self._followers[chain.id] = seated
        for follower in reversed([f for f in left if f.seq_id is None]):
            follower.source = None
            self._waiting.appendleft(follower)

    def _copy(self, source: Chain, to: Chain) -> None:
        self._cells.copy(source.seq_id or 0, to.seq_id or 0)
        to.source = None
        to.n_read = to.n_reused = source.n_read
        self.counts.n_reused += source.n_read

    def _alone(self, piece: Piece) -> list[Event]:
        """Decode a piece of a batch that failed on its own."""
        chain = piece.chain
        if chain.stop_reason is not None or not self._take_back(chain):
            return []
        try:
            if chain.n_forgotten > MAX_FORGOTTEN:
                raise ComputeError("the batch failed again and again")
            rows = self._cells.decode([piece])
            self.counts.n_steps += 1
        except ComputeError as error:
            return [self._end(chain, FAILED, error)]
        return self._after([piece], rows)

    def _take_back(self, chain: Chain) -> bool:
        """Cut a sequence to what it held before a batch that failed, parts of which may be in it.

        Returns
        -------
        bool
            False: it could not be cut; it is empty now, and the next steps read it anew.
        """
        if self._cells.cut(chain.seq_id or 0, chain.n_read):
            return True
        chain.n_read = 0
        if not chain.tokens:
            chain.prompt_logprobs = []
        chain.n_forgotten += 1
        return False

    def _after(self, pieces: list[Piece], rows: list[int]) -> list[Event]:
        """Count what was decoded and draw; the rows are those of the last batch."""
        drawn: list[tuple[Chain, int]] = []
        copies: list[tuple[Chain, Chain]] = []
        for piece, row in zip(pieces, rows):
            chain = piece.chain
            chain.n_read = piece.end
            if not chain.tokens:
                self.counts.n_prompt_tokens += piece.end - piece.start
                if chain.request.prompt_logprobs:
                    chain.prompt_logprobs += self._cells.prompt_logprobs(piece, row)
            if self._prefixes is not None and piece.end in chain.stops:
                self._prefixes.keep(chain, piece.end)
            if piece.is_last:
                drawn.append((chain, row + piece.end - piece.start - 1))
                if not chain.tokens:
                    for follower in self._followers.pop(chain.id, ()):
                        if follower.stop_reason is None:
                            copies.append((chain, follower))
                            drawn.append((follower, drawn[-1][1]))
        for source, to in copies:
            to.prompt_logprobs = list(source.prompt_logprobs)
            self._copy(source, to)
        return [self._draw(chain, row) for chain, row in drawn]

    def _draw(self, chain: Chain, row: int) -> Event:
        request, ctx = chain.request, self._llama.ctx
        if request.max_tokens == 0:
            return self._end(chain, LENGTH)
        try:
            token = chain.draw(ctx, row, self._n_vocab)
        except ComputeError as error:
            return self._end(chain, FAILED, error)
        is_end = bindings.llama_vocab_is_eog(self._llama._model.vocab, token)
        if is_end or token in request.stop_tokens:
            return self._end(chain, STOP)
        logprob: TokenLogprob | None = None
        if request.n_top is not None:
            logprob = token_logprob(logits_row(ctx, row, self._n_vocab), token, request.n_top)
        chain.take(token)
        self.counts.n_tokens += 1
        if len(chain.tokens) == request.max_tokens:
            self._end(chain, LENGTH)
        return Event(chain, token, logprob)

    def _end(self, chain: Chain, reason: str, error: Exception | None = None) -> Event:
        """Free a chain's sequence; those that wanted its prompt read it themselves."""
        if chain.seq_id is not None:
            if self._llama.config is not None:
                chain.stats = engine_stats(self._llama.ctx, chain.seq_id)
                self.counts.add_cache(chain.stats)
            self._cells.empty(chain.seq_id)
            del self._live[chain.seq_id]
        elif chain in self._waiting:
            self._waiting.remove(chain)
        chain.end(reason, error)
        self.counts.n_ended += 1
        self.counts.n_cancelled += reason == INTERRUPTED
        self.counts.n_failed += reason == FAILED
        self._promote(self._followers.pop(chain.id, []))
        if chain.source is not None:
            chains = self._followers.get(chain.source.id, [])
            if chain in chains:
                chains.remove(chain)
        return Event(chain, None)

    def _promote(self, followers: list[Chain]) -> None:
        """Let the first of those that wanted an ended chain's prompt read it for the others."""
        left = [chain for chain in followers if chain.stop_reason is None]
        if not left:
            return
        heir = next((chain for chain in left if chain.seq_id is not None), left[0])
        heir.source = None
        if heir.seq_id is not None:  # nothing is in it yet: it begins as any other
            del self._live[heir.seq_id]
            heir.seq_id = None
        self._waiting.appendleft(heir)
        others = [chain for chain in left if chain is not heir]
        for chain in others:
            chain.source = heir
        if others:
            self._followers[heir.id] = others

    # --- life time -------------------------------------------------------------------------------

    def close(self) -> None:
        """End all chains and empty the session; may be called twice."""
        if self._cells.is_closed:
            return
        for chain in [*self._live.values(), *self._waiting]:
            chain.end(INTERRUPTED)
        for chains in self._followers.values():
            for chain in chains:
                chain.end(INTERRUPTED)
        self._live, self._followers = {}, {}
        self._waiting.clear()
        self._cells.close()
        if self._llama._ctx is not None and self._llama._ctx.ctx is not None:
            self._llama.clear()
            if self._llama.config is not None:
                set_protect(self._llama.ctx, self._llama.n_protect, 0)

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
