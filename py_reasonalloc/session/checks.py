"""Whether values that a user gives are what they must be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..engine.errors import ConfigError

#: RA_MAX_TOKENS of reasonalloc.h.
MAX_TOKENS = 1 << 24


def check_table(name: str, table: Iterable[int]) -> tuple[int, ...]:
    """Return a table of token counts as a tuple; ConfigError for one that is none."""
    try:
        values = tuple(table)
    except TypeError:
        raise ConfigError(f"{name} = {table!r} must be a list of whole numbers") from None
    if not values:
        raise ConfigError(f"{name} is an empty list")
    for i, value in enumerate(values):
        check_int(f"{name}[{i}]", value, 1, MAX_TOKENS)
    return values


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """Raise ConfigError unless `value` is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} = {value!r} must be a whole number, {low} to {high}")
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value} is out of range: must be {low} to {high}")


def check_float(name: str, value: Any, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is a number in [low, high] (NaN never is)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} = {value!r} must be a number, {low:g} to {high:g}")
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value:g} is out of range: must be {low:g} to {high:g}")
