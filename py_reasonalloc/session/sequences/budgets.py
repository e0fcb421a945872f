"""What the library keeps for each sequence of a budgeted context."""

from __future__ import annotations

from typing import Any

from ...engine import bindings as c
from ...engine.stats import engine_stats


def set_protect(ctx: Any, n_protect: int, seq_id: int) -> None:
    """Protect the first positions of a sequence that is empty.

    Raises
    ------
    BudgetError
        The budget cannot hold them.
    """
    c.check(c.ra_set_protect(ctx, seq_id, n_protect))


def sequence_stats(ctx: Any, seq_id: int) -> Any:
    """Return the ra_stats of one sequence."""
    return engine_stats(ctx, seq_id)
