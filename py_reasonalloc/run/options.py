"""What to run, and what the model's vocabulary tells about it before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError, ContextFullError, ModelFileError
from ..engine.grammar import explain_grammar
from ..engine.modelfile import MAX_CONTEXT, context_fault, open_vocabulary, trained_context
from ..engine.prompts import encode_prompt
from ..session.chains import Chain
from ..session.config import BudgetConfig, kv_type_id
from ..session.steering import Sampling
from ..session.thinking import ThinkLimit
from .rope import Rope


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
        Where the budgets of layers and heads come from, or what a policy works by: "auto",
        "calibrate" or the path of a profile; `config` is then uniform over layers, and stays so if
        "auto" finds none. None: `config` is final.
    by_profile : bool
        The profile splits the budget. Else only a policy works by it.
    profile_layers : str or None
        Split over layers by that profile, "wave" or "error"; that "auto" finds none is then an
        error. None: as `prefers` says, if there is one.
    undecided : tuple of str
        Fields of `config`, "policy" and "merge", that nobody asked for: they go by how the profile
        splits the budget.
    prefers : str
        Split over layers that a profile is for where `profile_layers` names none: "error" or
        "wave"; a profile without curves serves for the wave.
    kv_type : str
        Type of K and V.
    n_ctx : int
        Context, tokens; 0: as trained with a budget, as long as the text can get without.
    max_tokens : int
        Most tokens to generate; 0: as many as the context holds.
    n_samples : int
        Texts that are decoded side by side, each in a sequence of its own.
    n_threads : int
        0: what llama_cpp chooses.
    n_gpu_layers : int
        Layers on a GPU; -1: all.
    sampling : Sampling
        How tokens are drawn.
    think : ThinkLimit or None
        How long the model may think; None: as long as it likes.
    rope : Rope
        How positions are scaled.
    raw : bool
        Leave out the chat template.
    template_variables : mapping
        What the chat template gets beside the message.
    system : str or None
        A system message before it.
    stop : tuple of str
        Texts that end the model's, and are left out of it.
    grammar : str or None
        GBNF that the text is held to.
    n_batch : int
        Tokens of a prompt that are read at a time.
    use_mmap, use_mlock : bool
        Map the file instead of reading it; keep the weights in memory.
    trace : Path or None
        File to write every compression to; needs a budget.
    chain : Chain or None
        What is continued, in the place of a prompt.
    save_state : Path or None
        File to leave the chain in, to be continued.
    recommended_by : str or None
        Whose recommendation `config` and `kv_type` are.
    verbose : bool
        Let llama.cpp log.
    """

    model: Path
    config: BudgetConfig | None = field(default_factory=BudgetConfig)
    profile: str | None = None
    by_profile: bool = True
    profile_layers: str | None = None
    undecided: tuple[str, ...] = ()
    prefers: str = "error"
    kv_type: str = "f16"
    n_ctx: int = 0
    max_tokens: int = 0
    n_samples: int = 1
    n_threads: int = 0
    n_gpu_layers: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    think: ThinkLimit | None = None
    rope: Rope = field(default_factory=Rope)
    raw: bool = False
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    n_batch: int = 512
    use_mmap: bool = True
    use_mlock: bool = False
    trace: Path | None = None
    chain: Chain | None = None
    save_state: Path | None = None
    recommended_by: str | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Plan:
    """What the model's vocabulary tells before its weights are loaded.

    Attributes
    ----------
    prompt : tuple of int
        Tokens; with those of the text that is continued.
    n_ctx : int
        Context to make, tokens.
    n_longest : int
        Tokens that prompt and text can reach together.
    rope : dict
        Arguments of `llama_cpp.Llama` that scale positions.
    """

    prompt: tuple[int, ...]
    n_ctx: int
    n_longest: int
    rope: dict[str, Any] = field(default_factory=dict)


def plan_run(options: RunOptions, text: str | None) -> Plan:
    """Tokenize the prompt and settle the length of the context.

    Parameters
    ----------
    text : str or None
        Prompt; None (dry runs only) stands for one of unknown length.

    Raises
    ------
    ConfigError
        Empty prompt, context longer than trained and positions not scaled, unknown cache type,
        protected prompt too long, a grammar that cannot be parsed.
    ContextFullError
        The prompt leaves no room in the context.
    ModelFileError
        The file is not a model, or does not say how long its context is and `options` neither.
    """
    kv_type_id(options.kv_type)
    rope = options.rope
    with open_vocabulary(options.model, options.verbose) as model:
        n_trained = trained_context(model)
        if n_trained == 0 and options.n_ctx == 0:
            raise ModelFileError(context_fault(options.model, model, "pass --ctx N"))
        prompt: tuple[int, ...] = () if options.chain is None else options.chain.tokens
        if text is not None:
            prompt = tuple(
                encode_prompt(model, text, options.raw, options.template_variables, options.system)
            )
        if options.grammar is not None:
            explain_grammar(model, options.grammar)
        n_ctx = options.n_ctx or n_trained
        scaled = rope.arguments(model, n_trained, n_ctx)
    if n_ctx > n_trained > 0 and not rope.stretches:
        raise ConfigError(
            f"ctx = {options.n_ctx} is out of range: the model was trained for {n_trained} tokens; "
            "--rope-scaling yarn (or linear, or --rope-freq-base, --rope-freq-scale) goes beyond"
        )
    if n_ctx > MAX_CONTEXT:
        raise ConfigError(f"ctx = {n_ctx} is out of range: must be 1 to {MAX_CONTEXT}")
    if len(prompt) >= n_ctx:
        raise ContextFullError(
            f"the prompt has {len(prompt)} tokens, but the context ends at {n_ctx}: shorten it"
        )
    n_longest = n_ctx
    if options.max_tokens > 0:
        n_longest = min(n_ctx, len(prompt) + options.max_tokens)
    if options.config is None and options.n_ctx == 0:
        n_ctx = n_longest  # a stock cache is allocated whole
    return Plan(prompt, n_ctx, n_longest, scaled)


def session_arguments(options: RunOptions, plan: Plan, n_ctx: int) -> dict[str, Any]:
    """Return the arguments of `ReasonLlama` for texts of that many tokens each."""
    if options.config is None:
        n_ctx *= options.n_samples  # sequences of a stock cache share its rows
    arguments: dict[str, Any] = {
        "n_seq_max": options.n_samples,
        "model_path": options.model,
        "budget": options.config,
        "n_ctx": n_ctx,
        "n_gpu_layers": options.n_gpu_layers,
        "type_k": options.kv_type,
        "type_v": options.kv_type,
        "n_batch": options.n_batch,
        "n_ubatch": options.n_batch,
        "use_mmap": options.use_mmap,
        "use_mlock": options.use_mlock,
        "checkpoints": 0,  # one prompt is read, once
        "verbose": options.verbose,
        **plan.rope,
    }
    if options.n_threads > 0:
        arguments["n_threads"] = arguments["n_threads_batch"] = options.n_threads
    return arguments
