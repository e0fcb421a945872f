"""`reasonalloc-eval fidelity` as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import special

from py_reasonalloc import BudgetConfig, ReasonLlama
from py_reasonalloc.commands import eval as cli
from py_reasonalloc.eval.results.file import read_results
from py_reasonalloc.fidelity.rows import FIDELITY

TEXTS = ROOT / "docs" / "fidelity" / "texts"
#: The demo's own texts: a few hundred tokens, many compressions.
OWN = ("demo", "--own", "--own-limit", "2", "--own-tokens", "200", "--threads", "1")
ARMS = ("--methods", "full,rkv,streaming", "--budgets", "80,96", "--protect-prompt", "off")


def run(*arguments: object) -> None:
    cli.fidelity_command.main(list(map(str, arguments)), standalone_mode=False)


def without_times(path: Path) -> list[dict[str, object]]:
    rows = [row.to_json() for row in read_results(path, form=FIDELITY).rows]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results file of a complete run."""
    folder = tmp_path_factory.mktemp("fidelity")
    outputs = [f"--{kind}={folder / f'out.{kind}'}" for kind in ("json", "csv", "markdown")]
    run(*OWN, *ARMS, "-o", folder / "r.jsonl", *outputs)
    return folder / "r.jsonl"


def test_rows_and_tables(finished) -> None:
    rows = read_results(finished, form=FIDELITY).rows
    assert len(rows) == 2 + 2 * 5
    written = {row.item: row for row in rows if row.kind == "written"}
    for row in rows:
        if row.kind == "written":
            continue
        text = written[row.item]
        assert (row.n_tokens, row.n_prompt) == (text.n_tokens, text.n_prompt)
        assert row.start == max((row.budget or 80) + 16, row.n_prompt - 1)
        assert sum(row.values["n"]) == row.n_tokens - 1 - row.start
        if row.method == "full":
            assert sum(row.values["kl"]) < 1e-6 * sum(row.values["n"])
            assert row.values["nll"] == pytest.approx(row.values["nll_full"])
            assert row.values["agree"] == row.values["n"] and row.n_evicted == 0
        else:
            assert row.kv_bytes == 6 * 4 * (row.budget + 16) * 32 * 2 * 2
            assert row.n_compressions > 0 and row.n_evicted > 0 and row.n_never == 0
            assert sum(row.values["kl"]) > 0
    folder = finished.parent
    report = json.loads((folder / "out.json").read_text())
    lines = list(csv.DictReader((folder / "out.csv").read_text().splitlines()))
    assert len(report["arms"]) == len(lines) == 5
    for arm, line in zip(report["arms"], lines):
        mine = [
            row
            for row in rows
            if (row.method, row.budget) == (arm["method"], arm["budget"]) and row.kind == "own"
        ]
        kl = sum(sum(row.values["kl"]) for row in mine) / sum(sum(row.values["n"]) for row in mine)
        assert arm["kl"] == pytest.approx(kl) == pytest.approx(float(line["kl"]))
        assert (arm["kl_difference"] is None) == (arm["method"] != "streaming")
    assert "| method" in (folder / "out.markdown").read_text()


def test_figures_are_those_of_decoding_one_by_one(finished, demo_model) -> None:
    """Everything again without this package's reading: tokens one by one, float64."""
    rows = {row.key: row for row in read_results(finished, form=FIDELITY).rows}
    row = next(row for row in rows.values() if (row.method, row.budget) == ("rkv", 80))
    written = next(r for r in rows.values() if r.kind == "written" and r.item == row.item)
    tokens = [int(token) for token in written.values["tokens"]]
    logs = []
    for config in (None, BudgetConfig(80, policy="rkv", buffer=16, window=16)):
        logits = []
        with ReasonLlama(demo_model, config, n_ctx=512, n_threads=1, n_threads_batch=1) as llama:
            for token in tokens[:-1]:
                llama.eval([token])
                logits.append(
                    np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),)).copy()
                )
        logs.append(special.log_softmax(np.array(logits[row.start :], np.float64), axis=1))
    p, q = logs
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    following = tokens[row.start + 1 :]
    assert sum(row.values["kl"]) == pytest.approx(kl.sum(), rel=0.01, abs=1e-4)
    assert sum(row.values["agree"]) == (p.argmax(axis=1) == q.argmax(axis=1)).sum()
    for name, log in (("nll", q), ("nll_full", p)):
        nll = -log[np.arange(len(following)), following].sum()
        assert sum(row.values[name]) == pytest.approx(nll, rel=1e-3, abs=1e-2)


def test_a_finished_run_reads_nothing_and_can_be_extended(finished, tmp_path, capsys) -> None:
    path = tmp_path / "more.jsonl"
    path.write_bytes(finished.read_bytes())
    run(*OWN, *ARMS, "-o", path)
    assert path.read_bytes() == finished.read_bytes()
    capsys.readouterr()
    run(
        *OWN,
        "--methods",
        "rkv,rkv+kv=q8_0",
        "--budgets",
        "80",
        "--protect-prompt",
        "off",
        "-o",
        path,
    )
    rows = read_results(path, form=FIDELITY).rows
    assert [row.method for row in rows[12:]] == ["rkv+kv=q8_0"] * 2
    assert "rkv+kv=q8_0" in capsys.readouterr().out


def test_kill_and_resume_lose_and_double_nothing(finished, tmp_path) -> None:
    path = tmp_path / "killed.jsonl"
    command = [
        sys.executable,
        "-m",
        "py_reasonalloc.commands.eval",
        "fidelity",
        *OWN,
        *ARMS,
        "-o",
        path,
    ]
    for n_lines in (3, 7):
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and (
            not path.exists() or path.read_bytes().count(b"\n") < n_lines
        ):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()
    run(*OWN, *ARMS, "-o", path)
    assert without_times(path) == without_times(finished)


def test_picture(finished, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    run(*OWN, *ARMS, "-o", finished, "--plot", tmp_path / "a.svg")
    run(*OWN, *ARMS, "-o", finished, "--plot", tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and b"</svg>" in drawn


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, demo_model):
    """Texts and models that are none."""
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Grüße, ".encode("latin-1") * 500)
    (tmp_path / "zeros.txt").write_bytes(b"text\0" * 500)
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "nothing").mkdir()
    data = demo_model.read_bytes()
    assert data[:4] == b"GGUF"
    (tmp_path / "vocab.gguf").write_bytes(data[:8] + struct.pack("<q", 0) + data[16:])
    return tmp_path


RKV = ("--methods", "rkv", "--budgets", 128)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["demo"], 2, "nothing to read: pass --text FILES, --own, or both"),
        (["demo", "--text", "no.txt"], 2, "no.txt: no such text file"),
        (["demo", "--text", "{}/nothing"], 2, "has no .txt files"),
        (["demo", "--text", "{}/empty.txt"], 2, "empty.txt: the text is empty"),
        (["demo", "--text", "{}/latin.txt"], 2, "latin.txt: not plain text: it is not UTF-8"),
        (["demo", "--text", "{}/zeros.txt"], 2, "zeros.txt: not plain text: it holds zero bytes"),
        (
            ["demo", "--text", "{}/short.txt", *RKV],
            2,
            "needs 209 (budget + buffer, and 64 to score)",
        ),
        (["demo", "--text", "{}/short.txt", "{}/short.txt"], 2, "two texts have this name"),
        (["{}/short.txt", "--own", *RKV], 1, "not a GGUF file"),
        (["no.gguf", "--own", *RKV], 1, "no such file"),
        (["{}/vocab.gguf", "--own", *RKV], 1, "vocab.gguf: cannot be loaded: "),
        (["demo", "--own", "--methods", "best", "--budgets", 128], 2, "method = 'best' is unknown"),
        (["demo", "--own", "--methods", "rkv", "--budgets", "1x"], 2, "is not a list of numbers"),
        (["demo", "--own", *RKV, "--kv-type", "q3"], 2, "'q3' is unknown"),
        (["demo", "--own", *RKV, "--target-kl", "-1"], 2, "--target-kl = -1 is out of range"),
        (["demo", "--own", *RKV, "--plot", "x.gif"], 2, "must end in"),
        (["demo", "--own", *RKV, "--csv", "no/such/x.csv"], 2, "its folder does not exist"),
        (["demo", "--own", *RKV, "--own-tokens", 99999], 1, "but the model was trained for"),
        (
            ["demo", "--own", *RKV, "--own-tokens", 20, "--own-limit", 1, "--threads", 1],
            2,
            "pass lower --budgets",
        ),
        (["demo", "--text", "{}/short.txt", "--facts", "500", *RKV], 2, "must be 0 to 400"),
    ],
)
def test_one_clear_line(files, capsys, arguments, code, message) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["fidelity", *(str(argument).format(files) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (code, "", 1), err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", 8], "made with other settings: window = 16 there, 8 here"),
        (["--own-tokens", 100], "own_tokens = 200 there, 100 here"),
        (["--protect-prompt", 9], "protect_prompt = 0 there, 9 here"),
        (["--methods", "rkv+buffer=32"], "positions from 96 on were scored there"),
        (["--csv", "{}"], "would replace what it is made from"),
    ],
)
def test_a_file_of_another_configuration(finished, capsys, arguments, message) -> None:
    before = finished.read_bytes()
    given = [str(argument).format(finished) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        cli.run(["fidelity", *OWN, *ARMS, "-o", str(finished), *given])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and message in err, err
    assert finished.read_bytes() == before


def test_files_of_the_other_command_are_refused(finished, tmp_path, capsys) -> None:
    other = tmp_path / "eval.jsonl"
    other.write_text('{"reasonalloc_eval": 1, "settings": {}}\n')
    with pytest.raises(SystemExit):
        cli.run(["fidelity", *OWN, *ARMS, "-o", str(other)])
    assert "not a results file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run(["report", str(finished)])
    assert "not a results file" in capsys.readouterr().err


# --- a real model --------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_real_model_still_knows(smollm2, tmp_path) -> None:
    """Streaming forgets what it read before its window; 8 bits forget nothing."""
    run(
        *(smollm2, "--text", TEXTS / "message.txt", "--max-tokens", 700, "--threads", 2),
        *("--methods", "full,full+kv=q8_0,streaming,keydiff@256", "--budgets", 128),
        *("--facts", 6, "--passages", 2, "--json", tmp_path / "r.json"),
    )
    report = json.loads((tmp_path / "r.json").read_text())
    arms = {arm["method"]: arm for arm in report["arms"]}
    assert arms["full"]["kl"] < 1e-6 and arms["full"]["agree"] == 1.0
    assert arms["full"]["recall"] == 1.0 and abs(arms["full"]["second_copy_more"]) < 1e-6
    assert arms["streaming"]["n_facts"] >= 4 and arms["streaming"]["recall"] == 0.0
    assert arms["full+kv=q8_0"]["kl"] < 0.02 < arms["streaming"]["kl"]
    assert arms["full+kv=q8_0"]["recall"] >= 0.75
    assert abs(arms["full+kv=q8_0"]["second_copy_more"]) < 0.1
    assert arms["streaming"]["second_copy_more"] > 1.0
    for copies in report["second_copies_full"]:
        assert copies["nll_second"] < 0.5 * copies["nll_first"]
