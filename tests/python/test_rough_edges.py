"""What people do to a command: foreign bytes, full disks, odd files, options that clash.

Through the real commands. Whatever is refused gives one line on standard error, an exit code that
says whose fault it is, and nothing on standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TIMEOUT
from gguf_factory import CHAT_TEMPLATE

from py_reasonalloc import ReasonLlama
from py_reasonalloc.engine.errors import ConfigError, ModelFileError, UnsupportedError

FAILURE, USAGE = 1, 2
posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX")

NO_BOS_TEMPLATE = CHAT_TEMPLATE.replace("{{ bos_token }}", "")
THINKING_TEMPLATE = CHAT_TEMPLATE + "{% if thinks %}<think>{% endif %}{# </think> #}"


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: bytes
    err: bytes

    @property
    def report(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        assert self.err == b""
        return json.loads(self.out)


@pytest.fixture(scope="module")
def call():
    """Return a function that runs a command of the package with bytes in and out."""

    def run(name: str, *arguments: object, stdin: bytes = b"", shell: str = "") -> Done:
        script = Path(sys.executable).parent / f"reasonalloc-{name}"
        command = [os.fsencode(script), *map(_argument, arguments)]
        if shell:  # a shell's redirection or limit, then the command
            command = [b"bash", b"-c", shell.encode(), *command]
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=TIMEOUT, cwd=ROOT, check=False
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def _argument(value: object) -> bytes:
    return value if isinstance(value, bytes) else os.fsencode(str(value))


def assert_refused(done: Done, code: int, pattern: str, name: str = "reasonalloc-run") -> None:
    assert (done.code, done.out) == (code, b""), done
    lines = done.err.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{name}: ")
    assert re.search(pattern, lines[0]), lines[0]


@pytest.fixture(scope="module")
def odd_files(make_gguf, tmp_path_factory) -> dict[str, Path]:
    """Model files that are not quite as they should be, by name."""
    folder = tmp_path_factory.mktemp("odd")
    plain = make_gguf(chat_template="QQ" + CHAT_TEMPLATE)
    changed = {
        "foreign-name": (b"random llama", b"caf\xe9om llama"),
        "foreign-template": (b"QQ{{", b"\xe9\xe8{{"),
        "no-length": (b"llama.context_length", b"llama.context_lengtX"),
    }
    files = {}
    for name, (old, new) in changed.items():
        data = plain.read_bytes()
        assert data.count(old) == 1
        files[name] = folder / f"{name}.gguf"
        files[name].write_bytes(data.replace(old, new))
    return files | {
        "plain": make_gguf(),
        "no-vocabulary": make_gguf(has_tokenizer=False),
        "length-0": make_gguf(n_ctx_train=0),
        "length-2^31": make_gguf(n_ctx_train=2**31 + 5),
        "empty-template": make_gguf(chat_template="{# nothing #}"),
        "broken-template": make_gguf(chat_template="{{ 1 / 0 }}"),
        "endless-template": make_gguf(
            chat_template="{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
        ),
    }


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


# --- standard output ------------------------------------------------------------------------------


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", ["demo", "-n", 3]),
        ("run", ["demo", "-n", 3, "--json"]),
        ("run", ["demo", "--dry-run"]),
        ("run", ["--help"]),
        ("run", ["--list-policies"]),
        ("inspect", ["TRACE"]),
        ("eval", ["--list-methods"]),
        ("eval", ["report", "RESULTS"]),
        ("profile", ["--compare", "PROFILE", "PROFILE"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_full_or_closed_output_is_one_line(call, written, name, arguments) -> None:
    arguments = [written.get(argument, argument) for argument in arguments]
    what = f"reasonalloc-{name}"
    if "report" in arguments:
        what += " report"
    done = call(name, *arguments, shell='"$0" "$@" >/dev/full')
    full = "standard output: cannot be written: No space left on device"
    assert_refused(done, FAILURE, full, what)
    done = call(name, *arguments, shell='exec "$0" "$@" >&-')
    assert_refused(done, FAILURE, "standard output is closed", what)


@pytest.fixture(scope="module")
def written(call, tmp_path_factory) -> dict[str, Path]:
    """Files that commands show."""
    folder = tmp_path_factory.mktemp("written")
    files = {"TRACE": folder / "t.jsonl", "RESULTS": folder / "r.jsonl"}
    assert call("run", "demo", "-n", 200, "--trace", files["TRACE"]).code == 0
    done = call("eval", "demo", "--methods", "full", "--limit", 1, "-o", files["RESULTS"])
    assert done.code == 0, done
    return files | {"PROFILE": next((ROOT / "profiles").glob("*.json"))}


@posix
def test_a_closed_error_stream_hurts_nothing(call, tmp_path) -> None:
    trace = tmp_path / "t.jsonl"
    done = call("run", "demo", "-n", 200, "--trace", trace, shell='exec "$0" "$@" 2>&-')
    assert (done.code, done.err) == (0, b"")
    assert done.out.startswith(b"<think>")
    assert call("inspect", trace).code == 0  # nothing of the summary got into it


@posix
def test_results_that_cannot_be_read_back(call) -> None:
    done = call("eval", "demo", "-o", "/dev/null")
    assert_refused(done, USAGE, "/dev/null: not a regular file", "reasonalloc-eval")


# --- aborts ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits differ")
def test_too_little_memory_is_one_line(call) -> None:
    """Just below what a run takes: no abort, and no debugger's words on standard output."""

    def run(limit: int) -> Done:
        """Run with so many KiB of address space."""
        shell = f'export OPENBLAS_NUM_THREADS=1; ulimit -c 0 -v {limit}; "$0" "$@"'
        return call("run", "demo", "-n", 40, "--threads", 1, shell=shell)

    too_little, enough = 100_000, 1_600_000
    while enough - too_little > 12_000:
        limit = (enough + too_little) // 2
        too_little, enough = (limit, enough) if run(limit).code else (too_little, limit)
    found = [run(too_little), run(too_little - 20_000)]
    for done in found:
        assert done.code == FAILURE, done
        assert len(done.err.splitlines()) == 1, done
        assert b"gdb" not in done.out and b"LWP" not in done.out
    assert any(b"memory" in done.err for done in found)


ABORT = """
import sys
from py_reasonalloc.engine.aborts import end_on_abort
from py_reasonalloc.engine.ggml import load_ggml
from py_reasonalloc.engine.modelfile import open_vocabulary
from py_reasonalloc.engine.prompts import tokenize

end_on_abort("name")
with open_vocabulary(sys.argv[1]) as model:
    load_ggml()["ggml_abort"](b"/build/of/x.c", 12, b"it broke")
"""


def test_an_abort_is_one_line(odd_files) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABORT, odd_files["plain"]], capture_output=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stdout) == (FAILURE, b"")
    assert done.stderr == b"name: llama.cpp gave up: x.c:12: it broke\n"


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
