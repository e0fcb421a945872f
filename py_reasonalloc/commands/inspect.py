"""The command `reasonalloc-inspect`: show what `reasonalloc-run --trace` wrote.

Exit codes: 0 done; 1 the file cannot be read or the plot not be made; 2 wrong usage.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..engine.errors import ConfigError
from ..output.console import run_command


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--layer", type=click.IntRange(min=0), help="Show this layer only.")
@click.option("--head", type=click.IntRange(min=0), help="Mark what this KV head of --layer holds.")
@click.option(
    "--at",
    type=click.IntRange(min=1),
    help="Mark the text after this compression, from 1.  [default: at the end]",
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    help="Draw everything into a .png or .svg file instead (needs matplotlib).",
)
@click.version_option(__version__)
def main(
    file: Path, layer: int | None, head: int | None, at: int | None, plot_file: Path | None
) -> None:
    """Show FILE, which reasonalloc-run --trace wrote.

    First what was run, then the budgets of layers and heads at every compression, then the text
    with the tokens marked that are still in the cache: by default shaded by the share of all heads
    that hold them.

    Colours are used in a terminal, unless NO_COLOR is set; else lines of shades.
    """
    from ..trace.plot import check_plot, plot
    from ..trace.read import read_trace
    from ..trace.view import chosen_heads, heat_map, marked_text, summary

    if head is not None and layer is None:
        raise ConfigError("--head needs --layer")
    if plot_file is not None:
        check_plot(plot_file)
    trace = read_trace(file)
    heads = chosen_heads(trace, layer, head)
    n_layer = trace.header.n_layer
    if layer is not None and layer >= n_layer:
        raise ConfigError(
            f"--layer {layer} is out of range: the trace has layers 0 to {n_layer - 1}"
        )
    if layer is not None and not heads:
        n_head = trace.header.n_head_kv[layer]
        raise ConfigError(f"--head {head} is out of range: layer {layer} has {n_head} KV heads")
    n = len(trace.compressions)
    if at is not None and at > n:
        raise ConfigError(f"--at {at} is out of range: the trace has {n} compressions")
    if plot_file is not None:
        plot(trace, plot_file)
        return
    style = _style()
    where = "at the end" if at is None else f"after compression {at}"
    title = f"text {where}"
    if layer is not None:
        title += f", layer {layer}" + ("" if head is None else f", head {head}")
    page = [
        *summary(trace),
        "",
        *heat_map(trace, style, layer),
        "",
        f"{title}:",
        *marked_text(trace, trace.snapshot(at), heads, style),
    ]
    sys.stdout.write("\n".join(page) + "\n")
    sys.stdout.flush()


def _style() -> Any:
    from ..trace.view import SHADES, Style

    is_terminal = sys.stdout.isatty()
    try:
        SHADES.encode(sys.stdout.encoding or "ascii")
        has_unicode = True
    except UnicodeEncodeError:
        has_unicode = False
    return Style(
        width=max(shutil.get_terminal_size((100, 24)).columns, 40),
        has_colour=is_terminal and not os.environ.get("NO_COLOR"),
        has_unicode=has_unicode,
    )


def run(arguments: list[str] | None = None) -> None:
    """Entry point of `reasonalloc-inspect`: never returns, shows no traceback for bad input."""
    run_command(main, "reasonalloc-inspect", arguments)


if __name__ == "__main__":
    run()
