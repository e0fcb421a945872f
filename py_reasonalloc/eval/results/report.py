"""What the rows of an evaluation say: figures per method and budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...engine.errors import ConfigError
from ...output.text import printable
from ..cases.rows import END, Row, arm_label
from .agreement import VERSION, check_same, notes_of, profiles_of, versions_of
from .file import Results
from .statistics import Difference, Estimate, paired_difference, pass_at_1

#: What arms are compared with unless another method is named.
BASELINE = "rkv"


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


def make_report(
    results: Sequence[Results], baseline: str | None = None, mix_versions: bool = False
) -> Report:
    """Sum up results files that were made with the same settings.

    Parameters
    ----------
    results : sequence of Results
        At least one.
    baseline : str, optional
        ``METHOD``: each arm is compared with it at the arm's own budget, or with the method's only
        arm if that is a full cache. ``METHOD@BUDGET``: each arm is compared with this one. Default:
        `BASELINE` if it is there.
    mix_versions : bool
        Files may be of several versions of ReasonAlloc; the report notes it. (One file whose rows
        are of several was made so on purpose.)

    Raises
    ------
    ConfigError
        Settings differ, a row is in two files, there are no rows, or no such baseline.
    """
    for i, other in enumerate(results[1:], start=1):
        rows = [row for result in results[:i] for row in result.rows]
        methods = {row.method for row in rows}
        check_same(results[0].settings, other, methods, profiles_of(rows), mix_versions)
    arms = _by_arm(results)
    if not arms:
        raise ConfigError(f"{results[0].path}: there are no rows in it yet")
    settings = results[0].settings
    versions = sum(map(versions_of, results), Counter[str]())
    if len(versions) > 1:
        settings = settings | {VERSION: sorted(versions)}
    notes = notes_of(results, versions)
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
        settings=settings,
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
