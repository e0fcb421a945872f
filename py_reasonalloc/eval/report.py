"""What the rows of an evaluation say: one line per method and budget, as text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import ConfigError
from ..inspect_view import printable
from .agreement import check_same, profiles_of
from .results import Results
from .rows import END, Row, arm_label
from .statistics import Difference, Estimate, paired_difference, pass_at_1

#: What arms are compared with unless another method is named.
BASELINE = "rkv"
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


@dataclass(frozen=True)
class ArmReport:
    """One line of the table. None: not known, as with servers that do not tell.

    Attributes
    ----------
    method, budget
        See `RowKey`.
    n_problems, n_texts : int
        Problems, and texts of all of them.
    n_missing : int
        Texts that another arm has and this one has not.
    accuracy : Estimate
        Mean over texts of being right; see `pass_at_1`.
    difference : Difference or None
        To the baseline, on the texts that both have; None without one, and for the baseline.
    mean_generated : float
        Tokens per text.
    runaway_rate : float
        Share of texts that the model did not end itself.
    kv_bytes, peak_tokens : int or None
        Largest of any text; see `Row`.
    mean_evicted, mean_compressions : float or None
        Per text; see `Row`.
    n_never_evicted : int
        Texts of a budgeted cache in which nothing was evicted.
    tokens_per_second : float or None
        Tokens generated / seconds of decoding, over all texts.
    """

    method: str
    budget: int
    n_problems: int
    n_texts: int
    n_missing: int
    accuracy: Estimate
    difference: Difference | None
    mean_generated: float
    runaway_rate: float
    kv_bytes: int | None
    peak_tokens: int | None
    mean_evicted: float | None
    mean_compressions: float | None
    n_never_evicted: int
    tokens_per_second: float | None


@dataclass(frozen=True)
class Report:
    """All lines, and what belongs to them.

    Attributes
    ----------
    settings : dict
        What all rows were made with.
    arms : tuple of ArmReport
        Full caches first, then by budget; within one in the order of the rows.
    baseline : str or None
        What differences are to, ``METHOD`` (at the same budget) or ``METHOD@BUDGET``; None: there
        is nothing to compare with.
    n_problems : int
        Problems of all arms together.
    notes : tuple of str
        What a reader must know of the files.
    """

    settings: dict[str, Any]
    arms: tuple[ArmReport, ...]
    baseline: str | None
    n_problems: int
    notes: tuple[str, ...]


def make_report(results: Sequence[Results], baseline: str | None = None) -> Report:
    """Sum up results files that were made with the same settings.

    Parameters
    ----------
    results : sequence of Results
        At least one.
    baseline : str, optional
        ``METHOD``: each arm is compared with it at the arm's own budget, or with the method's only
        arm if that is a full cache. ``METHOD@BUDGET``: each arm is compared with this one. Default:
        `BASELINE` if it is there.

    Raises
    ------
    ConfigError
        Settings differ, a row is in two files, there are no rows, or no such baseline.
    """
    for i, other in enumerate(results):
        rows = [row for result in results[:i] for row in result.rows]
        check_same(results[0].settings, other, {row.method for row in rows}, profiles_of(rows))
    arms = _by_arm(results)
    if not arms:
        raise ConfigError(f"{results[0].path}: there are no rows in it yet")
    notes = [f"{r.path}: its last line was broken and is left out" for r in results if r.n_dropped]
    labels = {name for method, budget in arms for name in (method, arm_label(method, budget))}
    if baseline is None and BASELINE in labels:
        baseline = BASELINE
    elif baseline is None:
        notes.append(f"no method is called {BASELINE}: --baseline METHOD compares with another")
    elif baseline not in labels:
        names = ", ".join(dict.fromkeys(method for method, _ in arms))
        raise ConfigError(f"baseline = {baseline!r} has no rows: there are {names}")
    wanted = {text for rows in arms.values() for text in rows}
    return Report(
        settings=results[0].settings,
        arms=tuple(
            _arm_report(arms, key, baseline, len(wanted))
            for key in sorted(arms, key=lambda key: key[1])
        ),
        baseline=baseline,
        n_problems=len({problem for problem, _ in wanted}),
        notes=tuple(notes),
    )


# --- figures -------------------------------------------------------------------------------------

#: (problem, sample) -> row; (method, budget) -> the rows of an arm.
_Texts = dict[tuple[str, int], Row]
_Arms = dict[tuple[str, int], _Texts]
_Number = TypeVar("_Number", int, float)


def _by_arm(results: Sequence[Results]) -> _Arms:
    arms: _Arms = {}
    for result in results:
        for row in result.rows:
            texts = arms.setdefault((row.method, row.budget), {})
            if (row.problem, row.sample) in texts:
                raise ConfigError(
                    f"{result.path}: another file has the same rows, e.g. "
                    f"{arm_label(row.method, row.budget)}, problem {printable(row.problem)}, "
                    f"sample {row.sample}"
                )
            texts[row.problem, row.sample] = row
    return arms


def _arm_report(
    arms: _Arms, key: tuple[str, int], baseline: str | None, n_wanted: int
) -> ArmReport:
    texts = arms[key]
    rows = texts.values()
    n_texts = _per_problem(texts, dict.fromkeys(texts, 1))
    n_right = _per_problem(texts, {text: int(row.correct) for text, row in texts.items()})
    timed = [row for row in rows if row.decode_seconds]
    seconds = sum(row.decode_seconds or 0.0 for row in timed)
    return ArmReport(
        method=key[0],
        budget=key[1],
        n_problems=len(n_texts),
        n_texts=len(texts),
        n_missing=n_wanted - len(texts),
        accuracy=pass_at_1(n_right, n_texts),
        difference=_difference(arms, key, baseline),
        mean_generated=sum(row.n_generated for row in rows) / len(rows),
        runaway_rate=sum(row.stop != END for row in rows) / len(rows),
        kv_bytes=max(_known(row.kv_bytes for row in rows), default=None),
        peak_tokens=max(_known(row.peak_tokens for row in rows), default=None),
        mean_evicted=_mean(row.n_evicted for row in rows),
        mean_compressions=_mean(row.n_compressions for row in rows),
        n_never_evicted=sum(row.n_evicted == 0 for row in rows) if key[1] > 0 else 0,
        tokens_per_second=sum(row.n_generated for row in timed) / seconds if timed else None,
    )


def _difference(arms: _Arms, key: tuple[str, int], baseline: str | None) -> Difference | None:
    """Return an arm's difference to the baseline, if they are two and have common texts."""
    if baseline is None:
        return None
    labels = {arm_label(*arm): arm for arm in arms}
    other = labels.get(arm_label(baseline, key[1]), labels.get(baseline))
    if other is None or other == key:
        return None
    common = [text for text in arms[key] if text in arms[other]]
    if not common:
        return None
    n_right, n_right_other = (
        _per_problem(common, {text: int(arms[arm][text].correct) for text in common})
        for arm in (key, other)
    )
    return paired_difference(n_right, n_right_other, _per_problem(common, dict.fromkeys(common, 1)))


def _per_problem(texts: Iterable[tuple[str, int]], values: dict[tuple[str, int], int]) -> list[int]:
    """Return the sums of the values of each problem's texts."""
    sums: dict[str, int] = {}
    for text in texts:
        sums[text[0]] = sums.get(text[0], 0) + values[text]
    return list(sums.values())


def _known(values: Iterable[_Number | None]) -> list[_Number]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[int | None]) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None


# --- tables --------------------------------------------------------------------------------------


def text_table(report: Report) -> str:
    """Return settings, table and notes for a terminal."""
    parts = [_settings_text(report.settings), _aligned(_cells(report))]
    parts.append("\n".join(_filled(note, "  ") for note in _notes(report)))
    return "\n\n".join(parts) + "\n"


def markdown_table(report: Report) -> str:
    """Return the same in Markdown."""
    head, *rows = _cells(report)
    rows = [list(map(_escaped, head)), *([_escaped(row[0]), *row[1:]] for row in rows)]
    notes = "\n".join(f"- {_escaped(note)}" for note in _notes(report))
    settings = _escaped(_settings_text(report.settings))
    return "\n\n".join([settings, _aligned(rows, is_markdown=True), notes]) + "\n"


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


def _aligned(rows: Sequence[Sequence[str]], is_markdown: bool = False) -> str:
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


def _settings_text(settings: dict[str, Any]) -> str:
    return _filled(
        ", ".join(
            f"{name} = {_setting(value)}" for name, value in settings.items() if value is not None
        )
    )


def _setting(value: Any) -> str:
    text = ", ".join(map(str, value)).join("[]") if isinstance(value, list) else str(value)
    if isinstance(value, list) and len(text) > _MAX_SHOWN:
        text = f"[{len(value)} values]"
    return printable(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 4] + " ...")


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, with underscores inside words left alone."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", text)
