"""What goes into a step: one token of each text, and pieces of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .chain import Chain


class Piece(NamedTuple):
    """Tokens [start, end) of a chain's prompt and text, decoded by one step."""

    chain: Chain
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """The chain draws its next token from the last one's logits."""
        return self.end == self.chain.n_known


def piece_end(start: int, end: int, room: int, n_batch: int, n_ubatch: int) -> int:
    """Return where a piece from `start` on ends that has at most `room` tokens.

    It ends where a micro-batch would if the text were read alone: compressions then happen at the
    same places, and the text is the same.

    Parameters
    ----------
    end : int
        Where the text ends.
    n_batch, n_ubatch : int
        Tokens of a batch and of a micro-batch of the context.

    Returns
    -------
    int
        `start` if not even one micro-batch has room.
    """
    reached = start
    while reached < end:
        in_batch = reached % n_batch
        step = min(n_ubatch - in_batch % n_ubatch, n_batch - in_batch, end - reached)
        if reached + step - start > room:
            break
        reached += step
    return reached


def compose(
    chains: Sequence[Chain], n_batch: int, n_ubatch: int, n_prompt: int, is_apart: bool = False
) -> list[list[Piece]]:
    """Return the batches of a step: pieces of prompts first, then the newest token of each text.

    It is one batch, unless not even a micro-batch of a prompt has room in it beside the texts.

    Parameters
    ----------
    chains : sequence of Chain
        Those that have a sequence, the oldest first.
    n_batch, n_ubatch : int
        Tokens of a batch and of a micro-batch of the context.
    n_prompt : int
        Most tokens of prompts in a step while texts go on; at least `n_ubatch`.
    is_apart : bool
        Put every piece of a prompt into a batch of its own. (llama.cpp's flash attention on a CPU
        rounds differently from 64 tokens in a batch on.)
    """
    texts = [Piece(c, c.n_read, c.n_known) for c in chains if not c.is_reading]
    readers = [c for c in chains if c.is_reading and c.source is None]
    if is_apart:
        prompts = _read(readers, n_prompt if texts else n_batch, n_batch, n_ubatch)
        return [[piece] for piece in prompts] + ([texts] if texts else [])
    room = min(n_prompt, n_batch - len(texts)) if texts else n_batch
    prompts = _read(readers, room, n_batch, n_ubatch)
    if readers and not prompts:
        prompts = _read(readers, n_prompt, n_batch, n_ubatch)
        return [texts, prompts]
    return [prompts + texts] if prompts or texts else []


def _read(readers: Iterable[Chain], room: int, n_batch: int, n_ubatch: int) -> list[Piece]:
    """Return pieces of prompts, the first ones first, of at most `room` tokens together."""
    pieces = []
    for chain in readers:
        stop = min((stop for stop in chain.stops if stop > chain.n_read), default=chain.n_known)
        end = piece_end(chain.n_read, stop, room, n_batch, n_ubatch)
        if end > chain.n_read:
            pieces.append(Piece(chain, chain.n_read, end))
            room -= end - chain.n_read
    return pieces


def fill(batch: Any, pieces: Iterable[Piece]) -> list[int]:
    """Put pieces into a llama_batch; return each one's first row."""
    rows, i = [], 0
    for chain, start, end in pieces:
        rows.append(i)
        is_last = end == chain.n_known
        # the logits of a prompt's last token give the first of the text, not one of the prompt
        n_prompt = len(chain.request.prompt)
        wants_all = chain.request.prompt_logprobs and not chain.tokens
        for position, token in enumerate(chain.known(start, end), start):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = chain.seq_id
            batch.logits[i] = wants_all and position < n_prompt - 1
            i += 1
        batch.logits[i - 1] |= is_last
    batch.n_tokens = i
    return rows
