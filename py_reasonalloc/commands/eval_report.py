"""The command `reasonalloc-eval report`: print what results files say."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from .. import __version__
from ..engine.errors import ConfigError


@click.command(
    "report",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    metavar="METHOD[@BUDGET]",
    help="What arms are compared with: at their own budget, or always the same arm."
    "  [default: rkv]",
)
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table to this file.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write all figures to this file.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw accuracy against budget and bytes into a .png, .svg or .pdf file (needs "
    "matplotlib).",
)
@click.option("--mix-versions", is_flag=True, help="FILES may be of several versions.")
@click.version_option(__version__)
def report_command(
    files: tuple[Path, ...],
    baseline: str | None,
    markdown: Path | None,
    csv: Path | None,
    plot: Path | None,
    mix_versions: bool,
) -> None:
    """Show accuracy, length and memory per method and budget.

    FILES are results of reasonalloc-eval; several must have been made with the same settings. A run
    that is under way can be looked at, too.
    """
    print_report(files, baseline, markdown, csv, plot, mix_versions)


def print_report(
    paths: Sequence[Path],
    baseline: str | None = None,
    markdown: Path | None = None,
    csv: Path | None = None,
    plot: Path | None = None,
    mix_versions: bool = False,
) -> None:
    """Print the table of results files, and write it where asked.

    Parameters
    ----------
    paths : sequence of Path
        At least one.
    baseline : str, optional
        See `make_report`.
    markdown, csv, plot : Path, optional
        Files to write.
    mix_versions : bool
        See `make_report`.

    Raises
    ------
    ConfigError
        See `read_results`, `make_report` and `save_plot`; or a file cannot be written.
    ReasonAllocError
        A results file is damaged.
    """
    from ..eval.results.file import read_results
    from ..eval.results.plot import save_plot
    from ..eval.results.report import make_report
    from ..eval.results.tables import csv_table, markdown_table, text_table
    from ..output.picture import check_picture

    for target in filter(None, (markdown, csv, plot)):
        if any(target.exists() and path.exists() and path.samefile(target) for path in paths):
            raise ConfigError(f"{target}: the report would replace the results")
    if plot is not None:
        check_picture(str(plot))
    results = [read_results(path, keep_texts=False) for path in paths]
    report = make_report(results, baseline, mix_versions)
    sys.stdout.write(text_table(report))
    sys.stdout.flush()
    if markdown is not None:
        write_text(markdown, markdown_table(report))
    if csv is not None:
        write_text(csv, csv_table(report))
    if plot is not None:
        save_plot(report, str(plot))


def write_text(path: Path, text: str) -> None:
    """Write a file; ConfigError if it cannot be."""
    try:
        with path.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None
