"""The demo's evidence, reduced: the pipeline is sound, and the full cache beats a small one."""

from __future__ import annotations

import csv
import gzip
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

from py_reasonalloc import ConfigError, ReasonLlama
from py_reasonalloc.demo import autopsy, evaluate, evidence, evidence_tables
from py_reasonalloc.eval.cases import datasets
from py_reasonalloc.eval.cases.rows import Row
from py_reasonalloc.eval.results.file import Results, read_results
from py_reasonalloc.output.console import run_command
from py_reasonalloc.task.problems import generate_problem
from py_reasonalloc.task.vocab import decode, encode


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
    assert min(kinds[kind] for kind in (*autopsy.KINDS, "other")) >= 20


def test_a_wave_is_the_papers_unless_an_arm_names_another_profile() -> None:
    """Looked up, the demo's profile is that with a horizon: two arms would be one."""
    labels = ["wave@160", "wave+profile=demo-reasoner-horizon@160", "rkv@160"]
    plain, horizon, rkv = (s.config for s in autopsy.setups_of(labels, 62).values())
    assert plain and horizon and rkv and plain.protect_prompt == 62
    assert plain.profile.name == "demo-reasoner" and horizon.profile.horizon == 128
    assert rkv.layers == "uniform" and plain.profile.demand != horizon.profile.demand


def test_autopsy_of_a_cache_that_holds_everything(demo_model) -> None:
    problem = generate_problem(40_000, 0, 1)
    report = autopsy.Autopsy()
    with ReasonLlama(demo_model, 600, buffer=16, n_threads=1) as llama:
        report.examine(llama, problem)
    assert (report.n_exact, report.wrong.total()) == (1, 0)
    assert len(report.held[True]) > 0
    assert all((shares == 1.0).all() for held in report.held.values() for shares in held)
    assert "rkv@600: 1 of 1 chains" in autopsy.text_of("rkv@600", report.to_json())


@pytest.mark.parametrize(
    ("command", "arguments", "code", "message"),
    [
        (autopsy.main, ["best@160"], 2, "method = 'best' is unknown"),
        (autopsy.main, ["rkv@160", "rkv@10"], 2, "rkv@10: budget 10 is too small"),
        (autopsy.main, ["full"], 2, "full: must be METHOD@BUDGET, e.g. rkv@160"),
        (autopsy.main, ["rkv@160", "--problems", "0"], 2, "0 is not in the range"),
        (autopsy.main, [], 2, "METHOD@BUDGET"),
        (evaluate.main, ["none.gguf"], 1, "none.gguf: no such file"),
        (evaluate.main, [__file__], 1, "not a GGUF"),
        (evaluate.main, ["--problems", "0"], 2, "0 is not in the range"),
        (evidence.main, ["--problems", "0"], 2, "0 is not in the range"),
        (evidence.main, ["--only", "methods,odds"], 2, "'odds' must be one of defaults, methods, "),
        (evidence.main, ["--report-only", "--out", "nothing"], 2, "nothing: there are no results"),
        (evidence.main, ["--docs", "no.md"], 2, "no.md: cannot be read: No such file"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path, monkeypatch, capsys, command, arguments, code, message
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(command, "demo", arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (code, "", 1), err
    assert message in err and not list(tmp_path.iterdir())


def results_of(*arms: tuple[str, int, str, int]) -> Results:
    """Return rows of arms: label, budget, a digit per problem (1: right), how many evicted."""
    shared = {"sample": 0, "seed": 0, "gold": "1", "n_prompt": 62, "n_generated": 9, "stop": "end"}
    rows = [
        Row(method, budget, str(i), answer=digit, correct=digit == "1", kv_bytes=budget * 1024,
            n_evicted=int(i < n_evicted), decode_seconds=60.0, **shared)
        for method, budget, digits, n_evicted in arms
        for i, digit in enumerate(digits)
    ]  # fmt: skip
    return Results(Path("r.jsonl"), {}, tuple(rows), 0, 0)


def test_texts_that_lost_nothing_are_marked() -> None:
    groups = [["rkv+kv=f16@96", "rkv+kv=q8_0@194"], ["rkv+kv=f16@128", "rkv+kv=q8_0@255"]]
    arms = [("full", 0, "1111", 0), ("full+kv=q8_0", 0, "1110", 0), ("rkv+kv=f16", 96, "1000", 4)]
    results = results_of(*arms, ("rkv+kv=q8_0", 194, "1100", 1))
    lines = evidence_tables.bytes_table(results, groups, ["f16", "q8_0"]).splitlines()
    assert lines == [
        "4 problems; 16 minutes of decoding, all processes together. In brackets: the budget, "
        "tokens.",
        "",
        "| bytes of the cache | f16 | q8_0 |",
        "|---|---:|---:|",
        "| 96 KiB | 25% (96) | 50% (194) [3/4] |",
        "| full cache | 100% | 75% |",
        "",
        "[k/n]: in k of n texts nothing was evicted; they say nothing about the method.",
    ]
    lines = evidence_tables.matrix(results_of(*arms, ("rkv", 96, "01", 2))).splitlines()
    assert lines[0].endswith("Not complete: some arms have 2 so far.") and lines[-1][0] == "|"
    assert "| `rkv+kv=f16` |  | 25.0 |" in lines and "| `rkv` |  | 50.0 |" in lines


def test_autopsies_as_a_table() -> None:
    wrong = {autopsy.FAR_VALUE: 4, "sum": 2, "sign": 1, "other": 1, "ended too early": 1}
    one = {
        "n_problems": 12,
        "n_exact": 3,
        "wrong": wrong,
        "held": {"right": [1.0, 0.76, 0.5], "wrong": []},
        "seconds": 61.0,
    }
    lines = evidence_tables.autopsy_table({"rkv@160": one}).splitlines()
    assert lines[0] == "12 problems an arm; 1 minute."
    assert lines[-1] == "| `rkv@160` | 3 | 3 / 4 / 2 | 76% / - |"


def test_sections_of_a_page(tmp_path) -> None:
    page = tmp_path / "page.md"
    text = "# A\n<!-- x -->\n<!-- /x -->\nb\n<!-- y -->\nold\nold\n<!-- /y -->\nc\n"
    page.write_text(text)
    evidence_tables.fill(page, "y", "| \\1 |\n")
    assert page.read_text() == text.replace("old\nold", "| \\1 |")
    evidence_tables.fill(page, "x", "new")
    assert "<!-- x -->\nnew\n<!-- /x -->\nb" in page.read_text()
    with pytest.raises(ConfigError, match=r"must have <!-- z --> and <!-- /z --> once"):
        evidence_tables.fill(page, "z", "new")
    evidence_tables.check_page(ROOT / "docs" / "evidence.md", evidence.all_parts(1, 1))


@pytest.mark.slow
def test_reduced_evidence(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    budgets = (evidence.BUDGETS[0], evidence.BUDGETS[-1])
    for name, value in (
        ("METHODS", ("full", "rkv", "reasonalloc")),
        ("BUDGETS", budgets),
        ("PARTS", ("rkv", "wave+profile=demo-reasoner-horizon")),
        ("WIDE_METHODS", ("rkv+window=16", "random+window=16")),
        ("WIDE_BUDGETS", (128,)),
        ("UNPROTECTED", ("rkv",)),
        ("BYTE_BUDGETS", (96,)),
        ("AUTOPSY_ARMS", ("rkv@160", "wave@160")),
        ("AUTOPSY_PROBLEMS", 3),
    ):
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(datasets, "DEMO_PROBLEMS", 20)  # hundreds of prompts take their time
    parts, out, page = evidence.all_parts(20, 4), tmp_path / "out", tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in parts))
    evidence.run(out, {"methods": parts["methods"]}, n_jobs=2, page=page)
    evidence.run(out, {name: parts[name] for name in parts if name != "methods"}, 1, page)
    rows = read_results(out / "methods.jsonl").rows
    assert len(rows) == 5 * 20 == len({row.key for row in rows})
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
    with (out / "methods.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.reader(stream))) == 1 + 5
    assert (out / "methods.svg").stat().st_size > 1000
    assert "reasonalloc" in (out / "methods.md").read_text(encoding="utf-8")
    assert "wave@160: " in (out / "autopsy.md").read_text(encoding="utf-8")
    text, files = page.read_text(), {path.name: path.read_bytes() for path in out.iterdir()}
    assert "20 problems; " in text and "3 problems an arm; " in text
    for name in parts:
        section = (out / f"{name}-section.md").read_text().strip()
        assert f"<!-- {name} -->\n{section}\n<!-- /{name} -->" in text and "| `" in text
    assert re.search(r"\| 336 KiB \| \d+% \(96\) \| \d+% \(194\) \| \d+% \(382\) \|", text)

    # again: nothing is decoded, and everything is the same
    monkeypatch.setattr(autopsy.Autopsy, "examine", None)
    evidence.run(out, {"autopsy": parts["autopsy"], "types": parts["types"]}, 1, page)
    # from the packed results alone
    monkeypatch.setattr(evidence, "evaluate", None)
    for path in out.iterdir():
        if path.suffix not in (".gz", ".json"):
            path.unlink()
    page.write_text(re.sub(r"(?s)-->\n[^<]*?<!-- /", "-->\n<!-- /", text))
    assert page.read_text() != text
    evidence.run(out, parts, 1, page, report_only=True)
    assert page.read_text() == text
    again = {path.name: path.read_bytes() for path in out.iterdir()}
    assert again == {name: data for name, data in files.items() if not name.endswith(".jsonl")}
    with pytest.raises(ConfigError, match="made with other settings: delete it, or pass another"):
        evidence.run(out, {"autopsy": parts["autopsy"]._replace(limit=2)}, 1)


def test_results_are_packed_alike(monkeypatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    first = evidence.packed(b"abc" * 100)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert evidence.packed(b"abc" * 100) == first and gzip.decompress(first) == b"abc" * 100
