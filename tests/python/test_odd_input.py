"""What people do to a command: foreign bytes, full disks, odd files, options that clash.

Through the real commands. Whatever is refused gives one line on standard error, an exit code that
says whose fault it is, and nothing on standard output.
"""

from __future__ import annotations

from itertools import islice

import pytest
from processes import (
    FAILURE,
    USAGE,
    assert_refused,
    posix,
)

from py_reasonalloc import ReasonLlama
from py_reasonalloc.engine.errors import ConfigError, ModelFileError, UnsupportedError

# --- refused --------------------------------------------------------------------------------------

REFUSED = [
    # files
    ("no-vocabulary", [], FAILURE, r"the file has no tokenizer"),
    ("no-vocabulary", ["--dry-run"], FAILURE, r"the file has no tokenizer"),
    ("no-length", [], FAILURE, r"damaged: it has no llama\.context_length$"),
    ("no-length", ["--ctx", 64], FAILURE, r"cannot be loaded: .*llama\.context_length"),
    ("length-0", [], FAILURE, r"llama\.context_length = 0 cannot be .*: pass --ctx N$"),
    ("length-0", ["--no-budget"], FAILURE, r"llama\.context_length = 0 .*: pass --ctx N$"),
    ("length-2^31", [], FAILURE, r"llama\.context_length = 2147483653 .*: pass --ctx N$"),
    # templates
    ("empty-template", [], USAGE, r"chat template .* makes nothing of the prompt: pass --raw"),
    ("broken-template", [], USAGE, r"chat template .* failed \(division by zero\): pass --raw"),
    ("endless-template", [], USAGE, r"chat template .* failed \(.*recursion.*\): pass --raw"),
    ("plain", ["--template-var", "x=1"], USAGE, r"x is for a chat template, but the model has"),
    ("plain", ["--template-var", "x"], USAGE, r"'x' is not NAME=VALUE"),
    ("plain", ["--template-var", "messages=1"], USAGE, r"'messages' is what the chat template"),
    # options
    ("plain", ["--threads", 100000], USAGE, r"'--threads': 100000 is not in the range 1<=x<=512"),
    ("plain", ["--seed", -2], USAGE, r"--seed = -2 is out of range: must be -1 \(random\) to"),
    ("plain", ["--set", "window=0"], USAGE, r"--set window = 0 is out of range"),
    ("plain", ["--kv-type", "Q4_K"], USAGE, r"type = 'Q4_K' is unknown: .*q4_1, q4_0, iq4_nl"),
    ("plain", ["--ctx", 4096], USAGE, r"--ctx = 4096 .* trained for 2048 tokens; --rope-scaling"),
    ("plain", ["--rope-scaling", "ntk"], USAGE, r"--rope-scaling = 'ntk' is unknown: .* yarn"),
    ("plain", ["--yarn-orig-ctx", 8], USAGE, r"--yarn-orig-ctx needs --rope-scaling = 'yarn'"),
    ("plain", ["--rope-freq-scale", -1], USAGE, r"--rope-freq-scale = -1 is out of range"),
    ("plain", ["--repeat-penalty", 0], USAGE, r"--repeat-penalty = 0 is out of range"),
    ("plain", ["--presence-penalty", "nan"], USAGE, r"--presence-penalty = nan is out of range"),
    ("plain", ["--frequency-penalty", 1e9], USAGE, r"--frequency-penalty = 1e\+09 is out of range"),
    ("plain", ["--repeat-last-n", -2], USAGE, r"--repeat-last-n = -2 is out of range"),
    ("plain", ["--dry-multiplier", -1], USAGE, r"--dry-multiplier = -1 is out of range"),
    ("plain", ["--dry-base", 0], USAGE, r"--dry-base = 0 is out of range"),
    ("plain", ["--dry-allowed-length", 0], USAGE, r"--dry-allowed-length = 0 is out of range"),
    ("plain", ["--xtc-probability", 2], USAGE, r"--xtc-probability = 2 is out of range"),
    ("plain", ["--xtc-probability", 1, "--temp", 0], USAGE, r"--xtc-probability needs a temperat"),
    ("plain", ["--think", -1], USAGE, r"--think = -1 is out of range"),
    ("plain", ["--think-end", "x"], USAGE, r"--think-end needs --think N"),
    ("plain", ["--think", 1, "--think-end", " "], USAGE, r"--think-end is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "arguments", "code", "pattern"), REFUSED)
def test_refused(call, odd_files, model, arguments, code, pattern) -> None:
    assert_refused(call("run", odd_files[model], "-p", "hi", *arguments), code, pattern)


@posix
@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["-p", b"caf\xe9"], r"-p: the text is not UTF-8"),
        (["-f", b"no\xe9.txt"], r"no\W+\.txt: cannot be read: No such file"),
        (["-f", "."], r"\.: cannot be read: Is a directory"),
        (["--think", 1, "--think-end", b"\xe9"], r"--think-end: the text is not UTF-8"),
    ],
)
def test_bytes_that_are_not_text(call, odd_files, arguments, pattern) -> None:
    assert_refused(call("run", odd_files["plain"], *arguments, stdin=b"hi"), USAGE, pattern)


def test_other_commands_refuse_in_one_line_too(call, odd_files, tmp_path) -> None:
    model = odd_files["no-vocabulary"]
    done = call("eval", model, "--dataset", "demo", "--methods", "full", "-o", tmp_path / "r.jsonl")
    assert_refused(done, FAILURE, "the file has no tokenizer", "reasonalloc-eval")
    done = call("eval", "serve", model, "--port", 0)
    assert_refused(done, FAILURE, "the file has no tokenizer", "reasonalloc-eval serve")
    for name, arguments in {
        "profile": ("demo", "-o", tmp_path / "p.json"),
        "bench": (),
        "eval": ("demo", "-o", tmp_path / "r.jsonl"),
    }.items():
        done = call(name, *arguments, "--threads", 513)
        assert_refused(done, USAGE, "'--threads': 513 is not in", f"reasonalloc-{name}")
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"one\ntw\xe9\n")
    done = call("profile", "demo", "-o", tmp_path / "p.json", "--prompts", prompts)
    assert_refused(
        done, USAGE, r"prompts\.txt: the list is not UTF-8 text \(byte 7\)", "reasonalloc-profile"
    )


# --- from Python ----------------------------------------------------------------------------------


def test_sessions_of_odd_files(odd_files) -> None:
    with ReasonLlama(odd_files["no-vocabulary"], n_ctx=64) as llama:
        with pytest.raises(UnsupportedError, match="the file has no tokenizer: pass tokens"):
            llama("hi")
        assert len(list(islice(llama.generate([1, 2, 3]), 3))) == 3
    with pytest.raises(ModelFileError, match=r"llama\.context_length = 0 .*: pass n_ctx"):
        ReasonLlama(odd_files["length-0"])
    ReasonLlama(odd_files["length-0"], n_ctx=64).close()
    with pytest.raises(ConfigError, match="n_threads = 513 is out of range"):
        ReasonLlama(odd_files["plain"], n_threads=513)
    with ReasonLlama(odd_files["foreign-template"]) as llama:
        assert llama.metadata["general.name"] == "random llama"
        chat = llama.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=2)
        # the template was applied: <s><|user|>hi<|assistant|> and two replaced bytes, three each
        assert chat["usage"]["prompt_tokens"] == 1 + 1 + 2 + 1 + 2 * 3
