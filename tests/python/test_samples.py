"""`reasonalloc-run --samples`: texts side by side, each that of a run of its own, and a vote."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from py_reasonalloc.eval.decode.answers import judge_demo
from py_reasonalloc.eval.decode.vote import vote

#: of ModelSpec(): layers x KV heads x (K + V) x head_dim x bytes of f16
ROW_BYTES = 2 * 2 * 2 * 32 * 2
DRAWN = ("--temp", 0.8, "--threads", 1)
#: Hot enough for the demo, which is sure of itself, to write different texts.
HOT = ("--temp", 2.5, "--top-p", 1, "--threads", 1)


def report(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("cache", [("--budget", 112), ("--no-budget",)])
def test_every_text_is_that_of_a_run_with_its_seed(cli, cache) -> None:
    arguments = ("demo", *HOT, *cache, "-n", 150, "--json")
    found = report(cli(*arguments, "--samples", 3, "--seed", 5))
    assert [text["seed"] for text in found["texts"]] == [5, 6, 7]
    assert [text["index"] for text in found["texts"]] == [0, 1, 2]
    for text in found["texts"]:
        alone = report(cli(*arguments, "--seed", text["seed"]))
        for name in ("text", "n_generated", "stop_reason", "n_compressions", "n_evicted"):
            assert text[name] == alone[name], name
        assert text["answer"] is None
    assert len({text["text"] for text in found["texts"]}) > 1
    assert found["n_prompt_read"] == found["n_prompt"] == alone["n_prompt"]
    assert found["n_generated"] == sum(text["n_generated"] for text in found["texts"])
    assert found["n_steps"] < found["n_generated"]
    if cache[0] == "--budget":
        assert found["kv_bytes"] == 3 * alone["kv_bytes"]
    assert (found["majority"], found["majority_texts"]) == (None, [])


def test_answers_and_majority(cli) -> None:
    arguments = ("demo", *DRAWN, "--samples", 3, "--vote")
    found = report(cli(*arguments, "--json"))
    texts = found["texts"]
    assert [text["answer"] for text in texts] == [judge_demo(t["text"], "0").answer for t in texts]
    assert found["majority"] == texts[found["majority_texts"][0]]["answer"] is not None
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    for i, text in enumerate(texts):
        head = (
            f"=== text {i + 1} of 3, seed {i}: {text['n_generated']} tokens; end: the model ended"
        )
        assert head in done.stdout
        assert text["text"] in done.stdout
    n = len(found["majority_texts"])
    assert done.stdout.endswith(f"\nmajority: {found['majority']} ({n} of 3)\n")
    assert "prompt tokens read once" in done.stderr
    assert f"({found['kv_bytes']} bytes) for 3 texts" in done.stderr


def test_limited_thinking(cli) -> None:
    found = report(cli("demo", *DRAWN, "--samples", 2, "--think", 20, "--json"))
    for text in found["texts"]:
        assert (text["n_thought"], text["is_thought_cut"]) == (20, True)
        assert "</think>" in text["text"][:200]


@pytest.mark.parametrize(
    ("texts", "answers", "groups"),
    [
        (["The answer is ten.", "The answer is nine.", "The answer is ten."],
         ["10", "9", "10"], [[0, 2], [1]]),
        (["none", "The answer is nine.", "no"], [None, "9", None], [[1]]),
        (["The answer is one.", "The answer is two."], ["1", "2"], [[0], [1]]),
        (["no", "no"], [None, None], []),
    ],
)  # fmt: skip
def test_votes(texts, answers, groups) -> None:
    found = vote(texts, judge_demo)
    assert (found.answers, found.groups) == (answers, groups)
    assert found.majority == (answers[groups[0][0]] if groups else None)


def test_equal_answers_are_written_in_different_ways() -> None:
    pytest.importorskip("math_verify")
    from py_reasonalloc.eval.decode.answers import judge_math

    texts = [r"\boxed{2}", r"so \boxed{\frac{1}{2}}", r"\boxed{0.5}", "?", r"\boxed{\frac{2}{4}}"]
    found = vote(texts, judge_math)
    assert found.groups == [[1, 2, 4], [0]]
    assert found.answers[3] is None
    assert found.majority == found.answers[1]


def test_dry_run_shows_the_bytes_of_all_texts(cli, make_gguf) -> None:
    arguments = (make_gguf(), "-p", "hello", "--budget", 32, "--buffer", 16, "--dry-run", "-n", 90)
    one = report(cli(*arguments, "--json"))
    four = report(cli(*arguments, "--samples", 4, "--json"))
    assert four["kv_bytes"] == 4 * one["kv_bytes"] == 4 * 48 * ROW_BYTES
    assert four["window_bytes"] == 4 * one["window_bytes"]
    assert four["layer_bytes"] == [4 * n for n in one["layer_bytes"]]
    assert (one["n_samples"], four["n_samples"]) == (1, 4)
    assert four["full_kv_bytes"] >= 4 * (6 + 90) * ROW_BYTES
    # what the run then takes
    run = report(cli(*arguments[:-3], "-n", 90, "--samples", 4, "--temp", 1, "--json"))
    for name in ("kv_bytes", "window_bytes", "compute_bytes", "weights_bytes"):
        assert run[name] == four[name], name
    lines = cli(*arguments, "--samples", 4).stdout.splitlines()
    (line,) = (line for line in lines if line.startswith("4 x cache, budget 32 + 16 (f16)"))
    assert f" {four['kv_bytes']} bytes" in line
    assert any(line.startswith("full cache for 4 x 96 tokens") for line in lines)


def test_sizes_of_many_sequences() -> None:
    def table(*arguments: str) -> str:
        command = [sys.executable, "-m", "py_reasonalloc.sizes", "--budgets", "256", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
        ).stdout

    assert "| full, 16,384 tokens | budget 256 |" in table()
    assert "| 448 MiB | 10 MiB |" in table()
    many = table("--parallel", "8")
    assert "| full, 8 x 16,384 tokens | budget 256 |" in many
    assert "| 3,584 MiB | 84 MiB |" in many


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_ends_all_texts_and_prints_them(make_gguf) -> None:
    command = [sys.executable, "-m", "py_reasonalloc.commands.run", str(make_gguf()), "-p", "hello"]
    command += ["--ctx", "100000", "--rope-freq-base", "1e6", "--samples", "2", "--verbose"]
    command += ["--budget", "32", "--buffer", "16", "--threads", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        for line in process.stderr:  # llama.cpp's last word before it decodes
            if "graph splits" in line or "compute buffer" in line:
                break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    except BaseException:
        process.kill()
        raise
    assert process.returncode == 130
    assert "=== text 2 of 2, seed 1: " in out
    assert out.count("end: stopped by Ctrl-C") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", 0], "0 is not in the range"),
        (["--samples", 500], "500 is not in the range"),
        (["--vote"], "--vote needs --samples K, at least 2"),
        (["--samples", 2, "--temp", 0], "--samples needs a temperature: greedy samples"),
        (["--samples", 2, "--trace", "x.gz"], "--samples and --trace exclude each other"),
    ],
)
def test_bad_input(cli, arguments, words) -> None:
    done = cli("demo", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("reasonalloc-run: ")
    assert words in line
