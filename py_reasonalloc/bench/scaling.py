"""On paper: how long a chain a machine's memory holds, and how fast it then is.

A step of the stock cache takes a + b n: a for the weights, b for each of the n cached tokens. Both
are fitted to the measured depths. Its bytes are those of weights and buffers, and a row per token.
A budgeted cache takes the bytes and the time that were measured, at any length; its own line, over
the budgets, tells what a larger one would cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .jobs import N_WARM
from .measure import Settings

#: Memory of laptops, GB; the share that a model may use (the rest is for the system).
MEMORIES_GB = (8, 16, 32)
USABLE_SHARE = 0.75
#: llama.cpp rounds a context up to a multiple of this.
_CELLS = 256


class Line(NamedTuple):
    """Milliseconds of a step: a + b * cached tokens."""

    a: float
    b: float

    def at(self, n: float) -> float:
        """Return milliseconds with `n` cached tokens."""
        return self.a + self.b * n


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """Fit a line to (cached tokens, ms) by least squares; None without two distinct points."""
    n = len(points)
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(p[i] for p in points) / n for i in (0, 1))
    b = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )
    return Line(mean_y - b * mean_x, b)


def longest_chain(usable_bytes: float, fixed_bytes: int, row_bytes: float) -> int:
    """Return the tokens whose rows fit into memory beside everything else; 0 if none do."""
    return max(int((usable_bytes - fixed_bytes) // row_bytes), 0)


def n_cells(depth: int, n_tokens: int) -> int:
    """Return the cells of the stock cache that a measurement allocates."""
    n = max(512, depth + N_WARM + n_tokens)
    return -(-n // _CELLS) * _CELLS


def _rows(first: dict[str, Any], last: dict[str, Any], n_timed: int) -> tuple[float, int]:
    """Return the bytes of a cached token, and those of a cache that do not grow (windows)."""
    n_first, n_last = (n_cells(line["depth"], n_timed) for line in (first, last))
    if n_first == n_last:
        return last["cache_bytes"] / n_last, 0
    row_bytes = (last["cache_bytes"] - first["cache_bytes"]) / (n_last - n_first)
    return row_bytes, max(round(first["cache_bytes"] - row_bytes * n_first), 0)


def _budget_line(lines: Iterable[dict[str, Any]], settings: Settings) -> Line | None:
    """Fit ms to the mean tokens cached between compressions, over budgets."""
    return fit(
        [
            (line["limit_depth"] - settings.buffer / 2, 1000.0 / line["tokens_per_second"].median)
            for line in lines
            if line["depth"] == max(settings.depths) and line["is_even"]
        ]
    )


def scale(summary: dict[str, list[dict[str, Any]]], settings: Settings) -> dict[str, Any] | None:
    """Work the figures out.

    Returns
    -------
    dict or None
        "stock": the fitted line, "a" in ms and "b" in ms per token; "budgets": the same over the
        evenly split budgets at the deepest depth, or None; "row_bytes": bytes of a cached token;
        "machines": for each memory the stock cache's longest chain and its speed at the end, and
        for each budget whether it fits, its speed, and the speed-up there. None if the reference
        was not measured at two depths, or the figures are too noisy for a rising line.
    """
    lines = [line for line in summary["decode"] if line["arm"] == settings.reference]
    n_timed = settings.buffer
    points = [
        (line["depth"] + N_WARM + n_timed / 2, 1000.0 / line["tokens_per_second"].median)
        for line in lines
    ]
    curve = fit(points)
    if curve is None or curve.a <= 0 or curve.b <= 0:
        return None
    stock = max(lines, key=lambda line: line["depth"])
    row_bytes, constant = _rows(min(lines, key=lambda line: line["depth"]), stock, n_timed)
    fixed = stock["weights_bytes"] + stock["compute_bytes"] + constant
    budgets = {line["arm"]: line for line in summary["decode"] if line["limit_depth"] is not None}
    machines = []
    for gigabytes in MEMORIES_GB:
        usable = gigabytes * 1e9 * USABLE_SHARE
        chain = longest_chain(usable, fixed, row_bytes)
        arms = []
        for arm, line in budgets.items():
            names = ("weights", "cache", "window", "scratch", "compute")
            n_bytes = sum(line[f"{name}_bytes"] for name in names)
            speed = line["tokens_per_second"].median
            arms.append(
                {
                    "arm": arm,
                    "fits": n_bytes <= usable,
                    "tokens_per_second": speed,
                    "over_stock": speed * curve.at(chain) / 1000.0,
                }
            )
        machines.append(
            {
                "gigabytes": gigabytes,
                "stock_tokens": chain,
                "stock_tokens_per_second": 1000.0 / curve.at(chain),
                "budgets": arms,
            }
        )
    own = _budget_line(budgets.values(), settings)
    return {
        "stock": curve._asdict(),
        "budgets": None if own is None else own._asdict(),
        "row_bytes": row_bytes,
        "usable_share": USABLE_SHARE,
        "machines": machines,
    }
