"""The demand of a layer: how many cached tokens its heads attend to, step by step.

The attention of one token is read while the graph runs (llama.cpp's eval callback; flash attention
off), counted and dropped: nothing of the size of an attention matrix is ever kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings

from ..engine import ggml
from ..engine.errors import UnsupportedError
from ..session.config import BudgetConfig
from .centres import CentreMeter
from .streams import StreamRecorder

_ATTENTION = re.compile(rb"^kq_soft_max-(\d+)$")


def tokens_for_mass(attention: npt.NDArray[np.floating[Any]], rho: float) -> npt.NDArray[np.intp]:
    """Count the tokens that cover a share of the attention.

    Parameters
    ----------
    attention : [n_head, n_kv]
        Not negative; rows need not sum to one.
    rho : float
        Share, 0 to 1.

    Returns
    -------
    counts : [n_head]
        The smallest number of tokens whose attention sums up to rho of their head's.
    """
    covered = np.cumsum(-np.sort(-attention, axis=1), axis=1, dtype=np.float64)
    return (covered < rho * covered[:, -1:]).sum(axis=1) + 1


class DemandMeter:
    """Sums up demands from the tensors of running graphs.

    Parameters
    ----------
    n_head_kv : [n_layer]
        KV heads of each layer; one of 0 is not measured.
    rho : float
        Share of the attention mass.
    horizon : int
        Steps over which the attention is summed before it is counted; 0: each step is counted.
    recorder : StreamRecorder or None
        Sees the tensors, too.
    centres : CentreMeter or None
        Likewise.

    Attributes
    ----------
    callback
        For `cb_eval` of llama_context_params; keep the meter as long as the context.
    n_steps : [n_layer]
        Decode steps measured.
    """

    def __init__(
        self,
        n_head_kv: Sequence[int],
        rho: float,
        horizon: int = 0,
        recorder: StreamRecorder | None = None,
        centres: CentreMeter | None = None,
    ) -> None:
        self.rho, self.horizon = rho, horizon
        self.recorder, self.centres = recorder, centres
        self._n_head_kv = list(n_head_kv)
        self.n_steps = np.zeros(len(n_head_kv), dtype=np.int64)
        self._n_counts = np.zeros(len(n_head_kv), dtype=np.int64)
        self._sum = np.zeros(len(n_head_kv), dtype=np.float64)
        self._horizons: list[_Horizon] = []
        self._error: Exception | None = None
        self._is_counted = True
        self.callback = bindings.ggml_backend_sched_eval_callback(self._receive)

    def start(self, n_prompt: int, is_counted: bool = True) -> None:
        """Begin with a prompt of so many tokens; the last one is complete.

        With `is_counted` false the recorder alone sees what follows.
        """
        self._is_counted = is_counted
        self._end_horizons()
        self._horizons = [_Horizon(n_prompt) for _ in self._n_head_kv]
        if self.recorder is not None:
            self.recorder.start()
        if self.centres is not None:
            self.centres.start()

    def _receive(self, tensor: int, ask: bool, _: Any) -> bool:
        """Answer whether a tensor is wanted (`ask`), or take it. Must not raise."""
        try:
            name = ggml.tensor_name(tensor)
            is_asked = False
            if self.centres is not None and self._error is None:
                is_asked = self.centres.receive(name, tensor, ask)
            if self.recorder is not None and self._error is None:
                answer = self.recorder.receive(tensor, name, ask)
                if answer is not None:
                    return answer or is_asked or not ask
            if is_asked:
                return True
            match = _ATTENTION.match(name)
            if match is None or self._error is not None or not self._is_counted:
                return not ask
            if ask:
                return ggml.tensor_shape(tensor)[1] == 1  # one token: a decode step, no prompt
            self._add(int(match[1]), ggml.read_f32(tensor)[0, :, 0, :])
        except Exception as error:  # noqa: BLE001 - nothing may pass through C
            self._error = self._error or error
        return not ask

    def _add(self, il: int, attention: npt.NDArray[np.float32]) -> None:
        """Take the attention of one step, [n_head, n_kv]."""
        if il >= len(self._sum):
            raise UnsupportedError(f"layer {il} is beyond the {len(self._sum)} of the model's file")
        if self._n_head_kv[il] == 0:
            return
        self.n_steps[il] += 1
        if self.horizon == 0:
            self._count(il, attention)
            return
        horizon = self._horizons[il]
        if horizon.n_seen >= self.horizon and horizon.n_seen % self.horizon == 0:
            self._end_horizon(il)
            horizon.begin(attention.shape[0])
        horizon.add(attention)

    def _count(self, il: int, attention: npt.NDArray[np.floating[Any]]) -> None:
        self._sum[il] += tokens_for_mass(attention, self.rho).mean()
        self._n_counts[il] += 1

    def _end_horizons(self) -> None:
        for il, horizon in enumerate(self._horizons):
            if 2 * horizon.n_added >= self.horizon:
                self._end_horizon(il)

    def _end_horizon(self, il: int) -> None:
        horizon = self._horizons[il]
        if horizon.n_added == 0:
            return
        by_head_kv = horizon.attention.reshape(self._n_head_kv[il], -1, horizon.attention.shape[1])
        self._count(il, by_head_kv.sum(axis=1))

    def raise_error(self) -> None:
        """Raise what went wrong inside the callback, if anything did."""
        if self._error is not None:
            raise self._error

    def demand(self) -> npt.NDArray[np.float64]:
        """Return the mean demand of each layer, tokens, [n_layer]; 0 where nothing was seen."""
        self._end_horizons()
        self._horizons = []
        return self._sum / np.maximum(self._n_counts, 1)


class _Horizon:
    """The attention of one layer since a horizon began, on tokens that could have been evicted."""

    def __init__(self, n_prompt: int) -> None:
        self._n_prompt = n_prompt
        self.n_seen = 0  # decode steps since the prompt
        self.n_added = 0  # of them, in this horizon
        self._n_old = 0
        self.attention = np.zeros((0, 0))

    def begin(self, n_head: int) -> None:
        """Forget what was added; from now on, tokens of the chain up to here count."""
        self._n_old = max(self.n_seen - BudgetConfig.window, 1)
        self.attention = np.zeros((n_head, self._n_old))
        self.n_added = 0

    def add(self, attention: npt.NDArray[np.float32]) -> None:
        """Add one step, [n_head, n_kv]; the first horizon after a prompt has nothing to look at."""
        self.n_seen += 1
        if self._n_old > 0:
            first = self._n_prompt
            self.attention += attention[:, first : first + self._n_old]
            self.n_added += 1
