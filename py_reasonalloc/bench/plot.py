"""Picture of a report: tokens/s against depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..profile_plot import check_picture, save_figure


def save_picture(lines: Sequence[dict[str, Any]], title: str, path: str) -> None:
    """Draw the decode figures of a report, medians with their range.

    Parameters
    ----------
    lines : sequence of dict
        ``report["summary"]["decode"]``.

    Raises
    ------
    ConfigError
        The file cannot be written, has an unknown ending, or matplotlib is missing.
    """
    check_picture(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm and line["depth"] > 0]
        if not own:
            continue
        depths = [line["depth"] for line in own]
        speeds = [line["tokens_per_second"] for line in own]
        style = "--" if own[0]["limit_depth"] is None else "-"
        drawn = axes.plot(depths, [s.median for s in speeds], style, marker="o", label=arm)[0]
        low, high = [s.smallest for s in speeds], [s.largest for s in speeds]
        axes.fill_between(depths, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    ticks = sorted({line["depth"] for line in lines if line["limit_depth"] is not None})
    axes.set_xscale("log", base=2)
    if ticks:
        axes.set_xticks(ticks, minor=False)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("tokens decoded before")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    save_figure(figure, path)
