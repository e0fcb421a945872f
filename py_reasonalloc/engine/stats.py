"""What the engine says about a budgeted cache, as an immutable snapshot."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import bindings as c
from .errors import ConfigError, ContextError, error_from_status


class HeadStats(NamedTuple):
    """One KV head of one layer, in tokens.

    Attributes
    ----------
    budget : int
        Tokens kept at a compression.
    capacity : int
        Tokens that its segment can hold: budget + buffer.
    used : int
        Tokens held now.
    offset : int
        First row of its segment in the layer's pool.
    n_evicted : int
        Since the cache was last cleared; tokens of a tail that was dropped do not count.
    row_bytes : int
        K and V of one token.
    """

    budget: int
    capacity: int
    used: int
    offset: int
    n_evicted: int
    row_bytes: int


@dataclass(frozen=True)
class KVStats:
    """Snapshot of a budgeted cache. Nothing here is computed in Python.

    Attributes
    ----------
    budget, buffer : int
        As configured, tokens.
    n_layer, n_head_kv_max : int
        Layers with a cache, largest number of KV heads.
    n_seq : int
        Sequences that the numbers are of.
    n_pos : int
        Length of the sequence: last position + 1.
    peak_tokens : int
        Most tokens that any head ever held; at most its budget + buffer.
    kv_bytes : int
        Allocated K and V of all layers.
    window_bytes, scratch_bytes : int
        The observation window's queries; buffers reserved for compressions.
    kv_bytes_full : int
        K and V rows of n_pos tokens in the stock cache; of layers with a window that have a
        budget, of as many as the window holds.
    n_entries, n_evicted : int
        (token, head) entries held now, and evicted since the last clear (those of a tail that was
        dropped do not count).
    n_compressions, compress_us : int
        Since the last clear; microseconds.
    n_tokens_total : int
        Tokens decoded since the context was made.
    stock_bytes : int
        Caches of sliding windows and recurrent states, which have no budget.
    layers : tuple of tuple of HeadStats
        ``layers[il][ih]``; empty for a layer without attention.
    """

    budget: int
    buffer: int
    n_layer: int
    n_head_kv_max: int
    n_seq: int
    n_pos: int
    peak_tokens: int
    kv_bytes: int
    window_bytes: int
    scratch_bytes: int
    kv_bytes_full: int
    n_entries: int
    n_evicted: int
    n_compressions: int
    compress_us: int
    n_tokens_total: int
    stock_bytes: int
    layers: tuple[tuple[HeadStats, ...], ...]
    _positions: tuple[tuple[npt.NDArray[np.int32], ...], ...] = field(repr=False, compare=False)

    def kept_positions(self, il: int, ih: int) -> npt.NDArray[np.int32]:
        """Return the positions that head `ih` of layer `il` held, ascending, [used], read-only.

        Raises
        ------
        ConfigError
            No such layer or head.
        """
        if not 0 <= il < len(self._positions):
            raise ConfigError(f"il = {il} is out of range: must be 0 to {len(self._positions) - 1}")
        if not 0 <= ih < len(self._positions[il]):
            raise ConfigError(
                f"ih = {ih} is out of range: layer {il} has {len(self._positions[il])} KV heads"
            )
        return self._positions[il][ih]


class MemoryUse(NamedTuple):
    """Bytes of a context, summed over its devices.

    Weights, cache and compute buffers as ra_memory_breakdown gives them; and what compressions need
    from the first decode on (0 for the stock cache).
    """

    model_bytes: int
    context_bytes: int
    compute_bytes: int
    scratch_bytes: int


def read_memory_use(ctx: int, has_budget: bool) -> MemoryUse:
    """Return the bytes that a llama_context takes.

    Raises
    ------
    ReasonAllocError
        The engine cannot tell.
    """
    sizes = [ctypes.c_int64() for _ in range(3)]
    c.check(c.ra_memory_breakdown(ctx, *(ctypes.byref(size) for size in sizes)))
    scratch = int(c.ra_planned_scratch_bytes(ctx)) if has_budget else 0
    if scratch < 0:
        raise ContextError(c.last_error())
    model, context, compute = (size.value for size in sizes)
    return MemoryUse(model, context, compute, scratch)


def engine_stats(ctx: int, seq_id: int = 0) -> Any:
    """Return the ra_stats of a sequence of a llama_context; -1: the sums over all of them.

    Raises
    ------
    NotFoundError
        The context has no budgeted cache.
    ConfigError
        It has no such sequence.
    """
    native = c.ra_stats(size=ctypes.sizeof(c.ra_stats))
    c.check(c.ra_stats_get(ctx, seq_id, ctypes.byref(native)))
    return native


def read_stats(ctx: int, n_layer: int, seq_id: int = 0) -> KVStats:
    """Read everything the engine reports.

    Parameters
    ----------
    ctx : int
        Address of a llama_context with a budgeted cache.
    n_layer : int
        Layers of the model.
    seq_id : int
        A sequence of the context.

    Raises
    ------
    NotFoundError
        The context has no budgeted cache.
    ConfigError
        It has no such sequence.
    """
    native = engine_stats(ctx, seq_id)
    heads = [c.ra_n_head_kv(ctx, il) for il in range(n_layer)]
    layers = tuple(
        tuple(_head_stats(ctx, seq_id, il, ih) for ih in range(n)) for il, n in enumerate(heads)
    )
    positions = tuple(
        tuple(_positions(ctx, seq_id, il, ih, head.used) for ih, head in enumerate(layer))
        for il, layer in enumerate(layers)
    )
    values = {name: getattr(native, name) for name, _ in c.ra_stats._fields_ if name != "size"}
    return KVStats(**values, layers=layers, _positions=positions)


def read_held_prefix(ctx: int, n_layer: int, seq_id: int = 0) -> int:
    """Return how many of the first positions every head still holds, without a gap."""
    shortest = int(engine_stats(ctx, seq_id).n_pos)
    for il in range(n_layer):
        for ih in range(c.ra_n_head_kv(ctx, il)):
            used = _head_stats(ctx, seq_id, il, ih).used
            positions = _positions(ctx, seq_id, il, ih, used)
            in_place = positions == np.arange(len(positions))
            n = len(in_place) if in_place.all() else int(in_place.argmin())
            shortest = min(shortest, n)
    return shortest


def _head_stats(ctx: int, seq_id: int, il: int, ih: int) -> HeadStats:
    native = c.ra_head_stats(size=ctypes.sizeof(c.ra_head_stats))
    c.check(c.ra_head_stats_get(ctx, seq_id, il, ih, ctypes.byref(native)))
    return HeadStats(*(getattr(native, name) for name in HeadStats._fields))


def _positions(ctx: int, seq_id: int, il: int, ih: int, n: int) -> npt.NDArray[np.int32]:
    positions = np.empty(n, dtype=np.int32)
    pointer = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    if c.ra_kept_positions(ctx, seq_id, il, ih, pointer, n) != n:
        raise error_from_status(1, c.last_error())
    positions.flags.writeable = False
    return positions
