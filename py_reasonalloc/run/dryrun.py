"""What a run will take, in bytes, before any weight is loaded.

llama.cpp can build a model and a context without allocating anything (`no_alloc`). The very session
that a run would use is built that way and asked for its sizes, so nothing is computed twice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from llama_cpp import llama_cpp as bindings

from ..engine.stats import engine_stats
from ..session.reason_llama import ReasonLlama
from .options import Plan, RunOptions, session_arguments


class EmptyLlama(ReasonLlama):
    """A session whose model, cache and buffers are never allocated. It cannot decode."""

    @property
    def model_params(self) -> Any:
        """Parameters of the model, set by the base constructor."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.no_alloc = True
        self._model_params = params


@dataclass(frozen=True)
class DryRun:
    """Bytes that a run will allocate.

    Attributes
    ----------
    n_prompt, n_tokens : int
        Tokens of the prompt, and of prompt and text at their longest.
    weights_bytes, compute_bytes : int
        Model tensors; compute buffers.
    kv_bytes : int
        K and V of all layers.
    window_bytes, scratch_bytes : int
        The observation window's queries; what compressions need.
    stock_bytes : int
        Caches of sliding windows and recurrent states, which have no budget.
    total_bytes : int
        All of the above.
    layer_bytes : tuple of int
        K and V of each layer; 0 for one without attention. Empty for the stock cache.
    layer_capacity : tuple of tuple of int
        Tokens that each head of each layer can hold of one text. Empty for the stock cache.
    full_kv_bytes, full_compute_bytes : int
        The stock cache for `n_samples` texts of `n_tokens` tokens, as `llama_cpp.Llama` makes it by
        default, and the compute buffers that go with it.
    short_kv_bytes : int
        The same cache with ``swa_full=False``, as llama.cpp's own programs make it: layers with a
        sliding window keep little more than it. Without such layers it is `full_kv_bytes`.
    n_samples : int
        Texts side by side; all bytes are those of all of them.
    """

    n_prompt: int
    n_tokens: int
    weights_bytes: int
    kv_bytes: int
    window_bytes: int
    scratch_bytes: int
    stock_bytes: int
    compute_bytes: int
    total_bytes: int
    layer_bytes: tuple[int, ...]
    layer_capacity: tuple[tuple[int, ...], ...]
    full_kv_bytes: int
    full_compute_bytes: int
    short_kv_bytes: int
    n_samples: int = 1


def dry_run(options: RunOptions, plan: Plan) -> DryRun:
    """Ask the engine what a run will take.

    Raises
    ------
    ReasonAllocError
        The run itself would be refused.
    """
    stock = dataclasses.replace(options, config=None)
    with _open(stock, plan, plan.n_longest) as llama:
        full = llama.memory_use()
        has_windows = bindings.llama_model_n_swa(llama.model) > 0
    short_kv_bytes = full.context_bytes
    if has_windows:
        with _open(stock, plan, plan.n_longest, swa_full=False) as llama:
            short_kv_bytes = llama.memory_use().context_bytes
    if options.config is None:
        with _open(options, plan, plan.n_ctx) as llama:
            use = llama.memory_use()
        kv_bytes, window_bytes, stock_bytes = use.context_bytes, 0, 0
        layer_bytes: tuple[int, ...] = ()
        capacity: tuple[tuple[int, ...], ...] = ()
    else:
        with _open(options, plan, plan.n_ctx) as llama:
            use = llama.memory_use()
            layers, stats = llama.kv_stats().layers, engine_stats(llama.ctx, -1)
        kv_bytes, window_bytes = stats.kv_bytes, stats.window_bytes
        stock_bytes = stats.stock_bytes
        capacity = tuple(tuple(head.capacity for head in layer) for layer in layers)
        layer_bytes = tuple(
            stats.n_seq * sum(head.capacity * head.row_bytes for head in layer) for layer in layers
        )
    return DryRun(
        n_prompt=len(plan.prompt),
        n_tokens=plan.n_longest,
        weights_bytes=use.model_bytes,
        kv_bytes=kv_bytes,
        window_bytes=window_bytes,
        scratch_bytes=use.scratch_bytes,
        stock_bytes=stock_bytes,
        compute_bytes=use.compute_bytes,
        total_bytes=use.model_bytes
        + kv_bytes
        + window_bytes
        + stock_bytes
        + use.scratch_bytes
        + use.compute_bytes,
        layer_bytes=layer_bytes,
        layer_capacity=capacity,
        full_kv_bytes=full.context_bytes,
        full_compute_bytes=full.compute_bytes,
        short_kv_bytes=short_kv_bytes,
        n_samples=options.n_samples,
    )


def _open(options: RunOptions, plan: Plan, n_ctx: int, **others: Any) -> EmptyLlama:
    arguments = session_arguments(options, plan, n_ctx)
    return EmptyLlama(**{**arguments, "use_mmap": False, "use_mlock": False, **others})
