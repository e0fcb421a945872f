"""From the arguments of `ReasonLlama` to a configuration."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from llama_cpp import Llama

from ..engine.errors import ConfigError, ModelFileError
from ..engine.library import MAX_THREADS
from ..engine.modelfile import check_model_file
from ..profile.lookup import AUTO, resolve_profile
from .centres import needs_centres
from .config import BudgetConfig, check_int
from .profiled import PROFILED


def check_threads(arguments: dict[str, Any]) -> None:
    """Raise ConfigError if more threads are asked for than ggml can have."""
    for name in ("n_threads", "n_threads_batch"):
        if arguments.get(name) is not None:
            check_int(name, arguments[name], 0, MAX_THREADS)


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
    if layers is None or layers in PROFILED or needs_centres(shared["policy"]):
        file = check_model_file(model_path)
        wants_curves = layers == "error" or (layers is None and wanted == AUTO)
        profile = resolve_profile(file, wanted, with_curves=wants_curves)
        if layers is None and profile is not None:
            layers = "error" if profile.head_error is not None else "wave"
    return BudgetConfig(
        budget=budget,
        **shared,
        layers=layers or "uniform",
        heads=heads or "uniform",
        profile=profile,
    )


def check_keywords(own: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Refuse arguments that neither a session's constructor nor that of `llama_cpp.Llama` has.

    Parameters
    ----------
    own : callable
        The constructor; the nearest name may be one of its own.
    given : mapping
        What is left for `llama_cpp.Llama`.

    Raises
    ------
    TypeError
        With the nearest name; the base class would swallow the argument.
    """
    of_base = inspect.signature(Llama.__init__).parameters
    known = [
        name
        for name, parameter in {**of_base, **inspect.signature(own).parameters}.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
    ]
    for name in given:
        if name not in of_base or of_base[name].kind is inspect.Parameter.VAR_KEYWORD:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"a session has no argument {name!r}{hint}")


def check_paths(given: Mapping[str, Any]) -> None:
    """Refuse adapter files that are not there or no GGUF, and a base model that is not there.

    Raises
    ------
    ModelFileError
        The base class would go on without them.
    """
    if given.get("lora_path") is not None:
        check_model_file(given["lora_path"])
    base = given.get("lora_base")
    if base is not None and not os.path.exists(base):
        raise ModelFileError(f"{base}: no such file")
