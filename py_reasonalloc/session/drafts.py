"""Speculative decoding in a budgeted cache: drafts that end where a compression would begin.

A compression runs when some head has no room for the next tokens. It must never see a draft that is
yet to be verified, and must fall at the token where it falls without drafts. So a draft is no
longer than the room that is left; where there is none, the compression comes first, and the draft
is decoded after it. What is rejected then is a tail after the last compression, which the cache can
drop; the ring of queries has `n_draft` more, so that it loses none that the next compression uses.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from ..engine import bindings as c
from ..engine.errors import ConfigError
from .config import MAX_WINDOW, BudgetConfig

#: Longest draft of a model that does not say how many tokens it drafts (`num_pred_tokens`).
DEFAULT_DRAFT = 16


def with_drafts(config: BudgetConfig, draft_model: Any) -> BudgetConfig:
    """Return a configuration with room for the drafts of a model, if it does not have it yet.

    Raises
    ------
    ConfigError
        The draft model cannot be called.
    """
    if not callable(draft_model):
        raise ConfigError(f"draft_model = {draft_model!r} must be a LlamaDraftModel")
    if config.n_draft > 0:
        return config
    asked = getattr(draft_model, "num_pred_tokens", DEFAULT_DRAFT)
    n_draft = int(asked) if isinstance(asked, (int, np.integer)) else DEFAULT_DRAFT
    return dataclasses.replace(config, n_draft=max(1, min(n_draft, MAX_WINDOW)))


class FittingDrafts(LlamaDraftModel):
    """The drafts of a model, cut so that no compression runs before they are verified.

    Parameters
    ----------
    model : callable
        Tokens so far [n] -> tokens that may come next.
    session : ReasonLlama
        With a budget; is not kept alive.
    """

    def __init__(self, model: Any, session: Any) -> None:
        self.model = model
        self._session = weakref.ref(session)

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """Return the draft after `input_ids`, maybe none; only what is used is asked for."""
        n_most = self._most(len(input_ids))
        if n_most <= 0:
            return np.empty(0, dtype=np.intc)
        draft = np.asarray(self.model(input_ids, **kwargs), dtype=np.intc)[:n_most]
        session = self._session()
        if session is not None and isinstance(session._batch, AllLogits):
            session._batch.has_draft = len(draft) > 0
        return draft

    def _most(self, n: int) -> int:
        """Return how many tokens a draft after `n` tokens may have."""
        session = self._session()
        if session is None or session.config is None:
            return 0
        n_ubatch = min(session.context_params.n_ubatch, session.config.buffer)
        n_new = n - session.n_tokens  # verified, and to be decoded with the draft
        room = int(c.ra_room(session.ctx, 0))
        if room < n_new:
            room = n_ubatch  # a compression makes that much before they are decoded
        return int(min(session.config.n_draft, n_ubatch - n_new, room - n_new))


class AllLogits:
    """A llama_batch of the base class that asks for the logits of every token of a draft.

    The base class would compute and keep those of the whole text, prompt and all.
    """

    def __init__(self, batch: Any) -> None:
        self.has_draft = False  # what is set next
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def set_batch(self, batch: Any, n_past: int, logits_all: bool) -> None:
        """Fill in tokens from position `n_past` on."""
        wants_all, self.has_draft = logits_all or self.has_draft, False
        self._batch.set_batch(batch=batch, n_past=n_past, logits_all=wants_all)
