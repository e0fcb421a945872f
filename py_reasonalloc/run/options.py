"""What to run, and what the model's vocabulary tells about it before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError, ContextFullError
from ..engine.modelfile import encode_prompt, open_vocabulary, trained_context
from ..session.config import BudgetConfig, kv_type_id
from ..session.generate import Sampling


@dataclass(frozen=True)
class RunOptions:
    """What to run.

    Attributes
    ----------
    model : Path
        GGUF file.
    config : BudgetConfig or None
        None: the stock cache.
    profile : str or None
        "auto", "calibrate" or the path of a profile. None: `config` is final.
    by_profile : bool
        The profile splits the budget over layers: `config` is uniform over them, and stays so if
        "auto" finds none. Else only a policy works by it.
    needs_profile : bool
        That "auto" finds none is an error.
    kv_type : str
        Type of K and V.
    n_ctx : int
        Context, tokens; 0: as trained with a budget, as long as the text can get without.
    max_tokens : int
        Most tokens to generate; 0: as many as the context holds.
    n_threads : int
        0: what llama_cpp chooses.
    n_gpu_layers : int
        Layers on a GPU; -1: all.
    sampling : Sampling
        How tokens are drawn.
    raw : bool
        Leave out the chat template.
    trace : Path or None
        File to write every compression to; needs a budget.
    verbose : bool
        Let llama.cpp log.
    """

    model: Path
    config: BudgetConfig | None = field(default_factory=BudgetConfig)
    profile: str | None = None
    by_profile: bool = True
    needs_profile: bool = False
    kv_type: str = "f16"
    n_ctx: int = 0
    max_tokens: int = 0
    n_threads: int = 0
    n_gpu_layers: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    raw: bool = False
    trace: Path | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Plan:
    """What the model's vocabulary tells before its weights are loaded.

    Attributes
    ----------
    prompt : tuple of int
        Tokens.
    n_ctx : int
        Context to make, tokens.
    n_longest : int
        Tokens that prompt and text can reach together.
    """

    prompt: tuple[int, ...]
    n_ctx: int
    n_longest: int


def plan_run(options: RunOptions, text: str | None) -> Plan:
    """Tokenize the prompt and settle the length of the context.

    Parameters
    ----------
    text : str or None
        Prompt; None (dry runs only) stands for one of unknown length.

    Raises
    ------
    ConfigError
        Empty prompt, context longer than trained, unknown cache type, protected prompt too long.
    ContextFullError
        The prompt leaves no room in the context.
    ModelFileError
        The file is not a model.
    """
    kv_type_id(options.kv_type)
    with open_vocabulary(options.model, options.verbose) as model:
        n_trained = trained_context(model)
        prompt = () if text is None else tuple(encode_prompt(model, text, options.raw))
    if options.n_ctx > n_trained > 0:
        raise ConfigError(
            f"ctx = {options.n_ctx} is out of range: the model was trained for {n_trained} tokens"
        )
    n_ctx = options.n_ctx or n_trained
    if len(prompt) >= n_ctx:
        raise ContextFullError(
            f"the prompt has {len(prompt)} tokens, but the context ends at {n_ctx}: shorten it"
        )
    n_longest = n_ctx
    if options.max_tokens > 0:
        n_longest = min(n_ctx, len(prompt) + options.max_tokens)
    if options.config is None and options.n_ctx == 0:
        n_ctx = n_longest  # a stock cache is allocated whole
    return Plan(prompt, n_ctx, n_longest)


def session_arguments(options: RunOptions, n_ctx: int) -> dict[str, Any]:
    """Return the arguments of `ReasonLlama` for a run."""
    arguments: dict[str, Any] = {
        "model_path": options.model,
        "budget": options.config,
        "n_ctx": n_ctx,
        "n_gpu_layers": options.n_gpu_layers,
        "type_k": options.kv_type,
        "type_v": options.kv_type,
        "verbose": options.verbose,
    }
    if options.n_threads > 0:
        arguments["n_threads"] = arguments["n_threads_batch"] = options.n_threads
    return arguments
