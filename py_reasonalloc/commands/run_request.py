"""From the options of `reasonalloc-run` to what is to be run."""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..engine.errors import ConfigError
from ..engine.usertext import STDIN, argument_text, read_text
from ..output.console import open_library
from ..task.shipped import DEMO_DEFAULTS, model_path

if TYPE_CHECKING:
    from ..run.runner import RunOptions
    from ..session.chains import Chain
    from ..session.config import BudgetConfig
    from ..session.thinking import ThinkLimit

#: `--window`, where the budget has room for it: wider than the paper's 8, see docs/evidence.md.
DEFAULT_WINDOW = 16
#: `--method` that stands for the settings of arXiv:2606.11164; with a profile its wave, too.
PAPER = "paper"
PAPER_FIELDS = {"policy": "rkv", "window": 8, "heads": "adaptive-literal"}
#: Largest seed: the next one is llama.cpp's word for a random one, as -1 is on a command line.
MAX_SEED = 2**32 - 2

_Options = TypeVar("_Options")


def run_options(arguments: dict[str, Any], is_demo: bool) -> RunOptions:
    """Return what the options of a command line ask for; loads the library.

    Raises
    ------
    ConfigError
        An option's value is not right, or two exclude each other.
    """
    open_library()
    from ..engine.prompts import read_variable
    from ..run.rope import Rope
    from ..run.runner import RunOptions
    from ..session.centres import needs_centres
    from ..session.config import BudgetConfig, kv_type_id
    from ..session.profiled import PROFILED
    from ..session.steering import Sampling

    kv_type_id(arguments["kv_type"] or "f16")
    is_auto = arguments["budget"] == "auto"
    model = _model(arguments, is_wanted=is_auto)
    arguments = {**arguments, "budget": None if is_auto else _number(arguments["budget"])}
    kv_type, recommended_by = (arguments["kv_type"] or "f16").lower(), None
    defaults = dict(DEMO_DEFAULTS) if is_demo else {}
    if arguments["chat"]:  # it may grow beyond any budget
        defaults.pop("protect_prompt", None)
    seed = chosen_seed(arguments["seed"])

    def chosen(name: str) -> Any:
        return defaults.get(name) if arguments[name] is None else arguments[name]

    direct = ("budget", "policy", "buffer", "sinks", "window", "protect_prompt", "budget_swa")
    given = {name: chosen(name) for name in direct if chosen(name) is not None}
    names = (*direct, "method", "layers", "heads", "profile")
    config, profile, by_profile = None, None, True
    undecided: tuple[str, ...] = ()
    if is_auto:
        config, kv_type, recommended_by = _recommended(arguments, model)
        protect = _protect_prompt(given.get("protect_prompt", "auto"))
        config = dataclasses.replace(config, protect_prompt=protect, policy_seed=seed)
    elif not arguments["no_budget"]:
        profile = _allocation(arguments, given)
        settings = _settings(arguments["settings"])
        given |= settings
        given["protect_prompt"] = _protect_prompt(given.get("protect_prompt", "auto"))
        if arguments["method"] == PAPER:
            given = {**PAPER_FIELDS, **given}
        budget = given.get("budget", BudgetConfig.budget)
        given.setdefault("window", max(BudgetConfig.window, min(DEFAULT_WINDOW, budget // 4)))
        undecided = tuple(name for name in ("policy", "merge") if name not in given)
        config = _budget(given, settings, seed)
        if profile is None and needs_centres(config.policy) and arguments["profile"] != "none":
            profile, by_profile = arguments["profile"] or "auto", False
    elif arguments["settings"]:
        raise ConfigError("--no-budget and --set exclude each other")
    elif any(arguments[name] is not None for name in names):
        first = next(name for name in names if arguments[name] is not None)
        raise ConfigError(f"--no-budget and --{first.replace('_', '-')} exclude each other")
    temp = Sampling.temp if chosen("temp") is None else chosen("temp")
    options = RunOptions(
        model=model,
        config=config,
        profile=profile,
        by_profile=by_profile,
        profile_layers=arguments["layers"] if arguments["layers"] in PROFILED else None,
        undecided=undecided,
        prefers="wave" if arguments["method"] == PAPER else "error",
        kv_type=kv_type,
        n_ctx=arguments["ctx"] or 0,
        max_tokens=arguments["max_tokens"],
        n_samples=arguments["samples"],
        n_threads=arguments["threads"] or 0,
        n_gpu_layers=arguments["gpu_layers"],
        sampling=_filled(Sampling, {**arguments, "temp": temp, "seed": seed}),
        think=_think(arguments),
        rope=_filled(Rope, arguments),
        raw=arguments["raw"],
        template_variables=dict(map(read_variable, arguments["template_vars"])),
        system=_system(arguments),
        stop=_stop(arguments["stop"]),
        grammar=_grammar(arguments),
        n_batch=arguments["n_batch"],
        use_mmap=arguments["use_mmap"],
        use_mlock=arguments["use_mlock"],
        trace=_trace(arguments),
        chain=_chain(arguments),
        save_state=_save_state(arguments),
        recommended_by=recommended_by,
        verbose=arguments["verbose"],
    )
    # a download is the last thing: what else is wrong has been said by then
    return dataclasses.replace(options, model=_model(arguments, is_wanted=True))


def _model(arguments: dict[str, Any], is_wanted: bool) -> Path:
    """Return the model file; with --hf an empty path until it `is_wanted`."""
    name, hub = arguments["model"], arguments["hf"]
    if name is None and hub is None:
        raise click.UsageError("Missing argument 'MODEL' (or --hf REPO[:FILE]).")
    if hub is None:
        return model_path(name)
    if name is not None:
        raise ConfigError("MODEL and --hf exclude each other")
    from ..run.hub import check_hub, hub_model

    check_hub(hub)
    return hub_model(hub) if is_wanted else Path()


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        raise ConfigError(f"budget = {text!r} must be a number of tokens, or auto") from None


def _recommended(arguments: dict[str, Any], model: Path) -> tuple[BudgetConfig, str, str]:
    """Return the cache that a profile of the model recommends, its type, and which profile does."""
    from ..fidelity.recommend import recommended_cache

    names = (
        "no_budget",
        "method",
        "policy",
        "layers",
        "heads",
        "buffer",
        "sinks",
        "window",
        "budget_swa",
        "kv_type",
    )
    for name in (*names, "settings"):
        if arguments[name]:
            option = {"settings": "set"}.get(name, name).replace("_", "-")
            raise ConfigError(f"--budget auto and --{option} exclude each other")
    if arguments["profile"] in ("none", "calibrate"):
        raise ConfigError(f"--budget auto and --profile {arguments['profile']} exclude each other")
    return recommended_cache(model, arguments["profile"] or "auto")


def chosen_seed(seed: int) -> int:
    """Return a seed as it was typed, or for -1 a random one.

    Raises
    ------
    ConfigError
        It is out of its range.
    """
    if seed == -1:
        return secrets.randbelow(MAX_SEED + 1)
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed = {seed} is out of range: must be -1 (random) to {MAX_SEED}")
    return seed


def _filled(kind: type[_Options], arguments: dict[str, Any]) -> _Options:
    """Return a dataclass with the arguments that have the names of its fields."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: arguments[name] for name in names})


def _think(arguments: dict[str, Any]) -> ThinkLimit | None:
    from ..session.thinking import ThinkLimit

    n_tokens, start, end = (arguments[name] for name in ("think", "think_start", "think_end"))
    if n_tokens is None:
        for name in ("think_start", "think_end"):
            if arguments[name] is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs --think N")
        return None
    start = None if start is None else argument_text(start, "--think-start")
    return ThinkLimit(n_tokens, start, None if end is None else argument_text(end, "--think-end"))


def _system(arguments: dict[str, Any]) -> str | None:
    text = arguments["system"]
    if text is None:
        return None
    if not text.strip():
        raise ConfigError("--system is empty")
    return argument_text(text, "--system")


def _stop(texts: Sequence[str]) -> tuple[str, ...]:
    if not all(texts):
        raise ConfigError("--stop is empty: every text would end at once")
    for text in texts:
        argument_text(text, "--stop")  # as it stands: a line end at its end counts
    return tuple(texts)


def _grammar(arguments: dict[str, Any]) -> str | None:
    """Return the GBNF that --grammar or --json-schema asks for."""
    from ..engine.grammar import grammar_of_schema

    given = {name: arguments[name] for name in ("grammar", "json_schema") if arguments[name]}
    for name in ("grammar", "json_schema"):
        if arguments[name] == "":
            raise ConfigError(f"--{name.replace('_', '-')} is empty")
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError("--grammar and --json-schema exclude each other")
    ((name, text),) = given.items()
    option = f"--{name.replace('_', '-')}"
    if arguments["think"] is not None:
        raise ConfigError(f"{option} and --think exclude each other: thinking would break it")
    if text.startswith("@"):
        text = read_text(text[1:], name.replace("_", " "))
    else:
        text = argument_text(text, option)
    return grammar_of_schema(text) if name == "json_schema" else text


def _budget(given: dict[str, Any], settings: dict[str, Any], seed: int) -> BudgetConfig:
    """Return the configuration; a fault of what came through --set is named so."""
    from ..session.config import BudgetConfig

    try:
        return BudgetConfig(**given, policy_seed=seed)
    except ConfigError as error:
        if str(error).partition(" = ")[0] in settings:
            raise type(error)(f"--set {error}".replace("lambda_ =", "lambda =")) from None
        raise


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `BudgetConfig` that --set names."""
    from ..session.config import read_option

    return dict(read_option(*pair.partition("=")[::2]) for pair in pairs)


def _allocation(arguments: dict[str, Any], given: dict[str, Any]) -> str | None:
    """Fill in how the budget is split; returns RunOptions.profile.

    An explicit --layers that no profile has a say in wins over any.
    """
    from ..session.profiled import PROFILED

    layers, profile = arguments["layers"], arguments["profile"] or "auto"
    if arguments["heads"] is not None:
        given["heads"] = arguments["heads"]
    if layers is None or layers in PROFILED:
        if profile != "none":
            return str(profile)
        if layers is not None:
            raise ConfigError(f"--layers {layers} and --profile none exclude each other")
        return None
    if layers[:1].isdigit() or "," in layers:
        table = _numbers(layers)
        mean = sum(table) // len(table)
        if arguments["budget"] not in (None, mean):
            raise ConfigError(
                f"--layers gives {mean} tokens on average, --budget {arguments['budget']}: leave "
                "--budget out"
            )
        given["budget"], given["layers"] = mean, table
    else:
        given["layers"] = layers
    return None


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"layers = {text!r} is not a list of numbers such as 96,64,80") from None


def _trace(arguments: dict[str, Any]) -> Path | None:
    """Return the trace file, refused at once if it cannot be one: loading a model takes time."""
    name = arguments["trace"]
    if name is None:
        return None
    for flag in ("no_budget", "dry_run"):
        if arguments[flag]:
            raise ConfigError(f"--trace and --{flag.replace('_', '-')} exclude each other")
    from ..trace.write import check_target

    inputs = (arguments["model"], arguments["prompt_file"])  # one is None with --hf
    return check_target(name, [Path(file) for file in inputs if file is not None])


def _chain(arguments: dict[str, Any]) -> Chain | None:
    """Return what is to be continued, if anything."""
    name = arguments["load_state"]
    if name is None:
        return None
    for option, flag in (("prompt", "-p"), ("prompt_file", "-f"), ("dry_run", "--dry-run")):
        if arguments[option]:
            raise ConfigError(f"--load-state and {flag} exclude each other")
    from ..session.chains import read_chain

    return read_chain(Path(name))


def _save_state(arguments: dict[str, Any]) -> Path | None:
    """Return where the chain is left, refused at once if it cannot be written there."""
    if arguments["save_state"] is None:
        return None
    if arguments["dry_run"]:
        raise ConfigError("--save-state and --dry-run exclude each other")
    from ..session.chains import check_target

    inputs = (arguments["model"], arguments["prompt_file"], arguments["trace"])
    return check_target(arguments["save_state"], inputs)


def _protect_prompt(value: str) -> str | int:
    try:
        return int(value)
    except ValueError:
        return value


def prompt_text(arguments: dict[str, Any], is_demo: bool) -> str | None:
    """Return the prompt's text, or None if there is none.

    Raises
    ------
    ConfigError
        Two are given, or it cannot be read, or is not text.
    """
    text, name = arguments["prompt"], arguments["prompt_file"]
    if arguments["load_state"] is not None:
        return None
    if arguments["chat"] and name == STDIN:
        raise ConfigError("--chat and -f - exclude each other: standard input has the turns")
    if text is not None and name is not None:
        raise ConfigError("-p and -f exclude each other")
    if text is not None:
        return argument_text(text, "-p")
    if name is not None:
        return read_text(name, "prompt")
    if arguments["chat"]:
        return None
    if is_demo:
        from ..task.problems import SAMPLE_PROBLEM

        return SAMPLE_PROBLEM.prompt
    if sys.stdin is None or sys.stdin.isatty():
        return None
    text = read_text(STDIN, "prompt")
    return text if text or not arguments["dry_run"] else None
