"""Snapshots shared by texts whose prompts begin alike: `Prefixes`."""

from __future__ import annotations

from typing import Any

from ...engine.stats import engine_stats
from ..checkpoints import Checkpoints, Snapshot, read_sequence, write_sequence
from ..protection import set_protect, splits_by_protection
from ..reading import pieces_of
from .chain import Chain


class Prefixes:
    """Lets a prompt go on from the longest snapshot that it begins with.

    The text is the one that reading the whole prompt would give: snapshots are taken where a piece
    of a prompt ends, see `py_reasonalloc.session.reading`.

    Parameters
    ----------
    llama : ReasonLlama
        An open session with a budget.
    limit : int
        Bytes of all snapshots together; what was not used for longest goes first.
    """

    def __init__(self, llama: Any, limit: int) -> None:
        self._ctx, self._config = llama.ctx, llama.config
        self._pieces = pieces_of(llama)
        self.store = Checkpoints(limit)

    def restore(self, chain: Chain, seq_id: int) -> None:
        """Put the longest snapshot that fits into a chain's sequence, which is empty."""
        prompt = chain.request.prompt
        if not chain.request.prompt_logprobs:
            n_protect = self._config.n_protect(len(prompt))
            found = self.store.find(prompt[:-1], n_protect)
            if found is not None and write_sequence(self._ctx, found.snapshot.state, seq_id):
                set_protect(self._ctx, n_protect, seq_id)
                chain.n_read = chain.n_reused = found.n_tokens
        chain.stops = frozenset(self._pieces.stops(chain.n_read, len(prompt)))

    def keep(self, chain: Chain, end: int) -> None:
        """Take a snapshot of a chain that has read its prompt's tokens [0, end)."""
        seq_id = chain.seq_id or 0
        state = read_sequence(self._ctx, seq_id)
        if state is None:
            return
        n_protect = self._config.n_protect(len(chain.request.prompt))
        is_free = engine_stats(self._ctx, seq_id).n_compressions == 0
        is_free = is_free and not splits_by_protection(self._config)
        self.store.keep(chain.known(0, end), Snapshot(state, None if is_free else n_protect))


def begin(llama: Any, chain: Chain, seq_id: int, prefixes: Prefixes | None) -> None:
    """Prepare a chain's empty sequence: its protected prompt, and what is known of it already.

    Raises
    ------
    BudgetError
        The budget cannot hold the protected prompt.
    """
    if llama.config is not None:
        set_protect(llama.ctx, llama.config.n_protect(len(chain.request.prompt)), seq_id)
    if prefixes is not None:
        prefixes.restore(chain, seq_id)
