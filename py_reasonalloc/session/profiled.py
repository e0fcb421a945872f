"""What a profile has to do with how a budget is split."""

from __future__ import annotations

import ctypes
from typing import Any

from ..engine.errors import ConfigError
from ..profile.files import Profile

#: Splits over layers that need a profile.
PROFILED = ("wave", "error")

#: Policy that stands for the one that goes with a split.
AUTO_POLICY = "auto"


def default_policy(layers: Any) -> str:
    """Return the policy that goes with a split over layers.

    loss with the budgets that it was made for, by error curves. With others it is better on one
    model that was measured and worse on another than rkv (docs/fidelity.md).
    """
    return "loss" if layers == "error" else "rkv"


def check_profile(layers: Any, profile: Any) -> None:
    """Raise ConfigError unless a split over layers can go by `profile`, or needs none."""
    if profile is not None and not isinstance(profile, Profile):
        raise ConfigError(f"profile = {profile!r} must be a Profile or the path of one")
    if layers not in PROFILED:
        return
    if profile is None:
        raise ConfigError(
            f"layers = {layers!r} needs a profile: pass one (reasonalloc-profile measures it)"
        )
    if layers == "error" and profile.head_error is None:
        raise ConfigError(
            f"layers = 'error' needs a profile with error curves, {profile.source or profile.name} "
            "has none: measure one with reasonalloc-profile"
        )


def profile_tables(layers: Any, profile: Profile) -> dict[str, tuple[Any, Any]]:
    """Return name -> (C type, values) of the tables of a ra_config that a split goes by."""
    if layers == "wave":
        return {"layer_demand": (ctypes.c_double, profile.demand)}
    curves = profile.head_error
    if layers != "error" or curves is None:
        return {}
    return {
        "head_error": (ctypes.c_double, [error for row in curves.values for error in row]),
        "error_grid": (ctypes.c_int32, curves.grid),
    }


def head_budgets(config: Any, n_head_kv: int | tuple[int, ...], n_layer: int) -> list[list[int]]:
    """Return the budget of each KV head of each layer, as the engine splits by error curves.

    Parameters
    ----------
    config : BudgetConfig
        With ``layers = "error"``.
    n_head_kv : int or tuple of int
        KV heads of every layer, or of each.

    Raises
    ------
    BudgetError
        The budget cannot hold what must stay.
    """
    from ..engine import bindings as c

    counts = [n_head_kv] * n_layer if isinstance(n_head_kv, int) else list(n_head_kv)
    flat = (ctypes.c_int32 * sum(counts))()
    native = config.to_native()
    c.check(c.ra_alloc_layers_run(ctypes.byref(native), len(flat), flat))
    budgets = iter(flat)
    return [[next(budgets) for _ in range(count)] for count in counts]
