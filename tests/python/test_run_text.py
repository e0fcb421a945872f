"""What `reasonalloc-run` takes and makes of it: prompts, templates, seeds, sampling, thinking."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from gguf_factory import CHAT_TEMPLATE
from processes import (
    NO_BOS_TEMPLATE,
    THINKING_TEMPLATE,
    posix,
)

# --- taken ----------------------------------------------------------------------------------------


def test_one_text_by_every_way_in(call, make_gguf, tmp_path) -> None:
    """A mark at the start, CR LF and newlines at the end: of a file, of standard input, of -p."""
    raw = b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n"
    file = tmp_path / "prompt.txt"
    file.write_bytes(raw)
    options = (make_gguf(), "--json", "-n", 8, "--temp", 0)
    reports = [
        call("run", *options, "-f", file).report,
        call("run", *options, "-f", "-", stdin=raw).report,
        call("run", *options, stdin=raw).report,
        call("run", *options, "-p", raw).report,
        call("run", *options, "-p", "one\ntwo\nthree").report,
    ]
    assert [found["n_prompt"] for found in reports] == [1 + 13] * 5
    assert len({found["text"] for found in reports}) == 1


def test_probe_prompts_from_standard_input(call, make_gguf, tmp_path) -> None:
    command = ("profile", make_gguf(), "--steps", 8, "--temp", 0)
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    demands = []
    for i, prompts in enumerate((file, "-")):
        out = tmp_path / f"{i}.json"
        done = call(*command, "--prompts", prompts, "-o", out, stdin=b"one\ntwo\n")
        assert done.code == 0, done.err
        demands.append(json.loads(out.read_text())["demand"])
    assert demands[0] == demands[1]


@posix
def test_a_name_that_is_not_utf8_is_a_name(call, make_gguf, tmp_path) -> None:
    model = os.fsencode(tmp_path) + b"/caf\xe9.gguf"
    os.link(make_gguf(), model)
    options = ("-p", "hi", "-n", 60, "--temp", 0, "--budget", 32, "--buffer", 16)
    named = call("run", model, *options, "--json", "--trace", tmp_path / "t.jsonl").report
    assert named["text"] == call("run", make_gguf(), *options, "--json").report["text"]
    assert named["model"].endswith("/caf\ufffd.gguf")
    assert call("run", model, "-p", "hi", "--dry-run").code == 0
    done = call("profile", model, "-o", tmp_path / "p.json", "--steps", 4)
    assert done.code == 0, done.err
    done = call(
        *("eval", model, "--dataset", "demo", "--limit", 1, "--max-tokens", 4),
        *("--methods", "full", "-o", tmp_path / "r.jsonl"),
    )
    assert done.code == 0, done.err
    done = call("eval", "report", tmp_path / "r.jsonl", "--markdown", tmp_path / "r.md")
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", ["foreign-name", "foreign-template"])
def test_foreign_bytes_in_metadata(call, odd_files, tmp_path, name) -> None:
    model = odd_files[name]
    # <s>QQ<s><|user|>hi<|assistant|>; llama.cpp's tokenizer makes three bytes of a foreign one
    n_prompt = {"foreign-name": 8, "foreign-template": 8 - 2 + 2 * 3}[name]
    options = ("-p", "hi", "-n", 60, "--budget", 32, "--buffer", 16)
    trace = tmp_path / "t.jsonl"
    found = call("run", model, *options, "--json", "--trace", trace).report
    assert found["n_prompt"] == n_prompt
    shown = call("inspect", trace)
    assert shown.code == 0, shown.err
    first = shown.out.decode().splitlines()[0]
    assert first.startswith("caf\ufffdom llama: " if name == "foreign-name" else "random llama: ")
    log = call("run", model, *options, "--verbose").err.decode()
    assert "\ufffd" in log and "Traceback" not in log
    done = call("profile", model, "-o", tmp_path / "p.json", "--steps", 4)
    assert done.code == 0, done.err
    done = call(
        *("eval", model, "--dataset", "demo", "--limit", 1, "--max-tokens", 4),
        *("--methods", "full", "-o", tmp_path / "r.jsonl"),
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", ["length-0", "length-2^31"])
def test_a_length_that_the_file_lacks_can_be_given(call, odd_files, name) -> None:
    for options in ((), ("--no-budget",), ("--dry-run",)):
        done = call("run", odd_files[name], "-p", "hi", "-n", 4, "--ctx", 64, "--json", *options)
        assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("template", "add_bos", "n_prompt"),
    [
        (CHAT_TEMPLATE, True, 8),  # <s><|user|>hello<|assistant|>
        (NO_BOS_TEMPLATE, True, 8),  # the file asks for one, the template has none
        (CHAT_TEMPLATE, False, 8),  # the other way round
        (NO_BOS_TEMPLATE, False, 7),
    ],
)
def test_one_bos_where_template_or_file_ask_for_it(
    call, make_gguf, template, add_bos, n_prompt
) -> None:
    """As llama.cpp's server and cli do: see engine/prompts.py."""
    model = make_gguf(chat_template=template, add_bos=add_bos)
    found = call("run", model, "-p", "hello", "-n", 1, "--json").report
    assert found["n_prompt"] == n_prompt


def test_template_variables(call, make_gguf) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}{% if x %}[{{ x }}]{% endif %}"
    model = make_gguf(chat_template=template)

    def n_prompt(*options: object) -> int:
        return call("run", model, "-p", "hi", "-n", 1, "--json", *options).report["n_prompt"]

    assert n_prompt() == n_prompt("--template-var", "x=false") == 3
    assert n_prompt("--template-var", "x=12") == n_prompt("--template-var", "x=no") == 3 + 4
    assert n_prompt("--template-var", "x=1", "--template-var", "x=null") == 3


def test_seeds(call, make_gguf) -> None:
    def run(*options: object) -> dict[str, Any]:
        return call("run", make_gguf(), "-p", "hi", "-n", 40, "--json", *options).report

    first, second = run("--seed", -1), run("--seed", -1)
    assert first["seed"] != second["seed"]
    assert first["text"] != second["text"]
    assert run("--seed", first["seed"])["text"] == first["text"]
    assert run()["text"] == run("--seed", 0)["text"]
    done = call("run", make_gguf(), "-p", "hi", "-n", 4, "--seed", 4711)
    assert b"seed 4711]" in done.err


@pytest.mark.parametrize("kind", ["Q8_0", "q5_1", "q5_0", "q4_1", "IQ4_NL"])
def test_cache_types(call, make_gguf, kind) -> None:
    options = ("-p", "hello", "-n", 40, "--temp", 0, "--json", "--kv-type", kind, "--budget", 128)
    found = call("run", make_gguf(), *options).report
    stock = call("run", make_gguf(), *options[:-2], "--no-budget").report
    assert found["kv_type"] == kind.lower()
    assert found["text"] == stock["text"]


def test_positions_beyond_the_trained_context(call, make_gguf) -> None:
    model = make_gguf(n_ctx_train=128)
    common = (model, "-p", "hello", "-n", 200, "--temp", 0, "--json")

    def run(*options: object) -> dict[str, Any]:
        return call("run", *common, *options).report

    stretched = run("--ctx", 512, "--rope-scaling", "linear")
    assert (stretched["n_generated"], stretched["stop_reason"]) == (200, "length")
    assert stretched["rope"] == {"rope_scaling_type": 1, "rope_freq_scale": 0.25}
    same = run("--ctx", 512, "--rope-freq-scale", 0.25)
    assert same["text"] == stretched["text"]
    yarn = run("--ctx", 512, "--rope-scaling", "yarn", "--yarn-beta-fast", 16)
    assert yarn["rope"]["yarn_beta_fast"] == 16
    based = run("--ctx", 512, "--rope-freq-base", 1e6)
    texts = {stretched["text"], yarn["text"], based["text"], run()["text"]}
    assert len(texts) == 4
    dry = call("run", *common, "--ctx", 512, "--rope-scaling", "yarn", "--dry-run").report
    assert dry["n_tokens"] == 206


def test_penalties_keep_a_text_from_going_round(call, make_gguf) -> None:
    def text(*options: object) -> str:
        common = ("-p", "hello", "-n", 150, "--temp", 0, "--json")
        return str(call("run", make_gguf(), *common, *options).report["text"])

    def n_again(text: str) -> int:
        """Triples of characters that the text has had before."""
        triples = [text[i : i + 3] for i in range(len(text) - 2)]
        return len(triples) - len(set(triples))

    plain = text()
    for options in (
        ("--repeat-penalty", 1.5),
        ("--presence-penalty", 3),
        ("--frequency-penalty", 3),
        ("--dry-multiplier", 5, "--dry-base", 3),
    ):
        assert n_again(text(*options)) < n_again(plain), options
    assert len(set(text("--presence-penalty", 50, "--repeat-last-n", -1)[:90])) == 90
    assert text("--presence-penalty", 50, "--repeat-last-n", 0) == plain
    assert text("--dry-multiplier", 5, "--dry-last-n", 0) == plain


def test_xtc_leaves_out_the_likeliest(call, make_gguf) -> None:
    common = ("-p", "hello", "-n", 60, "--temp", 0.2, "--json")
    options = ("--xtc-probability", 1, "--xtc-threshold", 0.01)
    plain = call("run", make_gguf(), *common).report
    found = call("run", make_gguf(), *common, *options).report
    assert found["text"] != plain["text"]
    assert found["xtc_probability"] == 1
    never = call("run", make_gguf(), *common, "--xtc-probability", 1, "--xtc-threshold", 0.6)
    assert never.report["text"] == plain["text"]


# --- thinking -------------------------------------------------------------------------------------


def test_the_demo_stops_thinking_when_told(call) -> None:
    free = call("run", "demo", "--json").report
    assert free["n_thought"] is None
    cut = call("run", "demo", "--json", "--think", 30).report
    opening, closing = "<think>", "</think>"
    assert (cut["n_thought"], cut["is_thought_cut"]) == (30, True)
    thought = cut["text"].partition(opening)[2].partition(closing)[0]
    assert free["text"].startswith(opening + thought)
    assert closing in cut["text"]
    longer = call("run", "demo", "--json", "--think", 5000).report
    assert longer["text"] == free["text"]
    assert not longer["is_thought_cut"]
    end = "\n</think>\nThe answer is"
    asked = call("run", "demo", "--json", "--think", 30, "--think-end", end).report
    assert end in asked["text"]
    assert asked["stop_reason"] == "stop"
    at_once = call("run", "demo", "--json", "--think", 0, "-n", 20).report
    assert at_once["text"].startswith(opening + closing)


@pytest.mark.parametrize(
    ("options", "n_before"),
    [
        ((), None),  # the template knows the tag, neither prompt nor text opens it
        (("--template-var", "thinks=true"), 10),  # the prompt opens it
        (("--think-start", ""), 10),  # the text does, we are told
        (("--think-end", "DONE"), 10),  # a tag that nobody knows: from the start
    ],
)
def test_where_thinking_begins(call, make_gguf, options, n_before) -> None:
    model = make_gguf(chat_template=THINKING_TEMPLATE)
    common = ("-p", "hello", "-n", 40, "--temp", 0, "--json", "--think", 10)
    found = call("run", model, *common, *options).report
    end = "DONE" if "DONE" in options else "</think>"
    if n_before is None:
        assert end not in found["text"]
        assert found["n_thought"] == 0
        return
    assert found["text"].index(end) == n_before
    assert found["n_thought"] == n_before
    assert (found["is_thought_cut"], found["n_generated"]) == (True, 40)


def test_many_threads_are_remarked_on(call) -> None:
    n = (os.cpu_count() or 1) + 1
    done = call("run", "demo", "-n", 2, "--threads", n)
    assert done.code == 0
    first = done.err.decode().splitlines()[0]
    assert re.fullmatch(rf"reasonalloc-run: {n} threads on \d+ processors .*", first)
