"""The smallest cache that keeps a model close enough to its full cache."""

from __future__ import annotations

import math
from typing import Any

from .. import __version__
from ..errors import ConfigError
from .plan import Plan
from .report import ArmReport, Report
from .rows import OWN


def check_target(target_kl: float) -> None:
    """Raise ConfigError unless a target can be one."""
    if not 0 < target_kl < math.inf:
        raise ConfigError(f"target_kl = {target_kl:g} is out of range: must be above 0, in nats")


def recommend(report: Report, plan: Plan, target_kl: float) -> dict[str, Any] | None:
    """Return the arm with the smallest cache whose KL stays within a target; None if none does.

    The upper end of the interval must be below the target, in every arm of the same method with a
    larger cache as well. What counts are the model's own texts, if there are any, else the files.

    Returns
    -------
    dict
        Fields of `recommendation` in ``profiles/schema/profile.schema.json``, without the command.
    """
    check_target(target_kl)
    sources = [arm.source for arm in report.arms]
    source = OWN if OWN in sources else sources[0]
    setups = {(arm.method, arm.budget): setup for arm, setup in plan.setups.items()}
    fitting: list[ArmReport] = []
    for method in dict.fromkeys(arm.method for arm in report.arms if arm.budget > 0):
        arms = [arm for arm in report.arms if (arm.method, arm.source) == (method, source)]
        for arm in sorted(arms, key=lambda arm: -arm.kv_bytes):
            if arm.kl.own.high > target_kl or (method, arm.budget) not in setups:
                break
            if arm.n_never == 0:
                fitting.append(arm)
    if not fitting:
        return None
    best = min(fitting, key=lambda arm: (arm.kv_bytes, arm.kl.own.value))
    setup = setups[best.method, best.budget]
    assert setup.config is not None
    return {
        "target_kl": target_kl,
        "method": best.method,
        "budget": best.budget,
        "buffer": setup.config.buffer,
        "window": setup.config.window,
        "kv_type": setup.kv_type,
        "kl": round(best.kl.own.value, 6),
        "kl_high": round(best.kl.own.high, 6),
        "n_tokens": best.n_tokens,
        "text": source,
        "tool_version": __version__,
    }


def recommendation_text(found: dict[str, Any] | None, report: Report, target_kl: float) -> str:
    """Return what `recommend` found, in a line."""
    if found is None:
        return (
            f"No cache of these stays within KL {target_kl:g} (upper end of the interval): pass "
            "higher --budgets or a higher --target-kl."
        )
    what = "the model's own text" if found["text"] == OWN else "these texts"
    return (
        f"Smallest cache that keeps {what} within KL {target_kl:g}: {found['method']} with budget "
        f"{found['budget']}, cache type {found['kv_type']}: KL {found['kl']:.3f}, at most "
        f"{found['kl_high']:.3f}."
    )
