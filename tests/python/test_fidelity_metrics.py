"""Divergences, intervals and rows of `reasonalloc-eval fidelity`, without a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.results.file import ResultsFile, read_results
from py_reasonalloc.eval.results.lines import BadLineError
from py_reasonalloc.fidelity.metrics import Reference, Scores, log_softmax
from py_reasonalloc.fidelity.probes import (
    LEAD,
    PASSAGE,
    Filler,
    fact_sequences,
    make_facts,
    passage_sequences,
)
from py_reasonalloc.fidelity.report import make_report
from py_reasonalloc.fidelity.resample import MANY_TEXTS, draw_blocks, ratio_interval
from py_reasonalloc.fidelity.rows import FIDELITY, Row, read_row
from py_reasonalloc.fidelity.run import block_sums
from py_reasonalloc.fidelity.tables import csv_table, json_report, markdown_table, text_table

# --- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (8.0, 300.0), (0.0, -5.0)])
def test_scores_are_those_of_float64(scale, shift) -> None:
    rng = np.random.default_rng(3)
    n, n_vocab, start = 150, 997, 40
    full = (scale * rng.standard_normal((n, n_vocab)) + shift).astype(np.float32)
    arm = (full + rng.standard_normal((n, n_vocab))).astype(np.float32)
    following = rng.integers(n_vocab, size=n)
    log_p, log_q = (special.log_softmax(a.astype(np.float64), axis=1) for a in (full, arm))
    with Reference(start) as reference:
        for first, last in ((0, 100), (100, 101), (101, n)):
            reference.add(full[first:last], following[first:last])
        for first, last in ((64, n), (0, 64)):  # in other pieces, out of order
            found = reference.compare(start + first, arm[first:last], following[first:last])
            p, q = log_p[first:last], log_q[first:last]
            kl = (np.exp(p) * (p - q)).sum(axis=1)
            np.testing.assert_allclose(found.kl, kl, rtol=5e-3, atol=1e-5)
            assert abs(found.kl.mean() - kl.mean()) < 5e-4 * kl.mean() + 1e-6
            rows = np.arange(last - first)
            np.testing.assert_allclose(found.nll, -q[rows, following[first:last]], atol=2e-4)
            np.testing.assert_allclose(found.nll_full, -p[rows, following[first:last]], atol=2e-4)
            same = full[first:last].argmax(axis=1) == arm[first:last].argmax(axis=1)
            np.testing.assert_array_equal(found.agree, same)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 30.0))
def test_the_full_cache_does_not_diverge_from_itself(seed, scale) -> None:
    logits = np.random.default_rng(seed).standard_normal((5, 400)).astype(np.float32)
    logits *= np.float32(scale)
    with Reference(0) as reference:
        reference.add(logits, np.zeros(5, np.intp))
        found = reference.compare(0, logits, np.zeros(5, np.intp))
    assert (np.abs(found.kl) < 1e-5).all() and found.agree.all()
    np.testing.assert_array_equal(found.nll, found.nll_full)


def test_impossible_tokens_do_not_spoil_a_divergence() -> None:
    logits = np.array([[0.0, 1.0, -math.inf]], np.float32)
    with Reference(0) as reference:
        reference.add(logits, np.array([1]))
        found = reference.compare(0, np.array([[1.0, 0.0, -3.0]], np.float32), np.array([1]))
    p, log_q = special.softmax([0.0, 1.0]), special.log_softmax([1.0, 0.0, -3.0])
    assert found.kl[0] == pytest.approx(float((p * (np.log(p) - log_q[:2])).sum()), abs=1e-3)
    assert np.isfinite(log_softmax(logits)[0, :2]).all()


def test_block_sums() -> None:
    n = 150
    rng = np.random.default_rng(0)
    kl, nll, nll_full = rng.random((3, n))
    agree = rng.random(n) < 0.5
    found = block_sums(Scores(kl, agree, nll, nll_full))
    assert found["n"] == [64, 64, 22]
    assert found["agree"] == [int(agree[i : i + 64].sum()) for i in (0, 64, 128)]
    for name, values in (("kl", kl), ("nll", nll), ("nll_full", nll_full)):
        np.testing.assert_allclose(found[name], [values[i : i + 64].sum() for i in (0, 64, 128)])


# --- bootstrap -----------------------------------------------------------------------------------


def test_few_texts_are_strata_of_blocks_and_many_are_drawn_whole() -> None:
    blocks = [3, 1, 5]
    draws = draw_blocks(blocks, seed=1, n_draws=300)
    for first, n in zip(np.cumsum([0, *blocks]), blocks):
        assert (draws[:, first : first + n].sum(axis=1) == n).all()
    many = draw_blocks([2] * MANY_TEXTS, seed=1, n_draws=300)
    assert (many[:, ::2] == many[:, 1::2]).all() and (many.sum(axis=1) == 2 * MANY_TEXTS).all()
    assert many.std() > 0


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    sums, counts = rng.random(40), rng.integers(1, 65, 40)
    first, again, other = (
        ratio_interval(sums, counts, draw_blocks([20, 20], seed)) for seed in (7, 7, 8)
    )
    assert first == again != other
    assert first.value == pytest.approx(sums.sum() / counts.sum())
    # by hand, draw after draw
    draws = draw_blocks([20, 20], 7)
    means = [(d * sums).sum() / (d * counts).sum() for d in draws]
    assert first[1:] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())


def test_intervals_hold_the_mean_of_the_population_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    draws = draw_blocks([15] * 4, 0, 500)
    held = 0
    for _ in range(300):
        found = ratio_interval(rng.gamma(2.0, 3.0, 60), np.full(60, 1.0), draws)
        held += found.low <= 6.0 <= found.high
    assert 0.89 < held / 300 < 0.985


# --- facts and passages --------------------------------------------------------------------------


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_facts_are_stated_once_and_asked_for_after_the_distance() -> None:
    facts = make_facts(40, 0)
    assert facts == make_facts(40, 0) != make_facts(40, 1)
    assert len({fact.opening for fact in facts}) == 40 == len({fact.value for fact in facts})
    filler = Filler([range(1000, 2500)])
    for i, probe in enumerate(fact_sequences(facts, 300, filler, letters, [7])):
        text = "".join(map(chr, [t for t in probe.tokens if 31 < t < 128]))
        fact = facts[i]
        assert text == f" {fact.opening} {fact.value}. {fact.opening} {fact.value}"
        (value,) = probe.spans
        assert probe.tokens[value.start : value.stop] == tuple(letters(f" {fact.value}"))
        opening, stated = letters(f" {fact.opening}"), letters(f" {fact.opening} {fact.value}.")
        assert value.start == 1 + LEAD + len(stated) + 300 + len(opening)
        assert probe.tokens[0] == 7 and value.stop == len(probe.tokens)


@pytest.mark.parametrize("bos", [[], [7]])
def test_passages_come_twice(bos) -> None:
    probes = passage_sequences(5, 200, Filler([range(100, 900), range(1000, 1800)]), bos)
    assert len({probe.tokens for probe in probes}) == 5
    for probe in probes:
        first, second = probe.spans
        assert (second.start, second.stop) == (len(probe.tokens) - PASSAGE, len(probe.tokens))
        assert first.start == 1 and first.stop == len(bos) + PASSAGE
        copy = probe.tokens[second.start : second.stop]
        assert probe.tokens[len(bos) : len(bos) + PASSAGE] == copy
        assert len(probe.tokens) == len(bos) + 2 * PASSAGE + 200


# --- rows and report -----------------------------------------------------------------------------


def row(method="rkv", budget=64, item="a.txt", kl=0.1, **changes) -> Row:
    values = {
        "n": [64, 64, 10],
        "kl": [64 * kl, 32 * kl, 5 * kl],
        "agree": [60, 64, 9],
        "nll": [200.0, 190.5, 30.25],
        "nll_full": [190.0, 190.0, 30.0],
    }
    counts = {"n_tokens": 300, "start": 128, "n_prompt": 0, "n_protect": 0, "peak_tokens": 96}
    counts |= {"kv_bytes": 1000 * budget, "n_evicted": 500, "n_compressions": 4, "n_never": 0}
    made = Row("text", method, budget, item, seconds=1.5, values=values, **counts)
    return replace(made, **changes)


def probe(kind: str, method: str, budget: int, **values) -> Row:
    return row(method, budget, "100", kind=kind, start=100, values=values)


REFERENCE = [
    probe("recall", "reference", 0, right=[1, 1, 0, 1]),
    probe("copy", "reference", 0, n=[10, 10], nll=[2.0, 4.0], nll_first=[30.0, 20.0]),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "best"}, "kind must be one of"),
        ({"budget": -1}, "budget must be"),
        ({"seconds": math.nan}, "seconds must be"),
        ({"item": ""}, "item must be"),
        ({"more": 1}, "no field"),
        ({"values": {}}, "values must have n, kl"),
        ({"values": {**row().values, "n": [64, 64]}}, "one length"),
        ({"values": {**row().values, "kl": [1.0, "x", 2.0]}}, "must hold numbers"),
        ({"values": {**row().values, "n": [64, 0, 10]}}, "at least one token"),
        ({"values": {**row().values, "agree": [0.5, 1, 1]}}, "whole numbers"),
        ({"profile": 5}, "profile must be"),
    ],
)
def test_lines_that_are_no_rows(changes, message) -> None:
    assert read_row(row().to_json()) == row()
    with pytest.raises(BadLineError, match=message):
        read_row({**row().to_json(), **changes})


@pytest.fixture
def results(tmp_path):
    """Return a function that writes rows into a file and reads it."""

    def make(*rows: Row):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        with ResultsFile.open(path, {"model": "m.gguf"}, form=FIDELITY) as file:
            for one in rows:
                file.append(one)
        return read_results(path, form=FIDELITY)

    return make


def test_figures_of_the_report(results) -> None:
    rows = [row(), row(item="b.txt", kl=0.3), row("snapkv", kl=0.2), row("full", 0, kl=0.0)]
    rows += [*REFERENCE, probe("recall", "rkv", 64, right=[1, 0, 1, 0])]
    rows += [probe("recall", "snapkv", 64, right=[0, 0, 0, 0])]
    rows += [probe("copy", "rkv", 64, n=[10, 10], nll=[12.0, 9.0], nll_first=[30.0, 20.0])]
    report = make_report([results(*rows)])
    full, rkv, snapkv = report.arms
    assert (full.method, rkv.method, snapkv.method, report.baseline) == (
        *("full", "rkv", "snapkv"),
        "rkv",
    )
    n = 138
    assert rkv.kl.own.value == pytest.approx(101 * 0.4 / (2 * n))
    assert rkv.agree.own.value == pytest.approx(133 / n)
    assert rkv.nll_more.own.value == pytest.approx(10.75 / n)
    assert rkv.kl.difference is None and full.kl.difference is None
    assert rkv.kl.own.low <= rkv.kl.own.value <= rkv.kl.own.high
    # on the text that both have: block by block 0.1 more, so there is no spread from the text
    assert snapkv.n_missing == 1 and snapkv.kl.difference is not None
    assert snapkv.kl.difference.value == pytest.approx(101 * 0.1 / n)
    assert snapkv.agree.difference == (0.0, 0.0, 0.0)
    # three facts are known with the full cache; the third, which it does not know, counts nothing
    assert (rkv.n_facts, rkv.recall.value, snapkv.recall.value) == (3, pytest.approx(1 / 3), 0.0)
    assert snapkv.recall_difference.value == pytest.approx(-1 / 3)
    assert rkv.copy.own.value == pytest.approx((10.0 + 5.0) / 20) and snapkv.copy is None
    assert report.copies_full == ((100, 2.5, 0.3),)
    shown = text_table(report)
    for part in ("minus rkv", "recall %", "2nd copy", "138*", "blocks of 64 tokens within 2 texts"):
        assert part in shown, part
    assert "| method" in markdown_table(report)
    lines = csv_table(report).splitlines()
    assert len(lines) == 4 and lines[0].startswith("source,method,budget")
    arms = json.loads(json_report(report))["arms"]
    assert arms[2]["kl_difference"] == pytest.approx(101 * 0.1 / n)
    assert arms[0]["recall"] is None and arms[1]["second_copy_more"] == pytest.approx(0.75)


def test_arms_that_never_evicted_are_marked(results) -> None:
    report = make_report([results(row(n_never=1, n_evicted=0))])
    assert "0 (1 never)" in text_table(report) and "evicted nothing" in text_table(report)


def test_a_report_needs_rows_and_a_baseline_that_is_there(results) -> None:
    with pytest.raises(ConfigError, match="no text has been scored"):
        make_report([results(*REFERENCE)])
    with pytest.raises(ConfigError, match="baseline = 'h2o' has no rows: there are snapkv"):
        make_report([results(row("snapkv"))], "h2o")
    report = make_report([results(row("snapkv"))])
    assert report.baseline is None and "minus rkv" not in text_table(report)
