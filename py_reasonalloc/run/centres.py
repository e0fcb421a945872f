"""Measure where the queries of every head lie: what the policy "triattention" works by.

TriAttention, arXiv 2604.04921: without their rotation by RoPE, the queries of a head lie close
around a fixed centre. Per query head the mean query is taken, and per rotated pair of its values
the mean modulus, over all tokens that a model reads and writes. Queries are read while the graph
runs (as the attention is, see `calibrate`), and the library says how the model rotates them.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine import bindings as c
from ..engine import ggml
from ..engine.errors import UnsupportedError

_PRODUCT = re.compile(rb"^kq-(\d+)$")


def unrotated(
    q: npt.NDArray[Any], positions: npt.NDArray[Any], pairs: npt.NDArray[Any], freq: Any
) -> npt.NDArray[np.float64]:
    """Take the rotation by their positions out of queries.

    Parameters
    ----------
    q : [n_tokens, n_head, head_dim]
        As they are attended with.
    positions : [n_tokens]
    pairs : [n_rot / 2, 2]
        Which values are rotated together.
    freq : [n_rot / 2]
        Radians per position.

    Returns
    -------
    array [n_tokens, n_head, head_dim]
    """
    angle = positions[:, None, None] * np.asarray(freq, dtype=np.float64)
    out = q.astype(np.float64)
    a, b = out[..., pairs[:, 0]], out[..., pairs[:, 1]]
    out[..., pairs[:, 0]] = a * np.cos(angle) + b * np.sin(angle)
    out[..., pairs[:, 1]] = b * np.cos(angle) - a * np.sin(angle)
    return out


def rotated_pairs(rope: c.ra_rope) -> npt.NDArray[np.intp]:
    """Return which values of a row are rotated together, [n_rot / 2, 2]."""
    half = rope.n_rot // 2
    f = np.arange(half)
    pairs = np.stack([f, f + half] if rope.is_neox else [2 * f, 2 * f + 1], axis=1)
    return pairs + int(rope.offset)


class CentreMeter:
    """Sums up the queries of running graphs.

    Parameters
    ----------
    n_head_kv : [n_layer]
        KV heads of each layer; one of 0 is not measured.
    head_dim : int
        Of the model.

    Attributes
    ----------
    reason : str
        Why the queries of this model cannot be read; "" if they can.
    """

    def __init__(self, n_head_kv: Sequence[int], head_dim: int) -> None:
        self.head_dim = head_dim
        self._n_head_kv = list(n_head_kv)
        n_layer = len(self._n_head_kv)
        self.reason = ""
        self._n_pos = np.zeros(n_layer, dtype=np.int64)
        self._n = np.zeros(n_layer, dtype=np.int64)
        self._sums: dict[int, npt.NDArray[np.float64]] = {}
        self._is_rotated = False
        self._freq = (c.c_float * max(head_dim // 2, 1))()

    def start(self) -> None:
        """Begin a text at position 0."""
        self._n_pos[:] = 0

    def receive(self, name: bytes, tensor: int, ask: bool) -> bool:
        """Answer whether a tensor of the graph is wanted; take it, unless it is only asked for."""
        match = _PRODUCT.match(name)
        if match is None or self.reason:
            return False
        il = int(match[1])
        if il < len(self._n_head_kv) and self._n_head_kv[il] == 0:
            return False
        if not ask:
            self._add(il, tensor)
        return True

    def _add(self, il: int, product: int) -> None:
        """Take the queries of a layer's attention product, the tensor at an address."""
        _, n_tokens, n_head, _ = ggml.tensor_shape(product)
        rope = c.ra_rope()
        q = np.empty((n_tokens, n_head, self.head_dim), dtype=np.float32)
        out = q.ctypes.data_as(ctypes.POINTER(c.c_float))
        try:
            c.check(c.ra_read_queries(product, rope, self._freq, len(self._freq), out, q.size))
        except UnsupportedError as error:
            self.reason = str(error)
            return
        pairs = rotated_pairs(rope)
        positions = self._n_pos[il] + np.arange(n_tokens)
        q64 = unrotated(q, positions, pairs, self._freq[: len(pairs)])
        moduli = np.zeros((n_head, self.head_dim // 2))
        moduli[:, : len(pairs)] = np.hypot(q64[..., pairs[:, 0]], q64[..., pairs[:, 1]]).sum(axis=0)
        sums = np.concatenate([q64.sum(axis=0), moduli], axis=1)
        self._sums[il] = self._sums.get(il, 0.0) + sums
        self._n[il] += n_tokens
        self._n_pos[il] += n_tokens
        self._is_rotated = self._is_rotated or rope.n_rot > 0

    def centres(self) -> bytes:
        """Return ra_config.centres in float32, little endian; empty for a model without RoPE."""
        if self.reason or not self._is_rotated:
            return b""
        rows = [(self._sums[il] / self._n[il]).ravel() for il in sorted(self._sums)]
        return np.concatenate(rows).astype("<f4").tobytes()
