"""What attention works on while a text is decoded with the full cache: Q, K and V of every head.

Read where the graph multiplies them (``kq-<layer>`` and ``kqv-<layer>``, flash attention off), so
they are what the model's attention sees, after whatever norms, rotation and scale it applies.
Queries are copied step by step; keys and values are read from the cache once the text has ended.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine import ggml
from ..engine.errors import UnsupportedError

_NODE = re.compile(rb"^(kq|kq_soft_max|kqv|l_out)-(\d+)$")

#: First positions, left out of the mean norm of the residual stream: they carry outliers.
N_FIRST = 4

Floats = npt.NDArray[np.float32]


class NoCurvesError(UnsupportedError):
    """Error curves of this model cannot be measured; everything else can."""


class Stream(NamedTuple):
    """One layer's text.

    Attributes
    ----------
    q : [n_head_kv, n_tokens, n_group, head_dim_k]
        Queries.
    k : [n_head_kv, n_tokens, head_dim_k]
        Keys as the cache holds them.
    v : [n_head_kv, n_tokens, head_dim_v]
        Values.
    scale : float
        Factor on q.k.
    """

    q: Floats
    k: Floats
    v: Floats
    scale: float


class StreamRecorder:
    """Copies what attention works on from the tensors of running graphs.

    A text must begin in an empty cache of one sequence, of f32, f16 or bf16. In memory meanwhile:
    the queries of one text, f32.

    Parameters
    ----------
    n_head_kv : [n_layer]
        KV heads of each layer; one of 0 is not recorded.
    """

    def __init__(self, n_head_kv: Sequence[int]) -> None:
        self._n_head_kv = list(n_head_kv)
        n_layer = len(self._n_head_kv)
        self._norm = np.zeros(n_layer)
        self._n_norm = np.zeros(n_layer, dtype=np.int64)
        self.start()

    def start(self) -> None:
        """Begin a text."""
        n_layer = len(self._n_head_kv)
        self._q: list[list[Floats]] = [[] for _ in range(n_layer)]
        self._k: list[ggml.View | None] = [None] * n_layer
        self._v: list[ggml.View | None] = [None] * n_layer
        self._scale = [0.0] * n_layer

    def receive(self, tensor: int, name: bytes, ask: bool) -> bool | None:
        """Answer whether a tensor is wanted (`ask`), or take it; None: it is none of ours."""
        match = _NODE.match(name)
        if match is None or int(match[2]) >= len(self._n_head_kv):
            return None
        kind, il = match[1], int(match[2])
        if self._n_head_kv[il] == 0:
            return None
        if kind == b"kq_soft_max":
            if ask:
                self._check(tensor, il)
            return None  # the demand is read from it, too
        if kind == b"kqv":
            if ask:
                self._v[il] = _cached(_required(ggml.source(tensor, 0)))
            return False
        if ask:
            return True
        if kind == b"kq":
            self._k[il] = _cached(_required(ggml.source(tensor, 0)))
            q = ggml.view_of(_required(ggml.source(tensor, 1)))
            self._q[il].append(ggml.read_view(q)[0])
        else:
            self._add_norm(il, ggml.read_f32(tensor)[0, 0])
        return True

    def _check(self, soft_max: int, il: int) -> None:
        """Take the scale; refuse what a replay does not do."""
        logits = _required(ggml.source(soft_max, 0))
        is_plain = ggml.tensor_name(logits) == b"kq-%d" % il and ggml.source(soft_max, 2) is None
        if not is_plain or ggml.parameter_f32(soft_max, 1) != 0.0:
            raise NoCurvesError(
                "attention with sinks, capped logits or ALiBi: error curves cannot be measured "
                "(reasonalloc-profile --no-curves leaves them out)"
            )
        self._scale[il] = ggml.parameter_f32(soft_max, 0)

    def _add_norm(self, il: int, residual: Floats) -> None:
        """Take the residual stream behind a block, [n_tokens, n_embd]."""
        n_before = sum(q.shape[1] for q in self._q[il])  # the block's own queries came before
        first = 0
        if self._q[il] and self._q[il][-1].shape[1] == residual.shape[0]:
            n_before -= residual.shape[0]
            first = max(N_FIRST - n_before, 0)
        self._norm[il] += float(np.square(residual[first:], dtype=np.float64).sum())
        self._n_norm[il] += max(residual.shape[0] - first, 0)

    def streams(self) -> list[Stream | None]:
        """Return the text of each layer that has attention, [n_layer]."""
        return [self._stream(il) for il in range(len(self._n_head_kv))]

    def _stream(self, il: int) -> Stream | None:
        n_head_kv, k_view, v_view = self._n_head_kv[il], self._k[il], self._v[il]
        if n_head_kv == 0 or k_view is None or v_view is None:
            return None
        q = np.concatenate(self._q[il], axis=1)  # [n_head, n_tokens, head_dim_k]
        n_tokens = q.shape[1]
        k = ggml.read_view(k_view)[0, :, :n_tokens]
        v = ggml.read_view(v_view)[0, :, :, :n_tokens].transpose(0, 2, 1)
        q = q.reshape(n_head_kv, -1, n_tokens, q.shape[2]).transpose(0, 2, 1, 3)
        copies = [np.ascontiguousarray(x) for x in (q, k, v)]
        return Stream(copies[0], copies[1], copies[2], self._scale[il])

    def norms(self) -> npt.NDArray[np.float64]:
        """Return the mean square norm of the residual stream behind each block, [n_layer].

        Raises
        ------
        NoCurvesError
            The graph does not show it.
        """
        if np.any((self._n_norm == 0) & (np.array(self._n_head_kv) > 0)):
            raise NoCurvesError(
                "the model's graph does not show its residual stream: error curves cannot be "
                "measured (reasonalloc-profile --no-curves leaves them out)"
            )
        return self._norm / np.maximum(self._n_norm, 1)


def _required(tensor: Any) -> int:
    if tensor is None:
        raise NoCurvesError(
            "attention of another shape than expected "
            "(reasonalloc-profile --no-curves leaves it out)"
        )
    return int(tensor)


def _cached(tensor: int) -> ggml.View:
    """Return where keys or values lie; refuse a copy of them, which is gone after the step."""
    view = ggml.view_of(tensor)
    if view.root == tensor:
        raise NoCurvesError(
            "latent attention (MLA): error curves cannot be measured "
            "(reasonalloc-profile --no-curves leaves them out)"
        )
    return view
