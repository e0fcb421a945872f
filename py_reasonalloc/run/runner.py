"""One run of the command line: load, decode, report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..engine.stats import engine_stats
from ..engine.usertext import path_text
from ..session.chains import take_chain
from ..session.generate import INTERRUPTED, STOP, Generation
from ..session.reason_llama import ReasonLlama
from .allocation import allocation, settle
from .interrupts import Interrupts
from .options import Plan, RunOptions, plan_run, session_arguments
from .watch import Watcher, watched

# fields of Sampling that a report has beside seed, temp and top_p
_SAMPLING = (
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry_multiplier",
    "xtc_probability",
    "top_k",
    "min_p",
)

#: Names of what a run without a budget reports as its policy.
FULL_CACHE = "full"


def run(
    options: RunOptions,
    text: str | None,
    write: Callable[[str], None],
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Decode one prompt.

    Parameters
    ----------
    text : str or None
        Prompt; None: a chain is continued.
    write : callable
        Gets the pieces of the generated text as they come.
    watcher : Watcher, optional
        Is shown the cache meanwhile; needs a budget.

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
    with Interrupts() as interrupts:
        plan = plan_run(options, text)
        interrupts.is_raising = True  # a calibration has no next token to wait for
        options = settle(options, plan)
        interrupts.is_raising = False
        with ReasonLlama(**session_arguments(options, plan, plan.n_ctx)) as llama:
            n_before = 0
            if options.chain is not None:
                options.chain.put_into(llama)
                n_before = len(plan.prompt) - options.chain.n_prompt
            generation = generation_of(options, llama, plan.prompt, n_before=n_before)
            if options.chain is not None and options.chain.is_ended:
                generation.stop_reason = STOP
            interrupts.stop = generation.interrupt
            if interrupts.is_set:  # while loading
                generation.interrupt()
            pieces: list[str] = []
            with watched(llama, watcher, options.trace, len(plan.prompt)):
                try:
                    interrupts.is_raising = not interrupts.is_set
                    for piece in generation if generation.stop_reason is None else ():
                        interrupts.is_raising = False
                        pieces.append(piece)
                        write(piece)
                        if watcher is not None:
                            watcher.step()
                except KeyboardInterrupt:
                    generation.interrupt()
                interrupts.is_raising = False
            if options.save_state is not None:
                tokens = plan.prompt + tuple(generation.tokens)
                is_ended = generation.stop_reason == STOP
                n_prompt = len(plan.prompt) - n_before
                take_chain(llama, tokens, n_prompt, is_ended).write(options.save_state)
            return report_of(options, plan, generation, "".join(pieces))


def generation_of(
    options: RunOptions,
    llama: ReasonLlama,
    prompt: Sequence[int],
    spelled: Collection[int] = (),
    n_before: int = 0,
) -> Generation:
    """Return the text that a run asks for, still to be made; `spelled`, `n_before`: see there."""
    return Generation(
        llama,
        prompt,
        options.max_tokens,
        options.sampling,
        options.think,
        n_before=n_before,
        keeps_rest=options.save_state is not None,
        stop=options.stop,
        grammar=options.grammar,
        spelled=spelled,
    )


def report_of(options: RunOptions, plan: Plan, generation: Generation, text: str) -> dict[str, Any]:
    """Return the report of a text: see `run`."""
    llama = generation.llama
    timing = generation.timing()
    memory = llama.memory_use()
    report: dict[str, Any] = {
        "text": text,
        "n_prompt": len(plan.prompt) if options.chain is None else options.chain.n_prompt,
        "n_before": 0 if options.chain is None else len(plan.prompt) - options.chain.n_prompt,
        "n_generated": len(generation.tokens),
        "stop_reason": generation.stop_reason or INTERRUPTED,
        "prompt_seconds": timing.prompt_seconds,
        "first_token_seconds": generation.first_token_seconds,
        "decode_seconds": timing.decode_seconds,
        "tokens_per_second": timing.tokens_per_second,
        "n_ctx": plan.n_ctx,
        "n_pos": llama.n_cached(),
        "kv_type": options.kv_type,
        "seed": options.sampling.seed,
        "temp": options.sampling.temp,
        "top_p": options.sampling.top_p,
        **{name: getattr(options.sampling, name) for name in _SAMPLING},
        "n_thought": None if generation.thinking is None else generation.thinking.n_thought,
        "is_thought_cut": None if generation.thinking is None else generation.thinking.is_cut,
        "rope": plan.rope,
        "model": path_text(options.model),
        "save_state": None if options.save_state is None else path_text(options.save_state),
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
