"""`reasonalloc-run --save-state` and `--load-state`: a chain cut in two is the uncut chain."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from py_reasonalloc import StateError
from py_reasonalloc.commands import run as command
from py_reasonalloc.session.chains import MAGIC, read_chain

GREEDY = ("--temp", 0, "--json")


@pytest.fixture
def run(in_process):
    """Run reasonalloc-run here; returns its report."""

    def run(*arguments):
        code, out, err = in_process(command.run, *arguments, *GREEDY)
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


@pytest.fixture
def fails(in_process):
    def fails(*arguments) -> tuple[object, str]:
        code, out, err = in_process(command.run, *arguments)
        assert out == "" and err.count("\n") == 1
        return code, err

    return fails


VARIANTS = {
    "default": (),
    "rkv": ("--policy", "rkv", "--budget", 48, "--buffer", 16),
    "q8_0": ("--kv-type", "q8_0", "--heads", "adaptive"),
    "protected": ("--protect-prompt", "all", "--budget", 160, "--layers", "pyramid"),
    "stock": ("--no-budget",),
    "penalties": ("--repeat-penalty", 1.3, "--dry-multiplier", 0.8, "--repeat-last-n", 40),
    "thinking": ("--think", 100, "--think-end", "\n</think>\nThe answer is"),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_chain_cut_in_pieces_is_the_uncut_chain(run, tmp_path, name) -> None:
    options, file = ("demo", *VARIANTS[name]), tmp_path / "chain.state"
    whole = run(*options, "-n", 180)
    parts = [run(*options, "-n", 97, "--save-state", file)]
    for n in (6, 77):
        parts.append(run(*options, "-n", n, "--load-state", file, "--save-state", file))
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [part["n_prompt"] for part in parts] == [whole["n_prompt"]] * 3
    assert [part["n_before"] for part in parts] == [0, 97, 103]
    assert parts[-1]["save_state"] == str(file)
    for key in ("n_evicted", "n_compressions", "n_pos", "kv_bytes", "stop_reason", "n_protect"):
        assert parts[-1][key] == whole[key]


def test_a_chain_that_ended_has_nothing_more(run, tmp_path) -> None:
    file = tmp_path / "chain.state"
    done = run("demo", "--save-state", file)
    assert done["stop_reason"] == "stop"
    more = run("demo", "--load-state", file)
    assert (more["text"], more["n_generated"], more["stop_reason"]) == ("", 0, "stop")
    assert more["n_before"] == done["n_generated"]


def test_a_character_cut_in_two_is_whole_in_the_end(make_gguf, run, tmp_path) -> None:
    """Text of bytes: most cuts fall inside a character, or what may be one."""
    model, file = make_gguf(), tmp_path / "chain.state"
    options = (model, "-p", "hello", "--budget", 32, "--buffer", 16, "--window", 8)
    whole = run(*options, "-n", 60)["text"]
    text = run(*options, "-n", 10, "--save-state", file)["text"]
    for _ in range(10):
        text += run(*options, "-n", 5, "--load-state", file, "--save-state", file)["text"]
    assert text.rstrip("\ufffd") == whole.rstrip("\ufffd")


@pytest.fixture(scope="module")
def chain(demo_model, tmp_path_factory) -> Path:
    """A chain of the demo model, with its default options."""
    from click.testing import CliRunner

    file = tmp_path_factory.mktemp("chain") / "chain.state"
    arguments = ["demo", "--temp", "0", "-n", "60", "--save-state", str(file)]
    done = CliRunner().invoke(command.main, arguments)
    assert file.is_file(), done.output
    return file


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--budget", 40), "it was saved with budget = "),
        (("--policy", "rkv"), "it was saved with policy = loss, here it is rkv"),
        (("--kv-type", "q8_0"), "it was saved with cache types = 1, 1, here it is 8, 8"),
        (("--no-budget",), "here it is none"),
        (("--ctx", 80), "its "),
    ],
)
def test_a_chain_of_other_options_is_refused(fails, chain, options, pattern) -> None:
    code, message = fails("demo", *options, "--load-state", chain)
    assert code in (1, 2)
    assert pattern in message or "the context ends at 80" in message


def test_a_chain_of_another_model_is_refused(fails, chain, make_gguf) -> None:
    code, message = fails(make_gguf(), "--budget", 64, "--load-state", chain)
    assert code == 1
    assert "it was saved with another model" in message


def damaged(data: bytes, kind: str) -> bytes:
    if kind == "text":
        return b"once upon a time\n" * 40
    if kind == "cut":
        return data[: len(data) // 2]
    if kind == "head":
        return data[: len(MAGIC) + 8]
    if kind == "longer":
        return data + b"x"
    if kind == "huge":
        return MAGIC + b"\xff" * 8 + data[len(MAGIC) + 8 :]
    if kind == "flipped":
        return data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:]
    assert kind == "forged"  # its digest is right, its numbers are not
    n_head = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 8], "little")
    at = len(MAGIC) + 8
    header = json.loads(data[at : at + n_head])
    header["n_tokens"] += 1
    head = json.dumps(header).encode()
    body = MAGIC + len(head).to_bytes(8, "little") + head + data[at + n_head : -32]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize("kind", ["text", "cut", "head", "longer", "huge", "flipped", "forged"])
def test_a_damaged_file_is_refused(fails, chain, tmp_path, kind) -> None:
    file = tmp_path / "chain.state"
    file.write_bytes(damaged(chain.read_bytes(), kind))
    code, message = fails("demo", "--load-state", file)
    assert code == 1
    assert "damaged" in message or "not a state that reasonalloc-run saved" in message


def test_a_forged_state_of_the_right_form_is_refused(fails, chain, tmp_path) -> None:
    file, whole = tmp_path / "chain.state", read_chain(chain)
    state = whole.state.copy()
    state[: len(state) // 2 : 7] ^= 0x55
    object.__setattr__(whole, "state", state)
    whole.write(file)
    code, message = fails("demo", "--load-state", file)
    assert code == 1
    assert "it is damaged, or of another kind of cache" in message
    object.__setattr__(whole, "tokens", (1 << 30, *whole.tokens[1:]))
    whole.write(file)
    code, message = fails("demo", "--load-state", file)
    assert code == 1
    assert "its tokens are of another vocabulary" in message


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--load-state", "{chain}", "-p", "more"), "--load-state and -p exclude each other"),
        (("--load-state", "{chain}", "-f", "x"), "--load-state and -f exclude each other"),
        (("--load-state", "{chain}", "--dry-run"), "--load-state and --dry-run exclude"),
        (("--save-state", "{tmp}/x", "--dry-run"), "--save-state and --dry-run exclude"),
        (("--save-state", "{tmp}"), "the state cannot be written: it is a folder"),
        (("--save-state", "{tmp}/no/x"), "the state cannot be written: there is no folder"),
    ],
)
def test_usage(fails, chain, tmp_path, arguments, pattern) -> None:
    filled = [text.format(chain=chain, tmp=tmp_path) for text in arguments]
    code, message = fails("demo", *filled)
    assert code == 2
    assert pattern in message


def test_a_missing_file(fails, tmp_path) -> None:
    code, message = fails("demo", "--load-state", tmp_path / "none")
    assert code == 1
    assert "the state cannot be read: No such file" in message


def test_a_file_that_cannot_be_written(chain, tmp_path) -> None:
    with pytest.raises(StateError, match="cannot be written"):
        read_chain(chain).write(tmp_path / "no" / "x")
