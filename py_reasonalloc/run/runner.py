"""One run of the command line: load, decode, report."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any

from ..engine.stats import engine_stats
from ..engine.usertext import path_text
from ..session.generate import INTERRUPTED, Generation
from ..session.reason_llama import ReasonLlama
from .allocation import allocation, settle
from .options import Plan, RunOptions, plan_run, session_arguments

# fields of Sampling that a report has beside seed, temp and top_p
_AGAINST_LOOPS = (
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry_multiplier",
    "xtc_probability",
)

#: Names of what a run without a budget reports as its policy.
FULL_CACHE = "full"


class _Interrupts:
    """Ctrl-C inside a ``with`` block: `stop` is called once; a second one always raises.

    While `is_raising`, the first one raises KeyboardInterrupt too (a prompt is being read, and
    there is no next token to wait for). A process that was started with Ctrl-C ignored ignores it.
    """

    def __init__(self) -> None:
        self.is_raising = False
        self.is_set = False
        self.stop: Callable[[], None] = lambda: None

    def __enter__(self) -> _Interrupts:
        self._former = signal.getsignal(signal.SIGINT)
        if self._former != signal.SIG_IGN:  # a shell's way to keep Ctrl-C from background jobs
            signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_set or self.is_raising:
            self.is_set = True
            raise KeyboardInterrupt
        self.is_set = True
        self.stop()


def run(options: RunOptions, text: str, write: Callable[[str], None]) -> dict[str, Any]:
    """Decode one prompt.

    Parameters
    ----------
    text : str
        Prompt.
    write : callable
        Gets the pieces of the generated text as they come.

    Returns
    -------
    dict
        The report that ``--json`` prints; all keys are always there. Sizes are in bytes, times in
        seconds, the rest in tokens; null where a stock cache has no such thing.

    Raises
    ------
    ReasonAllocError
        See `plan_run` and `ReasonLlama`.
    """
    with _Interrupts() as interrupts:
        plan = plan_run(options, text)
        interrupts.is_raising = True  # a calibration has no next token to wait for
        options = settle(options, plan)
        interrupts.is_raising = False
        with ReasonLlama(**session_arguments(options, plan, plan.n_ctx)) as llama:
            generation = Generation(
                llama, plan.prompt, options.max_tokens, options.sampling, options.think
            )
            interrupts.stop = generation.interrupt
            if interrupts.is_set:  # while loading
                generation.interrupt()
            pieces: list[str] = []
            trace: AbstractContextManager[None] = nullcontext()
            if options.trace is not None:
                trace = llama.trace_to(options.trace, len(plan.prompt))
            with trace:
                try:
                    interrupts.is_raising = not interrupts.is_set
                    for piece in generation if generation.stop_reason is None else ():
                        interrupts.is_raising = False
                        pieces.append(piece)
                        write(piece)
                except KeyboardInterrupt:
                    generation.interrupt()
                interrupts.is_raising = False
            return _report(options, plan, generation, "".join(pieces))


def _report(options: RunOptions, plan: Plan, generation: Generation, text: str) -> dict[str, Any]:
    llama = generation.llama
    timing = generation.timing()
    memory = llama.memory_use()
    report: dict[str, Any] = {
        "text": text,
        "n_prompt": len(plan.prompt),
        "n_generated": len(generation.tokens),
        "stop_reason": generation.stop_reason or INTERRUPTED,
        "prompt_seconds": timing.prompt_seconds,
        "decode_seconds": timing.decode_seconds,
        "tokens_per_second": timing.tokens_per_second,
        "n_ctx": plan.n_ctx,
        "n_pos": llama.n_cached(),
        "kv_type": options.kv_type,
        "seed": options.sampling.seed,
        "temp": options.sampling.temp,
        "top_p": options.sampling.top_p,
        **{name: getattr(options.sampling, name) for name in _AGAINST_LOOPS},
        "n_thought": None if generation.thinking is None else generation.thinking.n_thought,
        "is_thought_cut": None if generation.thinking is None else generation.thinking.is_cut,
        "rope": plan.rope,
        "model": path_text(options.model),
        "trace": None if options.trace is None else path_text(options.trace),
        "recommended_by": options.recommended_by,
        "weights_bytes": memory.model_bytes,
        "compute_bytes": memory.compute_bytes,
    }
    return report | (_stock_report(llama) if options.config is None else _budget_report(llama))


def _budget_report(llama: ReasonLlama) -> dict[str, Any]:
    assert llama.config is not None
    stats = engine_stats(llama.ctx)
    return {
        "policy": llama.config.policy,
        **allocation(llama.config),
        "budget": stats.budget,
        "buffer": stats.buffer,
        "n_protect": llama.n_protect,
        "peak_tokens": stats.peak_tokens,
        "kv_bytes": stats.kv_bytes,
        "kv_bytes_full": stats.kv_bytes_full,
        "window_bytes": stats.window_bytes,
        "stock_bytes": stats.stock_bytes,
        "scratch_bytes": stats.scratch_bytes,
        "n_compressions": stats.n_compressions,
        "compression_seconds": stats.compress_us / 1e6,
        "n_evicted": stats.n_evicted,
    }


def _stock_report(llama: ReasonLlama) -> dict[str, Any]:
    """Report of a run with the stock cache: it holds n_ctx cells, whatever is in them."""
    n_pos = llama.n_cached()
    kv_bytes = llama.memory_use().context_bytes
    return {
        "policy": FULL_CACHE,
        **allocation(None),
        "budget": None,
        "buffer": None,
        "n_protect": None,
        "peak_tokens": n_pos,
        "kv_bytes": kv_bytes,
        "kv_bytes_full": kv_bytes // llama.n_ctx() * n_pos,
        "window_bytes": 0,
        "stock_bytes": 0,
        "scratch_bytes": 0,
        "n_compressions": 0,
        "compression_seconds": 0.0,
        "n_evicted": 0,
    }
