"""From the arguments of `ReasonLlama` to a configuration."""

from __future__ import annotations

import os
from typing import Any

from ..engine.errors import ConfigError
from ..engine.modelfile import check_model_file
from ..profile.lookup import resolve_profile
from .centres import needs_centres
from .config import BudgetConfig


def session_config(
    model_path: str | os.PathLike[str],
    budget: int | BudgetConfig | None,
    shared: dict[str, Any],
    alloc: dict[str, Any],
) -> BudgetConfig | None:
    """Return the configuration that the arguments of `ReasonLlama` stand for.

    Parameters
    ----------
    shared : dict
        Arguments that have the names and defaults of `BudgetConfig`.
    alloc : dict
        layers, heads and profile; None: not given.

    Raises
    ------
    ConfigError
        Arguments are given twice, or out of range, or the profile does not fit the model.
    """
    if budget is None:
        return None
    if isinstance(budget, BudgetConfig):
        twice = [name for name, value in shared.items() if value != getattr(BudgetConfig, name)]
        twice += [name for name, value in alloc.items() if value is not None]
        if twice:
            raise ConfigError(f"{', '.join(twice)}: already part of the BudgetConfig")
        return budget
    layers, heads, wanted = alloc["layers"], alloc["heads"], alloc["profile"]
    profile = None
    if layers is None or layers == "wave" or needs_centres(shared["policy"]):
        profile = resolve_profile(check_model_file(model_path), wanted)
        layers = layers or ("uniform" if profile is None else "wave")
    heads = heads or ("uniform" if wanted is None else "adaptive")
    return BudgetConfig(budget=budget, **shared, layers=layers, heads=heads, profile=profile)
