"""Many texts at a time: the tasks of an arm are decoded side by side in one context."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby

from ...engine.errors import ComputeError
from ...engine.pieces import Pieces
from ...engine.prompts import encode_prompt
from ...session.reason_llama import ReasonLlama
from ...session.sequences.chain import FAILED, Chain
from ...session.sequences.request import Request
from ...session.sequences.scheduler import Sequences
from ..cases import rows
from ..cases.methods import Setup
from ..cases.rows import Row
from .loops import LoopDetector
from .run import solve_here
from .worker import (
    STOPS,
    Job,
    Task,
    budget_counts,
    full_counts,
    judge_row,
    request_of,
)

#: Its draws come from the seed of a context: texts of one context cannot have seeds of their own.
_DRAWING_POLICY = "random"


def solve_side_by_side(job: Job, tasks: Sequence[Task], n_parallel: int) -> Iterator[Row]:
    """Work on tasks in this process, up to `n_parallel` texts at a time; rows as texts end.

    Texts of one arm share a context. Samples of a problem that begin together share the reading of
    the prompt. Rows are those of `worker.Worker`, but for their times: what a text waited for
    others is in them. Texts of the policy "random" are decoded one by one.

    Raises
    ------
    ReasonAllocError
        As `Decoder.decode`; texts under way are lost.
    """
    session = _Session(job, n_parallel)
    try:
        for arm, of_arm in groupby(tasks, lambda task: task.arm):
            setup = job.setups[arm]
            if setup.config is not None and setup.config.policy == _DRAWING_POLICY:
                session.close()
                yield from solve_here(job, list(of_arm))
                continue
            llama = session.opened(setup)
            with Sequences(llama, prompt_step=None) as sequences:
                yield from _Texts(job, llama, sequences, of_arm).rows()
    finally:
        session.close()


class _Session:
    """The model, with a context for the texts of an arm."""

    def __init__(self, job: Job, n_parallel: int) -> None:
        self._job, self._n_parallel = job, n_parallel
        self._llama: ReasonLlama | None = None

    def opened(self, setup: Setup) -> ReasonLlama:
        """Return a session with an empty cache of a setup."""
        llama, is_stock = self._llama, setup.config is None
        if llama is not None and (llama.config is None) == is_stock:
            try:
                llama.reconfigure(setup.config, type_k=setup.kv_type, type_v=setup.kv_type)
            except BaseException:
                self.close()  # it has no context any more
                raise
            return llama
        self.close()
        job = self._job
        self._llama = ReasonLlama(
            job.model,
            setup.config,
            # sequences of a stock cache share its rows
            n_ctx=job.n_ctx * (self._n_parallel if is_stock else 1),
            n_seq_max=self._n_parallel,
            type_k=setup.kv_type,
            type_v=setup.kv_type,
            n_threads=job.n_threads,
            n_threads_batch=job.n_threads,
            n_gpu_layers=job.n_gpu_layers,
        )
        return self._llama

    def close(self) -> None:
        """Free the model."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None


class _Text:
    """A text under way."""

    def __init__(self, task: Task, chain: Chain, pieces: Pieces) -> None:
        self.task, self.chain, self.is_loop = task, chain, False
        self._pieces, self._detector = pieces, LoopDetector()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._fresh: list[int] = []  # not looked at yet: they end inside a character
        self._parts: list[str] = []

    def take(self, token: int) -> None:
        """Take its next token; a text that goes round in circles is given up."""
        self._fresh.append(token)
        self._add(self._decoder.decode(self._pieces[token]))

    def _add(self, part: str) -> None:
        if part:
            self._parts.append(part)
            if any([self._detector.update(token) for token in self._fresh]):
                self.is_loop = True
                self.chain.cancel()
            self._fresh = []

    def end(self) -> str:
        """Return the whole text."""
        self._add(self._decoder.decode(b"", final=True))
        return "".join(self._parts)


class _Texts:
    """The texts of one arm: which are begun, and what is known of those that go on."""

    def __init__(
        self, job: Job, llama: ReasonLlama, sequences: Sequences, tasks: Iterator[Task]
    ) -> None:
        self._job, self._llama, self._sequences = job, llama, sequences
        self._left = deque(tasks)
        self._running: dict[int, _Text] = {}

    def rows(self) -> Iterator[Row]:
        """Yield rows as texts end."""
        while self._left or self._running:
            self._begin()
            for event in self._sequences.step():
                text = self._running[event.chain.id]
                if event.token is not None:
                    text.take(event.token)
                if event.chain.stop_reason is not None:
                    del self._running[event.chain.id]
                    yield self._row(text)

    def _begin(self) -> None:
        """Fill the context with texts; what begins together with the same prompt reads it once."""
        fresh: dict[int, Chain] = {}
        while self._left and len(self._running) < self._sequences.n_seq_max:
            task = self._left.popleft()
            wanted = request_of(self._job, task)
            if task.problem in fresh:
                chain = self._sequences.fork(fresh[task.problem], wanted.sampling)
            else:
                prompt = encode_prompt(self._llama._model, wanted.prompt, wanted.raw)
                request = Request(tuple(prompt), wanted.max_tokens, wanted.sampling)
                chain = fresh[task.problem] = self._sequences.add(request)
            self._running[chain.id] = _Text(task, chain, self._llama.pieces())

    def _row(self, text: _Text) -> Row:
        chain, llama = text.chain, self._llama
        if chain.stop_reason == FAILED:
            raise chain.error or ComputeError("a text failed")
        whole = text.end()
        reason = STOPS.get(chain.stop_reason or "", rows.LENGTH)
        n_prompt = len(chain.request.prompt)
        first = chain.first or chain.ended or 0.0
        if llama.config is None:
            counts = full_counts(llama, chain.n_read)
        else:
            counts = budget_counts(chain.stats, llama.config.n_protect(n_prompt))
        return judge_row(
            self._job,
            text.task,
            whole,
            n_prompt=n_prompt,
            n_generated=len(chain.tokens),
            stop=rows.LOOP if text.is_loop else reason,
            prompt_seconds=first - (chain.started or first),
            decode_seconds=(chain.ended or first) - first,
            **counts,
        )
