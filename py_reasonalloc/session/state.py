"""Save a session and continue it: `Restorable`, the part of `ReasonLlama` that does it."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from typing import Any

import llama_cpp

from ..engine import bindings as c
from ..engine.errors import StateError
from .config import BudgetConfig
from .rows import reserve_rows
from .tracer import Traceable


class Restorable(Traceable):
    """A session whose tokens and cache can be saved, and that can go on from there."""

    config: BudgetConfig | None = None
    _n_protect: int
    _asks_cache = False  # before a completion: a state that does not fit is then no failure
    _has_warned = False

    def save_state(self) -> llama_cpp.LlamaState:
        """Return a copy of the session's tokens and cache.

        Raises
        ------
        StateError
            The engine could not write it.
        """
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
        try:
            if len(state.input_ids) != len(self.input_ids):
                raise ValueError(f"it was saved with a context of {len(state.input_ids)} tokens")
            if self.config is not None:  # the split over the layers hangs on it
                self.clear()
                self._n_protect = getattr(state, "n_protect", 0)
                c.check(c.ra_set_protect(self.ctx, 0, self._n_protect))
            reserve_rows(self, len(state.scores))
            super().load_state(state)
            if self.n_cached() != state.n_tokens:
                raise ValueError("its cache and its tokens differ in length")
        except (RuntimeError, ValueError) as error:
            self.clear()
            message = f"the state does not fit this session: {error}"
            if self._asks_cache:
                self._warn_once()
                raise KeyError(message) from None
            raise StateError(message) from None

    def _create_completion(self, *args: Any, **kwargs: Any) -> Generator[Any, Any, None]:
        """As the base class: for it, a prompt cache without a fitting state raises KeyError."""
        self._asks_cache = self.cache is not None
        try:
            yield from super()._create_completion(*args, **kwargs)
        finally:
            self._asks_cache = False

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """Generate tokens; the prompt cache was asked before, if at all."""
        self._asks_cache = False
        yield from super().generate(*args, **kwargs)

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the prompt cache holds states of another budget, context or model: they are "
                "passed over, and prompts read anew",
                RuntimeWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state["budget"] = self.config
        return state
