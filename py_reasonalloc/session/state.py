"""Save a session and continue it: `Restorable`, the part of `ReasonLlama` that does it."""

from __future__ import annotations

from typing import Any

import llama_cpp

from ..engine import bindings as c
from ..engine.errors import StateError
from .config import BudgetConfig
from .tracer import Traceable


class Restorable(Traceable):
    """A session whose tokens and cache can be saved, and that can go on from there."""

    config: BudgetConfig | None
    _n_protect: int

    def save_state(self) -> llama_cpp.LlamaState:
        """Return a copy of the session's tokens and cache.

        Raises
        ------
        StateError
            The engine could not write it.
        """
        self._require_open()
        state = super().save_state()
        if state.llama_state_size == 0:
            raise StateError("the state could not be saved")
        vars(state)["n_protect"] = self._n_protect
        return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continue from a saved state.

        Raises
        ------
        StateError
            It does not fit this model or budget. The session is then empty.
        """
        self._require_open()
        try:
            if len(state.input_ids) != len(self.input_ids):
                raise ValueError(f"it was saved with a context of {len(state.input_ids)} tokens")
            if self.config is not None:  # the split over the layers hangs on it
                self.clear()
                self._n_protect = getattr(state, "n_protect", 0)
                c.check(c.ra_set_protect(self.ctx, self._n_protect))
            super().load_state(state)
            if self.n_cached() != state.n_tokens:
                raise ValueError("its cache and its tokens differ in length")
        except (RuntimeError, ValueError) as error:
            self.clear()
            raise StateError(f"the state does not fit this session: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state["budget"] = self.config
        return state
