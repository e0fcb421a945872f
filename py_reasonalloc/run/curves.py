"""Error curves: how much the output of a KV head errs, by the number of tokens that it may keep.

A text is decoded with the full cache and recorded (`streams`). Each head's stream is then replayed
at each budget of a grid, with a compression every `buffer` tokens by the library's own code for
scores, selection and merging, and

    error_h(n) = 1 / mean |x_l|^2 * sum over later queries t and query heads g of |o_tg(n) - o_tg|^2

is summed over texts: o is the attention output of the full cache, o(n) that of the replay, x_l the
residual stream behind the head's layer, which the model's norms divide its contributions by.

That few heads need many tokens is DuoAttention's finding (arXiv:2410.10819), unequal budgets by
head are Ada-KV's (arXiv:2407.11550); the measure is ours.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine import bindings as c
from ..profile.files import HeadError
from ..session.config import BudgetConfig
from .streams import Floats, Stream

#: Budgets that are measured, as far as the texts are long.
GRID = (20, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


def replay_config(buffer: int, policy: str = "loss", merge: bool = True) -> BudgetConfig:
    """Return the configuration of a replay; 4 sinks and a window of 16 stay in any case."""
    return BudgetConfig(
        budget=GRID[-1], policy=policy, merge=merge, buffer=buffer, sinks=4, window=16
    )


def base_of(config: BudgetConfig) -> int:
    """Return how many tokens stay in any case."""
    return config.sinks + config.window


class _Rows(NamedTuple):
    """What a head keeps: one row per token, positions ascending."""

    k: Floats  # [n, head_dim_k]
    v: Floats  # [n, head_dim_v]
    pos: npt.NDArray[np.int32]
    bias: Floats
    state: Floats  # [n, n_state]

    def take(self, keep: npt.NDArray[np.bool_]) -> _Rows:
        k, v, pos, bias, state = self
        return _Rows(k[keep], v[keep], pos[keep], bias[keep], state[keep])

    def append(self, new: _Rows) -> _Rows:
        """Return these rows and the new ones behind them."""
        return _Rows(
            np.concatenate((self.k, new.k)),
            np.concatenate((self.v, new.v)),
            np.concatenate((self.pos, new.pos)),
            np.concatenate((self.bias, new.bias)),
            np.concatenate((self.state, new.state)),
        )


class _Scores(NamedTuple):
    """What a compression knows of a head's rows: [n] each, state [n, n_state]."""

    score: Floats
    state: Floats
    mass: Floats


class HeadReplay:
    """One head of one text, replayed at the budgets of a grid.

    Parameters
    ----------
    config : BudgetConfig
        Policy, merging, buffer, sinks and window; `budget` is of no meaning.
    q, k, v : [n_tokens, n_group, head_dim_k], [n_tokens, head_dim_k], [n_tokens, head_dim_v]
        The head's stream.
    scale : float
        Factor on q.k.
    place : (int, int)
        Layer and KV head.
    """

    def __init__(
        self,
        config: BudgetConfig,
        q: Floats,
        k: Floats,
        v: Floats,
        scale: float,
        place: tuple[int, int] = (0, 0),
    ) -> None:
        self._native = config.to_native()
        names = [c.ra_policy_name(i).decode() for i in range(c.ra_policy_count())]
        self._n_state = c.ra_policy_n_state(names.index(config.policy))
        self._buffer = config.buffer
        self._q, self._k, self._v = q, k, v
        self._scale, self._place = scale, place
        self._full = self._full_outputs()

    @staticmethod
    def starts(n_tokens: int, buffer: int) -> range:
        """Return the positions before which a compression runs."""
        return range(2 * buffer, n_tokens, buffer)

    def errors(self, grid: Sequence[int]) -> npt.NDArray[np.float64]:
        """Return the sum of |o - o_full|^2 over later queries and query heads, [n_grid].

        0 for a budget that the text never exceeds at a compression.
        """
        found = np.zeros(len(grid))
        waiting = list(range(len(grid)))
        rows = self._new_rows(0, 0)
        begin = 0
        # until something is evicted all budgets have the same rows: scored once for all of them
        for end in self.starts(len(self._k), self._buffer):
            if not waiting:
                break
            rows, begin = self._grown(rows, begin, end), end
            scores = self._scored(rows)
            for i in [i for i in waiting if grid[i] < end]:
                waiting.remove(i)
                found[i] = self._follow(self._compressed(rows, scores, grid[i]), end, grid[i])
            rows = rows._replace(state=scores.state)
        return found

    def _follow(self, rows: _Rows, begin: int, budget: int) -> float:
        """Return the error from position `begin` to the end of the text."""
        error, n_tokens = 0.0, len(self._k)
        while begin < n_tokens:
            end = min(begin + self._buffer, n_tokens)
            rows = self._grown(rows, begin, end)
            output = self._attend(begin, end, rows.k, rows.v, rows.pos, rows.bias)
            error += float(np.square(output - self._full[begin:end], dtype=np.float64).sum())
            if end < n_tokens:
                rows = self._compressed(rows, self._scored(rows), budget)
            begin = end
        return error

    def _attend(
        self,
        begin: int,
        end: int,
        k: Floats,
        v: Floats,
        pos: npt.NDArray[np.int32],
        bias: Floats | None = None,
    ) -> Floats:
        """Return the attention outputs of the queries [begin, end), [n, n_group, head_dim_v]."""
        q = self._q[begin:end]
        logits = (q.reshape(-1, q.shape[2]) @ k.T).reshape(*q.shape[:2], len(k))
        logits *= np.float32(self._scale)
        if bias is not None:
            logits += bias
        new = pos[np.searchsorted(pos, begin) :]
        hidden = new[None, :] > np.arange(begin, end)[:, None]
        logits[..., len(pos) - len(new) :] += np.where(hidden, np.float32(-np.inf), 0)[:, None, :]
        logits -= logits.max(axis=-1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=-1, keepdims=True)
        output = np.matmul(logits.reshape(-1, len(k)), v, dtype=np.float32)
        return output.reshape(*q.shape[:2], v.shape[1])

    def _full_outputs(self) -> Floats:
        pos = np.arange(len(self._k), dtype=np.int32)
        step = max(self._buffer, 64)
        parts = []
        for begin in range(0, len(self._k), step):
            end = min(begin + step, len(self._k))
            parts.append(self._attend(begin, end, self._k[:end], self._v[:end], pos[:end]))
        return np.concatenate(parts)

    def _new_rows(self, begin: int, end: int) -> _Rows:
        return _Rows(
            self._k[begin:end],
            self._v[begin:end],
            np.arange(begin, end, dtype=np.int32),
            np.zeros(end - begin, dtype=np.float32),
            np.full((end - begin, self._n_state), np.nan, dtype=np.float32),
        )

    def _grown(self, rows: _Rows, begin: int, end: int) -> _Rows:
        return rows.append(self._new_rows(begin, end))

    def _arrays(self, rows: _Rows) -> tuple[Any, list[Any]]:
        """Return the ra_head_arrays of rows, and what must live as long as it does."""
        end = int(rows.pos[-1]) + 1
        n_obs = min(self._buffer, len(rows.pos))
        alive = [rows.k, rows.v, self._q[end - n_obs : end], rows.pos, rows.bias, rows.state]
        alive = [np.ascontiguousarray(array) for array in alive]
        k, v, q, pos, bias, state = alive
        head = c.ra_head_arrays(
            size=ctypes.sizeof(c.ra_head_arrays),
            il=self._place[0],
            ih=self._place[1],
            n_kv=len(pos),
            n_group=q.shape[1],
            n_obs=n_obs,
            head_dim_k=k.shape[1],
            head_dim_v=v.shape[1],
            kq_scale=self._scale,
            k=_floats(k),
            v=_floats(v),
            q=_floats(q),
            pos=pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            bias=_floats(bias),
            state=_floats(state),
        )
        return head, alive

    def _scored(self, rows: _Rows) -> _Scores:
        head, alive = self._arrays(rows)
        n = len(rows.pos)
        out = _Scores(
            np.empty(n, np.float32),
            np.empty((n, self._n_state), np.float32),
            np.empty(n, np.float32),
        )
        c.check(
            c.ra_policy_score(ctypes.byref(self._native), ctypes.byref(head), *map(_floats, out))
        )
        del alive
        return out

    def _compressed(self, rows: _Rows, scores: _Scores, budget: int) -> _Rows:
        """Return what stays of rows, as a compression leaves it."""
        n = len(rows.pos)
        keep = np.empty(n, np.uint8)
        bytes_p = ctypes.POINTER(ctypes.c_uint8)
        c.check(c.ra_select_keep(n, _floats(scores.score), budget, keep.ctypes.data_as(bytes_p)))
        rows = rows._replace(state=scores.state)
        if self._native.merge and not keep.all():
            head, alive = self._arrays(rows)
            can_take = (keep.astype(bool) & np.isfinite(scores.score)).astype(np.uint8)
            target, bias = np.empty(n, np.int32), np.empty(n, np.float32)
            v = np.empty_like(alive[1])
            status = c.ra_merge_head(
                ctypes.byref(self._native),
                ctypes.byref(head),
                keep.ctypes.data_as(bytes_p),
                can_take.ctypes.data_as(bytes_p),
                _floats(scores.mass),
                target.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
                _floats(bias),
                _floats(v),
            )
            c.check(status)
            rows = rows._replace(v=v, bias=bias)
        return rows.take(keep.astype(bool))


def _floats(array: npt.NDArray[Any]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


class CurveMeter:
    """Sums up the errors of all heads over texts.

    Parameters
    ----------
    n_head_kv : [n_layer]
        KV heads of each layer.
    config : BudgetConfig
        See `replay_config`.
    n_threads : int
        Heads replayed at a time; 0: as many as the machine has CPUs.
    """

    def __init__(self, n_head_kv: Sequence[int], config: BudgetConfig, n_threads: int = 0) -> None:
        self._config = config
        self._places = [(il, ih) for il, n in enumerate(n_head_kv) for ih in range(n)]
        self._n_threads = n_threads or os.cpu_count() or 1
        self._errors = np.zeros((len(self._places), len(GRID)))
        self._n_longest = 0

    def add(
        self,
        streams: Sequence[Stream | None],
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Replay a text; `progress` gets a 1 for each head."""

        def errors(place: tuple[int, int]) -> npt.NDArray[np.float64]:
            stream, ih = streams[place[0]], place[1]
            if stream is None:
                return np.zeros(len(GRID))
            replay = HeadReplay(
                self._config, stream.q[ih], stream.k[ih], stream.v[ih], stream.scale, place
            )
            return replay.errors(GRID)

        n_tokens = max((stream.k.shape[1] for stream in streams if stream is not None), default=0)
        self._n_longest = max(self._n_longest, n_tokens)
        with ThreadPoolExecutor(self._n_threads) as pool:
            for i, found in enumerate(pool.map(errors, self._places)):
                self._errors[i] += found
                progress(1)

    def head_error(self, norms: npt.NDArray[np.float64]) -> HeadError | None:
        """Return the curves; None if the texts were too short for any.

        Parameters
        ----------
        norms : [n_layer]
            Mean square norm of the residual stream behind each layer.
        """
        starts = HeadReplay.starts(self._n_longest, self._config.buffer)
        n_grid = sum(n < starts[-1] for n in GRID) if len(starts) > 0 else 0
        if n_grid < 2:
            return None
        weights = np.array([1.0 / norms[il] if norms[il] > 0 else 0.0 for il, _ in self._places])
        values = self._errors[:, :n_grid] * weights[:, None]
        return HeadError(
            grid=GRID[:n_grid],
            base=base_of(self._config),
            buffer=self._config.buffer,
            policy=self._config.policy,
            merge=bool(self._config.merge),
            values=tuple(tuple(float(f"{x:.3e}") for x in row) for row in values),
        )
