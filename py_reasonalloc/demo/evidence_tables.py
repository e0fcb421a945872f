"""The tables of docs/evidence.md, made of results, and put between the page's markers.

A section of the page is what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine import tempfiles
from ..engine.errors import ConfigError
from ..eval.cases.rows import arm_label
from ..eval.results.file import Results
from ..eval.results.report import ArmReport, Report, make_report
from .autopsy import FAR_VALUE, KINDS

_KEPT = "[k/n]: in k of n texts nothing was evicted; they say nothing about the method."
#: The layer of which the table of autopsies tells how much of a value was still cached.
_LOOKUP_LAYER = 1


def matrix(results: Results, baseline: str | None = None) -> str:
    """Return accuracies in percent as Markdown, a row per method, a column per budget.

    A star: the paired difference to the baseline at the same budget has p < 0.05.
    """
    report = make_report([results], baseline)
    budgets = sorted({arm.budget for arm in report.arms})
    cells: dict[str, dict[int, str]] = {}
    for arm in report.arms:
        star = " *" if arm.difference is not None and arm.difference.p < 0.05 else ""
        cell = f"{100 * arm.accuracy.value:.1f}{star}{_mark(arm)}"
        cells.setdefault(arm.method, {})[arm.budget] = cell
    lines = ["| method | " + " | ".join(str(b) if b else "full cache" for b in budgets) + " |"]
    lines.append("|---|" + "---:|" * len(budgets))
    for method, row in cells.items():
        lines.append(f"| `{method}` | " + " | ".join(row.get(b, "") for b in budgets) + " |")
    return _section(results, report, lines)


def bytes_table(results: Results, groups: Sequence[Sequence[str]], kinds: Sequence[str]) -> str:
    """Return accuracies in percent as Markdown, a row per number of bytes, a column per type.

    Parameters
    ----------
    results : Results
        Rows of all arms in `groups`, and of the full caches of the types.
    groups : sequence of sequence of str
        Arms with the same bytes, one of each type, the first of which says how many.
    kinds : sequence of str
        Cache types; the first is that of ``full`` without an option.
    """
    report = make_report([results])
    arms = {arm_label(arm.method, arm.budget): arm for arm in report.arms}
    lines = ["| bytes of the cache | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
    for group in groups:
        found = [arms.get(label) for label in group]
        if found[0] is None or found[0].kv_bytes is None:
            continue
        cells = [
            "" if a is None else f"{a.accuracy.value:.0%} ({a.budget}){_mark(a)}" for a in found
        ]
        lines.append(f"| {found[0].kv_bytes / 1024:.0f} KiB | " + " | ".join(cells) + " |")
    full = [arms.get("full" if kind == kinds[0] else f"full+kv={kind}") for kind in kinds]
    if any(full):
        cells = ["" if arm is None else f"{arm.accuracy.value:.0%}" for arm in full]
        lines.append("| full cache | " + " | ".join(cells) + " |")
    return _section(results, report, lines, " In brackets: the budget, tokens.")


def _mark(arm: ArmReport) -> str:
    return f" [{arm.n_never_evicted}/{arm.n_texts}]" if arm.n_never_evicted else ""


def _section(results: Results, report: Report, lines: Sequence[str], more: str = "") -> str:
    """Return a table below a line about its problems and the time that they took."""
    seconds = sum((row.prompt_seconds or 0) + (row.decode_seconds or 0) for row in results.rows)
    head = f"{report.n_problems} problems; {_minutes(seconds)} of decoding, all processes together."
    head += more
    if any(arm.n_missing for arm in report.arms):
        head += f" Not complete: some arms have {min(a.n_problems for a in report.arms)} so far."
    foot = ["", _KEPT] if any(arm.n_never_evicted for arm in report.arms) else []
    return "\n".join([head, "", *lines, *foot]) + "\n"


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'' if minutes == 1 else 's'}"


def autopsy_table(found: Mapping[str, dict[str, Any]]) -> str:
    """Return what autopsies found (arm -> see `autopsy.dissect`) as Markdown."""
    n_problems = max(one["n_problems"] for one in found.values())
    lines = [
        "| arm | exact chains | first wrong token: line in progress / far value / other | "
        f"far value cached in layer {_LOOKUP_LAYER}, lookup right / wrong |",
        "|---|---:|---|---|",
    ]
    for arm, one in found.items():
        n_far = one["wrong"].get(FAR_VALUE, 0)
        n_near = sum(one["wrong"].get(kind, 0) for kind in KINDS if kind != FAR_VALUE)
        n_other = sum(one["wrong"].values()) - n_near - n_far
        held = [
            f"{one['held'][key][_LOOKUP_LAYER]:.0%}" if one["held"][key] else "-"
            for key in ("right", "wrong")
        ]
        lines.append(
            f"| `{arm}` | {one['n_exact']} | {n_near} / {n_far} / {n_other} | {' / '.join(held)} |"
        )
    seconds = sum(one["seconds"] for one in found.values())
    return "\n".join([f"{n_problems} problems an arm; {_minutes(seconds)}.", "", *lines]) + "\n"


# --- the page ------------------------------------------------------------------------------------


def check_page(page: Path, names: Iterable[str]) -> str:
    """Return the text of a page; ConfigError unless it has a place for each of the sections."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{page}: cannot be read: {reason}") from None
    for name in names:
        if len(re.findall(_place(name), text, flags=re.DOTALL)) != 1:
            raise ConfigError(f"{page}: must have <!-- {name} --> and <!-- /{name} --> once")
    return text


def fill(page: Path, name: str, content: str) -> None:
    """Replace a section of a page, which stays whole if it cannot be written."""
    text = check_page(page, [name])
    new = re.sub(
        _place(name),
        lambda found: f"{found[1]}\n{content.strip()}\n{found[2]}",
        text,
        flags=re.DOTALL,
    )
    write_whole(page, new.encode())


def _place(name: str) -> str:
    return rf"(<!-- {name} -->)\n.*?(<!-- /{name} -->)"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, all of it or nothing; ConfigError if it cannot be written."""
    try:
        tempfiles.write_whole(path, data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
