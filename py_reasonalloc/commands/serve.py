"""The command `reasonalloc-serve`: an OpenAI-compatible server.

Exit codes: 0 ended by Ctrl-C or SIGTERM; 1 the model failed; 2 wrong usage, or it cannot listen.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..engine.errors import ConfigError
from ..output.console import listen_options, run_command
from ..task.shipped import DEMO
from .run_options import budget_options, model_options
from .run_request import run_options

if TYPE_CHECKING:
    from ..run.options import RunOptions

#: Context of a text where the stock cache is asked for and --ctx is not: it is allocated whole.
STOCK_CTX = 4096
#: What the extra brings.
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model")
@listen_options(8000)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Texts decoded side by side, each in a cache of its own.",
)
@click.option(
    "--queue",
    "n_queue",
    type=click.IntRange(0, 100_000),
    default=64,
    show_default=True,
    help="Most texts that wait; then requests are refused with 429.",
)
@click.option(
    "--checkpoints",
    type=click.IntRange(0, 1 << 20),
    default=256,
    show_default=True,
    help="MiB of RAM for snapshots: a prompt that begins as an earlier one is not read anew.",
)
@click.option(
    "--api-key",
    envvar="REASONALLOC_API_KEY",
    help="What callers must send (Authorization: Bearer KEY); also from REASONALLOC_API_KEY.",
)
@click.option("--alias", help="Name of the model in answers.  [default: its file's]")
@click.option(
    "--max-body",
    type=click.IntRange(1024, 1 << 30),
    default=4 << 20,
    show_default=True,
    help="Most bytes of a request.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0.0, 3600.0),
    default=5.0,
    show_default=True,
    help="Seconds that running texts get at the end; then they are cut off.",
)
@budget_options
@model_options
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log.")
@click.version_option(__version__)
def main(**arguments: Any) -> int:
    """Serve MODEL, a GGUF file or "demo", to programs that speak to OpenAI.

    Requests are decoded side by side in one context, each inside the budget: the weights are read
    once per step for all of them. Chat and text completions, streaming, log-probabilities, JSON
    schemas and grammars: see docs/serving.md. Ctrl-C or SIGTERM end it.
    """
    for module in NEEDED:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed: pip install '.[serve]'")
    key = arguments["api_key"]
    if key is not None and (not key.strip() or not key.isascii()):
        raise ConfigError("--api-key must be ASCII text")
    is_demo = arguments["model"] == DEMO
    options = run_options(_filled(arguments), is_demo)
    if options.config is None and options.n_ctx == 0:
        options = dataclasses.replace(options, n_ctx=_stock_ctx(options))
    return _serve(options, arguments)


def _filled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with those of reasonalloc-run that a server has no use for."""
    from .run import main as run_main

    words = [arguments["model"]]
    given = run_main.make_context("reasonalloc-run", words, resilient_parsing=True)
    return {**given.params, **arguments}


def _stock_ctx(options: RunOptions) -> int:
    from ..engine.modelfile import open_vocabulary, trained_context

    with open_vocabulary(options.model, options.verbose) as model:
        return min(trained_context(model) or STOCK_CTX, STOCK_CTX)


def _serve(options: RunOptions, arguments: dict[str, Any]) -> int:
    from ..engine.log import LogCapture
    from ..run.allocation import settle
    from ..run.options import plan_run, session_arguments
    from ..serve.run import ServeOptions, serve
    from ..session.reason_llama import ReasonLlama

    n_parallel = arguments["parallel"]
    names = ("host", "port", "n_queue", "api_key", "max_body", "grace")
    serving = ServeOptions(
        name=arguments["alias"] or options.model.stem,
        checkpoints=arguments["checkpoints"] << 20,
        **{name: arguments[name] for name in names},
    )
    with LogCapture(forward=options.verbose, all_threads=True):
        plan = plan_run(options, None)
        options = settle(options, plan)
        n_ctx = plan.n_ctx * (n_parallel if options.config is None else 1)
        asked = session_arguments(options, plan, n_ctx) | {"n_seq_max": n_parallel}
        with ReasonLlama(**asked) as llama:
            serve(llama, serving, click.echo)
    return 0


def run(arguments: list[str] | None = None) -> None:
    """Entry point of `reasonalloc-serve`: never returns, never shows a traceback."""
    run_command(main, "reasonalloc-serve", arguments)


if __name__ == "__main__":
    run()
