"""Several texts for one prompt, decoded side by side in one context."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..engine.errors import ComputeError, ConfigError
from ..engine.stats import engine_stats
from ..engine.usertext import path_text
from ..session.generate import INTERRUPTED, Sampling
from ..session.reason_llama import ReasonLlama
from ..session.sequences.chain import FAILED, Chain
from ..session.sequences.request import Request
from ..session.sequences.scheduler import Sequences
from .allocation import allocation, settle
from .options import Plan, RunOptions, plan_run, session_arguments

#: Seeds go round here: the next one is llama.cpp's word for a random one.
N_SEEDS = 2**32 - 1


@dataclass(frozen=True)
class Sample:
    """One of the texts.

    Attributes
    ----------
    index : int
        0 up to the number of texts.
    seed : int
        Of its draws.
    text : str
        What there is of it.
    n_generated : int
        Tokens of it.
    stop_reason : str
        As in `run.runner`.
    n_thought : int or None
        Tokens of thinking, where that is limited.
    is_thought_cut : bool or None
        The end of thinking was forced.
    seconds : float
        From its first token to its last, the steps shared with the others.
    n_compressions, n_evicted : int
        Of its part of the cache.
    """

    index: int
    seed: int
    text: str
    n_generated: int
    stop_reason: str
    n_thought: int | None
    is_thought_cut: bool | None
    seconds: float
    n_compressions: int
    n_evicted: int


def sample_seeds(seed: int, n: int) -> list[int]:
    """Return the seeds of `n` texts: the first one is that of a single text."""
    return [(seed + i) % N_SEEDS for i in range(n)]


def run_samples(
    options: RunOptions, text: str, advance: Callable[[Sample], object]
) -> tuple[list[Sample], dict[str, Any]]:
    """Decode `options.n_samples` texts for one prompt, which is read once.

    Ctrl-C ends all of them.

    Parameters
    ----------
    text : str
        Prompt.
    advance : callable
        Gets each text when it ends.

    Returns
    -------
    list of Sample
        All texts, by index.
    dict
        What they have in common: the keys of ``--json``.

    Raises
    ------
    ReasonAllocError
        See `plan_run` and `ReasonLlama`, or a text failed.
    """
    if options.sampling.temp == 0 and options.n_samples > 1:
        raise ConfigError("--samples needs a temperature: greedy samples are all the same")
    plan = plan_run(options, text)
    options = settle(options, plan)
    arguments = session_arguments(options, plan, plan.n_ctx)
    with ReasonLlama(**arguments) as llama, Sequences(llama, prompt_step=None) as sequences:
        run = _Run(options, plan, llama, sequences)
        run.decode(advance)
        return run.samples(), run.report()


class _Run:
    """Texts under way."""

    def __init__(
        self, options: RunOptions, plan: Plan, llama: ReasonLlama, sequences: Sequences
    ) -> None:
        self._options, self._plan = options, plan
        self._llama, self._sequences = llama, sequences
        self._start = time.perf_counter()
        self._memory = llama.memory_use()
        self._samples: dict[int, Sample] = {}
        first, *others = [
            dataclasses.replace(options.sampling, seed=seed)
            for seed in sample_seeds(options.sampling.seed, options.n_samples)
        ]
        self._chains = [self._begin(first)]
        self._chains += [sequences.fork(self._chains[0], sampling) for sampling in others]

    def _begin(self, sampling: Sampling) -> Chain:
        options = self._options
        most = options.max_tokens or None
        request = Request(self._plan.prompt, most, sampling, think=options.think)
        return self._sequences.add(request)

    def decode(self, advance: Callable[[Sample], object]) -> None:
        """Decode to the end, or until Ctrl-C."""
        index = {chain.id: i for i, chain in enumerate(self._chains)}
        try:
            for event in self._sequences.run():
                chain = event.chain
                if chain.stop_reason == FAILED:
                    raise chain.error or ComputeError("a text failed")
                if chain.stop_reason is not None:
                    i = index[chain.id]
                    self._samples[i] = self._sample(i, chain)
                    advance(self._samples[i])
        except KeyboardInterrupt:
            for i, chain in enumerate(self._chains):
                if i not in self._samples:
                    self._samples[i] = self._sample(i, chain)

    def samples(self) -> list[Sample]:
        return [self._samples[i] for i in range(len(self._chains))]

    def _sample(self, index: int, chain: Chain) -> Sample:
        pieces, stats, thinking = self._llama.pieces(), chain.stats, chain.thinking
        if stats is None and self._options.config is not None and chain.seq_id is not None:
            stats = engine_stats(self._llama.ctx, chain.seq_id)
        ended = chain.ended or time.perf_counter()
        return Sample(
            index=index,
            seed=chain.request.sampling.seed,
            text=b"".join(pieces[t] for t in chain.tokens).decode("utf-8", "replace"),
            n_generated=len(chain.tokens),
            stop_reason=chain.stop_reason or INTERRUPTED,
            n_thought=None if thinking is None else thinking.n_thought,
            is_thought_cut=None if thinking is None else thinking.is_cut,
            seconds=ended - (chain.first or ended),
            n_compressions=0 if stats is None else stats.n_compressions,
            n_evicted=0 if stats is None else stats.n_evicted,
        )

    def report(self) -> dict[str, Any]:
        """Return what the texts have in common."""
        options, llama, memory = self._options, self._llama, self._memory
        counts, samples = self._sequences.counts, self.samples()
        ends = [chain.ended or time.perf_counter() for chain in self._chains]
        first = min((chain.first for chain in self._chains if chain.first), default=max(ends))
        seconds = max(ends) - first
        n_later = sum(max(sample.n_generated - 1, 0) for sample in samples)
        report: dict[str, Any] = {
            "n_samples": len(samples),
            "n_prompt": len(self._plan.prompt),
            "n_prompt_read": counts.n_prompt_tokens,
            "n_generated": sum(sample.n_generated for sample in samples),
            "n_steps": counts.n_steps,
            "prompt_seconds": first - self._start,
            "decode_seconds": seconds,
            "tokens_per_second": n_later / seconds if seconds > 0 else 0.0,
            "n_ctx": self._plan.n_ctx,
            "kv_type": options.kv_type,
            "temp": options.sampling.temp,
            "top_p": options.sampling.top_p,
            "rope": self._plan.rope,
            "model": path_text(options.model),
            "recommended_by": options.recommended_by,
            "weights_bytes": memory.model_bytes,
            "compute_bytes": memory.compute_bytes,
            "policy": "full" if options.config is None else options.config.policy,
            **allocation(options.config),
        }
        if options.config is None:
            kv = {"kv_bytes": memory.context_bytes, "window_bytes": 0, "scratch_bytes": 0}
            return report | kv | {"budget": None, "buffer": None}
        stats = engine_stats(llama.ctx, -1)
        return report | {
            "kv_bytes": stats.kv_bytes,
            "window_bytes": stats.window_bytes,
            "scratch_bytes": stats.scratch_bytes,
            "budget": stats.budget,
            "buffer": stats.buffer,
        }
