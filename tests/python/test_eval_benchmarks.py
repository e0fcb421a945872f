"""MATH-500 and AIME-24 through the real command, on a small random model: it scores 0.

What is shown: loading, prompts and chat template, judging, resuming, the report. The files are in
the folder that REASONALLOC_DATA_DIR names; what needs none of them has problems of its own.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from gguf_factory import CHAT_TEMPLATE
from test_eval_cli import run, start, without_times

from py_reasonalloc.engine.modelfile import open_vocabulary
from py_reasonalloc.engine.prompts import encode_prompt
from py_reasonalloc.eval.cases.datasets import load_dataset
from py_reasonalloc.eval.decode.answers import judge_for
from py_reasonalloc.eval.results.file import read_results

pytest.importorskip("math_verify", reason="math-verify is not installed")


@pytest.mark.parametrize("name", ["math500", "aime24"])
def test_end_to_end(make_gguf, tmp_path, name) -> None:
    folder = os.environ.get("REASONALLOC_DATA_DIR", "")
    data = Path(folder) / f"{name}.jsonl"
    if not folder or not data.is_file():
        pytest.skip(f"REASONALLOC_DATA_DIR names no folder with {name}.jsonl")
    model = make_gguf(chat_template=CHAT_TEMPLATE, n_ctx_train=8192)
    path = tmp_path / "results.jsonl"
    command = [model, "--dataset", name, "--data", data, "-o", path, "--limit", 3]
    command += ["--methods", "full,rkv,random", "--budgets", 64, "--buffer", 32]
    command += ["--max-tokens", 80, "--samples", 2, "--threads", 1, "--keep-texts"]
    code, out, err = run(*command)
    assert code == 0, err
    rows = read_results(path).rows
    assert len(rows) == 3 * 3 * 2 and name in out
    assert not any(row.correct for row in rows)

    dataset = load_dataset(name, path=data)
    with open_vocabulary(model) as vocabulary:
        for problem, prompt in zip(dataset.problems[:3], dataset.prompts):
            assert problem.question in prompt and "\\boxed{}" in prompt
            n_prompt = len(encode_prompt(vocabulary, prompt))
            assert n_prompt > len(encode_prompt(vocabulary, prompt, raw=True))  # the template
            found = [row for row in rows if row.problem == problem.key]
            assert {row.n_prompt for row in found} == {n_prompt}
            assert {row.gold for row in found} == {problem.answer}
    assert len({row.text for row in rows if row.method == "full"}) == 6  # samples differ
    assert all((row.n_evicted > 0) == (row.budget > 0) for row in rows)

    before = path.read_bytes()
    assert run(*command)[0] == 0  # nothing is left to do
    assert path.read_bytes() == before
    judge = judge_for(name)
    for problem in dataset.problems[:3]:
        text = f"<think>Hmm.</think> The answer is $\\boxed{{{problem.answer}}}$."
        assert judge(text, problem.answer).correct


def test_a_run_that_was_killed_half_way_goes_on(make_gguf, tmp_path) -> None:
    """The texts before and after the kill are those of a run without one."""
    data = tmp_path / "math500.jsonl"
    records = [
        {"unique_id": f"test/{i}.json", "problem": f"What is ${i}+1$?", "answer": str(i + 1)}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = make_gguf(chat_template=CHAT_TEMPLATE, n_ctx_train=8192)
    paths = [tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"]
    commands = [
        [model, "--dataset", "math500", "--data", data, "-o", path, "--threads", 1, "--keep-texts",
         "--methods", "full,rkv,random", "--budgets", 64, "--buffer", 32, "--max-tokens", 120]
        for path in paths
    ]  # fmt: skip
    assert run(*commands[0])[0] == 0
    process = start(*commands[1])
    while not paths[1].exists() or paths[1].read_bytes().count(b"\n") < 1 + 6:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    kept = read_results(paths[1]).rows
    assert 6 <= len(kept) < 18
    code, _, err = run(*commands[1])
    assert code == 0, err
    whole, resumed = (read_results(path).rows for path in paths)
    assert resumed[: len(kept)] == kept
    assert list(map(without_times, resumed)) == list(map(without_times, whole))
    assert len(resumed) == 18 and any(row.n_evicted > 0 for row in resumed[len(kept) :])
