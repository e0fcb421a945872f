"""The command `reasonalloc-profile`: measure a model's layer profile, show one, or compare two.

Exit codes: 0 done; 1 the model, the file or the decode failed; 2 wrong usage; 130 stopped by Ctrl-C
(nothing is written).
"""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..engine.errors import ConfigError
from ..engine.usertext import path_text
from ..output.console import EXIT_FAILURE, open_library, run_command, threads_option
from ..task.shipped import DEMO, DEMO_DEFAULTS, model_path

if TYPE_CHECKING:
    from ..profile.files import Profile


#: What --recommend compares unless something else is asked for: what runs by default, with error
#: curves and without.
RECOMMEND_METHODS = "rkv,rkv+kv=q8_0"
RECOMMEND_BY_CURVES = "loss-error,loss-error+kv=q8_0"
RECOMMEND_BUDGETS = "64,96,128,192,256,384"
RECOMMEND_KL = 0.1


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model", required=False)
@click.option("-o", "--output", type=click.Path(), help="Profile to write.")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(),
    help="File of probe prompts, UTF-8, one per line, at most 8; -: standard input.",
)
@click.option(
    "--steps", type=int, default=512, show_default=True, help="Most tokens to decode per prompt."
)
@click.option(
    "--rho", type=float, default=0.93, show_default=True, help="Share of the attention to cover."
)
@click.option(
    "--horizon",
    type=int,
    default=0,
    show_default=True,
    help="Sum the attention over so many steps, then count; 0: count each step, as in the paper.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--temp", type=float, default=0.6, show_default=True, help="Temperature; 0: greedy.")
@click.option("--raw", is_flag=True, help="Do not apply the model's chat template.")
@threads_option()
@click.option(
    "--gpu-layers", type=click.IntRange(min=-1), default=0, help="Layers to run on a GPU; -1: all."
)
@click.option(
    "--curves/--no-curves",
    default=None,
    help="Measure the error curves of the KV heads, too.  [default: where attention allows it]",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Plain text to measure error curves on besides the chains of thought; may be repeated.",
)
@click.option(
    "--buffer",
    type=int,
    help="Tokens between compressions, of error curves and --recommend.  [default: 128; demo: 16]",
)
@click.option("--cache", is_flag=True, help="Keep the profile for reasonalloc-run, too.")
@click.option(
    "--recommend",
    is_flag=True,
    help="Find the smallest cache that keeps the model's own text close to the full cache's, too, "
    "and write it into the profile: reasonalloc-run --budget auto takes it.",
)
@click.option(
    "--target-kl",
    type=float,
    metavar="NATS",
    help="With --recommend: how close, see reasonalloc-eval fidelity.  [default: 0.1]",
)
@click.option(
    "--methods",
    help=f"With --recommend: what to compare.  [default: {RECOMMEND_METHODS}; with error curves "
    f"{RECOMMEND_BY_CURVES}, too]",
)
@click.option("--budgets", help=f"With --recommend.  [default: {RECOMMEND_BUDGETS}]")
@click.option("--window", type=int, help="With --recommend.  [default: 16]")
@click.option("--plot", metavar="FILE", help="Draw it into a .png, .svg or .pdf (matplotlib).")
@click.option(
    "--compare",
    nargs=2,
    metavar="A.json B.json",
    help="Show how alike two profiles are; --plot draws both.",
)
@click.option("--show", metavar="A.json", help="Show a profile; --plot draws it.")
@click.option(
    "--budget",
    type=int,
    default=256,
    show_default=True,
    help="Tokens per KV head of the split by error curves that is shown.",
)
@click.option(
    "--protect", type=int, default=0, show_default=True, help="Protected tokens of that split."
)
@click.version_option(__version__)
def main(**arguments: Any) -> int:
    """Measure how many cached tokens each layer of MODEL, a GGUF file, needs while it reasons.

    The model decodes its own chain of thought on a few probe prompts (maths; "demo", the model
    that comes with this package, gets the problems it knows) with the full cache. The profile is
    written to -o and drawn. It makes `reasonalloc-run` give every layer the share it needs.

    Error curves say how much each KV head's output errs, by the number of tokens that it keeps:
    `reasonalloc-run --layers error` splits the budget over all heads by them.
    """
    if arguments["plot"]:
        from ..output.picture import check_picture

        check_picture(arguments["plot"])
    for name in ("target_kl", "methods", "budgets", "window"):
        if arguments[name] is not None and not arguments["recommend"]:
            raise ConfigError(f"--{name.replace('_', '-')} goes with --recommend")
    if arguments["show"]:
        if arguments["model"] is not None or arguments["output"] is not None:
            raise ConfigError("--show takes a profile, no model and no -o")
        _show(arguments)
        return 0
    if arguments["compare"]:
        if arguments["model"] is not None or arguments["output"] is not None:
            raise ConfigError("--compare takes two profiles, no model and no -o")
        _compare(arguments["compare"], arguments["plot"])
        return 0
    if arguments["model"] is None:
        raise ConfigError("no model: pass a GGUF file, or demo")
    if arguments["output"] is None and not arguments["cache"]:
        raise ConfigError("nowhere to write the profile to: pass -o FILE or --cache")
    return _calibrate(arguments)


def _calibrate(arguments: dict[str, Any]) -> int:
    open_library()
    from ..engine.identity import read_identity
    from ..engine.usertext import read_text
    from ..profile.lookup import save_to_cache
    from ..profile.plot import save_picture, terminal_plot
    from ..run.calibrate import Settings, measure
    from ..run.probes import default_prompts, read_prompts
    from ..run.streams import NoCurvesError
    from ..session.generate import Sampling

    settings = Settings(
        steps=arguments["steps"],
        rho=arguments["rho"],
        horizon=arguments["horizon"],
        sampling=Sampling(temp=arguments["temp"], seed=arguments["seed"]),
        n_threads=arguments["threads"] or 0,
        n_gpu_layers=arguments["gpu_layers"],
        raw=arguments["raw"],
        curves=arguments["curves"] is not False,
        buffer=_buffer(arguments),
    )
    if arguments["texts"] and not settings.curves:
        raise ConfigError("--text and --no-curves exclude each other")
    model = model_path(arguments["model"])
    output = arguments["output"]
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"{output}: cannot be written: its folder does not exist")
    identity = read_identity(model)
    if arguments["prompt_file"] is None:
        prompts = default_prompts(identity, settings.sampling.seed)
    else:
        prompts = read_prompts(arguments["prompt_file"])
    if arguments["recommend"]:
        from ..fidelity.recommend import check_target

        check_target(_target(arguments))
    name = identity.families[0] if output is None else path_text(Path(output).stem)
    texts = [read_text(path, "text") for path in arguments["texts"]]
    try:
        profile = measure(model, prompts, settings, name, _command(arguments), texts)
    except NoCurvesError as error:  # raised by the first prompt: little is lost
        if arguments["curves"] is not None or texts:
            raise
        click.echo(f"no error curves: {str(error).split(':')[0]}", err=True)
        arguments["curves"], settings = False, replace(settings, curves=False)
        profile = measure(model, prompts, settings, name, _command(arguments), texts)
    is_missing = False
    if arguments["recommend"]:
        profile = _recommend(arguments, profile)
        is_missing = profile.recommendation is None
    if output is not None:
        profile.save(output)
    if arguments["cache"]:
        save_to_cache(profile, identity)
    if settings.curves and profile.head_error is None:
        click.echo(
            f"no error curves: no text was longer than {4 * settings.buffer} tokens "
            "(--steps, --text, --buffer)",
            err=True,
        )
    click.echo(terminal_plot(profile))
    if arguments["plot"]:
        save_picture([profile], arguments["plot"])
    return EXIT_FAILURE if is_missing else 0


def _target(arguments: dict[str, Any]) -> float:
    return RECOMMEND_KL if arguments["target_kl"] is None else float(arguments["target_kl"])


def _recommend(arguments: dict[str, Any], profile: Profile) -> Profile:
    """Return the profile with the smallest cache that is close enough, if there is one."""
    from .eval_fidelity import recommend_for

    methods = RECOMMEND_METHODS
    if profile.head_error is not None:
        methods = f"{RECOMMEND_BY_CURVES},{methods}"
    options = [
        f"--methods={arguments['methods'] or methods}",
        f"--budgets={arguments['budgets'] or RECOMMEND_BUDGETS}",
        f"--own-tokens={arguments['steps']}",
        f"--seed={arguments['seed']}",
        f"--temp={arguments['temp']}",
        f"--gpu-layers={arguments['gpu_layers']}",
    ]
    for option, name in (("prompts", "prompt_file"), ("threads", "threads")):
        if arguments[name] is not None:
            options.append(f"--{option}={arguments[name]}")
    for name in ("buffer", "window"):
        if arguments[name] is not None:
            options.append(f"--{name}={arguments[name]}")
    options += ["--raw"] if arguments["raw"] else []
    found = recommend_for(
        arguments["model"], profile, options, _target(arguments), _command(arguments)
    )
    return replace(profile, recommendation=found)


def _buffer(arguments: dict[str, Any]) -> int:
    if arguments["buffer"] is not None:
        return int(arguments["buffer"])
    return int(str(DEMO_DEFAULTS["buffer"])) if arguments["model"] == DEMO else 128


def _show(arguments: dict[str, Any]) -> None:
    from ..profile.files import load_profile
    from ..profile.plot import budget_lines, save_picture, terminal_plot
    from ..session.config import BudgetConfig
    from ..session.profiled import head_budgets

    profile = load_profile(arguments["show"])
    click.echo(terminal_plot(profile))
    budgets = None
    if profile.head_error is not None:
        curves = profile.head_error
        config = BudgetConfig(
            budget=arguments["budget"],
            policy=curves.policy,
            window=max(curves.base - BudgetConfig.sinks, 1),
            protect_prompt=arguments["protect"] or "off",
            layers="error",
            profile=profile,
        )
        budgets = head_budgets(config, profile.n_head_kv, profile.n_layer)
        click.echo(budget_lines(budgets, arguments["budget"], arguments["protect"]))
    if arguments["plot"]:
        save_picture([profile], arguments["plot"], budgets)


def _command(arguments: dict[str, Any]) -> str:
    """Return the command that measures this profile, file names without their folders."""
    words = ["reasonalloc-profile", path_text(Path(arguments["model"]).name)]
    for option, name in (("-o", "output"), ("--prompts", "prompt_file")):
        if arguments[name] is not None:
            words += [option, path_text(Path(arguments[name]).name)]
    words += [f"--{name}={arguments[name]}" for name in ("steps", "rho", "seed", "temp")]
    if arguments["horizon"] > 0:
        words.append(f"--horizon={arguments['horizon']}")
    if arguments["curves"] is not False:
        words.append(f"--buffer={_buffer(arguments)}")
        words += [f"--text={Path(text).name}" for text in arguments["texts"]]
    else:
        words.append("--no-curves")
    if arguments["recommend"]:
        words += ["--recommend", f"--target-kl={_target(arguments):g}"]
        for name in ("methods", "budgets", "window"):
            if arguments[name] is not None:
                words.append(f"--{name}={arguments[name]}")
    return shlex.join([*words, *(["--raw"] if arguments["raw"] else [])])[:1000]


def _compare(paths: tuple[str, str], picture: str | None) -> None:
    from ..profile.files import compare, load_profile
    from ..profile.plot import save_picture, terminal_plot

    profiles = [load_profile(path) for path in paths]
    likeness = compare(profiles[0], profiles[1])
    for profile in profiles:
        click.echo(terminal_plot(profile))
    rank = likeness.rank_correlation
    shown = "undefined (a flat curve)" if math.isnan(rank) else f"{rank:.3f} (1: the same order)"
    click.echo(f"rank correlation   {shown}")
    click.echo(f"L1 of the shares   {likeness.l1:.3f} (0: the same shape, 2: disjoint)")
    if picture:
        save_picture(profiles, picture)


def run(arguments: list[str] | None = None) -> None:
    """Entry point of `reasonalloc-profile`: never returns, shows no traceback for bad input."""
    run_command(main, "reasonalloc-profile", arguments)


if __name__ == "__main__":
    run()
