"""Decoding one problem after the other with a model that is loaded once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ... import __version__
from ...engine.prompts import encode_prompt
from ...engine.stats import engine_stats
from ...session.generate import CONTEXT, LENGTH, STOP, Generation, Sampling
from ...session.reason_llama import ReasonLlama
from ..cases import rows
from ..cases.methods import Arm, Setup, profile_digest
from ..cases.rows import Problem, Row
from .answers import judge_for
from .loops import LoopDetector


class Task(NamedTuple):
    """One text to write: an arm, the index of a problem, a sample."""

    arm: Arm
    problem: int
    sample: int


@dataclass(frozen=True)
class Job:
    """All that a process needs to work on tasks; it can be pickled.

    Attributes
    ----------
    model : Path
        GGUF file.
    dataset : str
        Name, which decides how answers are judged.
    problems : tuple of Problem
        What `Task.problem` counts.
    prompts : tuple of str
        User messages, one per problem, template applied.
    setups : mapping
        Arm -> its cache; policy_seed is set anew for every text.
    n_ctx : int
        Context, tokens.
    max_tokens : int
        Most tokens to generate.
    temp, top_p : float
        See `Sampling`.
    seed : int
        From which every text's own seed is made.
    raw : bool
        Leave out the chat template.
    keep_texts : bool
        Put texts into the rows.
    n_threads, n_gpu_layers : int
        See `ReasonLlama`.
    """

    model: Path
    dataset: str
    problems: tuple[Problem, ...]
    prompts: tuple[str, ...]
    setups: Mapping[Arm, Setup]
    n_ctx: int
    max_tokens: int
    temp: float
    top_p: float
    seed: int
    raw: bool
    keep_texts: bool
    n_threads: int
    n_gpu_layers: int


def text_seed(seed: int, problem: str, sample: int) -> int:
    """Return a text's seed, of sampling and of policies: the same in every arm, 0 to 2**31 - 1."""
    return zlib.crc32(f"{seed}/{problem}/{sample}".encode()) & 0x7FFFFFFF


def judge_row(
    job: Job, task: Task, text: str, n_prompt: int, n_generated: int, stop: str, **measured: Any
) -> Row:
    """Return the row of a text, judged."""
    problem = job.problems[task.problem]
    judgement = judge_for(job.dataset)(text, problem.answer)
    return Row(
        method=task.arm.method,
        budget=task.arm.budget,
        problem=problem.key,
        sample=task.sample,
        seed=text_seed(job.seed, problem.key, task.sample),
        gold=problem.answer,
        answer=judgement.answer,
        correct=judgement.correct,
        n_prompt=n_prompt,
        n_generated=n_generated,
        stop=stop,
        text=text if job.keep_texts else None,
        profile=profile_digest(job.setups[task.arm]),
        version=__version__,
        **measured,
    )


class Request(NamedTuple):
    """One text to write, as a model needs to know it.

    Attributes
    ----------
    setup : Setup
        The cache.
    prompt : str
        User message.
    raw : bool
        Leave out the chat template.
    max_tokens : int
        Most tokens to generate; 0: as many as the context holds.
    sampling : Sampling
        How tokens are drawn.
    """

    setup: Setup
    prompt: str
    raw: bool
    max_tokens: int
    sampling: Sampling


def request_of(job: Job, task: Task) -> Request:
    """Return what a model needs to know of a task.

    A policy that draws at random draws with the text's seed: other numbers for every text.
    """
    seed = text_seed(job.seed, job.problems[task.problem].key, task.sample)
    setup = job.setups[task.arm]
    if setup.config is not None:
        setup = setup._replace(config=replace(setup.config, policy_seed=seed))
    return Request(
        setup=setup,
        prompt=job.prompts[task.problem],
        raw=job.raw,
        max_tokens=job.max_tokens,
        sampling=Sampling(job.temp, job.top_p, seed),
    )


class Decoder:
    """A model that is loaded once and writes texts; the cache is made anew where it differs.

    Parameters
    ----------
    model : Path
        GGUF file; loaded when the first text is wanted.
    n_ctx : int
        Context, tokens.
    n_threads, n_gpu_layers : int
        See `ReasonLlama`.
    """

    def __init__(self, model: Path, n_ctx: int, n_threads: int, n_gpu_layers: int) -> None:
        self.n_ctx = n_ctx
        self._model, self._n_threads, self._n_gpu_layers = model, n_threads, n_gpu_layers
        self._llama: ReasonLlama | None = None
        self._setup: Setup | None = None

    def decode(
        self, request: Request, is_stopped: Callable[[], bool] = lambda: False
    ) -> tuple[str, dict[str, Any]]:
        """Write one text with an empty cache.

        Parameters
        ----------
        request : Request
            See there.
        is_stopped : callable
            Asked between tokens; a text under way is given up with KeyboardInterrupt.

        Returns
        -------
        str
            The text.
        dict
            Fields of its `Row`: tokens, why it ended, sizes and times.

        Raises
        ------
        ReasonAllocError
            The model cannot be loaded, the prompt does not fit, or a decode failed. The next text
            may be tried all the same.
        KeyboardInterrupt
            `is_stopped`.
        """
        llama = self._session(request.setup)
        llama.clear()
        prompt = encode_prompt(llama._model, request.prompt, request.raw)
        generation = Generation(llama, prompt, request.max_tokens, request.sampling)
        text, is_loop = _text_of(generation, is_stopped)
        timing = generation.timing()
        return text, {
            "n_prompt": len(prompt),
            "n_generated": len(generation.tokens),
            "stop": rows.LOOP if is_loop else STOPS[generation.stop_reason or LENGTH],
            "prompt_seconds": timing.prompt_seconds,
            "decode_seconds": timing.decode_seconds,
            **measure_cache(llama),
        }

    def _session(self, setup: Setup) -> ReasonLlama:
        if self._llama is None:
            self._llama = ReasonLlama(
                self._model,
                setup.config,
                n_ctx=self.n_ctx,
                type_k=setup.kv_type,
                type_v=setup.kv_type,
                n_threads=self._n_threads,
                n_threads_batch=self._n_threads,
                n_gpu_layers=self._n_gpu_layers,
                checkpoints=0,
            )
        elif setup != self._setup:
            try:
                self._llama.reconfigure(setup.config, type_k=setup.kv_type, type_v=setup.kv_type)
            except BaseException:
                self.close()  # it has no context any more
                raise
        self._setup = setup
        return self._llama

    def close(self) -> None:
        """Free the model; the next text would load it again."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None


def _text_of(generation: Generation, is_stopped: Callable[[], bool]) -> tuple[str, bool]:
    """Return the text, and whether it was cut off because it went round in circles."""
    detector, pieces, n_seen, is_loop = LoopDetector(), [], 0, False
    for piece in generation:
        pieces.append(piece)
        if is_stopped():
            raise KeyboardInterrupt
        fresh: Sequence[int] = generation.tokens[n_seen:]
        n_seen += len(fresh)
        if any([detector.update(token) for token in fresh]):
            is_loop = True
            generation.interrupt()
    return "".join(pieces), is_loop


class Worker:
    """A loaded model that works on tasks.

    Parameters
    ----------
    job : Job
        See there.
    is_stopped : callable
        Asked between tokens; a text under way is given up with KeyboardInterrupt.
    """

    def __init__(self, job: Job, is_stopped: Callable[[], bool] = lambda: False) -> None:
        self.job = job
        self.is_stopped = is_stopped
        self._decoder = Decoder(job.model, job.n_ctx, job.n_threads, job.n_gpu_layers)

    def solve(self, task: Task) -> Row:
        """Decode one problem, judge the text, and read the engine's counts; see `Decoder`."""
        text, measured = self._decoder.decode(request_of(self.job, task), self.is_stopped)
        return judge_row(self.job, task, text, **measured)

    def close(self) -> None:
        """Free the model."""
        self._decoder.close()


#: Why a session's text ended -> `Row.stop`.
STOPS = {STOP: rows.END, LENGTH: rows.LENGTH, CONTEXT: rows.LENGTH}


def measure_cache(llama: ReasonLlama) -> dict[str, Any]:
    """Return the engine's counts of the text that a session holds, as fields of `Row`."""
    if llama.config is None:
        return full_counts(llama, llama.n_cached())
    return budget_counts(engine_stats(llama.ctx), llama.n_protect)


def full_counts(llama: ReasonLlama, n_cached: int) -> dict[str, Any]:
    """Return what `n_cached` tokens in a stock cache take, as fields of `Row`."""
    return {
        "n_protect": None,
        "peak_tokens": n_cached,
        "kv_bytes": llama.memory_use().context_bytes // llama.n_ctx() * n_cached,
        "n_evicted": 0,
        "n_compressions": 0,
        "compress_seconds": 0.0,
    }


def budget_counts(stats: Any, n_protect: int) -> dict[str, Any]:
    """Return the counts of a sequence, its ra_stats, as fields of `Row`."""
    return {
        "n_protect": n_protect,
        "peak_tokens": stats.peak_tokens,
        "kv_bytes": stats.kv_bytes,
        "n_evicted": stats.n_evicted,
        "n_compressions": stats.n_compressions,
        "compress_seconds": stats.compress_us / 1e6,
    }
