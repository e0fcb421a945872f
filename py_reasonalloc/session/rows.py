"""Rows of logits, one for each token, allocated as tokens come."""

from __future__ import annotations

from typing import Any

import numpy as np


def reserve_rows(session: Any, n: int) -> None:
    """Make room for the logits of the first `n` tokens; those that are there stay.

    The base class allocates [n_ctx, n_vocab] floats at once, which for a reasoner's trained context
    is more than most machines have. Here the room doubles, up to what the context can hold.
    """
    old = session.scores
    if n <= len(old):
        return
    n_rows = max(n, min(2 * len(old), len(session.input_ids)))
    session.scores = np.zeros((n_rows, old.shape[1]), dtype=old.dtype)
    session.scores[: len(old)] = old
