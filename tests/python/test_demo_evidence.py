"""The demo's evidence, reduced: the pipeline is sound, and the full cache beats a small one."""

from __future__ import annotations

import csv
from collections import Counter

import pytest

from py_reasonalloc import ReasonLlama
from py_reasonalloc.demo import autopsy, evidence
from py_reasonalloc.demo.problems import generate_problem
from py_reasonalloc.demo.vocab import decode, encode
from py_reasonalloc.eval.methods import Arm
from py_reasonalloc.eval.results import read_results


def test_equal_bytes_are_equal() -> None:
    arms = evidence.equal_bytes([96, 160])
    assert arms[:2] == ["rkv+kv=f16@96", "rkv+kv=q8_0@194"]
    for i, arm in enumerate(arms):
        label, _, budget = arm.partition("@")
        size = evidence.ELEMENT_BYTES[label.partition("kv=")[2]]
        wanted = ([96, 160][i // 3] + evidence.BUFFER) * 2.0
        assert wanted - size < (int(budget) + evidence.BUFFER) * size <= wanted


def test_places_of_a_gold_chain() -> None:
    kinds: Counter[str] = Counter()
    for index in range(20):
        chain = generate_problem(7, index, 2).chain
        ids, n_recalled = encode(chain), chain.count("as we found before")
        found = list(autopsy.places(chain))
        assert len(found) == len(ids)
        for token, place in zip(ids, found):
            kinds[place.kind] += 1
            if place.source >= 0:  # it was stated there, and is the same value
                assert place.kind.startswith("value") and ids[place.source] == token
            if place.kind == "sign":
                assert decode([token]) in (" plus", " minus")
        assert n_recalled <= sum(place.kind == "value found before" for place in found)
        assert sum(place.kind == "sum" for place in found) == 2 * chain.count("Check:")
    assert min(kinds[kind] for kind in (*autopsy._KINDS, "other")) >= 20


def test_a_wave_is_the_papers_unless_an_arm_names_another_profile() -> None:
    """Looked up, the demo's profile is that with a horizon: two arms would be one."""
    labels = ["wave@160", "wave+profile=demo-reasoner-horizon@160", "rkv@160"]
    plain, horizon, rkv = (s.config for s in autopsy.setups_of(labels, 62).values())
    assert plain and horizon and rkv and plain.protect_prompt == 62
    assert plain.profile.name == "demo-reasoner" and horizon.profile.horizon == 128
    assert rkv.layers == "uniform" and plain.profile.demand != horizon.profile.demand


def test_autopsy_of_a_cache_that_holds_everything(demo_model, capsys) -> None:
    problem = generate_problem(40_000, 0, 1)
    report = autopsy.Autopsy()
    with ReasonLlama(demo_model, 600, buffer=16, n_threads=1) as llama:
        report.examine(llama, problem)
    assert report.n_exact + report.wrong.total() == 1
    assert len(report.held[True]) > 0
    assert all((shares == 1.0).all() for held in report.held.values() for shares in held)
    report.show(Arm("rkv", 600))
    assert "of 1 chains" in capsys.readouterr().out


@pytest.mark.slow
def test_reduced_evidence(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evidence, "METHODS", ("full", "rkv", "reasonalloc"))
    monkeypatch.setattr(evidence, "BUDGETS", (evidence.BUDGETS[0], evidence.BUDGETS[-1]))
    plan = evidence.comparisons(50, 50)["methods"]
    evidence.run(tmp_path, {"methods": plan}, n_jobs=2)
    rows = read_results(tmp_path / "methods.jsonl").rows
    assert len(rows) == 5 * 50 == len({row.key for row in rows})
    for row in rows:
        assert (row.n_evicted > 0) == (row.budget > 0)
        if row.budget > 0:  # 6 layers of 4 heads; K and V rows of 32 f16 values
            assert row.kv_bytes == 6 * 4 * (row.budget + evidence.BUFFER) * 2 * 32 * 2
        if row.method == "rkv":
            assert row.peak_tokens <= row.budget + evidence.BUFFER
    right = {
        arm: sum(row.correct for row in rows if (row.method, row.budget) == arm)
        for arm in {(row.method, row.budget) for row in rows}
    }
    assert right["full", 0] > right["rkv", evidence.BUDGETS[0]]
    with (tmp_path / "methods.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.reader(stream))) == 1 + 5
    assert (tmp_path / "methods.svg").stat().st_size > 1000
    assert "reasonalloc" in (tmp_path / "methods.md").read_text(encoding="utf-8")
