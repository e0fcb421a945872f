"""Traces as a picture: budgets of layers and heads over time, and which tokens stayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import ConfigError, TraceError
from ..output.text import printable
from .format import Compression, Trace
from .view import budget_rows, chosen_heads, layer_rows

FORMATS = (".png", ".svg")
#: Most compressions and positions that the picture of the tokens resolves.
_COLUMNS, _ROWS = 400, 600


def check_plot(path: Path) -> None:
    """Raise ConfigError unless `path` names a format that can be drawn."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: the plot must end in {' or '.join(FORMATS)}")


def plot(trace: Trace, path: Path) -> None:
    """Draw a trace into a PNG or SVG file.

    Raises
    ------
    ConfigError
        The name has another ending.
    TraceError
        matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    check_plot(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise TraceError("--plot needs matplotlib: pip install matplotlib") from None
    heads, budgets = budget_rows(trace)
    if budgets.size == 0:
        raise TraceError("there is nothing to plot: no compression took place")
    layers, means = layer_rows(heads, budgets)
    figure = Figure(figsize=(10, 11), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1)
    header = trace.header
    figure.suptitle(
        f"{printable(header.model)}: budget {header.budget} + {header.buffer}, "
        f"{printable(header.policy)}, layers {printable(header.layer_alloc)}, "
        f"heads {printable(header.head_alloc)}".replace("$", r"\$")
    )
    limits = float(budgets.min()), float(budgets.max())
    _draw(axes[0], means, limits, "mean budget of a layer's heads", "layer", "tokens")
    axes[0].set_yticks(*_ticks([str(il) for il in layers]))
    _draw(axes[1], budgets, limits, "budget of each head", "layer.head", "tokens")
    axes[1].set_yticks(*_ticks([f"{il}.{ih}" for il, ih in heads]))
    share, n_pos = _kept_map(trace)
    extent = (0.5, budgets.shape[1] + 0.5, n_pos, 0)
    _draw(axes[2], share, (0.0, 1.0), "tokens in the cache", "position", "share of heads", extent)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        reason = error.strerror or error
        raise TraceError(f"{path}: the plot cannot be written: {reason}") from None


def _draw(
    axis: Any,
    values: npt.NDArray[Any],
    limits: tuple[float, float],
    title: str,
    label: str,
    unit: str,
    extent: tuple[float, float, float, float] | None = None,
) -> None:
    n_rows, n_columns = values.shape
    image = axis.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        vmin=limits[0],
        vmax=limits[1],
        extent=extent or (0.5, n_columns + 0.5, n_rows - 0.5, -0.5),
    )
    axis.set_title(title)
    axis.set_ylabel(label)
    axis.set_xlabel("compression")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.figure.colorbar(image, ax=axis, label=unit)


def _ticks(names: list[str]) -> tuple[list[int], list[str]]:
    rows = list(range(0, len(names), -(-len(names) // 24)))
    return rows, [names[row] for row in rows]


def _kept_map(trace: Trace) -> tuple[npt.NDArray[np.float64], int]:
    """Return the share of heads that hold a position, [rows, columns], and the positions shown.

    NaN where the text had not come so far.
    """
    heads = chosen_heads(trace, None, None)
    n_all = len(trace.compressions)
    n_pos = max(max(compression.n_pos for compression in trace.compressions), 1)
    n_rows, n_columns = min(n_pos, _ROWS), min(n_all, _COLUMNS)
    wanted = {(column * n_all) // n_columns for column in range(n_columns)}
    columns = []
    i = -1
    for record, snapshot in trace.snapshots():
        i += isinstance(record, Compression)
        if not isinstance(record, Compression) or i not in wanted:
            continue
        share = np.full(n_pos, np.nan)
        share[: snapshot.n_pos] = snapshot.share(heads)
        starts = np.arange(n_rows) * n_pos // n_rows
        columns.append(np.add.reduceat(share, starts) / np.diff(starts, append=n_pos))
    return np.array(columns).T, n_pos
