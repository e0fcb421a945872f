"""How a run's budget is split over layers and heads, once the model and prompt are known."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..engine.errors import ConfigError, ProfileError
from ..engine.identity import read_identity
from ..engine.usertext import path_text
from ..profile.files import Profile
from ..profile.lookup import resolve_profile, save_to_cache
from ..session.centres import needs_centres
from ..session.config import BudgetConfig
from ..session.profiled import PROFILED
from .options import Plan, RunOptions
from .probes import default_prompts

#: ``--profile calibrate``, and how much it decodes: a look, where reasonalloc-profile measures.
CALIBRATE = "calibrate"
QUICK_PROMPTS, QUICK_STEPS = 4, 128


def settle(options: RunOptions, plan: Plan) -> RunOptions:
    """Fill in what hangs on the model and the prompt: the profile, and how much is protected.

    The allocators need to know the protected tokens when the cache is made, for they give every
    head room for them.

    Raises
    ------
    ConfigError
        Budgets are given for another number of layers.
    ProfileError
        The profile is not valid, does not fit the model, or is needed and there is none.
    BudgetError
        The budget cannot hold the protected prompt.
    """
    config = options.config
    if config is None:
        return options
    if options.chain is not None:
        config = dataclasses.replace(config, protect_prompt=options.chain.n_protect)
    elif config.protect_prompt != "off" and plan.prompt:
        config = dataclasses.replace(config, protect_prompt=config.n_protect(len(plan.prompt)))
    if not isinstance(config.layers, str):
        n_layer = read_identity(options.model).n_layer
        if len(config.layers) != n_layer:
            raise ConfigError(
                f"layers has {len(config.layers)} budgets, {options.model} has {n_layer} layers"
            )
    profile: Profile | None = None
    layers = options.profile_layers
    if options.profile == CALIBRATE:
        profile = _calibrate(options)
    elif options.profile is not None:
        wants_curves = (layers or options.prefers) == "error"
        profile = resolve_profile(options.model, options.profile, with_curves=wants_curves)
    if profile is not None and options.by_profile:
        preferred = options.prefers if profile.head_error is not None else "wave"
        config = dataclasses.replace(config, layers=layers or preferred, profile=profile)
    elif profile is not None:
        config = dataclasses.replace(config, profile=profile)
    elif needs_centres(config.policy):
        raise ProfileError(
            f"policy = {config.policy!r} needs a profile with query centres, and none fits "
            f"{path_text(options.model)}: make one with --profile calibrate or reasonalloc-profile"
        )
    elif layers is not None:
        what = "a profile with error curves" if layers == "error" else "a profile"
        raise ProfileError(
            f"layers = {layers!r} needs {what}, and none fits {options.model}: make one with "
            "--profile calibrate or reasonalloc-profile"
        )
    return dataclasses.replace(options, config=config)


def _calibrate(options: RunOptions) -> Profile:
    """Measure a profile for the model of a run, briefly, and keep it in the user's cache."""
    from .calibrate import Settings, measure

    wants_curves = (options.profile_layers or options.prefers) == "error"
    settings = Settings(
        steps=Settings.steps if wants_curves else QUICK_STEPS,
        curves=wants_curves,
        buffer=options.config.buffer if options.config is not None else Settings.buffer,
        n_threads=options.n_threads,
        n_gpu_layers=options.n_gpu_layers,
        raw=options.raw,
    )
    identity = read_identity(options.model)
    prompts = default_prompts(identity, settings.sampling.seed)[:QUICK_PROMPTS]
    command = f"reasonalloc-run {path_text(options.model.name)} --profile {CALIBRATE}"
    profile = measure(options.model, prompts, settings, identity.families[0], command)
    path = save_to_cache(profile, identity)
    return dataclasses.replace(profile, source=str(path))


def allocation(config: BudgetConfig | None) -> dict[str, Any]:
    """Return how a budget is split, as reports show it; nulls for the stock cache."""
    if config is None:
        return {"profile": None, "layers": None, "heads": None}
    profile = config.profile if config.layers in PROFILED else None
    return {
        "profile": profile.source or profile.name if isinstance(profile, Profile) else None,
        "layers": config.layers if isinstance(config.layers, str) else list(config.layers),
        "heads": config.heads,
    }
