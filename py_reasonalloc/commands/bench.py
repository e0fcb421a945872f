"""The command `reasonalloc-bench`: parsing, progress, and what is written where.

Exit codes: 0 done; 1 the model, a file or every measurement failed; 2 wrong usage; 130 stopped by
Ctrl-C (what was measured by then is reported all the same).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..bench.shapes import SHAPES, check_shape_name
from ..engine.errors import ComputeError, ConfigError
from ..output.console import EXIT_INTERRUPTED, open_library, run_command, threads_option

if TYPE_CHECKING:
    from ..bench.measure import Row, Settings

#: What --quick changes where nothing else is asked for.
_QUICK = {"depths": "512,2048", "budgets": "256", "stock": "f16", "prompts": "512", "repeat": 1}
_DEFAULTS = {
    "depths": "512,2048,8192,16384,32768",
    "budgets": "128,256,512,1024",
    "stock": "f16,q8_0,q4_0",
    "prompts": "512,2048",
    "repeat": 3,
}
_MAX_TOKENS = 1 << 20


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--shape", required=True, metavar="NAME|FILE", help=f"{', '.join(SHAPES)}, or a .gguf file."
)
@click.option(
    "--weights",
    type=click.Choice(["q4_0", "q8_0", "q4_k_m", "f16"]),
    help="Type of the random weights.  [default: q4_0]",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="So many of the shape's layers, where memory does not hold all.  [default: all]",
)
@click.option(
    "--depths", metavar="N,N,...", help=f"Tokens decoded before.  [default: {_DEFAULTS['depths']}]"
)
@click.option(
    "--budgets",
    metavar="N,N,...|none",
    help=f"Tokens kept per KV head.  [default: {_DEFAULTS['budgets']}]",
)
@click.option(
    "--stock",
    metavar="TYPE,...",
    help="Types of the stock caches; the first is what all is compared with.  "
    f"[default: {_DEFAULTS['stock']}]",
)
@click.option(
    "--kv-type", default="f16", show_default=True, help="Type of the budgeted caches' K and V."
)
@click.option(
    "--splits",
    default="even",
    show_default=True,
    metavar="even,uneven",
    help="How budgets are split: the same everywhere; layers along a wave and adaptive heads.",
)
@click.option(
    "--attention",
    default="auto",
    show_default=True,
    metavar="auto,head,layer",
    help="Over heads that differ: one operation per KV head, or one masked operation per layer.",
)
@click.option("--policy", default="rkv", show_default=True, help="Of the budgeted caches.")
@click.option("--buffer", type=int, default=128, show_default=True, help="Between compressions.")
@click.option(
    "--buffers",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="Whole buffers to time in a budgeted cache (a stock cache: one).",
)
@click.option(
    "--prompts",
    metavar="N,N,...|none",
    help=f"Lengths of prompts to read.  [default: {_DEFAULTS['prompts']}]",
)
@click.option(
    "--parallel",
    metavar="N,N,...",
    help="Also decode so many sequences side by side in one context, e.g. 1,2,4,8.",
)
@click.option(
    "--parallel-depth",
    type=click.IntRange(1, _MAX_TOKENS),
    default=4096,
    show_default=True,
    help="Tokens that each sequence of a stock cache then has.",
)
@click.option("--repeat", type=click.IntRange(1, 100), help="Repetitions.  [default: 3]")
@threads_option(default="  [default: all]")
@click.option(
    "--gpu-layers", type=click.IntRange(min=-1), default=0, help="Layers to run on a GPU; -1: all."
)
@click.option(
    "--decode-all",
    is_flag=True,
    help="Let budgeted caches decode every token up to a depth.  (minutes each)",
)
@click.option(
    "--llama-bench", metavar="FILE", help="Also run this llama-bench on the same model file."
)
@click.option(
    "--llama-bench-depth",
    type=click.IntRange(0, _MAX_TOKENS),
    default=2048,
    show_default=True,
    help="Deepest depth for it: it decodes every token up to there.",
)
@click.option(
    "--unpatched", metavar="FOLDER", help="Also measure the llama.cpp libraries in this folder."
)
@click.option(
    "--parts",
    metavar="PART,...",
    help="Measure only some of: decode, memory, turns, prompt, load, parallel.  [default: all]",
)
@click.option("--json", "json_file", metavar="FILE", help="Write everything as JSON.")
@click.option("--plot", metavar="FILE", help="Draw tokens/s by depth: .png, .svg or .pdf.")
@click.option("--markdown", metavar="FILE", help="Write the report that is printed.")
@click.option("--quick", is_flag=True, help="Two depths, one budget, one repetition.")
@click.version_option(__version__)
def main(**arguments: Any) -> int:
    """Measure speed and memory of budgeted caches against the stock cache.

    Needs no weights: a random model of a well-known shape is made in the cache folder
    (REASONALLOC_CACHE_DIR moves it). Each measurement runs in its own process; progress goes to
    standard error, the report to standard output.
    """
    check_shape_name(arguments["shape"])
    for name in ("json_file", "markdown", "plot"):
        _check_target(arguments[name])
    if arguments["plot"]:
        from ..output.picture import check_picture

        check_picture(arguments["plot"])
    settings = _settings(arguments)
    return _run(arguments, settings)


def _check_target(name: str | None) -> None:
    if name is not None and not Path(name).absolute().parent.is_dir():
        raise ConfigError(f"{name}: cannot be written: its folder does not exist")


def _numbers(name: str, text: str, low: int) -> tuple[int, ...]:
    """Return a list of numbers, ascending, each once; () for "none"."""
    if text == "none":
        return ()
    try:
        values = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise ConfigError(f"--{name} {text!r} is not a list of numbers such as 512,2048") from None
    if not low <= values[0] <= values[-1] <= _MAX_TOKENS:
        raise ConfigError(f"--{name} {text}: every number must be {low} to {_MAX_TOKENS}")
    return tuple(values)


def _settings(arguments: dict[str, Any]) -> Settings:
    """Return what to measure; writes the model if it is not there yet."""
    open_library()
    from ..bench.llama_bench import check_binary
    from ..bench.measure import PARTS, SPLITS, Settings, budget_arms
    from ..bench.models import open_model
    from ..session.config import BudgetConfig, kv_type_id

    def chosen(name: str) -> Any:
        value = arguments[name]
        if value is None:
            return (_QUICK if arguments["quick"] else _DEFAULTS)[name]
        return value

    depths = _numbers("depths", chosen("depths"), 0)
    if not depths:
        raise ConfigError("--depths none: there must be one")
    stock = tuple(dict.fromkeys(chosen("stock").split(",")))
    for kind in (*stock, arguments["kv_type"]):
        kv_type_id(kind)
    splits = tuple(dict.fromkeys(arguments["splits"].split(",")))
    for split in splits:
        if split not in SPLITS:
            raise ConfigError(f"--splits {split!r} is unknown: must be one of {', '.join(SPLITS)}")
    parts = PARTS if arguments["parts"] is None else tuple(arguments["parts"].split(","))
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"--parts {part!r} is unknown: must be of {', '.join(PARTS)}")
    unpatched, bench = arguments["unpatched"], arguments["llama_bench"]
    if unpatched is not None and not Path(unpatched).is_dir():
        raise ConfigError(f"--unpatched {unpatched}: no such folder")
    parallel = _parallel(arguments, parts)
    options: dict[str, Any] = {
        "parallel": parallel,
        "parallel_depth": arguments["parallel_depth"],
        "depths": depths,
        "budgets": _numbers("budgets", chosen("budgets"), 1),
        "stock_types": stock,
        "kv_type": arguments["kv_type"],
        "splits": splits,
        "attention": tuple(dict.fromkeys(arguments["attention"].split(","))),
        "policy": arguments["policy"],
        "buffer": arguments["buffer"],
        "n_buffers": arguments["buffers"],
        "prompts": _numbers("prompts", chosen("prompts"), 1),
        "parts": parts,
        "repeat": chosen("repeat"),
        "n_threads": arguments["threads"] or _n_processors(),
        "n_gpu_layers": arguments["gpu_layers"],
        "is_decoded": arguments["decode_all"],
        "unpatched": None if unpatched is None else Path(unpatched).resolve(),
        "llama_bench": None if bench is None else check_binary(bench),
        "llama_bench_depth": arguments["llama_bench_depth"],
    }
    # before a large file is written: what can be refused without it
    budget_arms(Settings(model=Path(), **{**options, "splits": ("even",)}))
    for attention in options["attention"]:
        BudgetConfig(attention=attention)
    settings = Settings(
        model=open_model(arguments["shape"], arguments["weights"], arguments["layers"]), **options
    )
    budget_arms(settings)
    return settings


def _parallel(arguments: dict[str, Any], parts: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of sequences, ascending; () for none."""
    from ..bench.measure import PARALLEL

    text = arguments["parallel"]
    if text is None:
        if arguments["parts"] is not None and PARALLEL in parts:
            raise ConfigError(f"--parts {PARALLEL} needs --parallel N,N,..., e.g. 1,2,4,8")
        return ()
    if PARALLEL not in parts:
        raise ConfigError(f"--parallel: --parts leaves {PARALLEL} out")
    from llama_cpp import llama_cpp as bindings

    numbers = _numbers("parallel", text, 1)
    most = int(bindings.llama_max_parallel_sequences())
    if not numbers or numbers[-1] > most:
        raise ConfigError(f"--parallel {text}: every number must be 1 to {most}")
    return numbers


def _n_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(arguments: dict[str, Any], settings: Settings) -> int:
    from ..bench.measure import measure, plan, plan_turns
    from ..bench.models import DEFAULT_WEIGHTS
    from ..bench.parallel import measure_group, plan_parallel
    from ..bench.report import build, markdown

    weights = None if arguments["shape"] not in SHAPES else arguments["weights"] or DEFAULT_WEIGHTS
    shape = Path(arguments["shape"]).name
    if arguments["layers"] is not None:
        shape += f", {arguments['layers']} of its {SHAPES[shape].n_layer} layers"
    rows: list[Row] = []
    is_interrupted = False
    others = [
        partial(measure_group, group, settings.n_buffers, settings.buffer)
        for group in plan_parallel(settings)
    ]
    n_jobs = len(plan(settings)) + len(plan_turns(settings)) + len(others)
    n_jobs += settings.llama_bench is not None
    n_jobs *= settings.repeat
    bar = click.progressbar(length=n_jobs, label="measuring", file=sys.stderr)
    with bar as progress:
        try:
            measure(settings, rows, lambda: progress.update(1), others)
        except KeyboardInterrupt:
            is_interrupted = True
    if all("error" in row for row in rows):
        if is_interrupted:
            return EXIT_INTERRUPTED
        raise ComputeError(f"nothing could be measured: {rows[0]['error']}")
    report = build(rows, settings, shape, weights, _command(arguments))
    text = markdown(report)
    click.echo(text, nl=False)
    if arguments["markdown"] is not None:
        _write(arguments["markdown"], text)
    if arguments["json_file"] is not None:
        _write(arguments["json_file"], json.dumps(report, indent=1, allow_nan=False) + "\n")
    if arguments["plot"] is not None:
        from ..bench.plot import save_picture

        title = shape if weights is None else f"{shape}, {weights}"
        save_picture(report["summary"]["decode"], title, arguments["plot"])
    return EXIT_INTERRUPTED if is_interrupted else 0


def _command(arguments: dict[str, Any]) -> str:
    """Return the command line, without files that it writes and without folders."""
    words = ["reasonalloc-bench", "--shape", Path(arguments["shape"]).name]
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif name in ("llama_bench", "unpatched") and value is not None:
            words += [option, Path(value).name]
        elif name == "parallel_depth" and arguments["parallel"] is None:
            continue
        elif name not in ("shape", "json_file", "plot", "markdown") and value not in (None, False):
            words += [option, str(value)]
    return shlex.join(words)


def _write(name: str, text: str) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name}: cannot be written: {error.strerror}") from None


def run(arguments: list[str] | None = None) -> None:
    """Entry point of `reasonalloc-bench`: never returns, shows no traceback for bad input."""
    run_command(main, "reasonalloc-bench", arguments)


if __name__ == "__main__":
    run()
