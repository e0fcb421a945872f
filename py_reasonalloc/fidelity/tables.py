"""The report of a fidelity run as a table: for a terminal, in Markdown, in CSV, in JSON."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, NamedTuple

from ..eval.results.tables import MIB, aligned, escaped, filled, settings_text
from ..output.text import printable
from ..profile.files import Recommendation
from .report import ArmReport, Metric, Report
from .rows import OWN, TEXT

_WHAT = {TEXT: "files", OWN: "the model's own texts"}


def text_table(report: Report) -> str:
    """Return settings, tables and notes for a terminal."""
    parts = [settings_text(report.settings)]
    for title, cells in _tables(report):
        parts.append(f"{title}\n\n{aligned(cells)}")
    parts.append("\n".join(filled(note, "  ") for note in _notes(report)))
    return "\n\n".join(parts) + "\n"


def markdown_table(report: Report) -> str:
    """Return the same in Markdown."""
    parts = [escaped(settings_text(report.settings))]
    for title, (head, *rows) in _tables(report):
        lines = [list(map(escaped, head)), *([escaped(row[0]), *row[1:]] for row in rows)]
        parts.append(f"{escaped(title)}\n\n{aligned(lines, is_markdown=True)}")
    parts.append("\n".join(f"- {escaped(note)}" for note in _notes(report)))
    return "\n\n".join(parts) + "\n"


def csv_table(report: Report) -> str:
    """Return a line of names and one per arm; nothing is rounded, shares are 0 to 1."""
    stream = io.StringIO()
    lines = [_flat(arm, report.baseline) for arm in report.arms]
    writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def json_report(report: Report, recommendation: Recommendation | None = None) -> str:
    """Return everything as one JSON object: settings, arms (as in the CSV), notes."""
    value = {
        "settings": report.settings,
        "arms": [_flat(arm, report.baseline) for arm in report.arms],
        "second_copies_full": [
            dict(zip(("distance", "nll_first", "nll_second"), row)) for row in report.copies_full
        ],
        "notes": list(report.notes),
        "recommendation": None if recommendation is None else recommendation._asdict(),
    }
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _flat(arm: ArmReport, baseline: str | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: getattr(arm, name)
        for name in "source method budget start n_texts n_tokens n_missing".split()
    }
    values["baseline"] = baseline
    for name in ("kl", "agree", "nll_more"):
        values |= _flat_metric(name, getattr(arm, name))
    values |= {"n_facts": arm.n_facts, "distance": arm.distance}
    values |= _flat_interval("recall", arm.recall)
    values |= _flat_interval("recall_difference", arm.recall_difference)
    values["recall_p"] = None if arm.recall_difference is None else arm.recall_difference.p
    values |= _flat_metric("second_copy_more", arm.copy)
    for name in "kv_bytes peak_tokens n_evicted n_compressions n_never seconds".split():
        values[name] = getattr(arm, name)
    return values


def _flat_metric(name: str, metric: Metric | None) -> dict[str, float | None]:
    own, difference = (None, None) if metric is None else (metric.own, metric.difference)
    return _flat_interval(name, own) | _flat_interval(f"{name}_difference", difference)


def _flat_interval(name: str, interval: Any) -> dict[str, float | None]:
    ends = ("", "_low", "_high")
    found = (None,) * 3 if interval is None else interval[:3]
    return {f"{name}{end}": number for end, number in zip(ends, found)}


# --- cells ---------------------------------------------------------------------------------------


class _Table(NamedTuple):
    title: str
    cells: list[list[str]]


def _tables(report: Report) -> list[_Table]:
    tables = []
    for source in (TEXT, OWN):
        arms = [arm for arm in report.arms if arm.source == source]
        if arms:
            tables.append(_Table(f"Next token, {_WHAT[source]}", _next_token(arms, report)))
    probed = [arm for arm in report.arms if arm.source == TEXT and arm.distance is not None]
    if probed:
        tables.append(_Table("Asked for later", _asked_later(probed, report)))
    return tables


def _next_token(arms: list[ArmReport], report: Report) -> list[list[str]]:
    base = [] if report.baseline is None else [f"minus {report.baseline}"]
    head = ["method", "budget", "tokens", "KL", *base, "top-1 %", "NLL +", "cache MiB"]
    rows = [[*head, "compr.", "evicted"]]
    for arm in arms:
        evicted = f"{arm.n_evicted:.0f}" + (f" ({arm.n_never} never)" if arm.n_never else "")
        rows.append(
            [
                arm.method,
                "full" if arm.budget == 0 else str(arm.budget),
                f"{arm.n_tokens}{'*' if arm.n_missing else ''}",
                _interval(arm.kl.own, ".3f"),
                *([_interval(arm.kl.difference, "+.3f")] if base else []),
                _interval(arm.agree.own, ".1f", 100),
                _interval(arm.nll_more.own, "+.3f"),
                f"{arm.kv_bytes / MIB:.4g}",
                f"{arm.n_compressions:.1f}",
                evicted,
            ]
        )
    return rows


def _asked_later(arms: list[ArmReport], report: Report) -> list[list[str]]:
    base = [] if report.baseline is None else [f"minus {report.baseline}"]
    facts = any(arm.recall is not None for arm in arms)
    copies = any(arm.copy is not None for arm in arms)
    head = ["method", "budget", "after"]
    head += ["facts", "recall %", *base] if facts else []
    head += ["2nd copy NLL +", *base] if copies else []
    rows = [head]
    for arm in arms:
        cells = [arm.method, "full" if arm.budget == 0 else str(arm.budget), str(arm.distance)]
        if facts:
            cells += [str(arm.n_facts), _interval(arm.recall, ".0f", 100)]
            cells += [_interval(arm.recall_difference, "+.0f", 100)] if base else []
        if copies:
            cells.append(_interval(arm.copy and arm.copy.own, "+.2f"))
            cells += [_interval(arm.copy and arm.copy.difference, "+.2f")] if base else []
        rows.append(cells)
    return rows


def _interval(interval: Any, form: str, factor: float = 1.0) -> str:
    if interval is None:
        return "-"
    value, low, high = (factor * number for number in interval[:3])
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _notes(report: Report) -> list[str]:
    notes = [
        "KL: mean divergence of the next token from the full cache (f16), nats; top-1: same "
        "likeliest token; NLL +: negative log-likelihood of the text minus the full cache's, nats",
        "tokens: positions scored, from budget + buffer on, the same for all arms of a budget; "
        "cache: allocated, budget + buffer; compr., evicted: mean per text",
    ]
    if report.baseline is not None:
        notes.append(
            f"minus {report.baseline}: at the same budget, on the same positions, drawn in pairs"
        )
    if any(arm.n_facts for arm in report.arms):
        notes.append(
            f"recall: of {report.n_stated} facts stated once, those that the full cache knows "
            "('facts'), asked for after so many tokens ('after')"
        )
    for distance, first, second in report.copies_full:
        notes.append(
            f"2nd copy: of a passage that comes again after {distance} tokens; full cache: "
            f"{second:.2f} nats a token, {first:.2f} the first time"
        )
    if any(arm.n_missing for arm in report.arms):
        notes.append("*: texts are missing that other arms of the budget have")
    if any(arm.n_never for arm in report.arms):
        notes.append("never: texts in which this budget evicted nothing: no figure of the method")
    return notes + [printable(note) for note in report.notes]
