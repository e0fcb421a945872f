"""One run of the command line: load, decode, report."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .allocation import allocation, settle
from .config import BudgetConfig, kv_type_id
from .errors import ConfigError, ContextFullError
from .generate import INTERRUPTED, Generation, Sampling
from .modelfile import encode_prompt, open_vocabulary, trained_context
from .session import ReasonLlama
from .stats import engine_stats

#: Names of what a run without a budget reports as its policy.
FULL_CACHE = "full"


@dataclass(frozen=True)
class RunOptions:
    """What to run.

    Attributes
    ----------
    model : Path
        GGUF file.
    config : BudgetConfig or None
        None: the stock cache.
    profile : str or None
        Where the layers' budgets come from: "auto", "calibrate" or the path of a profile; `config`
        is then uniform over layers, and stays so if "auto" finds none. None: `config` is final.
    needs_profile : bool
        That "auto" finds none is an error.
    kv_type : str
        Type of K and V.
    n_ctx : int
        Context, tokens; 0: as trained with a budget, as long as the text can get without.
    max_tokens : int
        Most tokens to generate; 0: as many as the context holds.
    n_threads : int
        0: what llama_cpp chooses.
    n_gpu_layers : int
        Layers on a GPU; -1: all.
    sampling : Sampling
        How tokens are drawn.
    raw : bool
        Leave out the chat template.
    trace : Path or None
        File to write every compression to; needs a budget.
    recommended_by : str or None
        Whose recommendation `config` and `kv_type` are.
    verbose : bool
        Let llama.cpp log.
    """

    model: Path
    config: BudgetConfig | None = field(default_factory=BudgetConfig)
    profile: str | None = None
    needs_profile: bool = False
    kv_type: str = "f16"
    n_ctx: int = 0
    max_tokens: int = 0
    n_threads: int = 0
    n_gpu_layers: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    raw: bool = False
    trace: Path | None = None
    recommended_by: str | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Plan:
    """What the model's vocabulary tells before its weights are loaded.

    Attributes
    ----------
    prompt : tuple of int
        Tokens.
    n_ctx : int
        Context to make, tokens.
    n_longest : int
        Tokens that prompt and text can reach together.
    """

    prompt: tuple[int, ...]
    n_ctx: int
    n_longest: int


def plan_run(options: RunOptions, text: str | None) -> Plan:
    """Tokenize the prompt and settle the length of the context.

    Parameters
    ----------
    text : str or None
        Prompt; None (dry runs only) stands for one of unknown length.

    Raises
    ------
    ConfigError
        Empty prompt, context longer than trained, unknown cache type, protected prompt too long.
    ContextFullError
        The prompt leaves no room in the context.
    ModelFileError
        The file is not a model.
    """
    kv_type_id(options.kv_type)
    with open_vocabulary(options.model, options.verbose) as model:
        n_trained = trained_context(model)
        prompt = () if text is None else tuple(encode_prompt(model, text, options.raw))
    if options.n_ctx > n_trained > 0:
        raise ConfigError(
            f"ctx = {options.n_ctx} is out of range: the model was trained for {n_trained} tokens"
        )
    n_ctx = options.n_ctx or n_trained
    if len(prompt) >= n_ctx:
        raise ContextFullError(
            f"the prompt has {len(prompt)} tokens, but the context ends at {n_ctx}: shorten it"
        )
    n_longest = n_ctx
    if options.max_tokens > 0:
        n_longest = min(n_ctx, len(prompt) + options.max_tokens)
    if options.config is None and options.n_ctx == 0:
        n_ctx = n_longest  # a stock cache is allocated whole
    return Plan(prompt, n_ctx, n_longest)


def session_arguments(options: RunOptions, n_ctx: int) -> dict[str, Any]:
    """Return the arguments of `ReasonLlama` for a run."""
    arguments: dict[str, Any] = {
        "model_path": options.model,
        "budget": options.config,
        "n_ctx": n_ctx,
        "n_gpu_layers": options.n_gpu_layers,
        "type_k": options.kv_type,
        "type_v": options.kv_type,
        "verbose": options.verbose,
    }
    if options.n_threads > 0:
        arguments["n_threads"] = arguments["n_threads_batch"] = options.n_threads
    return arguments


class _Interrupts:
    """Ctrl-C inside a ``with`` block: `stop` is called once; a second one always raises.

    While `is_raising`, the first one raises KeyboardInterrupt too (a prompt is being read, and
    there is no next token to wait for).
    """

    def __init__(self) -> None:
        self.is_raising = False
        self.is_set = False
        self.stop: Callable[[], None] = lambda: None

    def __enter__(self) -> _Interrupts:
        self._former = signal.signal(signal.SIGINT, self._receive)
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
        with ReasonLlama(**session_arguments(options, plan.n_ctx)) as llama:
            generation = Generation(llama, plan.prompt, options.max_tokens, options.sampling)
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
        "model": str(options.model),
        "trace": None if options.trace is None else str(options.trace),
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
        "scratch_bytes": 0,
        "n_compressions": 0,
        "compression_seconds": 0.0,
        "n_evicted": 0,
    }
