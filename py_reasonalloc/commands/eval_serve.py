"""The command `reasonalloc-eval serve`: a model for evaluations that run on another machine.

Exit codes: 1 the model; 2 wrong usage, or it cannot listen; 130 ended by Ctrl-C.
"""

from __future__ import annotations

import os

import click

from .. import __version__
from ..output.console import listen_options, open_library, threads_option


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model")
@listen_options(8080)
@threads_option(default="  [default: all]")
@click.option(
    "--gpu-layers", type=click.IntRange(min=-1), default=0, help="Layers to run on a GPU; -1: all."
)
@click.option(
    "--ctx",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Context of requests of other programs, at most as trained.",
)
@click.version_option(__version__)
def serve_command(
    model: str, host: str, port: int, threads: int | None, gpu_layers: int, ctx: int
) -> int:
    """Serve MODEL, a GGUF file, to evaluations on other machines (reasonalloc-eval --server FILE).

    The evaluation chooses the cache of every text. For other programs this is an OpenAI-compatible
    server with the full cache, one text at a time. There are no passwords: whoever can reach the
    port can use it. Ctrl-C ends it.
    """
    open_library()
    from ..engine.log import LogCapture
    from ..eval.remote.http_server import ModelServer
    from ..task.shipped import model_path

    path = model_path(model)
    n_threads = threads or os.cpu_count() or 1
    with (
        LogCapture(forward=False, all_threads=True),
        ModelServer(host, port, path, n_threads, gpu_layers, ctx) as server,
    ):
        click.echo(f"serving {path.name} at {server.url}")
        server.serve_forever()
    return 0
