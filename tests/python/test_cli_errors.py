"""Every kind of bad input, through the real command: one line, the right exit code."""

from __future__ import annotations

import re

import pytest

FAILURE, USAGE = 1, 2


def assert_refused(done, code: int, pattern: str) -> None:
    """Check exit code and that stderr is exactly one line that matches."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("reasonalloc-run: ")
    assert re.search(pattern, lines[0]), lines[0]


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (None, r"m\.gguf: no such file"),
        (b"", r"m\.gguf: not a GGUF file \(it is empty\)"),
        (b"PK\x03\x04 something else", r"m\.gguf: not a GGUF file"),
        (b"GGUF", r"m\.gguf: the file is truncated or damaged"),
    ],
    ids=["missing", "empty", "not-gguf", "magic-only"],
)
def test_model_file(cli, tmp_path, content, pattern) -> None:
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    assert_refused(cli(path, "-p", "hi"), FAILURE, pattern)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999])
def test_truncated(cli, make_gguf, tmp_path, share) -> None:
    whole = make_gguf().read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert_refused(cli(path, "-p", "hi"), FAILURE, r"truncated or damaged: .+")


def test_folder(cli, tmp_path) -> None:
    assert_refused(cli(tmp_path, "-p", "hi"), FAILURE, "not a file")


@pytest.mark.parametrize("arch", ["mamba"])
def test_unsupported_architecture(cli, make_gguf, arch) -> None:
    path = make_gguf(arch=arch)
    refused = rf"architecture '{arch}' is not supported with a budget"
    assert_refused(cli(path, "-p", "hi"), FAILURE, refused)
    assert_refused(cli(path, "-p", "hi", "--dry-run"), FAILURE, refused)
    assert cli(path, "-p", "hi", "--no-budget", "-n", 2).returncode == 0


def test_cache_type_that_does_not_fit_the_heads(cli, make_gguf) -> None:
    path = make_gguf(head_dim=48)
    assert_refused(cli(path, "-p", "hi", "--kv-type", "q8_0"), FAILURE, r"q8_0 .*divisible by 32")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--budget", 0], r"budget = 0 is out of range: must be 1 to"),
        (["--budget", -5], r"budget = -5 is out of range"),
        (["--budget", "many"], r"--budget.*'many' must be a number of tokens, or auto"),
        (["--budget", 2**40], r"budget = \d+ is out of range"),
        (["--budget", 12], r"budget 12 is too small: the sinks \(4\) and the window \(8\)"),
        (["--budget", 64, "--sinks", 60], r"budget 64 is too small"),
        (["--window", 0], r"window = 0 is out of range: must be 1 to 1024"),
        (["--sinks", -1], r"sinks = -1 is out of range"),
        (["--buffer", 0], r"buffer = 0 is out of range"),
        (["--policy", "best"], r"policy = 'best' is unknown: must be one of rkv, snapkv"),
        (["--kv-type", "q3_k"], r"cache type = 'q3_k' is unknown: must be one of f32, f16"),
        (
            ["--protect-prompt", "some"],
            r"--protect-prompt = 'some' must be 'off', 'all', 'auto' or a number",
        ),
        (["--protect-prompt", 400], r"budget 256 is too small: the protected prompt \(400\)"),
        (["--protect-prompt", -1], r"--protect-prompt = -1 is out of range"),
        (["--no-budget", "--budget", 64], r"--no-budget and --budget exclude each other"),
        (["--no-budget", "--protect-prompt", 9], r"--no-budget and --protect-prompt exclude"),
        (["--ctx", 100000], r"ctx = 100000 is out of range: the model was trained for 2048"),
        (["--frobnicate"], r"No such option.*--frobnicate"),
        (["--temp", -1], r"temp = -1 is out of range"),
        (["--temp", "nan"], r"temp = nan is out of range"),
        (["--seed", 2**32], r"seed = 4294967296 is out of range"),
        (["--top-p", 2], r"--top-p = 2 is out of range"),
    ],
)
def test_options(cli, make_gguf, arguments, pattern) -> None:
    assert_refused(cli(make_gguf(), "-p", "hi", *arguments), USAGE, pattern)


@pytest.mark.parametrize(
    ("arguments", "stdin", "pattern"),
    [
        (["-p", ""], "", "the prompt is empty"),
        (["-p", " \n\t"], "", "the prompt is empty"),
        (["--raw", "-p", ""], "", "the prompt is empty"),
        ([], "", "the prompt is empty"),
        (["-p", "a", "-f", "b"], "", "-p and -f exclude each other"),
        (["-f", "no/such/file.txt"], "", r"no/such/file\.txt: cannot be read: No such file"),
    ],
)
def test_prompt(cli, make_gguf, arguments, stdin, pattern) -> None:
    assert_refused(cli(make_gguf(), *arguments, stdin=stdin), USAGE, pattern)


def test_prompt_that_is_not_text(cli, make_gguf, tmp_path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xff\xfe\x00")
    assert_refused(cli(make_gguf(), "-f", path), USAGE, r"prompt\.txt: the prompt is not UTF-8")


def test_prompt_beyond_the_trained_context(cli, make_gguf) -> None:
    path = make_gguf(n_ctx_train=300)
    pattern = r"the prompt has 301 tokens, but the context ends at 300: shorten it"
    assert_refused(cli(path, "-p", "x" * 300), FAILURE, pattern)
    assert_refused(cli(path, "-p", "x" * 300, "--no-budget"), FAILURE, pattern)


def test_protected_prompt_beyond_the_budget(cli, make_gguf) -> None:
    done = cli(make_gguf(), "-p", "x" * 60, "--budget", 64, "--protect-prompt", "all")
    assert_refused(done, USAGE, r"61.*budget|budget.*61")


def test_library_that_is_missing(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    pattern = r"Cannot load llama_cpp: .*LLAMA_CPP_LIB_PATH"
    assert_refused(cli(tmp_path / "m.gguf", "-p", "hi"), FAILURE, pattern)


def test_no_model(cli) -> None:
    assert_refused(cli("-p", "hi"), USAGE, "Missing argument 'MODEL'")


@pytest.mark.parametrize(
    ("option", "pattern"),
    [
        ("lamda=0.5", "option = 'lamda' is unknown: must be one of lambda, "),
        ("lambda", "lambda = '' is not a number"),
        ("lambda=x", "lambda = 'x' is not a number"),
        ("lambda=2", "--set lambda = 2 is out of range: must be 0 to 1"),
        ("n_guard=1.5", "n_guard = '1.5' is not a number"),
        ("buffer=0", "buffer = 0 "),
        ("attention=x", "attention = 'x' is unknown: must be one of auto, head, layer"),
    ],
)
def test_parameters(cli, make_gguf, option, pattern) -> None:
    assert_refused(cli(make_gguf(), "-p", "hi", "--set", option), USAGE, pattern)
    assert_refused(
        cli(make_gguf(), "-p", "hi", "--set", "mu=0.5", "--no-budget"),
        USAGE,
        "--no-budget and --set exclude each other",
    )
