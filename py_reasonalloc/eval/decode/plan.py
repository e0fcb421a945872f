"""From the command line's arguments to what is decoded, and what a results file must match."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import __version__
from ...engine.errors import ConfigError, ContextFullError
from ...engine.identity import read_identity
from ...engine.modelfile import open_vocabulary, trained_context
from ...engine.prompts import encode_prompt
from ...engine.usertext import path_text
from ...profile.lookup import resolve_profile
from ...session.config import BudgetConfig
from ...session.generate import Sampling
from ...task.shipped import DEMO, DEMO_DEFAULTS, model_path
from ..cases.datasets import DEMO_DATASET, DEMO_LEVEL, Dataset, load_dataset
from ..cases.methods import (
    Arm,
    Common,
    Setup,
    parse_arms,
    profile_digest,
    profile_of,
    read_count,
    setup_of,
)
from ..cases.rows import RowKey
from ..results.agreement import protection_there
from ..results.lines import Results
from .answers import judge_for
from .run import plan_tasks
from .worker import Job, Task

#: Arguments that are left out -> their value, on the demo data set and on others.
_DEFAULTS = {
    "buffer": (DEMO_DEFAULTS["buffer"], 128),
    "temp": (0.0, 0.6),
    "max_tokens": (1000, 16384),
    "protect_prompt": ("all", "auto"),
}


class Plan(NamedTuple):
    """An evaluation that has been checked.

    Attributes
    ----------
    job : Job
        See there.
    arms : tuple of Arm
        In the order of the table.
    n_samples : int
        Texts per arm and problem.
    settings : dict
        What a results file must have been made with for this run to go on in it.
    profiles : dict
        Layer profiles of the arms; see `profiles_of`.
    """

    job: Job
    arms: tuple[Arm, ...]
    n_samples: int
    settings: dict[str, Any]
    profiles: dict[str, str]

    def tasks(self, done: Iterable[RowKey]) -> list[Task]:
        """Return what is left to decode; see `plan_tasks`."""
        return plan_tasks(self.arms, self.job.problems, self.n_samples, done)


def make_plan(arguments: dict[str, Any], there: Results | None = None) -> Plan:
    """Check everything that can be checked before weights are loaded.

    Parameters
    ----------
    arguments : dict
        Of the command `reasonalloc-eval`, by the names of its options.
    there : Results, optional
        The results file that the run will go on in.

    Raises
    ------
    ConfigError
        An argument, the data set, the template or a method is not right; a budget cannot hold the
        protected prompts.
    ReasonAllocError
        The model file, or its profile.
    """
    is_demo_model = arguments["model"] == DEMO
    model = model_path(arguments["model"])
    arms = parse_arms(split_list(arguments["methods"]), read_budgets(arguments["budgets"] or ""))
    dataset = _dataset(arguments, is_demo_model)
    judge_for(dataset.name)  # what it needs is missed now, not after the first text
    is_demo = dataset.name == DEMO_DATASET
    chosen = dict(arguments)
    for name, (demo, other) in _DEFAULTS.items():
        if chosen[name] is None:
            chosen[name] = demo if is_demo else other
    if chosen["temp"] == 0 and chosen["samples"] > 1:
        raise ConfigError("--samples needs a temperature: greedy samples are all the same")
    Sampling(chosen["temp"], chosen["top_p"])
    lengths, n_trained = _prompt_lengths(model, dataset.prompts, chosen["raw"])
    n_ctx = min(max(lengths) + chosen["max_tokens"], n_trained or 1 << 30)
    if max(lengths) >= n_ctx:
        raise ContextFullError(
            f"the longest prompt has {max(lengths)} tokens, but the model's context ends at {n_ctx}"
        )
    profile = resolve_profile(model, chosen["profile"])
    n_protect = protected_tokens(chosen, arms, max(lengths), there)
    common = Common(
        buffer=chosen["buffer"],
        sinks=chosen["sinks"],
        window=chosen["window"],
        n_protect=n_protect or 0,
        kv_type=chosen["kv_type"],
        profile=profile,
    )
    n_used = chosen["limit"] or len(dataset.problems)
    job = Job(
        model=model,
        dataset=dataset.name,
        problems=dataset.problems[:n_used],
        prompts=dataset.prompts[:n_used],
        setups=_setups(chosen, arms, common, there),
        n_ctx=n_ctx,
        max_tokens=chosen["max_tokens"],
        temp=chosen["temp"],
        top_p=chosen["top_p"],
        seed=chosen["seed"],
        raw=chosen["raw"],
        keep_texts=chosen["keep_texts"],
        n_threads=chosen["threads"] or max(1, (os.cpu_count() or 1) // (chosen["jobs"] or 1)),
        n_gpu_layers=chosen["gpu_layers"],
    )
    settings = _settings(chosen, dataset, job) | {
        "protect_prompt": n_protect,
        "profile": None if profile is None else [round(d, 6) for d in profile.demand],
    }
    profiles = {
        called: digest
        for arm, setup in job.setups.items()
        if (called := profile_of(arm.method)) is not None
        and (digest := profile_digest(setup)) is not None
    }
    return Plan(job, arms, chosen["samples"], settings, profiles)


def _settings(chosen: dict[str, Any], dataset: Dataset, job: Job) -> dict[str, Any]:
    names = ("buffer", "sinks", "window", "kv_type", "max_tokens", "temp", "seed", "raw")
    settings = {name: chosen[name] for name in names}
    if chosen["temp"] > 0:
        settings["top_p"] = chosen["top_p"]
    return {
        "version": __version__,
        "model": path_text(job.model.name),
        "model_fingerprint": read_identity(job.model).fingerprint,
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "template": hashlib.sha256(dataset.template.encode()).hexdigest()[:16],
        "shuffle_seed": chosen["shuffle_seed"],
        **settings,
    }


def _dataset(arguments: dict[str, Any], is_demo_model: bool) -> Dataset:
    name = arguments["dataset"] or (DEMO_DATASET if is_demo_model else None)
    if name is None:
        raise ConfigError("no problems: pass --dataset math500, aime24, demo or a JSON Lines file")
    if arguments["level"] is not None and name != DEMO_DATASET:
        raise ConfigError("--level goes with the demo's problems: leave it out")
    return load_dataset(
        name,
        path=arguments["data"],
        question_field=arguments["question_field"],
        answer_field=arguments["answer_field"],
        template=arguments["template"],
        shuffle_seed=arguments["shuffle_seed"],
        level=arguments["level"] or DEMO_LEVEL,
        n_problems=arguments["limit"],
    )


def _prompt_lengths(model: Path, prompts: Sequence[str], raw: bool) -> tuple[list[int], int]:
    """Return the tokens of each prompt, and the context that the model was trained for."""
    with open_vocabulary(model) as vocabulary:
        lengths = [len(encode_prompt(vocabulary, prompt, raw)) for prompt in prompts]
        return lengths, trained_context(vocabulary)


def protected_tokens(
    chosen: dict[str, Any], arms: Sequence[Arm], longest: int, there: Results | None
) -> int | None:
    """Return the most prompt tokens that are protected, the same number in every arm.

    "all" is the longest prompt's number: the allocators give every head room for it. "auto" is what
    the file has already, else what suits the smallest budget. None: no arm has a budget.
    """
    text = chosen["protect_prompt"]
    count = read_count(text)
    if text not in ("all", "off", "auto") and count is None:
        raise ConfigError(f"protect_prompt = {text!r} must be auto, off, all or a number of tokens")
    budgets = [arm.budget for arm in arms if arm.budget > 0]
    if not budgets:
        return None
    if text in ("all", "off"):
        return longest if text == "all" else 0
    if count is not None:
        return min(count, longest)
    n_there = None if there is None else protection_there(there)
    if n_there is not None:
        return n_there
    shared = {"sinks": chosen["sinks"], "window": chosen["window"], "protect_prompt": text}
    return BudgetConfig(min(budgets), **shared).n_protect(longest)


def _setups(
    chosen: dict[str, Any], arms: Sequence[Arm], common: Common, there: Results | None
) -> dict[Arm, Setup]:
    try:
        return {arm: setup_of(arm, common) for arm in arms}
    except ConfigError as error:
        if there is None or chosen["protect_prompt"] != "auto":
            raise
        for arm in arms:  # a fault of another kind is named without the file
            setup_of(arm, common._replace(n_protect=0))
        raise ConfigError(
            f"{there.path} has {common.n_protect} protected prompt tokens in every arm: {error}, "
            "or another results file"
        ) from None


def split_list(text: str) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_budgets(text: str) -> list[int]:
    """Return the numbers of a list with commas; ConfigError if they are none."""
    parts = split_list(text)
    numbers = [number for part in parts if (number := read_count(part))]
    if len(numbers) != len(parts):
        raise ConfigError(f"budgets = {text!r} is not a list of numbers such as 128,256,512")
    return numbers
