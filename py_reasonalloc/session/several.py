"""A context with several sequences: `Several`, the part of a session that asks for it."""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as bindings

from ..engine.errors import ConfigError
from .checks import check_int


class Several(llama_cpp.Llama):
    """A session whose context holds `n_seq_max` sequences, its own being the first."""

    _n_seq_asked = 1

    def _ask_sequences(self, n_seq_max: int, is_embedding: bool) -> None:
        """Note how many sequences the context is to have, before the base class makes it.

        Raises
        ------
        ConfigError
            They are more than llama.cpp takes, or the base class decides on them.
        """
        check_int("n_seq_max", n_seq_max, 1, int(bindings.llama_max_parallel_sequences()))
        if is_embedding and n_seq_max > 1:
            raise ConfigError("embedding=True decides on n_seq_max itself: leave out one")
        self._n_seq_asked = n_seq_max

    @property
    def n_seq_max(self) -> int:
        """Sequences of the context."""
        return int(self.context_params.n_seq_max)

    @property
    def context_params(self) -> Any:
        """The llama_context_params that the base constructor fills in."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        if self._n_seq_asked > 1:
            params.n_seq_max, params.kv_unified = self._n_seq_asked, True
        self._context_params = params
