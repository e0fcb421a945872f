"""Error curves of a model's KV heads: the part `head_error` of a layer profile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeadError:
    """How much each KV head's output errs, by the number of tokens that it keeps.

    Attributes
    ----------
    grid : tuple of int
        [n_grid] budgets that were measured, ascending.
    base : int
        Tokens of each budget that stayed in any case: sinks and window.
    buffer : int
        Tokens between compressions.
    policy : str
        What chose the tokens.
    merge : bool
        Whether evicted tokens were merged into kept ones.
    values : tuple of tuple of float
        [n_heads, n_grid] errors, layer after layer: summed over the texts, relative to the mean
        square norm of the residual stream. 4 digits. Comparable within one model only.
    """

    grid: tuple[int, ...]
    base: int
    buffer: int
    policy: str
    merge: bool
    values: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return {
            "grid": list(self.grid),
            "base": self.base,
            "buffer": self.buffer,
            "policy": self.policy,
            "merge": self.merge,
            "values": [list(row) for row in self.values],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HeadError:
        """Return the curves that a checked file holds."""
        return cls(
            grid=tuple(map(int, value["grid"])),
            base=int(value["base"]),
            buffer=int(value["buffer"]),
            policy=value["policy"],
            merge=value["merge"],
            values=tuple(tuple(map(float, row)) for row in value["values"]),
        )


def contradictions(value: dict[str, Any], n_heads: int) -> list[str]:
    """Return what a schema cannot say about `head_error` of a file, one line per field."""
    grid, values = value["grid"], value["values"]
    found = []
    if any(b <= a for a, b in zip(grid, grid[1:])):
        found.append("head_error.grid: must ascend")
    if value["base"] > grid[0]:
        found.append(f"head_error.base: {value['base']} is more than the first of the grid")
    if len(values) != n_heads:
        found.append(f"head_error.values: {len(values)} curves, but there are {n_heads} KV heads")
    for i, row in enumerate(values):
        if len(row) != len(grid):
            found.append(
                f"head_error.values[{i}]: {len(row)} errors, but the grid has {len(grid)} points"
            )
        elif not all(map(math.isfinite, row)):
            found.append(f"head_error.values[{i}]: not all of them are numbers")
    return found
