"""The report of an evaluation as a table: for a terminal, in Markdown, in CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from ...output.text import printable
from .report import ArmReport, Report

MIB = 1 << 20
_WIDTH = 100
_MAX_SHOWN = 80

_ACCURACY = "accuracy: mean over texts (pass@1), with its 95% interval"
_COMPARED = (
    "vs {}: difference in points, with its 95% interval and exact p (signs flipped problem by "
    "problem; McNemar's test where there is one text a problem)"
)
_COUNTS = (
    "tokens, evicted, compr.: mean per text; runaway: texts that the model did not end; cache, "
    "peak: largest of all texts"
)
_INCOMPLETE = (
    "*: texts are missing that other arms have: the accuracies are of other problems, differences "
    "are of common ones"
)
_NEVER = "never: texts in which this budget evicted nothing; they say nothing about the method"


def text_table(report: Report) -> str:
    """Return settings, table and notes for a terminal."""
    parts = [settings_text(report.settings), aligned(_cells(report))]
    parts.append("\n".join(filled(note, "  ") for note in _notes(report)))
    return "\n\n".join(parts) + "\n"


def markdown_table(report: Report) -> str:
    """Return the same in Markdown."""
    head, *rows = _cells(report)
    rows = [list(map(escaped, head)), *([escaped(row[0]), *row[1:]] for row in rows)]
    notes = "\n".join(f"- {escaped(note)}" for note in _notes(report))
    settings = escaped(settings_text(report.settings))
    return "\n\n".join([settings, aligned(rows, is_markdown=True), notes]) + "\n"


def csv_table(report: Report) -> str:
    """Return a line of names and one per arm; nothing is rounded, shares are 0 to 1."""
    stream = io.StringIO()
    lines = [_csv_values(arm, report.baseline) for arm in report.arms]
    writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _csv_values(arm: ArmReport, baseline: str | None) -> dict[str, Any]:
    value, low, high, p, n_problems = arm.difference or (None,) * 5
    return {
        "method": arm.method,
        "budget": arm.budget,
        "n_problems": arm.n_problems,
        "n_texts": arm.n_texts,
        "n_missing": arm.n_missing,
        "accuracy": arm.accuracy.value,
        "accuracy_low": arm.accuracy.low,
        "accuracy_high": arm.accuracy.high,
        "baseline": None if arm.difference is None else baseline,
        "difference": value,
        "difference_low": low,
        "difference_high": high,
        "p": p,
        "n_common_problems": n_problems,
        "mean_generated": arm.mean_generated,
        "runaway_rate": arm.runaway_rate,
        "kv_bytes": arm.kv_bytes,
        "peak_tokens": arm.peak_tokens,
        "mean_evicted": arm.mean_evicted,
        "mean_compressions": arm.mean_compressions,
        "n_never_evicted": arm.n_never_evicted,
        "tokens_per_second": arm.tokens_per_second,
    }


def _cells(report: Report) -> list[list[str]]:
    """Return the table, names of the columns first; all rows have the same length."""
    has_samples = any(arm.n_texts != arm.n_problems for arm in report.arms)
    return [
        [
            "method",
            "budget",
            "problems",
            *(["texts"] if has_samples else []),
            "accuracy %",
            *([f"vs {report.baseline}", "p"] if report.baseline is not None else []),
            "tokens",
            "runaway",
            "cache MiB",
            "peak",
            "evicted",
            "compr.",
            "tokens/s",
        ],
        *(_arm_cells(arm, report, has_samples) for arm in report.arms),
    ]


def _arm_cells(arm: ArmReport, report: Report, has_samples: bool) -> list[str]:
    n_all = f"/{report.n_problems}" if arm.n_problems < report.n_problems else ""
    evicted = _number(arm.mean_evicted, ".0f")
    if arm.n_never_evicted:
        evicted += f" ({arm.n_never_evicted} never)"
    compared = ["-", "-"]
    if arm.difference is not None:
        value, low, high, p, _ = arm.difference
        compared = [_percents(value, low, high, "+.1f"), "<0.001" if p < 0.001 else f"{p:.3f}"]
    return [
        arm.method,
        "full" if arm.budget == 0 else str(arm.budget),
        f"{arm.n_problems}{n_all}{'*' if arm.n_missing else ''}",
        *([str(arm.n_texts)] if has_samples else []),
        _percents(*arm.accuracy, ".1f"),
        *(compared if report.baseline is not None else []),
        f"{arm.mean_generated:.0f}",
        f"{100 * arm.runaway_rate:.1f}%",
        _number(None if arm.kv_bytes is None else arm.kv_bytes / MIB, ".4g"),
        _number(arm.peak_tokens, "d"),
        evicted,
        _number(arm.mean_compressions, ".1f"),
        _number(arm.tokens_per_second, ".1f"),
    ]


def _percents(value: float, low: float, high: float, form: str) -> str:
    return f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _notes(report: Report) -> list[str]:
    notes = [_ACCURACY, _COUNTS]
    if report.baseline is not None:
        where = "" if "@" in report.baseline else ", same budget"
        notes.insert(1, _COMPARED.format(report.baseline + where))
    if any(arm.n_missing for arm in report.arms):
        notes.append(_INCOMPLETE)
    if any(arm.n_never_evicted for arm in report.arms):
        notes.append(_NEVER)
    return notes + [printable(note) for note in report.notes]


def aligned(rows: Sequence[Sequence[str]], is_markdown: bool = False) -> str:
    """Return rows as lines, the first column to the left, the others to the right."""
    first, *others = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = [
        [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))]
        for row in rows
    ]
    if is_markdown:
        lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    lines.insert(1, ["-" * width for width in (first, *others)])
    return "\n".join("  ".join(cells) for cells in lines)


def settings_text(settings: dict[str, Any]) -> str:
    """Return settings in lines of NAME = VALUE, with commas."""
    return filled(
        ", ".join(
            f"{name} = {_setting(value)}" for name, value in settings.items() if value is not None
        )
    )


def _setting(value: Any) -> str:
    text = ", ".join(map(str, value)).join("[]") if isinstance(value, list) else str(value)
    if isinstance(value, list) and len(text) > _MAX_SHOWN:
        text = f"[{len(value)} values]"
    return printable(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 4] + " ...")


def filled(text: str, indent: str = "") -> str:
    """Return text in lines; `indent` begins all but the first."""
    return textwrap.fill(
        text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, with underscores inside words left alone."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", text)
