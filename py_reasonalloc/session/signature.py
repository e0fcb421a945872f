"""What a saved state has in common with the sessions that can go on from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..engine.identity import read_identity
from ..profile.files import Profile
from .config import BudgetConfig
from .profiled import PROFILED, profile_tables

Signature = Mapping[str, str]

#: Not compared: part of the state itself, or without influence on what is kept.
_LEFT_OUT = ("protect_prompt", "policy_seed", "profile", "attention", "n_draft")


def signature_of(session: Any) -> dict[str, str]:
    """Return name -> value of everything that a state depends on: model, cache types, budget."""
    params = session.context_params
    found = {
        "model": read_identity(session.model_path).fingerprint,
        "cache types": f"{params.type_k}, {params.type_v}",
        "positions": f"{params.rope_scaling_type}, {params.rope_freq_base:g}, "
        f"{params.rope_freq_scale:g}",
    }
    if session.config is None:
        return found | {"budget": "none"}
    return found | _of_config(session.config)


def _of_config(config: BudgetConfig) -> dict[str, str]:
    found = {
        field.name.rstrip("_"): str(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in _LEFT_OUT
    }
    for field in ("budget_swa", "n_query"):
        if getattr(config, field) == getattr(BudgetConfig, field):  # as states of before it
            del found[field]
    if config.policy == "random":
        found["policy_seed"] = str(config.policy_seed)
    profile = config.profile
    if isinstance(profile, Profile) and config.layers in PROFILED:
        tables = {
            name: list(values)
            for name, (_, values) in profile_tables(config.layers, profile).items()
        }
        shape = [profile.gamma, profile.clip_lo, profile.clip_hi]
        text = json.dumps([tables, shape], sort_keys=True)
        found["profile"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def difference(saved: Signature, here: Signature) -> str | None:
    """Return in words what two signatures differ in first; None: nothing."""
    for name in (*here, *saved):
        there, ours = saved.get(name), here.get(name)
        if there == ours:
            continue
        if name in ("model", "profile"):
            return f"it was saved with another {name}"
        return f"it was saved with {name} = {there or 'none'}, here it is {ours or 'none'}"
    return None
