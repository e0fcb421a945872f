"""The real command: output, report, streaming, Ctrl-C, dry run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time

import llama_cpp
import pytest
from conftest import ROOT
from gguf_factory import CHAT_TEMPLATE

from py_reasonalloc.engine.stats import read_memory_use
from py_reasonalloc.run.calibrate import Settings, calibrate
from py_reasonalloc.session.centres import needs_centres
from py_reasonalloc.session.config import policy_names

KEYS = {
    "text", "n_prompt", "n_generated", "stop_reason", "prompt_seconds", "decode_seconds",
    "tokens_per_second", "kv_bytes", "kv_bytes_full", "budget", "peak_tokens", "n_compressions",
    "compression_seconds", "n_evicted", "policy", "profile", "layers",
    "heads",
}  # fmt: skip

# of ModelSpec(): layers x KV heads x (K + V) x head_dim x bytes of f16
ROW_BYTES = 2 * 2 * 2 * 32 * 2


def report(done) -> dict:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_json_report(cli, make_gguf) -> None:
    found = report(
        cli(make_gguf(), "-p", "hello", "--json", "-n", 200, "--budget", 32, "--buffer", 16,
            "--temp", 0, "--heads", "uniform")
    )  # fmt: skip
    assert found.keys() >= KEYS
    assert (found["n_prompt"], found["n_generated"]) == (6, 200)
    assert (found["stop_reason"], len(found["text"])) == ("length", 200)
    assert (found["budget"], found["peak_tokens"]) == (32, 48)
    assert found["kv_bytes"] == (32 + 16) * ROW_BYTES
    assert found["kv_bytes_full"] == 205 * ROW_BYTES  # the last token is never decoded
    assert (found["policy"], found["profile"]) == ("rkv", None)
    assert (found["layers"], found["heads"]) == ("uniform", "uniform")
    # 48 tokens are there when the first compression falls due, then one every 16
    assert found["n_compressions"] == 1 + (205 - 48 - 1) // 16
    assert found["n_evicted"] == found["n_compressions"] * 16 * 4
    assert found["decode_seconds"] > 0 and found["prompt_seconds"] > 0
    assert found["tokens_per_second"] == pytest.approx(199 / found["decode_seconds"])
    assert 0 < found["compression_seconds"] < found["decode_seconds"]


def test_json_report_without_a_budget(cli, make_gguf) -> None:
    found = report(cli(make_gguf(), "-p", "hello", "--json", "-n", 100, "--no-budget"))
    assert found.keys() >= KEYS
    assert (found["budget"], found["policy"], found["profile"]) == (None, "full", None)
    assert (found["n_evicted"], found["n_compressions"]) == (0, 0)
    assert found["peak_tokens"] == 6 + 99
    assert found["kv_bytes"] == 256 * ROW_BYTES  # llama.cpp rounds 106 up
    assert found["kv_bytes_full"] == 105 * ROW_BYTES


def test_a_budget_that_holds_everything_gives_the_stock_text(cli, make_gguf) -> None:
    arguments = (make_gguf(), "-p", "hello", "--json", "-n", 150, "--temp", 0)
    full = report(cli(*arguments, "--no-budget"))
    assert report(cli(*arguments, "--budget", 200))["text"] == full["text"]
    assert report(cli(*arguments, "--budget", 24, "--buffer", 8))["text"] != full["text"]


def test_options_reach_the_engine(cli, make_gguf) -> None:
    found = report(
        cli(make_gguf(), "-p", "x" * 20, "--json", "-n", 60, "--budget", 40, "--buffer", 8,
            "--policy", "streaming", "--kv-type", "q8_0", "--protect-prompt", "all", "--ctx", 512,
            "--sinks", 2, "--window", 4, "--threads", 1, "--seed", 7)
    )  # fmt: skip
    assert (found["policy"], found["kv_type"], found["seed"]) == ("streaming", "q8_0", 7)
    assert (found["n_protect"], found["n_ctx"]) == (21, 512)
    assert found["kv_bytes"] == 48 * 2 * 2 * 2 * 34  # 32 values of q8_0 take 34 bytes


def test_parameters_reach_the_policy(cli, make_gguf) -> None:
    command = [make_gguf(), "-p", "how many?", "--budget", 40, "--buffer", 16, "-n", 200]
    command += ["--temp", 0, "--window", 8, "--json", "--policy", "rkv"]

    def text(*options: object) -> str:
        done = cli(*command, *options)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["text"])

    assert text() == text("--set", "lambda=0.1") != text("--set", "lambda=1")
    assert text() == text("--set", "attention=layer")  # the same but for rounding
    wide = json.loads(cli(*command, "--set", "window=20").stdout)
    narrow = json.loads(cli(*command).stdout)
    assert wide["window_bytes"] == 20 / 8 * narrow["window_bytes"]


def test_the_default_window_leaves_room(cli, make_gguf) -> None:
    windows = []
    for budget in (20, 40, 64, 256):
        done = cli(make_gguf(), "-p", "x", "--budget", budget, "-n", 1, "--json", "--policy=rkv")
        windows.append(json.loads(done.stdout)["window_bytes"])
    assert [8 * n / windows[0] for n in windows] == [8, 10, 16, 16]


def test_summary_and_text(cli, make_gguf) -> None:
    arguments = (make_gguf(), "-p", "hello", "-n", 80, "--budget", 32, "--buffer", 16)
    arguments += ("--heads", "uniform")
    done = cli(*arguments, "--temp", 0)
    assert done.returncode == 0
    assert done.stdout == report(cli(*arguments, "--temp", 0, "--json"))["text"] + "\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert "6 prompt tokens" in lines[0] and "80 generated" in lines[0]
    assert f"{48 * ROW_BYTES} bytes" in lines[1] and "at most 48 were held" in lines[1]
    assert "compressions" in lines[2]
    assert "no profile fits this model" in lines[3] and "heads: uniform" in lines[3]


def test_prompt_sources_agree(cli, make_gguf, tmp_path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("wärum?", encoding="utf-8")
    arguments = (make_gguf(), "--json", "-n", 8, "--temp", 0)
    reports = [
        report(cli(*arguments, "-p", "wärum?")),
        report(cli(*arguments, "-f", file)),
        report(cli(*arguments, stdin="wärum?")),
    ]
    assert [r["n_prompt"] for r in reports] == [8, 8, 8]  # the start token, 5 + 2 bytes
    assert len({r["text"] for r in reports}) == 1


def test_chat_template_and_raw(cli, make_gguf) -> None:
    with_template = make_gguf(chat_template=CHAT_TEMPLATE)
    arguments = ("-p", "hello", "--json", "-n", 4)
    assert report(cli(with_template, *arguments))["n_prompt"] == 8  # <s><|user|>hello<|assistant|>
    assert report(cli(with_template, *arguments, "--raw"))["n_prompt"] == 6
    assert report(cli(make_gguf(), *arguments))["n_prompt"] == 6


def test_chat_template_that_fails(cli, make_gguf) -> None:
    path = make_gguf(chat_template="{{ raise_exception('no user here') }}")
    done = cli(path, "-p", "hello")
    assert done.returncode == 2
    assert "failed (no user here): pass --raw" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert cli(path, "-p", "hello", "--raw", "-n", 2).returncode == 0


def test_seed(cli, make_gguf) -> None:
    def text(seed: int) -> str:
        arguments = ("-p", "hi", "--json", "-n", 40, "--temp", 1.5, "--seed", seed)
        return report(cli(make_gguf(), *arguments))["text"]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_verbose_shows_the_log_and_nothing_else_does(cli, make_gguf) -> None:
    arguments = (make_gguf(), "-p", "hi", "-n", 2)
    assert "llama_model_loader" in cli(*arguments, "--verbose").stderr
    assert "llama" not in cli(*arguments).stderr.replace(str(make_gguf()), "")


def test_the_end_of_the_context_is_a_clear_stop(cli, make_gguf) -> None:
    path = make_gguf(n_ctx_train=300)
    found = report(cli(path, "-p", "hi", "--json", "--budget", 32, "--buffer", 16, "--temp", 0))
    assert found["stop_reason"] == "context"
    assert found["n_prompt"] + found["n_generated"] == 300 + 1  # the last one is not decoded
    assert report(cli(path, "-p", "hi", "--json", "--no-budget", "--temp", 0))["n_pos"] == 300


def start(command, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        bufsize=0,  # what was read is then all that has left the pipe
    )


def wait_until_loaded(process) -> None:
    """Return when a run with --verbose has made its context and starts to read the prompt."""
    log = b""
    while b"Model metadata" not in log:
        more = process.stderr.read(65536)
        assert more, log
        log += more
    time.sleep(0.5)


@pytest.mark.usefixtures("foreground")
def test_text_streams_and_ctrl_c_ends_it(command, make_gguf) -> None:
    path = make_gguf(n_ctx_train=1 << 20)  # would go on for many minutes
    with start(command, path, "-p", "hello", "--budget", 32, "--temp", 0) as process:
        first = process.stdout.read(20)
        assert first  # arrived although the text has not ended
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    text, summary = (first + rest).decode(), errors.decode()
    assert text.endswith("\n") and text.isascii()
    assert "Traceback" not in summary
    assert f"{len(text) - 1} generated" in summary and "stopped by Ctrl-C" in summary
    assert len(summary.splitlines()) == 4


@pytest.mark.usefixtures("foreground")
@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_in_the_background_ctrl_c_is_for_others(command, make_gguf) -> None:
    path = make_gguf(n_ctx_train=1 << 20)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does it, inherited by the child
    with start(command, path, "-p", "hello", "--budget", 32, "--temp", 0, "-n", 3000) as process:
        assert process.stdout.read(1)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=60)
    assert (process.returncode, len(text)) == (0, 3000), errors


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_with_json(command, make_gguf) -> None:
    path = make_gguf(n_ctx_train=1 << 20)
    with start(command, path, "-p", "hello", "--json", "--verbose", "--temp", 0) as process:
        wait_until_loaded(process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    found = json.loads(output)
    assert found["stop_reason"] == "interrupted"
    assert len(found["text"]) == found["n_generated"] < 1 << 20


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_while_the_prompt_is_read(command, make_gguf, tmp_path) -> None:
    path = make_gguf(n_ctx_train=1 << 20, head_dim=64, n_layer=4)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("why? " * 100_000)
    with start(command, path, "-f", prompt, "--budget", 512, "--json", "--verbose") as process:
        wait_until_loaded(process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    found = json.loads(output)
    assert (found["stop_reason"], found["n_generated"]) == ("interrupted", 0)
    assert found["n_pos"] < found["n_prompt"] == 500_001


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end differently")
def test_a_reader_that_leaves(command, make_gguf) -> None:
    path = make_gguf(n_ctx_train=1 << 20)
    with start(command, path, "-p", "hello", "--temp", 0) as process:
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert errors == b""


@pytest.mark.parametrize(
    ("weight_type", "arguments"),
    [
        ("f16", ["--budget", 48, "--buffer", 16]),
        ("q8_0", ["--budget", 100, "--buffer", 64, "--kv-type", "q8_0", "--policy", "snapkv"]),
        ("f32", ["--budget", 48, "--kv-type", "f32", "--policy", "streaming"]),
        ("q4_0", ["--budget", 48]),
        ("q8_0", ["--no-budget"]),
    ],
    ids=["f16", "q8_0", "f32", "q4_0", "stock"],
)
def test_dry_run_tells_what_the_run_takes(cli, make_gguf, weight_type, arguments) -> None:
    path = make_gguf(arch="qwen3", n_layer=3, weight_type=weight_type)
    common = (path, "-p", "hello", "-n", 150, "--json", *arguments)
    dry, real = report(cli(*common, "--dry-run")), report(cli(*common))
    for key in ("kv_bytes", "window_bytes", "scratch_bytes", "compute_bytes", "weights_bytes"):
        if key in real:
            assert dry[key] == real[key], key
    parts = ("weights_bytes", "kv_bytes", "window_bytes", "scratch_bytes", "compute_bytes")
    assert dry["total_bytes"] == sum(dry[part] for part in parts)
    if "--kv-type" not in arguments:
        full = report(cli(path, "-p", "hello", "-n", 150, "--json", "--no-budget"))
        assert dry["full_kv_bytes"] == full["kv_bytes"]
        assert dry["full_compute_bytes"] == full["compute_bytes"]
    if "--no-budget" not in arguments:
        assert sum(dry["layer_bytes"]) == dry["kv_bytes"]
        assert len(dry["layer_bytes"]) == 3


def test_dry_run_table(cli, make_gguf) -> None:
    path = make_gguf(arch="deci", n_layer=3, n_head_kv=(4, 0, 1))
    done = cli(path, "--dry-run", "--budget", 60, "--buffer", 4)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    row_bytes = 2 * 32 * 2
    layers = [line.split()[2:] for line in lines if line.startswith("  layer")]
    assert [int(layer[0]) for layer in layers] == [4 * 64 * row_bytes, 0, 64 * row_bytes]
    assert [layer[-3:] for layer in layers] == [
        ["4", "x", "64"],
        ["B", "no", "budget"],
        ["1", "x", "64"],
    ]
    assert any(line.startswith("full cache for 2048 tokens") for line in lines)


def test_dry_run_tells_what_stock_takes_for_windows(cli, make_gguf) -> None:
    """llama_cpp.Llama keeps a window's rows for all of the context, llama.cpp's programs do not."""
    path = make_gguf(arch="gemma3", n_layer=6)  # five layers with a window of 64 tokens
    arguments = (path, "-p", "hello", "-n", 1500, "--budget", 60, "--buffer", 4, "--dry-run")
    found = report(cli(*arguments, "--json"))
    allocated = []
    for options in ({}, {"swa_full": True}, {"swa_full": False}):
        with contextlib.closing(
            llama_cpp.Llama(str(path), n_ctx=found["n_tokens"], verbose=False, **options)
        ) as llama:
            allocated.append(read_memory_use(llama.ctx, False).context_bytes)
    row_bytes = 2 * 2 * 32 * 2
    assert allocated == [6 * 1536 * row_bytes] * 2 + [(1536 + 5 * 768) * row_bytes]
    assert [found["full_kv_bytes"], found["short_kv_bytes"]] == allocated[1:]
    # the budgeted context has such windows, too; it computes fewer tokens at once
    assert found["stock_bytes"] == 5 * 256 * row_bytes
    lines = cli(*arguments).stdout.splitlines()
    [full] = [line.split() for line in lines if line.startswith("full cache")]
    [short] = [line.split() for line in lines if "llama-cli" in line]
    assert f"{allocated[0]}" in full and "swa_full=True," in full
    assert f"{allocated[2]}" in short and "swa_full=False," in short


def test_demo(cli) -> None:
    found = report(cli("demo", "--json"))
    assert found["n_compressions"] > 0
    n_slots = found["budget"] + found["buffer"]
    assert found["peak_tokens"] <= 2 * 2 * n_slots  # a layer, and a head of it, twice the mean
    assert found["kv_bytes"] == found["kv_bytes_full"] // found["n_pos"] * n_slots
    assert found["kv_bytes"] < found["kv_bytes_full"]
    assert found["n_protect"] == found["n_prompt"]
    assert found["stop_reason"] == "stop"
    assert "</think>" in found["text"]


def test_demo_with_the_full_cache_is_right(cli) -> None:
    from py_reasonalloc.task.problems import SAMPLE_PROBLEM, extract_answer

    found = report(cli("demo", "--json", "--no-budget"))
    assert extract_answer(found["text"]) == SAMPLE_PROBLEM.answer
    assert found["n_evicted"] == 0


def test_list_policies(cli) -> None:
    done = cli("--list-policies")
    assert (done.returncode, done.stderr) == (0, "")
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert tuple(listed) == policy_names()


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_runs(cli, make_gguf, policy, tmp_path) -> None:
    common = ["-p", "hello", "--json", "-n", 80, "--budget", 32, "--buffer", 16]
    if needs_centres(policy):
        settings = Settings(steps=8, n_threads=1)
        calibrate(make_gguf(), ["hello"], settings).save(tmp_path / "p.json")
        common += ["--profile", tmp_path / "p.json"]
    found = report(cli(make_gguf(), *common, "--policy", policy))
    assert found["policy"] == policy
    assert found["n_compressions"] > 0


def test_help_and_version(cli) -> None:
    done = cli("--help")
    assert done.returncode == 0 and "--budget" in done.stdout and "130" in done.stdout
    from py_reasonalloc import __version__

    assert __version__ in cli("--version").stdout
