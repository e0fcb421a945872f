"""The demo's evidence, reduced: the pipeline is sound, and the full cache beats a small one."""

from __future__ import annotations

import csv

import pytest

from py_reasonalloc.demo import evidence
from py_reasonalloc.eval.results import read_results


def test_equal_bytes_are_equal() -> None:
    arms = evidence.equal_bytes([96, 160])
    assert arms[:2] == ["rkv+kv=f16@96", "rkv+kv=q8_0@194"]
    for i, arm in enumerate(arms):
        label, _, budget = arm.partition("@")
        size = evidence.ELEMENT_BYTES[label.partition("kv=")[2]]
        wanted = ([96, 160][i // 3] + evidence.BUFFER) * 2.0
        assert wanted - size < (int(budget) + evidence.BUFFER) * size <= wanted


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
        assert row.peak_tokens <= row.budget + evidence.BUFFER or row.budget == 0
    right = {
        arm: sum(row.correct for row in rows if (row.method, row.budget) == arm)
        for arm in {(row.method, row.budget) for row in rows}
    }
    assert right["full", 0] > right["rkv", evidence.BUDGETS[0]]
    with (tmp_path / "methods.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.reader(stream))) == 1 + 5
    assert (tmp_path / "methods.svg").stat().st_size > 1000
    assert "reasonalloc" in (tmp_path / "methods.md").read_text(encoding="utf-8")
