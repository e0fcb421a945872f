"""Tokens of one sequence as llama.cpp takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_cpp import llama_cpp as bindings


def new_batch(n: int) -> Any:
    """Return a llama_batch with room for `n` tokens of sequence 0; free with llama_batch_free."""
    batch = bindings.llama_batch_init(n, 0, 1)
    for i in range(n):
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
    return batch


def fill_batch(batch: Any, tokens: Sequence[int], pos: int, all_logits: bool) -> None:
    """Put tokens into a batch, from position `pos` on; the last one's logits are always computed.

    Parameters
    ----------
    all_logits : bool
        Compute the logits of every token.
    """
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = pos + i
        batch.logits[i] = all_logits
    batch.logits[len(tokens) - 1] = 1
