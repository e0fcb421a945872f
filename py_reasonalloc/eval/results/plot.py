"""Accuracy against budget and against bytes, as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...engine.errors import ConfigError
from ...output.picture import check_picture, save_figure
from .report import ArmReport, Report
from .statistics import Estimate
from .tables import MIB

MARKERS = "os^vDPX<>*"
LINES = ("-", "--", ":")
#: Shift between the error bars of neighbouring methods: a factor of the budget or bytes, as log.
_SHIFT = 0.012
_N_TICKS = 6


def save_plot(report: Report, path: str) -> None:
    """Draw one curve per method with 95% intervals; full caches are horizontal lines.

    Where no bytes are known there is only the half with budgets.

    Parameters
    ----------
    report : Report
        What to draw.
    path : str
        Its ending names the format: .png, .svg or .pdf. The same report gives the same SVG or PDF.

    Raises
    ------
    ConfigError
        No arm has a budget, the file cannot be written, or matplotlib is missing.
    """
    check_picture(path)
    budgeted = [arm for arm in report.arms if arm.budget > 0]
    if not budgeted:
        raise ConfigError("there is nothing to plot: no arm has a budget")
    from matplotlib.figure import Figure

    has_bytes = any(arm.kv_bytes for arm in budgeted)
    figure = Figure(figsize=(12.0 if has_bytes else 7.5, 4.8), layout="constrained")
    panels = figure.subplots(1, 2 if has_bytes else 1, sharey=True, squeeze=False)[0]
    _draw(panels[0], report, lambda arm: arm.budget)
    budgets = sorted({arm.budget for arm in budgeted})
    panels[0].set_xticks(budgets, [str(budget) for budget in budgets])
    panels[0].set_xlabel("budget (tokens per layer and KV head)")
    panels[0].set_ylabel("accuracy % (bars, bands: 95% interval)")
    if has_bytes:
        _draw(panels[1], report, lambda arm: (arm.kv_bytes or 0) / MIB)
        ticks = log_ticks([arm.kv_bytes / MIB for arm in budgeted if arm.kv_bytes])
        panels[1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[1].set_xlabel("cache (MiB, budget + buffer)")
    for axes in panels:
        axes.minorticks_off()
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    names = [str(report.settings.get(name, "")) for name in ("model", "dataset")]
    title = ", ".join([*filter(None, names), f"{report.n_problems} problems"])
    figure.suptitle(plain(title))
    save_figure(figure, path)


def _draw(axes: Any, report: Report, x_of: Callable[[ArmReport], float]) -> None:
    """Draw all arms into one half; `x_of` gives 0 for an arm that is left out."""
    full = [arm for arm in report.arms if arm.budget == 0]
    methods = list(dict.fromkeys(arm.method for arm in report.arms if arm.budget > 0))
    for i, arm in enumerate(full):
        _level(axes, arm, i)
    for i, method in enumerate(methods):
        points = [(x_of(arm), arm) for arm in report.arms if arm.method == method and arm.budget]
        shift = math.exp(_SHIFT * (i - (len(methods) - 1) / 2))
        shifted = [(x * shift, arm.accuracy) for x, arm in points if x > 0]
        draw_curve(axes, shifted, method, i, scale=100)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)


def draw_curve(
    axes: Any, points: list[tuple[float, Estimate]], method: str, i: int, scale: float = 1
) -> None:
    """Draw the curve of method `i` through estimates times `scale`, with their intervals."""
    points = sorted(points, key=lambda point: point[0])
    estimates = [estimate for _, estimate in points]
    axes.errorbar(
        [x for x, _ in points],
        [scale * estimate.value for estimate in estimates],
        yerr=[
            [scale * (estimate.value - estimate.low) for estimate in estimates],
            [scale * (estimate.high - estimate.value) for estimate in estimates],
        ],
        label=plain(method),
        color=f"C{i % 10}",
        marker=MARKERS[i % len(MARKERS)],
        linestyle=LINES[i // 10 % len(LINES)],
        markersize=5,
        linewidth=1.3,
        elinewidth=0.8,
        capsize=2,
    )


def _level(axes: Any, arm: ArmReport, i: int) -> None:
    share = arm.accuracy
    size = "" if arm.kv_bytes is None else f" ({arm.kv_bytes / MIB:.4g} MiB)"
    axes.axhspan(100 * share.low, 100 * share.high, color="black", alpha=0.08, linewidth=0)
    axes.axhline(
        100 * share.value,
        label=plain(arm.method + size),
        color="black",
        linestyle=LINES[i % len(LINES)],
        linewidth=1,
    )


def log_ticks(values: list[float]) -> list[float]:
    """Return a few numbers of two digits, at equal ratios from the smallest to the largest."""
    low, high = math.log(min(values)), math.log(max(values))
    steps = [low + (high - low) * i / (_N_TICKS - 1) for i in range(_N_TICKS)]
    return sorted({float(f"{math.exp(step):.2g}") for step in steps})


def plain(text: str) -> str:
    """Return text in which matplotlib looks for no formulas."""
    return text.replace("$", r"\$")
