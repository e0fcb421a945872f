"""Save a session and continue it: `Restorable`, the part of `ReasonLlama` that does it."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings

from ..engine import bindings as c
from ..engine.errors import StateError
from .checkpoints import Checkpoints, read_sequence, write_sequence
from .config import BudgetConfig
from .drafts import FittingDrafts
from .reading import PromptReader
from .rows import reserve_rows
from .signature import Signature, difference, signature_of
from .tracer import Traceable


class Restorable(Traceable):
    """A session whose tokens and cache can be saved, and that can go on from there."""

    config: BudgetConfig | None = None
    _n_protect: int
    _checkpoint_bytes: int
    _reader: PromptReader
    _asks_cache = False  # before a completion: a state that does not fit is then no failure
    _has_warned = False
    _known_signature: tuple[BudgetConfig | None, dict[str, str]] | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        """The snapshots that there are; none without a budget."""
        return self._reader.store

    @property
    def n_reused(self) -> int:
        """Tokens of the last prompt that were not read: the cache held them, or a checkpoint."""
        return self._reader.n_reused

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
        vars(state).update(n_protect=self._n_protect, signature=dict(self.signature()))
        return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continue from a saved state.

        Raises
        ------
        StateError
            It is damaged, or of another model, budget or context. Nothing has changed then.
        """
        try:
            self._check_state(state)
            with self._kept_on_failure():
                self._put_state(state)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            message = f"the state does not fit this session: {error}"
            if self._asks_cache:
                self._warn_once()
                raise KeyError(message) from None
            raise StateError(message) from None
        reserve_rows(self, len(state.scores))
        self.scores[: len(state.scores)] = state.scores
        self.input_ids[:] = state.input_ids
        self.n_tokens, self._seed, self._requires_eval = state.n_tokens, state.seed, True

    def load_sequence(
        self,
        tokens: Sequence[int],
        state: npt.NDArray[np.uint8],
        n_protect: int,
        saved: Signature,
    ) -> None:
        """Continue from the state of a sequence, as `read_sequence` returned it.

        Parameters
        ----------
        tokens : sequence of int
            What the state stands for, or more; its last one is to be decoded next.
        n_protect : int
            Positions that it protects.
        saved : mapping
            `signature` of the session that it is of.

        Raises
        ------
        StateError
            It is damaged, or of another model, budget or context. Nothing has changed then.
        """
        try:
            reason = difference(saved, self.signature())
            if reason is not None:
                raise ValueError(reason)
            if len(tokens) > self._n_ctx:
                raise ValueError(f"its {len(tokens)} tokens exceed the context of {self._n_ctx}")
            if min(tokens) < 0 or max(tokens) >= self._n_vocab:
                raise ValueError("its tokens are of another vocabulary")
            with self._kept_on_failure():
                self._protect_for_state(n_protect)
                if not write_sequence(self._ctx.ctx, state):
                    raise ValueError("it is damaged, or of another kind of cache")
                n_held = self.n_cached()
                if n_held == len(tokens) and self._ctx.kv_cache_seq_rm(-1, n_held - 1, -1):
                    n_held -= 1
                if not 0 < n_held < len(tokens):
                    raise ValueError("its cache and its tokens differ in length")
        except (RuntimeError, ValueError) as error:
            raise StateError(f"the state does not fit this session: {error}") from None
        self.input_ids[:n_held] = tokens[:n_held]
        self.n_tokens, self._requires_eval = n_held, True

    def _check_state(self, state: llama_cpp.LlamaState) -> None:
        """Raise ValueError for what is wrong with a state, as far as its parts tell."""
        if len(state.input_ids) != len(self.input_ids):
            raise ValueError(f"it was saved with a context of {len(state.input_ids)} tokens")
        saved = getattr(state, "signature", None)
        if saved is None and self.config is not None:
            raise ValueError("it was saved without a budget, or by another version")
        reason = None if saved is None else difference(saved, self.signature())
        if reason is not None:
            raise ValueError(reason)
        if not 0 <= state.n_tokens <= len(self.input_ids):
            raise ValueError(f"it is damaged: it has {state.n_tokens} tokens")
        if state.scores.ndim != 2 or state.scores.shape[1] != self.scores.shape[1]:
            raise ValueError("it is damaged: its logits are of another vocabulary")
        if len(state.scores) > len(self.input_ids):
            raise ValueError("it is damaged: it has more logits than tokens")
        if len(state.llama_state) != state.llama_state_size:
            raise ValueError("it is damaged: it has lost some of its bytes")

    def _put_state(self, state: llama_cpp.LlamaState) -> None:
        n_bytes = state.llama_state_size
        self._protect_for_state(getattr(state, "n_protect", 0))
        data = (ctypes.c_uint8 * n_bytes).from_buffer_copy(state.llama_state)
        if bindings.llama_state_set_data(self._ctx.ctx, data, n_bytes) != n_bytes:
            raise ValueError("it is damaged, or of another kind of cache")
        if self.n_cached() != state.n_tokens:
            raise ValueError("it is damaged: its cache and its tokens differ in length")

    def _protect_for_state(self, n_protect: int) -> None:
        """Empty the cache, and split its budget as a state wants it that is put into it."""
        if self._tracer is not None:
            self._tracer.is_stale = True
        self._ctx.kv_cache_clear()
        if self.config is not None:
            c.check(c.ra_set_protect(self.ctx, 0, n_protect))
            self._n_protect = n_protect

    @contextlib.contextmanager
    def _kept_on_failure(self) -> Iterator[None]:
        """Put the cache back as it is now if the block, which replaces it, raises."""
        n_protect, n_cached = self._n_protect, self.n_cached()
        before = read_sequence(self._ctx.ctx) if n_cached > 0 else None
        if n_cached > 0 and before is None:
            raise ValueError("the session's own state could not be set aside")
        try:
            yield
        except BaseException:
            self._protect_for_state(n_protect)
            if before is not None and not write_sequence(self._ctx.ctx, before):
                self.clear()
            raise

    def signature(self) -> dict[str, str]:
        """Return what a state of this session depends on: name -> value."""
        if self._known_signature is None or self._known_signature[0] is not self.config:
            self._known_signature = self.config, signature_of(self)
        return self._known_signature[1]

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
        state["n_seq_max"] = self.context_params.n_seq_max
        state["checkpoints"] = self._checkpoint_bytes
        if isinstance(self.draft_model, FittingDrafts):
            state["draft_model"] = self.draft_model.model
        return state
