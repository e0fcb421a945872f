"""NumPy definition of the allocators: ReasonAlloc, arXiv:2606.11164, and PyramidKV, 2406.02069.

Written from the formulas. Budgets are compared with `check_rounding`, since two correct solutions
may round a tie of remainders differently.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def shares(
    demand: Array, total: int, floor: int, gamma: float = 0.5, lo: float = 0.25, hi: float = 2.0
) -> tuple[Array, float]:
    """Real-valued budgets [n] with sum `total`, and their cap.

    x = clip(s * w, floor, cap), w = clip(d^gamma, lo * mean, hi * mean). s is found exactly: the
    sum is piecewise linear in s, with a bend where an entry leaves the floor or reaches the cap.
    """
    n = len(demand)
    largest = demand.max()
    w = (demand / largest) ** gamma if largest > 0 else np.ones(n)
    w = np.maximum(np.clip(w, lo * w.mean(), hi * w.mean()), 1e-12)
    mean = total / n
    cap = max(np.floor(hi * mean + 1e-9), np.ceil(mean), floor)
    bends = np.unique(np.concatenate([floor / w, cap / w]))
    sums = np.array([np.clip(s * w, floor, cap).sum() for s in bends])
    right = int(np.searchsorted(sums, total - 1e-9))
    if right == 0:
        return np.clip(bends[0] * w, floor, cap), cap
    right = min(right, len(bends) - 1)
    left = right - 1
    rise = sums[right] - sums[left]
    t = (total - sums[left]) / rise if rise > 0 else 0.0
    s = bends[left] + t * (bends[right] - bends[left])
    return np.clip(s * w, floor, cap), cap


def check_rounding(budgets: Array, x: Array, total: int, floor: int, cap: float) -> None:
    """Assert that whole `budgets` are `x` rounded by largest remainder, within bounds."""
    assert budgets.sum() == total
    assert budgets.min() >= floor
    assert budgets.max() <= cap
    assert np.abs(budgets - x).max() < 1.0 + 1e-6
    up, down = budgets > x + 1e-6, budgets < x - 1e-6
    if up.any() and down.any():
        fraction = x - np.floor(x)
        assert fraction[up].min() >= fraction[down].max() - 1e-6


def over_base(
    demand: Array,
    total: int,
    base: int,
    least: int = 1,
    gamma: float = 0.5,
    lo: float = 0.25,
    hi: float = 2.0,
) -> tuple[Array, float]:
    """Real-valued budgets [n] with sum `total` where each holds `base` anyway, and their cap."""
    x, cap = shares(demand, total - base * len(demand), least, gamma, lo, hi)
    return base + x, base + cap


def pyramid_line(budget: int, n_layer: int, beta: float = 20.0, base: int = 0) -> Array:
    """Layer budgets: what exceeds `base`, R, falls from 2R - R/beta to R/beta."""
    rest = budget - base
    last = rest / beta
    line = np.linspace(2 * rest - last, last, n_layer) if n_layer > 1 else np.array([rest])
    return base + line


def comparable(scores: list[Array]) -> list[Array]:
    """Scores that are shares of a head's whole, times the head's number of tokens; in float32."""
    return [(s.astype(np.float32) * np.float32(len(s))).astype(float) for s in scores]


def least_error(
    scores: list[Array], total: int, base: int, least: int, clip_hi: float = 2.0
) -> tuple[Array, float]:
    """Budgets [n] of least summed score of what goes, and the most that one may be.

    One row after another goes to the head whose best token left scores highest; a head's first
    `least` rows are its own.
    """
    mean = total / len(scores) - base
    most = max(int(clip_hi * mean), int(np.ceil(mean)))
    free = [np.sort(s[np.isfinite(s)])[::-1] for s in scores]
    budgets = np.array([min(least, len(s)) for s in free])
    for _ in range(int(round(mean * len(scores))) - least * len(scores)):
        bids = [s[b] if b < min(len(s), most) else -np.inf for s, b in zip(free, budgets)]
        if max(bids) == -np.inf:
            break
        budgets[int(np.argmax(bids))] += 1
    budgets = np.maximum(budgets, least)
    while budgets.sum() < total - base * len(scores):
        budgets[int(np.argmin(budgets))] += 1
    return base + budgets, base + most


def head_demand(scores: list[Array], n_best: int) -> Array:
    """Tokens of each head among the `n_best` best that may go (all that tie with the last)."""
    scores = [s[np.isfinite(s)] for s in scores]
    pooled = np.sort(np.concatenate(scores))[::-1]
    tau = pooled[min(n_best, len(pooled)) - 1] if len(pooled) else 0.0
    return np.array([np.count_nonzero(s >= tau) for s in scores], dtype=float)
