"""Commands on models of which only some layers have a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_factory import byte_symbols
from test_architectures import program  # noqa: F401  (a fixture)
from test_engine_classes import save

from py_reasonalloc.commands import eval as eval_cli
from py_reasonalloc.commands import inspect as inspect_cli
from py_reasonalloc.commands import profile as profile_cli
from py_reasonalloc.commands import run as run_cli
from py_reasonalloc.engine.errors import StateError, UnsupportedError
from py_reasonalloc.engine.stats import engine_stats
from py_reasonalloc.profile.files import load_profile
from py_reasonalloc.run.calibrate import Settings, calibrate
from py_reasonalloc.session.config import BudgetConfig
from py_reasonalloc.session.generate import Sampling
from py_reasonalloc.session.reason_llama import ReasonLlama
from py_reasonalloc.trace.read import read_trace

PROMPT = "Alice has 3 apples and 4 pears and eats one of them. How many are left?"


@pytest.fixture(scope="module")
def windows(make_gguf: Any) -> Path:
    """Gemma 3 with twelve layers: ten have a window, layers 5 and 11 grow."""
    return make_gguf(arch="gemma3", n_layer=12, head_dim=64, n_ctx_train=1024)


def settings(**others: Any) -> Settings:
    chosen = {"sampling": Sampling(temp=0.0), **others}
    return Settings(steps=160, buffer=16, n_threads=1, **chosen)


@pytest.mark.parametrize("layers", ["wave", "error", "uniform"])
def test_a_profile_is_of_the_layers_that_have_a_budget(windows: Path, layers: str) -> None:
    profile = calibrate(windows, [PROMPT], settings(curves=layers == "error"))
    assert profile.n_head_kv == (0, 0, 0, 0, 0, 2) * 2
    assert [il for il, demand in enumerate(profile.demand) if demand > 0] == [5, 11]
    if profile.head_error is not None:
        assert len(profile.head_error.values) == 4
        assert all(max(row) > 0.0 for row in profile.head_error.values)
    policy = "triattention" if layers == "uniform" else "rkv"
    config = BudgetConfig(40, policy=policy, buffer=16, window=8, layers=layers, profile=profile)
    with ReasonLlama(windows, budget=config, n_ctx=256) as llama:
        llama.eval(llama.tokenize(PROMPT.encode() * 2))
        assert engine_stats(llama.ctx).n_compressions > 0
        held = [len(layer) for layer in llama.kv_stats().layers]
        assert held == [0, 0, 0, 0, 0, 2] * 2


def test_windows_with_a_budget(windows: Path, tmp_path: Path) -> None:
    """A profile splits over the layers that grow; traces, states and dry runs have all layers."""
    profile = calibrate(windows, [PROMPT], settings(curves=True))
    config = BudgetConfig(
        40, buffer=16, window=8, layers="error", heads="adaptive", profile=profile, budget_swa=24
    )
    with ReasonLlama(windows, budget=config, n_ctx=512) as llama:
        tokens = llama.tokenize(PROMPT.encode() * 3)
        with llama.trace_to(tmp_path / "trace.jsonl"):
            llama.eval(tokens)
        state = llama.save_state()
        stats = llama.kv_stats()
        capacities = [sum(head.capacity for head in layer) for layer in stats.layers]
        assert capacities[:5] == [2 * (24 + 16)] * 5
        assert capacities[5] + capacities[11] == 4 * (40 + 16)
        assert stats.stock_bytes == 0
        expected = [stats.kept_positions(il, 0) for il in range(12)]
        llama.eval(tokens[:20])
        llama.load_state(state)
        kept = llama.kv_stats()
        assert all(np.array_equal(kept.kept_positions(il, 0), expected[il]) for il in range(12))
        state.signature["budget_swa"] = "25"
        with pytest.raises(StateError, match="saved with budget_swa = 25, here it is 24"):
            llama.load_state(state)
    trace = read_trace(tmp_path / "trace.jsonl")
    assert trace.tokens == tuple(tokens)
    assert {layer.il for event in trace.compressions for layer in event.layers} == set(range(12))


def test_windows_on_the_command_line(windows: Path, cli: Any) -> None:
    common = (
        "-p",
        PROMPT * 2,
        "-n",
        60,
        "--budget",
        40,
        "--buffer",
        16,
        "--profile",
        "none",
        "--json",
    )
    found = []
    for more in ((), ("--budget-swa", 24), ("--set", "budget_swa=24")):
        dry = json.loads(cli(windows, *common, *more, "--dry-run").stdout)
        done = cli(windows, *common, *more)
        assert done.returncode == 0, done
        real = json.loads(done.stdout)
        for key in ("kv_bytes", "stock_bytes", "scratch_bytes", "compute_bytes"):
            assert dry[key] == real[key], key
        assert sum(dry["layer_bytes"]) == dry["kv_bytes"]
        found.append(real)
    off, own, same = found
    assert off["stock_bytes"] > 0 == own["stock_bytes"]
    assert own["kv_bytes"] == same["kv_bytes"] > off["kv_bytes"]
    assert own["text"] == same["text"]
    table = cli(windows, *common[:-1], "--budget-swa", 24, "--dry-run").stdout
    assert "cache, budget 40 + 16, windows 24 (f16)" in table
    assert "layer 0 " in table and "no budget" not in table


def with_vocabulary(source: Path, target: Path) -> Path:
    """Copy a random model of 128 tokens, and give it a vocabulary of ASCII."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        if name.startswith(("GGUF.", "general.arch", "tokenizer.")) or (
            is_array and not field.data
        ):
            continue
        kind = field.types[-1] if is_array else None
        writer.add_key_value(name, field.contents(), field.types[0], kind)
    symbols = byte_symbols()[32:127]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*symbols, "ĠĠ", *(f"<{i}>" for i in range(len(symbols) + 1, 128))])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(127)
    writer.add_eos_token_id(126)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_latent_rows_have_demands_but_no_curves(program: Path, tmp_path: Path) -> None:  # noqa: F811
    """Their values are copied for each step: nothing that could be read after the text."""
    source = save(program, tmp_path, "deepseek2", "moe")
    path = with_vocabulary(source, tmp_path / "latent.gguf")
    with pytest.raises(UnsupportedError, match=r"latent attention .*--no-curves"):
        calibrate(path, [PROMPT], settings())
    profile = calibrate(path, [PROMPT], settings(curves=False))
    assert profile.n_head_kv == 1
    assert min(profile.demand) > 0
    config = BudgetConfig(40, buffer=16, window=8, layers="wave", profile=profile)
    with ReasonLlama(path, budget=config, n_ctx=256) as llama:
        llama.eval(llama.tokenize(PROMPT.encode() * 2))
        assert engine_stats(llama.ctx).n_compressions > 0


def test_layers_without_attention_are_left_out(program: Path, tmp_path: Path) -> None:  # noqa: F811
    source = save(program, tmp_path, "granitehybrid", "dense")
    path = with_vocabulary(source, tmp_path / "hybrid.gguf")
    profile = calibrate(path, [PROMPT], settings())
    heads = profile.n_head_kv
    assert isinstance(heads, tuple)
    assert 0 in heads
    assert [n > 0 for n in heads] == [demand > 0 for demand in profile.demand]
    config = BudgetConfig(40, buffer=16, window=8, layers="error", profile=profile)
    with ReasonLlama(path, budget=config, n_ctx=256) as llama:
        llama.eval(llama.tokenize(PROMPT.encode() * 2))
        assert engine_stats(llama.ctx).n_compressions > 0


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("gemma2", "dense"),  # windows, soft caps
        ("granitehybrid", "dense"),  # recurrent layers
        ("deepseek2", "moe"),  # latent rows
        ("qwen3next", "moe"),  # recurrent layers, experts
        ("gpt-oss", "moe"),  # windows, attention sinks
    ],
)
def test_demand_over_horizons(program: Path, tmp_path: Path, arch: str, kind: str) -> None:  # noqa: F811
    path = with_vocabulary(save(program, tmp_path, arch, kind), tmp_path / "model.gguf")
    # seven prompts, for these models end their texts at random
    found = calibrate(path, [PROMPT] * 7, settings(curves=False, horizon=16, sampling=Sampling()))
    assert found.horizon == 16
    heads = found.n_head_kv
    heads = (heads,) * found.n_layer if isinstance(heads, int) else heads
    assert [n > 0 for n in heads] == [demand > 0 for demand in found.demand]
    assert max(heads) > 0


@pytest.mark.parametrize(
    ("arch", "kind", "curves"),
    [
        ("qwen2", "dense", ""),
        ("qwen3moe", "moe", ""),
        ("gpt-oss", "moe", "attention with sinks"),
        ("bloom", "dense", "attention with sinks, capped logits or ALiBi"),
        ("deepseek2", "moe", "latent attention (MLA)"),
        ("qwen3next", "moe", ""),
    ],
)
def test_command_lines(
    program: Path,  # noqa: F811
    tmp_path: Path,
    in_process: Any,
    arch: str,
    kind: str,
    curves: str,
) -> None:
    """Measure a profile, run with it and watch, compare with the full cache."""
    model = with_vocabulary(save(program, tmp_path, arch, kind), tmp_path / "model.gguf")
    prompts, profile, trace = (tmp_path / name for name in ("prompts", "wave.json", "trace"))
    prompts.write_text("why?\nA train leaves at 9\nhow?\n")
    common = ("--threads", 1, "--buffer", 16)
    steps = ("--prompts", prompts, "--steps", 120)
    code, out, err = in_process(profile_cli.run, model, *steps, *common, "-o", profile)
    assert code == 0, err
    has_curves = load_profile(profile).head_error is not None
    assert has_curves == (curves == ""), err
    assert (f"no error curves: {curves}" in err) == (curves != "")

    arguments = (model, *common, "--budget", 40, "--profile", profile, "-n", 120, "-p", PROMPT)
    code, out, err = in_process(run_cli.run, *arguments, "--dry-run", "--json")
    assert code == 0, err
    dry = json.loads(out)
    code, out, err = in_process(
        run_cli.run, *arguments, "--temp", 0, "--layers", "wave", "--trace", trace, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["n_compressions"] > 0
    assert found["layers"] == "wave"
    assert dry["kv_bytes"] == found["kv_bytes"]
    code, out, err = in_process(inspect_cli.run, trace)
    assert (code, err) == (0, "")
    assert "rkv" in out

    text = tmp_path / "text.txt"
    text.write_text((PROMPT * 4)[:240])  # trained for 256
    probes = ("--facts", 0, "--passages", 0, "--text", text)
    methods = ("--methods", "rkv,wave,keydiff", "--budgets", 24, "--profile", profile)
    code, out, err = in_process(eval_cli.run, "fidelity", model, *probes, *methods, *common)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert {row[0] for row in rows if len(row) > 5 and row[1] == "24"} == {"rkv", "wave", "keydiff"}
