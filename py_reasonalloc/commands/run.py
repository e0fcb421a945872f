"""The command `reasonalloc-run`: parsing, and turning errors into one line and an exit code.

Exit codes: 0 done; 1 the model, the file or the decode failed; 2 wrong usage; 130 stopped by Ctrl-C
(text and summary are printed all the same).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..engine.errors import ConfigError
from ..output.console import EXIT_INTERRUPTED, run_command
from ..task.shipped import DEMO
from .run_options import budget_options, model_options, prompt_options, sampling_options
from .run_request import prompt_text, run_options
from .run_samples import check_samples, run_samples, samples_options

if TYPE_CHECKING:
    from ..run.runner import RunOptions


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model", required=False)
@prompt_options
@budget_options
@model_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option(
    "--trace",
    metavar="FILE",
    help="Write what every compression kept to FILE, for reasonalloc-inspect.  (.gz: compressed)",
)
@click.option(
    "--save-state", metavar="FILE", help="Leave the chain in FILE, to be continued another day."
)
@click.option(
    "--load-state",
    metavar="FILE",
    help="Continue the chain that --save-state left, with the options that it was begun with.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Hold a conversation: lines typed, or from standard input; /help there lists commands.",
)
@click.option(
    "--watch",
    is_flag=True,
    help="Show budgets of layers and heads and what is evicted, on the terminal of standard error.",
)
@samples_options
@click.option("--dry-run", is_flag=True, help="Load no weights; print what the run would take.")
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log.")
@click.version_option(__version__)
def main(**arguments: Any) -> int:
    """Decode MODEL, a GGUF file, inside a fixed KV-cache budget.

    The prompt comes from -p, -f or standard input, and is the same by every way in: UTF-8, a
    byte-order mark dropped, line ends made LF, those at the end dropped. The model's chat template
    is applied if it has one. The text goes to standard output as it is decoded, a summary to
    standard error.

    MODEL may be "demo": the small model that comes with this package, on a sample problem.

    Ctrl-C ends the text, prints the summary and exits with 130; a second one exits at once.
    """
    is_demo = arguments["model"] == DEMO
    check_samples(arguments)
    if arguments["watch"]:
        _check_watch(arguments)
    options = run_options(arguments, is_demo)
    text = prompt_text(arguments, is_demo)
    if arguments["chat"] and not arguments["dry_run"]:
        if arguments["save_state"] or arguments["load_state"]:
            raise ConfigError("--chat keeps its conversations by /save and /load")
        from .run_chat import chat

        _warn(options)
        return chat(options, text, arguments["as_json"], arguments["watch"])
    _warn(options)
    if arguments["dry_run"]:
        return _dry_run(options, text, arguments["as_json"])
    if text is None and options.chain is None:
        raise ConfigError("no prompt: pass -p TEXT or -f FILE, or pipe it to standard input")
    if options.n_samples > 1 and text is not None:
        return run_samples(options, text, is_demo, arguments["vote"], arguments["as_json"])
    if arguments["watch"]:
        return _watch(options, text, arguments["as_json"])
    return _run(options, text, arguments["as_json"])


def _check_watch(arguments: dict[str, Any]) -> None:
    from .run_watch import check_watch

    if arguments["dry_run"]:
        raise ConfigError("--watch and --dry-run exclude each other")
    if arguments["chat"] and arguments["trace"]:
        raise ConfigError("--watch, --chat and --trace exclude each other: leave one out")
    check_watch(arguments["no_budget"])


def _warn(options: RunOptions) -> None:
    n_processors = os.cpu_count() or 1
    if options.n_threads > n_processors:
        click.echo(
            f"reasonalloc-run: {options.n_threads} threads on {n_processors} processors wait for "
            "each other: fewer are faster",
            err=True,
        )
    if options.use_mlock and sys.platform != "win32" and os.geteuid() != 0:
        import resource

        n_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if n_bytes != resource.RLIM_INFINITY and n_bytes < os.path.getsize(options.model):
            click.echo(
                f"reasonalloc-run: --mlock may keep {n_bytes} bytes in memory, fewer than the "
                "model has: ulimit -l",
                err=True,
            )


def _run(options: RunOptions, text: str | None, as_json: bool) -> int:
    from ..engine.log import LogCapture
    from ..run.runner import run

    write: Callable[[str], None] = (lambda piece: None) if as_json else _write
    with LogCapture(forward=options.verbose):
        report = run(options, text, write)
    if not as_json:
        _write("\n")
    return _end(options, report, as_json)


def _watch(options: RunOptions, text: str | None, as_json: bool) -> int:
    """As `_run`, with the cache on the terminal meanwhile."""
    from ..engine.log import LogCapture
    from ..run.runner import run
    from .run_watch import WatchScreen

    screen = WatchScreen(is_silent=as_json)
    try:
        with LogCapture(forward=options.verbose):
            report = run(options, text, screen.piece, screen.watcher)
        screen.end()
    finally:
        screen.close()
    return _end(options, report, as_json)


def _end(options: RunOptions, report: dict[str, Any], as_json: bool) -> int:
    """Print what there is to say about a text; returns the exit code."""
    from ..run.report import summary
    from ..session.generate import INTERRUPTED

    if as_json:
        _write(json.dumps(report, ensure_ascii=False) + "\n")
    else:
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
    fields["recommended_by"] = options.recommended_by
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
