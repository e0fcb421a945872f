"""The smallest cache that keeps a model close enough to its full cache."""

from __future__ import annotations

import math
import os

from .. import __version__
from ..engine.errors import ConfigError, ProfileError
from ..eval.cases.methods import Arm, Common, setup_of
from ..profile.files import Recommendation
from ..profile.lookup import AUTO, find_profiles, resolve_profile
from ..session.config import BudgetConfig
from .plan import Plan
from .report import ArmReport, Report
from .rows import OWN


def check_target(target_kl: float) -> None:
    """Raise ConfigError unless a target can be one."""
    if not 0 < target_kl < math.inf:
        raise ConfigError(f"target_kl = {target_kl:g} is out of range: must be above 0, in nats")


def recommend(
    report: Report, plan: Plan, target_kl: float, command: str = ""
) -> Recommendation | None:
    """Return the arm with the smallest cache whose KL stays within a target; None if none does.

    The upper end of the interval must be below the target, in every arm of the same method with a
    larger cache as well. What counts are the model's own texts, if there are any, else the files.

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
    return Recommendation(
        target_kl=float(target_kl),
        method=best.method,
        budget=best.budget,
        buffer=setup.config.buffer,
        sinks=setup.config.sinks,
        window=setup.config.window,
        kv_type=setup.kv_type.lower(),
        kl=round(best.kl.own.value, 6),
        kl_high=round(best.kl.own.high, 6),
        n_tokens=best.n_tokens,
        tool_version=__version__,
        command=command or "reasonalloc-eval fidelity",
    )


def recommendation_text(found: Recommendation | None, report: Report, target_kl: float) -> str:
    """Return what `recommend` found, in a line."""
    if found is None:
        return (
            f"No cache of these stays within KL {target_kl:g} (upper end of the interval): pass "
            "higher --budgets or a higher --target-kl."
        )
    is_own = any(arm.source == OWN for arm in report.arms)
    what = "the model's own text" if is_own else "these texts"
    return (
        f"Smallest cache that keeps {what} within KL {target_kl:g}: {found.method} with budget "
        f"{found.budget}, cache type {found.kv_type}: KL {found.kl:.3f}, at most "
        f"{found.kl_high:.3f}."
    )


def recommended_cache(
    model_path: str | os.PathLike[str], wanted: str | os.PathLike[str]
) -> tuple[BudgetConfig, str, str]:
    """Return the cache that a model's profile recommends.

    Parameters
    ----------
    wanted : "auto" or path
        "auto": the first of `find_profiles` that recommends one.

    Returns
    -------
    BudgetConfig, str, str
        Configuration; type of K and V; which profile recommends it, and how close it was.

    Raises
    ------
    ProfileError
        There is no profile that recommends a cache, or what it recommends cannot be.
    """
    if wanted == AUTO:
        profiles = find_profiles(model_path)
    else:
        profiles = [profile for profile in [resolve_profile(model_path, wanted)] if profile]
    profile = next((p for p in profiles if p.recommendation is not None), None)
    if profile is None or profile.recommendation is None:
        if wanted == AUTO:
            who = f"no profile that fits {model_path} recommends a budget"
        else:
            who = f"{wanted} recommends no budget"
        raise ProfileError(
            f"{who}: measure one with reasonalloc-profile MODEL --cache --recommend, or pass "
            "--budget N"
        )
    found = profile.recommendation
    common = Common(found.buffer, found.sinks, found.window, 0, found.kv_type, profile)
    name = profile.source or profile.name
    try:
        setup = setup_of(Arm(found.method, found.budget), common)
    except ConfigError as error:
        raise ProfileError(f"{name}: its recommendation cannot be used: {error}") from None
    if setup.config is None:
        raise ProfileError(f"{name}: its recommendation cannot be used: it has no budget")
    return setup.config, setup.kv_type, f"{name} (KL {found.kl:.3f}, target {found.target_kl:g})"
