"""What the rows of a fidelity run say: figures per method and budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.errors import ConfigError
from ..eval.cases.rows import arm_label
from ..eval.results.agreement import check_same, notes_of, profiles_of, versions_of
from ..eval.results.lines import Results
from ..eval.results.statistics import Difference, Estimate, paired_difference, wilson
from .resample import MANY_TEXTS, draw_blocks, ratio_interval
from .rows import COPY, OWN, RECALL, TEXT, WRITTEN, Row
from .run import REFERENCE_ARM

#: What arms are compared with unless another method is named.
BASELINE = "rkv"
#: Of the bootstrap.
_SEED = 0


@dataclass(frozen=True)
class Metric:
    """A mean with its interval, and what it is more than the baseline's.

    Attributes
    ----------
    own : Estimate
        Of this arm.
    difference : Estimate or None
        This arm minus the baseline, drawn in pairs; None without one, and for the baseline.
    """

    own: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class ArmReport:
    """One line of the table.

    Attributes
    ----------
    source : str
        `TEXT`: files; `OWN`: texts of the model.
    method, budget : str, int
        Of the arm; budget 0 is a full cache.
    n_texts, n_tokens, n_missing : int
        Texts; positions scored; texts that other arms of the budget have and this one has not.
    start : int
        First position scored.
    kl, agree, nll_more : Metric
        Mean KL divergence of the next token from the full cache, nats; share of positions with the
        same likeliest token; negative log-likelihood minus the full cache's, nats.
    recall : Estimate or None
        Share of the facts known with the full cache that are recalled, with Wilson's interval.
    recall_difference : Difference or None
        To the baseline, on the same facts.
    n_facts : int
        Facts known with the full cache.
    copy : Metric or None
        Negative log-likelihood of second copies minus the full cache's, nats a token.
    distance : int or None
        Tokens between a fact and its question, and between two copies.
    kv_bytes, peak_tokens : int
        Largest of the texts'.
    n_evicted, n_compressions : float
        Mean per text.
    n_never : int
        Texts in which this budget evicted nothing.
    seconds : float
        For all texts.
    """

    source: str
    method: str
    budget: int
    n_texts: int
    n_tokens: int
    n_missing: int
    start: int
    kl: Metric
    agree: Metric
    nll_more: Metric
    recall: Estimate | None
    recall_difference: Difference | None
    n_facts: int
    copy: Metric | None
    distance: int | None
    kv_bytes: int
    peak_tokens: int
    n_evicted: float
    n_compressions: float
    n_never: int
    seconds: float

    @property
    def label(self) -> str:
        """What the arm is called."""
        return arm_label(self.method, self.budget)


@dataclass(frozen=True)
class Report:
    """All lines, and what belongs to them.

    Attributes
    ----------
    settings : dict
        What all rows were made with.
    arms : tuple of ArmReport
        By source and budget; within one in the order of the rows.
    baseline : str or None
        Method that differences are to, at the same budget.
    n_stated : int
        Facts that were stated.
    copies_full : tuple of (int, float, float)
        Distance, and the full cache's nats a token of first and of second copies.
    notes : tuple of str
        What a reader must know.
    """

    settings: dict[str, Any]
    arms: tuple[ArmReport, ...]
    baseline: str | None
    n_stated: int
    copies_full: tuple[tuple[int, float, float], ...]
    notes: tuple[str, ...]


_Arm = tuple[str, str, int]  # kind, method, budget


def make_report(
    results: Sequence[Results], baseline: str | None = None, notes: Sequence[str] = ()
) -> Report:
    """Sum up results files that were made with the same settings.

    Parameters
    ----------
    results : sequence of Results
        At least one.
    baseline : str, optional
        Method that each arm is compared with at its own budget; default: `BASELINE` if it is there.
    notes : sequence of str
        What else a reader must know.

    Raises
    ------
    ConfigError
        Settings differ, there are no rows, or no such baseline.
    """
    rows: dict[Any, Row] = {}
    for i, other in enumerate(results):
        here = list(rows.values())
        if i > 0:
            check_same(results[0].settings, other, {row.method for row in here}, profiles_of(here))
        rows |= {row.key: row for row in other.rows}
    arms: dict[_Arm, dict[str, Row]] = {}
    for row in rows.values():
        arms.setdefault((row.kind, row.method, row.budget), {})[row.item] = row
    scored = [arm for arm in arms if arm[0] in (TEXT, OWN)]
    if not scored:
        raise ConfigError(f"{results[0].path}: no text has been scored in it yet")
    methods = list(dict.fromkeys(method for _, method, _ in scored))
    if baseline is None and BASELINE in methods:
        baseline = BASELINE
    elif baseline is not None and baseline not in methods:
        raise ConfigError(f"baseline = {baseline!r} has no rows: there are {', '.join(methods)}")
    order = {arm: i for i, arm in enumerate(scored)}
    scored.sort(key=lambda arm: (arm[0] != TEXT, arm[2], order[arm]))
    stated = [row for row in rows.values() if row.kind == RECALL]
    return Report(
        settings=results[0].settings,
        arms=tuple(_arm_report(arms, arm, baseline) for arm in scored),
        baseline=baseline,
        n_stated=len(stated[0].values["right"]) if stated else 0,
        copies_full=_copies_full(arms),
        notes=(*notes, *_notes(results, arms, scored)),
    )


def _notes(
    results: Sequence[Results], arms: dict[_Arm, dict[str, Row]], scored: Sequence[_Arm]
) -> list[str]:
    notes = notes_of(results, sum(map(versions_of, results), Counter[str]()))
    written = arms.get((WRITTEN, *REFERENCE_ARM), {})
    for arm in scored:
        n_short = len(written) - len(arms[arm]) if arm[0] == OWN else 0
        if n_short > 0:
            notes.append(
                f"{arm_label(*arm[1:])}: {n_short} of the model's own {len(written)} texts are too "
                "short to be scored"
            )
    n_texts = max(len(arms[arm]) for arm in scored)
    if n_texts >= MANY_TEXTS:
        notes.append(f"intervals: 95%, bootstrap over {n_texts} texts")
    else:
        notes.append(
            f"intervals: 95%, bootstrap over blocks of 64 tokens within {n_texts} "
            f"text{'s' if n_texts > 1 else ''}: fewer than {MANY_TEXTS} texts say little about "
            "others"
        )
    return notes


# --- figures -------------------------------------------------------------------------------------


def _arm_report(arms: dict[_Arm, dict[str, Row]], arm: _Arm, baseline: str | None) -> ArmReport:
    kind, method, budget = arm
    texts = arms[arm]
    rows = list(texts.values())
    other = arms.get((kind, baseline or "", budget), {}) if method != baseline else {}
    wanted = {item for key, items in arms.items() if key[::2] == arm[::2] for item in items}
    facts, asked = _probe_rows(arms, RECALL, method, budget)
    copies, _ = _probe_rows(arms, COPY, method, budget)
    base_facts, _ = _probe_rows(arms, RECALL, baseline or "", budget)
    base_copies, _ = _probe_rows(arms, COPY, baseline or "", budget)
    is_base = method == baseline
    known = np.asarray(asked.values["right"]) > 0 if asked is not None else np.zeros(0, bool)
    return ArmReport(
        source=kind,
        method=method,
        budget=budget,
        n_texts=len(rows),
        n_tokens=int(sum(sum(row.values["n"]) for row in rows)),
        n_missing=len(wanted) - len(rows),
        start=min(row.start for row in rows),
        kl=_metric(texts, other, "kl"),
        agree=_metric(texts, other, "agree"),
        nll_more=_metric(texts, other, "nll_more"),
        recall=_recall(facts, known),
        recall_difference=None if is_base else _recall_difference(facts, base_facts, known),
        n_facts=int(known.sum()),
        copy=_copy(arms, copies, None if is_base else base_copies),
        distance=_distance(facts, copies),
        kv_bytes=max(row.kv_bytes for row in rows),
        peak_tokens=max(row.peak_tokens for row in rows),
        n_evicted=sum(row.n_evicted for row in rows) / len(rows),
        n_compressions=sum(row.n_compressions for row in rows) / len(rows),
        n_never=sum(row.n_never for row in rows),
        seconds=sum(row.seconds for row in rows),
    )


def _sums(row: Row, name: str) -> list[float]:
    if name == "nll_more":
        return [a - b for a, b in zip(row.values["nll"], row.values["nll_full"])]
    return row.values[name]


def _metric(texts: dict[str, Row], other: dict[str, Row], name: str) -> Metric:
    """Return a mean over all positions, and what it is more than another arm's on common texts."""
    common = [
        item
        for item, row in texts.items()
        if item in other and other[item].values["n"] == row.values["n"]
    ]
    return Metric(
        _mean([texts[item] for item in texts], name),
        _mean([texts[item] for item in common], name, [other[item] for item in common])
        if common
        else None,
    )


def _mean(rows: Sequence[Row], name: str, others: Sequence[Row] = ()) -> Estimate:
    sums = np.concatenate([_sums(row, name) for row in rows])
    if others:
        sums = sums - np.concatenate([_sums(row, name) for row in others])
    counts = np.concatenate([row.values["n"] for row in rows])
    draws = draw_blocks([len(row.values["n"]) for row in rows], _SEED)
    return ratio_interval(sums, counts, draws)


def _probe_rows(
    arms: dict[_Arm, dict[str, Row]], kind: str, method: str, budget: int
) -> tuple[Row | None, Row | None]:
    """Return an arm's row of facts or passages, and the full cache's over the same distance.

    A full cache has one of each distance: that of the longest counts.
    """
    found = arms.get((kind, method, budget), {})
    if not found:
        return None, None
    item = max(found, key=int)
    return found[item], arms.get((kind, *REFERENCE_ARM), {}).get(item)


def _recall(facts: Row | None, known: Any) -> Estimate | None:
    if facts is None or not known.any():
        return None
    right = np.asarray(facts.values["right"])[known]
    share = float(right.mean())
    return Estimate(share, *wilson(share, len(right)))


def _recall_difference(facts: Row | None, other: Row | None, known: Any) -> Difference | None:
    if facts is None or other is None or other.item != facts.item or not known.any():
        return None
    right, right_other = (np.asarray(row.values["right"])[known] for row in (facts, other))
    return paired_difference(right.tolist(), right_other.tolist(), [1] * len(right))


def _copy(arms: dict[_Arm, dict[str, Row]], copies: Row | None, other: Row | None) -> Metric | None:
    if copies is None:
        return None
    full = arms.get((COPY, *REFERENCE_ARM), {}).get(copies.item)
    if full is None:
        return None
    counts = np.asarray(copies.values["n"])
    draws = draw_blocks([len(counts)], _SEED)
    nll = np.asarray(copies.values["nll"])
    difference = None
    if other is not None and other.item == copies.item:
        difference = ratio_interval(nll - np.asarray(other.values["nll"]), counts, draws)
    more = nll - np.asarray(full.values["nll"])
    return Metric(ratio_interval(more, counts, draws), difference)


def _distance(*rows: Row | None) -> int | None:
    return next((row.start for row in rows if row is not None), None)


def _copies_full(arms: dict[_Arm, dict[str, Row]]) -> tuple[tuple[int, float, float], ...]:
    found = []
    for row in sorted(arms.get((COPY, *REFERENCE_ARM), {}).values(), key=lambda row: row.start):
        first, second, n = (sum(row.values[name]) for name in ("nll_first", "nll", "n"))
        found.append((row.start, first / n, second / n))
    return tuple(found)
