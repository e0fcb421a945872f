"""Which positions of a session are never evicted: the prompt, as far as it is to be protected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as bindings

from ..engine import bindings as c
from ..engine.stats import engine_stats, read_held_prefix


def n_protectable(session: Any, tokens: Sequence[int]) -> int:
    """Return how many positions to protect for a prompt.

    A conversation that goes on is not read again because a longer prompt has more to protect than
    its first turn had: what every head still holds of it is protected then. With "all", everything
    is.
    """
    wanted: int = session.config.n_protect(len(tokens))
    before: int = session.n_protect
    goes_on = 0 < session.n_tokens < len(tokens) and np.array_equal(
        session.input_ids[: session.n_tokens], tokens[: session.n_tokens]
    )
    if session.config.protect_prompt == "all" or wanted <= before or not goes_on:
        return wanted
    if engine_stats(session.ctx).n_evicted == 0:
        return wanted
    return max(before, min(wanted, _n_held(session)))


def set_protect(ctx: Any, n_protect: int, seq_id: int = 0) -> None:
    """Protect the first positions of a sequence from now on.

    Raises
    ------
    BudgetError
        The budget cannot hold them.
    """
    c.check(c.ra_set_protect(ctx, seq_id, n_protect))


def protect(session: Any, n_protect: int) -> None:
    """Protect the first positions; a cache made under another protection is dropped.

    That is one that was compressed and lacks some of them, or protected more; and one whose layers
    an allocator splits: they are split anew.

    Raises
    ------
    BudgetError
        The budget cannot hold them.
    """
    before = session.n_protect
    if splits_by_protection(session.config) and n_protect != before:
        session.clear()
    set_protect(session.ctx, n_protect)
    if n_protect != before and engine_stats(session.ctx).n_evicted > 0:
        is_short = _n_held(session) < min(n_protect, session.n_cached())
        if n_protect < before or is_short:
            session.clear()
    session._n_protect = n_protect


def splits_by_protection(config: Any) -> bool:
    """Return whether how many positions are protected changes the budgets of layers."""
    return isinstance(config.layers, str) and config.layers != "uniform"


def _n_held(session: Any) -> int:
    return read_held_prefix(session.ctx, bindings.llama_model_n_layer(session.model))
