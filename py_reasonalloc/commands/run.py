"""The command `reasonalloc-run`: parsing, and turning errors into one line and an exit code.

Exit codes: 0 done; 1 the model, the file or the decode failed; 2 wrong usage; 130 stopped by Ctrl-C
(text and summary are printed all the same).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..engine.errors import ConfigError
from ..output.console import EXIT_INTERRUPTED, run_command
from ..task.shipped import DEMO, DEMO_DEFAULTS, model_path

if TYPE_CHECKING:
    from ..run.runner import RunOptions


#: `--window`, where the budget has room for it: wider than the paper's 8, see docs/evidence.md.
DEFAULT_WINDOW = 16


def _list_policies(context: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if not is_wanted:
        return
    from ..session.config import policy_summaries

    for name, text in policy_summaries().items():
        click.echo(f"{name:<12} {text}")
    context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model")
@click.option("-p", "--prompt", help="What to ask.")
@click.option("-f", "--file", "prompt_file", type=click.Path(), help="Read the prompt from a file.")
@click.option("--raw", is_flag=True, help="Do not apply the model's chat template.")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=0),
    default=0,
    help="Most tokens to generate; 0 (default): until the model ends or its context does.",
)
@click.option("--budget", type=int, help="Tokens kept per layer and KV head.  [default: 256]")
@click.option(
    "--no-budget", is_flag=True, help="Use llama.cpp's own cache, which keeps everything."
)
@click.option("--policy", help="Rule by which tokens stay; see --list-policies.  [default: rkv]")
@click.option(
    "--list-policies",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_policies,
    help="Show the policies and exit.",
)
@click.option(
    "--layers",
    metavar="uniform|pyramid|wave|N,N,...",
    help="Split of the budget over layers.  [default: wave with a profile, else uniform]",
)
@click.option(
    "--heads",
    metavar="uniform|adaptive",
    help="Split of a layer's budget over its KV heads.  [default: adaptive]",
)
@click.option(
    "--profile",
    metavar="auto|none|calibrate|PATH",
    help="Layer profile: the one that fits, if any; none; one measured now, and kept; a file.  "
    "[default: auto]",
)
@click.option("--buffer", type=int, help="Tokens decoded between compressions.  [default: 128]")
@click.option("--sinks", type=int, help="First tokens that always stay.  [default: 4]")
@click.option(
    "--window",
    type=int,
    help="Newest tokens that always stay.  [default: 16; 8 to 15 with a budget below 64]",
)
@click.option(
    "--protect-prompt",
    metavar="auto|off|all|N",
    help="Prompt tokens that always stay; auto: up to (budget - sinks - window) / 2.  "
    "[default: auto]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A parameter of policy, allocators or attention, e.g. lambda=0.5; may be repeated.",
)
@click.option(
    "--kv-type",
    default="f16",
    show_default=True,
    help="Type of the cache: f32, f16, bf16, q8_0, q4_0.",
)
@click.option("--ctx", type=click.IntRange(min=1), help="Context in tokens.  [default: as trained]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option(
    "--gpu-layers", type=click.IntRange(min=-1), default=0, help="Layers to run on a GPU; -1: all."
)
@click.option("--temp", type=float, help="Temperature; 0: greedy.  [default: 0.6]")
@click.option(
    "--top-p",
    type=float,
    default=0.95,
    show_default=True,
    help="Nucleus sampling.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the sampling (and of the random policy).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option(
    "--trace",
    metavar="FILE",
    help="Write what every compression kept to FILE, for reasonalloc-inspect.  (.gz: compressed)",
)
@click.option("--dry-run", is_flag=True, help="Load no weights; print what the run would take.")
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log.")
@click.version_option(__version__)
def main(**arguments: Any) -> int:
    """Decode MODEL, a GGUF file, inside a fixed KV-cache budget.

    The prompt comes from -p, -f or standard input. The model's chat template is applied if it has
    one. The text goes to standard output as it is decoded, a summary to standard error.

    MODEL may be "demo": the small model that comes with this package, on a sample problem.

    Ctrl-C ends the text, prints the summary and exits with 130; a second one exits at once.
    """
    is_demo = arguments["model"] == DEMO
    options = _options(arguments, is_demo)
    text = _prompt(arguments, is_demo)
    if arguments["dry_run"]:
        return _dry_run(options, text, arguments["as_json"])
    if text is None:
        raise ConfigError("no prompt: pass -p TEXT or -f FILE, or pipe it to standard input")
    return _run(options, text, arguments["as_json"])


def _options(arguments: dict[str, Any], is_demo: bool) -> RunOptions:
    from ..engine.library import load_library

    load_library()  # before anything else needs llama_cpp: its errors say what to do
    from ..run.runner import RunOptions
    from ..session.centres import needs_centres
    from ..session.config import BudgetConfig
    from ..session.generate import Sampling

    defaults = DEMO_DEFAULTS if is_demo else {}

    def chosen(name: str) -> Any:
        return defaults.get(name) if arguments[name] is None else arguments[name]

    direct = ("budget", "policy", "buffer", "sinks", "window", "protect_prompt")
    given = {name: chosen(name) for name in direct if chosen(name) is not None}
    names = (*direct, "layers", "heads", "profile")
    config, profile, by_profile = None, None, True
    if not arguments["no_budget"]:
        profile = _allocation(arguments, given)
        given |= _settings(arguments["settings"])
        given["protect_prompt"] = _protect_prompt(given.get("protect_prompt", "auto"))
        budget = given.get("budget", BudgetConfig.budget)
        given.setdefault("window", max(BudgetConfig.window, min(DEFAULT_WINDOW, budget // 4)))
        config = BudgetConfig(**given, policy_seed=arguments["seed"])
        if profile is None and needs_centres(config.policy) and arguments["profile"] != "none":
            profile, by_profile = arguments["profile"] or "auto", False
    elif arguments["settings"]:
        raise ConfigError("--no-budget and --set exclude each other")
    elif any(arguments[name] is not None for name in names):
        first = next(name for name in names if arguments[name] is not None)
        raise ConfigError(f"--no-budget and --{first.replace('_', '-')} exclude each other")
    temp = chosen("temp")
    return RunOptions(
        model=model_path(arguments["model"]),
        config=config,
        profile=profile,
        by_profile=by_profile,
        needs_profile=arguments["layers"] == "wave",
        kv_type=arguments["kv_type"],
        n_ctx=arguments["ctx"] or 0,
        max_tokens=arguments["max_tokens"],
        n_threads=arguments["threads"] or 0,
        n_gpu_layers=arguments["gpu_layers"],
        sampling=Sampling(
            temp=Sampling.temp if temp is None else temp,
            top_p=arguments["top_p"],
            seed=arguments["seed"],
        ),
        raw=arguments["raw"],
        trace=_trace(arguments),
        verbose=arguments["verbose"],
    )


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `BudgetConfig` that --set names."""
    from ..session.config import read_option

    return dict(read_option(*pair.partition("=")[::2]) for pair in pairs)


def _allocation(arguments: dict[str, Any], given: dict[str, Any]) -> str | None:
    """Fill in how the budget is split; returns RunOptions.profile.

    An explicit --layers other than wave wins over any profile.
    """
    layers, profile = arguments["layers"], arguments["profile"] or "auto"
    given["heads"] = arguments["heads"] or "adaptive"
    if layers is None or layers == "wave":
        if profile != "none":
            return str(profile)
        if layers == "wave":
            raise ConfigError("--layers wave and --profile none exclude each other")
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

    inputs = (arguments["model"], arguments["prompt_file"])
    return check_target(name, [Path(file) for file in inputs if file is not None])


def _protect_prompt(value: str) -> str | int:
    try:
        return int(value)
    except ValueError:
        return value


def _prompt(arguments: dict[str, Any], is_demo: bool) -> str | None:
    """Return the prompt's text, or None if there is none."""
    text, name = arguments["prompt"], arguments["prompt_file"]
    if text is not None and name is not None:
        raise ConfigError("-p and -f exclude each other")
    if text is not None:
        return str(text)
    try:
        if name is not None:
            return Path(name).read_text(encoding="utf-8")
        if is_demo:
            from ..task.problems import SAMPLE_PROBLEM

            return SAMPLE_PROBLEM.prompt
        if sys.stdin is None or sys.stdin.isatty():
            return None
        text = sys.stdin.buffer.read().decode("utf-8")
        return text if text or not arguments["dry_run"] else None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name or 'standard input'}: the prompt is not UTF-8 text") from None


def _run(options: RunOptions, text: str, as_json: bool) -> int:
    from ..engine.log import LogCapture
    from ..run.report import summary
    from ..run.runner import run
    from ..session.generate import INTERRUPTED

    write: Callable[[str], None] = (lambda piece: None) if as_json else _write
    with LogCapture(forward=options.verbose):
        report = run(options, text, write)
    if as_json:
        _write(json.dumps(report, ensure_ascii=False) + "\n")
    else:
        _write("\n")
        asked = options.profile if options.by_profile else None
        click.echo(summary(report, asked), err=True)
    return EXIT_INTERRUPTED if report["stop_reason"] == INTERRUPTED else 0


def _dry_run(options: RunOptions, text: str | None, as_json: bool) -> int:
    from dataclasses import asdict

    from ..engine.log import LogCapture
    from ..run.allocation import allocation, settle
    from ..run.dryrun import dry_run
    from ..run.report import dry_run_table
    from ..run.runner import plan_run

    with LogCapture(forward=options.verbose):
        plan = plan_run(options, text)
        asked = options.profile if options.by_profile else None
        options = settle(options, plan)
        result = dry_run(options, plan)
    fields = asdict(result) | allocation(options.config)
    _write((json.dumps(fields) if as_json else dry_run_table(result, options, asked)) + "\n")
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def run(arguments: list[str] | None = None) -> None:
    """Entry point of `reasonalloc-run`: never returns, never shows a traceback for bad input."""
    run_command(main, "reasonalloc-run", arguments)


if __name__ == "__main__":
    run()
