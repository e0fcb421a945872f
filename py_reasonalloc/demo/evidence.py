"""The demo reasoner's evidence, from one command: ``python -m py_reasonalloc.demo.evidence``.

Comparisons on fresh problems: today's defaults beside other scores; the paper's settings at every
budget; what each part of the method gives; the methods with a wider window; without prompt
protection; cache types at equal bytes. Each is a results file of `reasonalloc-eval`, NAME.jsonl,
and made of it NAME.jsonl.gz, tables (NAME.md and NAME.csv), a plot and the section that
docs/evidence.md shows, NAME-section.md. And what
`demo.autopsy` finds: autopsy.json and autopsy.md. A run that was stopped goes on with the same
command.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Union

import click

from .. import __version__
from ..commands.eval import main as evaluate
from ..engine.errors import ConfigError
from ..engine.identity import read_identity
from ..eval.results.file import read_results
from ..eval.results.plot import save_plot
from ..eval.results.report import make_report
from ..eval.results.tables import csv_table, markdown_table
from ..output.console import run_command
from ..output.picture import check_picture
from ..profile.files import profiles_folder
from ..task.shipped import DEMO_MODEL
from .autopsy import BUFFER, dissect, text_of
from .evidence_tables import autopsy_table, bytes_table, check_page, fill, matrix, write_whole

BUDGETS = (128, 160, 200, 256)
METHODS = (
    "full",
    "streaming",
    "random",
    "snapkv",
    "h2o",
    "rkv",
    "pyramid-rkv",
    "wave",
    "adaptive",
    "reasonalloc",
)
#: Where parts are taken apart: a budget at which most fail, and one at which most work.
PART_BUDGETS = (160, 200)
#: The same model's profile with a horizon of 128 steps.
HORIZON = "profile=demo-reasoner-horizon"
PARTS = (
    "rkv",
    "rkv+lambda=0.5",
    "rkv+lambda=0.9",
    "rkv-ema",
    "rkv+value_guard=2",
    "rkv+window=16",
    "rkv+window=24",
    "rkv+lambda=0.5+window=16",
    "rkv+buffer=32",
    "random",
    "wave",
    f"wave+{HORIZON}",
    "adaptive",
    "reasonalloc",
    f"reasonalloc+{HORIZON}",
    "adaptive+lambda=0.5",
    "wave+lambda=0.5",
    f"wave+{HORIZON}+lambda=0.5",
    f"reasonalloc+{HORIZON}+lambda=0.5",
    f"reasonalloc+{HORIZON}+lambda=0.5+window=16",
)
#: With the window that keeps the line in progress.
WIDE = "window=16"
WIDE_BUDGETS = (128, 160, 200)
WIDE_METHODS = (
    f"random+{WIDE}",
    f"snapkv+{WIDE}",
    f"rkv+{WIDE}",
    f"pyramid-rkv+{WIDE}",
    f"wave+{WIDE}",
    f"wave+{HORIZON}+{WIDE}",
    f"adaptive+{WIDE}",
    f"reasonalloc+{WIDE}",
    f"reasonalloc+{HORIZON}+{WIDE}",
    f"reasonalloc+{HORIZON}+{WIDE}+lambda=0.5",
)
#: Today's settings: the window of `reasonalloc-run`, error curves for layers and heads, merging.
DEFAULT_BUDGETS = (96, 128, 160, 200, 256)
DEFAULT_METHODS = tuple(
    f"{name}+{WIDE}"
    for name in (
        *("streaming", "random", "snapkv", "h2o", "keydiff", "rkv", "pyramid-rkv", "loss"),
        "rkv+layers=error",
        "loss-error",
    )
)
UNPROTECTED = ("random", "rkv", "snapkv", "reasonalloc")
#: Cache type -> bytes of one element, block scales included.
ELEMENT_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
#: f16 budgets whose bytes the quantised caches get.
BYTE_BUDGETS = (96, 128, 160)
AUTOPSY_ARMS = (
    "rkv@160",
    "random@160",
    "wave@160",
    f"wave+{HORIZON}@160",
    "rkv+lambda=0.5@160",
)
AUTOPSY_PROBLEMS = 60


def equal_bytes(budgets: Sequence[int], method: str = "rkv") -> list[str]:
    """Return arms of all cache types whose segments (budget + buffer) have the same bytes."""
    arms = []
    for budget in budgets:
        for kind, size in ELEMENT_BYTES.items():
            n_tokens = int((budget + BUFFER) * ELEMENT_BYTES["f16"] / size) - BUFFER
            arms.append(f"{method}+kv={kind}@{n_tokens}")
    return arms


class Comparison(NamedTuple):
    """One results file.

    Attributes
    ----------
    limit : int
        Problems.
    methods, options
        Of `reasonalloc-eval`.
    baseline : str or None
        What differences are to; None: uniform R-KV.
    """

    limit: int
    methods: Sequence[str]
    options: Sequence[str]
    baseline: str | None = None


class Autopsies(NamedTuple):
    """What `demo.autopsy` is to look at: `limit` problems of each arm."""

    limit: int
    arms: Sequence[str]


Part = Union[Comparison, Autopsies]


def all_parts(n_problems: int, n_parts: int) -> dict[str, Part]:
    """Return all parts: `n_problems` in the first two comparisons, `n_parts` in the others."""
    budgets = ["--budgets", ",".join(map(str, BUDGETS))]
    some = ["--budgets", ",".join(map(str, PART_BUDGETS))]
    wide = ["--budgets", ",".join(map(str, WIDE_BUDGETS))]
    today = ["--budgets", ",".join(map(str, DEFAULT_BUDGETS))]
    types = ["full", "full+kv=q8_0", "full+kv=q4_0", *equal_bytes(BYTE_BUDGETS)]
    return {
        "defaults": Comparison(n_problems, DEFAULT_METHODS, today, f"rkv+{WIDE}"),
        "methods": Comparison(n_problems, METHODS, budgets),
        "parts": Comparison(n_parts, PARTS, some),
        "window": Comparison(n_parts, WIDE_METHODS, wide, f"rkv+{WIDE}"),
        "unprotected": Comparison(n_parts, UNPROTECTED, [*some, "--protect-prompt", "off"]),
        "types": Comparison(n_parts, types, []),
        "autopsy": Autopsies(min(n_parts, AUTOPSY_PROBLEMS), AUTOPSY_ARMS),
    }


def run(
    folder: Path,
    parts: Mapping[str, Part],
    n_jobs: int,
    page: Path | None = None,
    report_only: bool = False,
    mix_versions: bool = False,
) -> None:
    """Do parts and write what they show into a folder, and into the sections of a page.

    Parameters
    ----------
    folder : Path
        Made if need be.
    parts : mapping
        Name -> part.
    n_jobs : int
        Processes.
    page : Path, optional
        See `fill`.
    report_only : bool
        Decode nothing: take the results that are in the folder, packed or not.
    mix_versions : bool
        Go on in results of another version.

    Raises
    ------
    ConfigError
        The page has no place for a section; something cannot be written; results in the folder were
        made with other settings, or are not there; matplotlib is missing.
    """
    if page is not None:
        check_page(page, parts)
    check_picture("any.svg")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    for name, part in parts.items():
        start = time.monotonic()
        if isinstance(part, Autopsies):
            section = _autopsy(folder / name, part, report_only)
        else:
            if not report_only:
                more = ["--mix-versions"] if mix_versions else []
                _compare(folder / f"{name}.jsonl", part, n_jobs, more)
            section = _report(folder / name, part)
        write_whole(folder / f"{name}-section.md", section.encode())
        if page is not None:
            fill(page, name, section)
        click.echo(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes")


# --- comparisons ---------------------------------------------------------------------------------


def _compare(results: Path, comparison: Comparison, n_jobs: int, more: Sequence[str]) -> None:
    arguments = ["demo", "-o", str(results), "--methods", ",".join(comparison.methods)]
    arguments += [*comparison.options, "--limit", str(comparison.limit)]
    arguments += ["--buffer", str(BUFFER), "--jobs", str(n_jobs), "--threads", "1"]
    arguments += ["--profile", str(profiles_folder() / "demo-reasoner.json")]
    evaluate.main([*arguments, *more], standalone_mode=False)


def _report(base: Path, comparison: Comparison) -> str:
    """Write what results say beside them, and pack them; return the section of the page."""
    with _unpacked(base) as path:
        results = read_results(path, keep_texts=False)
        if path.parent == base.parent:
            write_whole(base.with_suffix(".jsonl.gz"), packed(path.read_bytes()))
    report = make_report([results], comparison.baseline)
    write_whole(base.with_suffix(".md"), markdown_table(report).encode())
    write_whole(base.with_suffix(".csv"), csv_table(report).encode())
    save_plot(report, str(base.with_suffix(".svg")))
    if base.name != "types":
        return matrix(results, comparison.baseline)
    arms = equal_bytes(BYTE_BUDGETS)
    n_kinds = len(ELEMENT_BYTES)
    groups = [arms[i : i + n_kinds] for i in range(0, len(arms), n_kinds)]
    return bytes_table(results, groups, list(ELEMENT_BYTES))


@contextmanager
def _unpacked(base: Path) -> Iterator[Path]:
    """Yield the path of a results file; unpacked elsewhere if only the packed one is there."""
    path, pack = base.with_suffix(".jsonl"), base.with_suffix(".jsonl.gz")
    if path.exists() or not pack.exists():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        try:
            with gzip.open(pack) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (OSError, EOFError) as error:
            raise ConfigError(f"{pack}: cannot be unpacked: {error}") from None
        yield copy


def packed(data: bytes) -> bytes:
    """Return data compressed: the same bytes whenever and wherever it is done by this zlib."""
    stream = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as pack:
        pack.write(data)
    return stream.getvalue()


# --- autopsies -----------------------------------------------------------------------------------


def _autopsy(base: Path, part: Autopsies, report_only: bool) -> str:
    """Look at the arms that have not been looked at yet; return the section of the page."""
    path = base.with_suffix(".json")
    settings = {
        "version": __version__,
        "model_fingerprint": read_identity(DEMO_MODEL).fingerprint,
        "n_problems": part.limit,
    }
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        there, found = _read_autopsies(path)
        if there != settings and not report_only:
            raise ConfigError(f"{path}: made with other settings: delete it, or pass another --out")
    elif report_only:
        raise ConfigError(f"{path}: cannot be read: No such file")
    missing = [arm for arm in part.arms if arm not in found]
    if missing and not report_only:
        for arm, one in dissect(missing, part.limit):
            found[arm] = one
            write_whole(path, (json.dumps({**settings, "arms": found}, indent=1) + "\n").encode())
    found = {arm: found[arm] for arm in part.arms if arm in found}
    if not found:
        raise ConfigError(f"{path}: none of {', '.join(part.arms)} is in it")
    table = autopsy_table(found)
    texts = "\n\n".join(text_of(arm, one) for arm, one in found.items())
    write_whole(base.with_suffix(".md"), f"{table}\n```\n{texts}\n```\n".encode())
    return table


def _read_autopsies(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values, dict(values.pop("arms"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"{path}: not a file of autopsies: delete it to make a new one") from None


def _names(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> list[str]:
    names = [name for text in texts for name in text.replace(",", " ").split()]
    known = list(all_parts(1, 1))
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} must be one of {', '.join(known)}")
    return names


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs/evidence"),
    show_default=True,
    help="Folder of the results.",
)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Page whose sections are filled, too: docs/evidence.md.",
)
@click.option(
    "--problems",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Of the first two comparisons.",
)
@click.option(
    "--part-problems",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Of the others.",
)
@click.option(
    "--only",
    multiple=True,
    callback=_names,
    metavar="NAME[,NAME...]",
    help=f"Some of {', '.join(all_parts(1, 1))}.",
)
@click.option("--report-only", is_flag=True, help="Decode nothing: report what is in --out.")
@click.option(
    "--mix-versions", is_flag=True, help="Go on in results files of another version (no autopsies)."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes.  [default: all cores]")
def main(
    out: Path,
    docs: Path | None,
    problems: int,
    part_problems: int,
    only: list[str],
    report_only: bool,
    mix_versions: bool,
    jobs: int | None,
) -> None:
    """Make the demo reasoner's evidence; the same command goes on where it was stopped."""
    parts = all_parts(problems, part_problems)
    parts = {name: parts[name] for name in only or parts}
    if report_only and not only:
        ends = (".jsonl", ".jsonl.gz", ".json")
        parts = {n: p for n, p in parts.items() if any((out / (n + end)).exists() for end in ends)}
        if not parts:
            raise ConfigError(f"{out}: there are no results in it")
    run(out, parts, jobs or os.cpu_count() or 1, docs, report_only, mix_versions)


if __name__ == "__main__":
    run_command(main, "demo.evidence")
