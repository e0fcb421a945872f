"""The thread that owns the context: it batches what requests want and hands on what comes."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..engine.errors import ConfigError, ContextFullError, ReasonAllocError
from ..engine.stats import engine_stats
from ..session.sequences.chain import FAILED, INTERRUPTED, STOP, Chain, Event
from ..session.sequences.prefixes import Prefixes
from ..session.sequences.scheduler import Sequences
from .errors import ApiError, bad_value, busy, closing
from .text import Delta
from .work import Choice, Work

#: Seconds over which tokens per second are taken.
RATE_SECONDS = 10.0


class Job:
    """A request that is being decoded.

    Parameters
    ----------
    work : Work
        What is wanted.
    deliver : callable
        Gets lists of Delta, or an ApiError, from the engine's thread.
    """

    def __init__(self, work: Work, deliver: Callable[[Any], None]) -> None:
        self.work, self.deliver = work, deliver
        self.chains: list[Chain] = []
        self.made = time.monotonic()
        self.is_cancelled = False

    def cancel(self) -> None:
        """End it before the next step; from any thread."""
        self.is_cancelled = True
        for chain in list(self.chains):
            chain.cancel()

    @property
    def n_cached(self) -> int:
        """Tokens of its prompts that were not read for it."""
        return sum(chain.n_reused for chain in self.chains)


@dataclass(frozen=True)
class Snapshot:
    """What the server did and is doing; see `metrics`."""

    n_running: int
    n_waiting: int
    n_prompt_tokens: int
    n_tokens: int
    n_reused: int
    n_steps: int
    n_ended: int
    n_cancelled: int
    n_failed: int
    n_compressions: int
    n_evicted: int
    n_cached_tokens: int
    tokens_per_second: float


class Engine:
    """Decodes jobs in a thread of its own.

    Parameters
    ----------
    llama : ReasonLlama
        An open session; the engine's own from here on.
    n_queue : int
        Most choices that wait beside those that run.
    prefixes : Prefixes, optional
        Snapshots shared by requests whose prompts begin alike.
    """

    def __init__(self, llama: Any, n_queue: int, prefixes: Prefixes | None = None) -> None:
        self._llama = llama
        self._sequences = Sequences(llama, prefixes=prefixes)
        self.n_parallel, self.n_ctx = self._sequences.n_seq_max, self._sequences.n_ctx
        self._n_most = n_queue + self.n_parallel
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._n_open = 0  # choices that are not over
        self._choices: dict[int, tuple[Job, Choice]] = {}  # chain -> whose it is
        self._is_closing, self._until = False, math.inf
        self._seconds = 1.0  # that a job takes, on average
        self._tokens: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self.failure: str | None = None
        self.prefixes = prefixes
        memory = llama.memory_use()
        self.cache_bytes = int(memory.context_bytes)
        self.weights_bytes = int(memory.model_bytes)
        self.snapshot = self._snapshot()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job; from any thread.

        Raises
        ------
        ApiError
            The queue is full, or the server is closing.
        """
        n = len(job.work.choices)
        with self._lock:
            if self._is_closing:
                raise closing()
            if n > self._n_most:
                raise bad_value(f"{n} choices are more than {self._n_most}, the whole queue", "n")
            if self._n_open + n > self._n_most:
                rounds = self._n_open / self.n_parallel
                raise busy(min(max(math.ceil(rounds * self._seconds), 1), 60))
            self._n_open += n
        self._inbox.put(job)

    @property
    def is_alive(self) -> bool:
        """Its thread runs."""
        return self._thread.is_alive() and self.failure is None

    def close(self, seconds: float) -> None:
        """Take no more jobs, let those that run end, cut them off after so many seconds."""
        with self._lock:
            self._until = min(self._until, time.monotonic() + seconds)
            self._is_closing = True
        self._inbox.put(None)

    def join(self) -> None:
        """Wait until the thread has ended, and free the sequences."""
        if self._thread.ident is not None:
            self._thread.join()
        self._sequences.close()

    # --- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # noqa: BLE001 - nothing is left to run on; the answers say so
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self._cut()

    def _turn(self) -> bool:
        """Take what came and do one step; False: all is done."""
        is_idle = self._sequences.is_idle
        if is_idle and self._is_closing and self._inbox.empty():
            return False
        while True:
            try:
                job = self._inbox.get(timeout=0.5 if is_idle else None, block=is_idle)
            except queue.Empty:
                break
            is_idle = False
            if job is not None:
                self._begin(job)
        if self._is_closing and time.monotonic() > self._until:
            return False
        if not self._sequences.is_idle:
            self._dispatch(self._sequences.step())
        self.snapshot = self._snapshot()
        return True

    def _begin(self, job: Job) -> None:
        previous: tuple[int, Chain] | None = None
        try:
            for choice in job.work.choices:
                if previous is not None and previous[0] == choice.i_prompt:
                    chain = self._sequences.fork(previous[1], choice.request.sampling)
                else:
                    chain = self._sequences.add(choice.request)
                    previous = (choice.i_prompt, chain)
                job.chains.append(chain)
                self._choices[chain.id] = (job, choice)
        except ReasonAllocError as error:
            n_left = len(job.work.choices) - len(job.chains)
            with self._lock:
                self._n_open -= n_left
            job.cancel()
            job.deliver(_refusal(error))
            return
        if job.is_cancelled:
            job.cancel()

    def _dispatch(self, events: list[Event]) -> None:
        out: dict[int, tuple[Job, list[Delta]]] = {}
        for event in events:
            chain = event.chain
            job, choice = self._choices[chain.id]
            writer = choice.writer
            deltas = out.setdefault(id(job), (job, []))[1]
            if event.token is not None and not writer.is_stopped:
                deltas.append(writer.take(event.token, event.logprob))
                if writer.is_stopped:
                    deltas.append(writer.finish(STOP))
                    chain.cancel()
            if chain.stop_reason is None:
                continue
            del self._choices[chain.id]
            with self._lock:
                self._n_open -= 1
                self._seconds += 0.1 * (time.monotonic() - job.made - self._seconds)
            if chain.stop_reason == FAILED:
                job.cancel()
                job.deliver(_refusal(chain.error))
            elif not writer.is_stopped and chain.stop_reason != INTERRUPTED:
                reason = STOP if chain.stop_reason == STOP else "length"
                deltas.append(writer.finish(reason))
        for job, deltas in out.values():
            if deltas and not job.is_cancelled:
                job.deliver(deltas)

    def _cut(self) -> None:
        """End what is left: its callers get an error."""
        with self._lock:
            self._is_closing = True
        jobs = {id(job): job for job, _ in self._choices.values()}
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                jobs[id(job)] = job
        for job in jobs.values():
            if self.failure is None:
                job.deliver(closing())
            else:
                job.deliver(ApiError(500, "the engine has failed", "server_error"))
        self._choices.clear()
        self._n_open = 0

    def _snapshot(self) -> Snapshot:
        counts, now = self._sequences.counts, time.monotonic()
        while len(self._tokens) > 1 and now - self._tokens[0][0] > RATE_SECONDS:
            self._tokens.popleft()
        then, n_then = self._tokens[0]
        if now - self._tokens[-1][0] > 0.1:
            self._tokens.append((now, counts.n_tokens))
        n_compressions, n_evicted, n_cached = counts.n_compressions, counts.n_evicted, 0
        if self._llama.config is not None:
            stats = engine_stats(self._llama.ctx, -1)
            n_compressions += stats.n_compressions
            n_evicted += stats.n_evicted
            n_cached = stats.n_entries
        return Snapshot(
            n_running=self._sequences.n_running,
            n_waiting=self._sequences.n_waiting,
            n_prompt_tokens=counts.n_prompt_tokens,
            n_tokens=counts.n_tokens,
            n_reused=counts.n_reused,
            n_steps=counts.n_steps,
            n_ended=counts.n_ended,
            n_cancelled=counts.n_cancelled,
            n_failed=counts.n_failed,
            n_compressions=n_compressions,
            n_evicted=n_evicted,
            n_cached_tokens=n_cached,
            tokens_per_second=(counts.n_tokens - n_then) / (now - then) if now > then else 0.0,
        )


def _refusal(error: Exception | None) -> ApiError:
    """Return what a caller is told of a chain's failure."""
    if isinstance(error, (ConfigError, ContextFullError)):
        return bad_value(str(error))
    return ApiError(500, f"the decode failed: {error}", "server_error")
