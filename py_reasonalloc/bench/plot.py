"""Pictures of reports: tokens/s against depth, and how steps and compressions grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..output.picture import check_picture, save_figure


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


def save_curves(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw steps (above) and compressions (below) over each thing that was varied.

    Dots are measured, lines are the fitted formulas; over depth, the stock cache is dashed.

    Parameters
    ----------
    rows : sequence of dict
        ``report["points"]`` of `py_reasonalloc.bench.curves`.

    Raises
    ------
    ConfigError
        See `save_picture`.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    names = [name for name in dict.fromkeys(row["curve"] for row in rows) if name != "stock"]
    figure = Figure(figsize=(2.4 * len(names), 4.6), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False, sharey="row")
    for column, name in enumerate(names):
        own = [row for row in rows if row["curve"] == name]
        at = [row[name] for row in own]
        for line, key in zip(axes[:, column], ("step_us", "compress_us")):
            line.plot(at, [row[key] / 1e3 for row in own], "o", label="measured")
            line.plot(at, [row[f"{key}_fitted"] / 1e3 for row in own], "-", label="formula")
            line.set_xscale("log", base=2)
            line.set_yscale("log")
            line.grid(alpha=0.3)
        axes[1, column].set_xlabel(name)
        stock = [row for row in rows if row["curve"] == "stock"] if name == "depth" else []
        if stock:
            depths = [row["depth"] for row in stock]
            axes[0, column].plot(depths, [row["step_us"] / 1e3 for row in stock], "--", marker="o")
            axes[0, column].text(depths[-1], stock[-1]["step_us"] / 1e3, "stock ", ha="right")
    axes[0, 0].set_ylabel("step, ms")
    axes[1, 0].set_ylabel("compression, ms")
    axes[1, 0].legend(fontsize="small")
    save_figure(figure, path)
