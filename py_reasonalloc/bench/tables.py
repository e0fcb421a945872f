"""Pieces of Markdown that all tables of the report are made of."""

from __future__ import annotations

from collections.abc import Sequence

from ..output.text import size
from .summary import Spread


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, all columns but the first aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread_text(value: Spread | None, digits: int = 3, factor: float = 1.0) -> str:
    """Return "median (smallest to largest)", one number if there was one repetition."""
    if value is None:
        return ""
    median, low, high = (f"{factor * v:.{digits}f}" for v in value)
    return median if low == high else f"{median} ({low} to {high})"


def bytes_text(value: int | None) -> str:
    """Return a size for people; "" for None."""
    return "" if value is None else size(value)
