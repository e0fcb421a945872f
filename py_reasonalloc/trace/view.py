"""Traces as text for a terminal: summary, heat map of the budgets, text with what is in the cache.

Traces may come from anywhere, so nothing of them reaches the terminal but printable characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..output.text import printable
from .format import Compression, Snapshot, Trace

#: Share of heads, from none to all; budgets, from the smallest to the largest.
SHADES, ASCII_SHADES = " ░▒▓█", " .:*#"
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", ".:-=+*%@"
#: The same in a terminal's 256 colours: text and background.
_SHADE_COLOURS = ("38;5;244", "38;5;16;48;5;153", "38;5;16;48;5;111", "38;5;231;48;5;69",
                  "38;5;231;48;5;19")  # fmt: skip
_BAR_COLOURS = (17, 18, 25, 31, 37, 72, 149, 226)
_RESET = "\x1b[0m"


@dataclass(frozen=True)
class Style:
    """How to draw.

    Attributes
    ----------
    width : int
        Columns.
    has_colour : bool
        Use ANSI colours.
    has_unicode : bool
        Use block characters, else ASCII.
    """

    width: int = 80
    has_colour: bool = False
    has_unicode: bool = True

    @property
    def shades(self) -> str:
        """Characters for 0 to 100%."""
        return SHADES if self.has_unicode else ASCII_SHADES

    @property
    def bars(self) -> str:
        """Characters for the smallest to the largest."""
        return BARS if self.has_unicode else ASCII_BARS


def chosen_heads(trace: Trace, il: int | None, ih: int | None) -> list[tuple[int, int]]:
    """Return the heads ``(il, ih)`` of one head, one layer or all layers."""
    counts = enumerate(trace.header.n_head_kv)
    return [
        (layer, head)
        for layer, n in counts
        for head in range(n)
        if il in (None, layer) and ih in (None, head)
    ]


def budget_rows(trace: Trace) -> tuple[list[tuple[int, int]], npt.NDArray[np.int64]]:
    """Return the heads and their budgets, tokens, [n_heads, n_compressions]."""
    heads = chosen_heads(trace, None, None)
    columns = [
        [snapshot.budgets[il][ih] for il, ih in heads]
        for record, snapshot in trace.snapshots()
        if isinstance(record, Compression)
    ]
    return heads, np.array(columns, dtype=np.int64).reshape(len(columns), len(heads)).T


def layer_rows(
    heads: Sequence[tuple[int, int]], budgets: npt.NDArray[np.int64]
) -> tuple[list[int], npt.NDArray[np.float64]]:
    """Return the layers and the mean budget of their heads, tokens, [n_layers, n_compressions]."""
    layers = sorted({il for il, _ in heads})
    of_head = np.array([il for il, _ in heads])
    means = [budgets[of_head == il].mean(axis=0) for il in layers]
    return layers, np.array(means).reshape(len(layers), budgets.shape[1])


def _columns(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


# --- parts of the page ---------------------------------------------------------------------------


def summary(trace: Trace) -> list[str]:
    """Return a few lines on what was traced."""
    header, compressions = trace.header, trace.compressions
    counts = sorted(set(header.n_head_kv))
    heads = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    prompt = "" if header.n_prompt is None else f"prompt of {header.n_prompt} tokens, "
    n_pos = trace.records[-1].n_pos if trace.records else 0
    return [
        f"{printable(header.model)}: {header.n_layer} layers, {heads} KV heads each",
        f"budget {header.budget} + {header.buffer} tokens per head, policy "
        f"{printable(header.policy)}, layers {printable(header.layer_alloc)}, heads "
        f"{printable(header.head_alloc)}, {header.sinks} sinks, window {header.window}",
        f"{prompt}{n_pos} tokens in all, {len(compressions)} compressions",
        *(f"note: {note}" for note in trace.notes),
    ]


def heat_map(trace: Trace, style: Style, il: int | None = None) -> list[str]:
    """Return the budgets over time: a row per layer, and per head where heads differ."""
    heads, budgets = budget_rows(trace)
    if il is not None:
        chosen = [i for i, head in enumerate(heads) if head[0] == il]
        heads, budgets = [heads[i] for i in chosen], budgets[chosen]
    if budgets.size == 0:
        return ["no compression took place: every head holds every token"]
    n = budgets.shape[1]
    layers, means = layer_rows(heads, budgets)
    low, high = float(budgets.min()), float(budgets.max())
    scale = f"{_swatch(0, style)} {low:g}  {_swatch(7, style)} {high:g}"
    if low == high:
        scale = f"all {low:g}"
    lines = [f"budgets in tokens per head, compressions 1 to {n}: {scale}"]
    lines += _map_rows([f"layer {i}" for i in layers], means, (low, high), style)
    of_layer = [np.array([head[0] for head in heads]) == i for i in layers]
    if any((budgets[mask] != budgets[mask][0]).any() for mask in of_layer):
        names = [f"layer {i} head {k}" for i, k in heads]
        lines += ["of these, each head:", *_map_rows(names, budgets, (low, high), style)]
    return lines


def _map_rows(
    names: Sequence[str],
    values: npt.NDArray[np.generic],
    limits: tuple[float, float],
    style: Style,
) -> Iterable[str]:
    n_label = max(map(len, names))
    ranges = [f"{row.min():.4g}..{row.max():.4g}" for row in values]
    n_columns = max(style.width - n_label - max(map(len, ranges)) - 6, 8)
    for name, row, text in zip(names, shrunk(values, n_columns), ranges):
        cells = "".join(_swatch(_level(value, limits), style) for value in row)
        yield f"  {name:<{n_label}}  {cells}  {text}"


def shrunk(values: npt.NDArray[np.generic], n_columns: int) -> npt.NDArray[np.float64]:
    """Return rows of at most n_columns values, each the mean of its neighbours."""
    n = values.shape[1]
    if n <= n_columns:
        return values.astype(np.float64)
    starts = np.arange(n_columns) * n // n_columns
    sums = np.add.reduceat(values.astype(np.float64), starts, axis=1)
    means: npt.NDArray[np.float64] = sums / np.diff(starts, append=n)
    return means


def _level(value: float, limits: tuple[float, float]) -> int:
    low, high = limits
    return 4 if high == low else round((value - low) / (high - low) * 7)


def _swatch(level: int, style: Style) -> str:
    if style.has_colour:
        return f"\x1b[48;5;{_BAR_COLOURS[level]}m {_RESET}"
    return style.bars[level]


def marked_text(
    trace: Trace, snapshot: Snapshot, heads: Sequence[tuple[int, int]], style: Style
) -> list[str]:
    """Return the text up to then, shaded by the share of `heads` that hold each token.

    Without colours the shades are a line of their own below each line of text.
    """
    share = snapshot.share(heads)
    levels = np.ceil(share * 4).astype(np.int64)
    n_full, n_none = int((share == 1).sum()), int((levels == 0).sum())
    where = f"in all {len(heads)} heads, {n_none} in none"
    if len(heads) == 1:
        where = f"in the cache, {n_none} evicted"
    lines = [f"{snapshot.n_pos} tokens: {n_full} {where}", _legend(len(heads), style)]
    if snapshot.n_pos > snapshot.n_text:
        n = snapshot.n_pos - snapshot.n_text
        lines.append(f"(the text of the last {n} tokens is not in the file: shown as ?)")
    pieces = [*trace.pieces[: snapshot.n_text], *"?" * (snapshot.n_pos - snapshot.n_text)]
    cells: list[tuple[str, int]] = []
    for piece, level in zip(pieces, levels.tolist()):
        for char in piece:
            if char == "\n":
                cells.append(("\u240a" if style.has_unicode else "$", level))
                lines += _text_row(cells, style)
                cells = []
            else:
                cells.append((printable(char), level))
    return lines + _text_row(cells, style)


def _legend(n_heads: int, style: Style) -> str:
    names = ["evicted", "in the cache"]
    levels = [0, 4]
    if n_heads > 1:
        names = ["in no head", "up to 25%", "50%", "75%", "100% of the heads"]
        levels = [0, 1, 2, 3, 4]
    if style.has_colour:
        return "  ".join(_shaded(f" {name} ", level) for name, level in zip(names, levels))
    return "   ".join(f"'{style.shades[level]}' {name}" for name, level in zip(names, levels))


def _shaded(text: str, level: int) -> str:
    return f"\x1b[{_SHADE_COLOURS[level]}m{text}{_RESET}"


def _text_row(cells: Sequence[tuple[str, int]], style: Style) -> list[str]:
    """Return one line of the text, wrapped."""
    lines: list[str] = []
    row: list[tuple[str, int]] = []
    used = 0
    for char, level in cells:
        if used + _columns(char) > style.width:
            lines += _drawn(row, style)
            row, used = [], 0
        row.append((char, level))
        used += _columns(char)
    return lines + (_drawn(row, style) if row else [])


def _drawn(row: Sequence[tuple[str, int]], style: Style) -> list[str]:
    if not style.has_colour:
        shades = "".join(style.shades[level] * _columns(char) for char, level in row)
        return ["".join(char for char, _ in row), shades.rstrip()]
    parts: list[str] = []
    i = 0
    while i < len(row):
        end = i
        while end < len(row) and row[end][1] == row[i][1]:
            end += 1
        parts.append(_shaded("".join(char for char, _ in row[i:end]), row[i][1]))
        i = end
    return ["".join(parts)]
