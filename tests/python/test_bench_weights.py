"""Random models of a shape: valid, reproducible, and written without holding them."""

from __future__ import annotations

import dataclasses
import shutil
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from py_reasonalloc import ConfigError, ModelFileError, ReasonLlama
from py_reasonalloc.bench import weights
from py_reasonalloc.bench.blocks import FILL
from py_reasonalloc.bench.models import cached_path, model_file, open_model
from py_reasonalloc.bench.shapes import SHAPES, ModelShape
from py_reasonalloc.bench.weights import (
    WEIGHTS,
    TensorPlan,
    model_bytes,
    plan_tensors,
    tensor_chunks,
    write_model,
)
from py_reasonalloc.engine.identity import read_identity
from py_reasonalloc.sizes import SHAPES as CACHE_SHAPES

DEMO = SHAPES["demo"]
#: A small shape whose rows allow the 256-value blocks of q4_K and q6_K everywhere.
WIDE = dataclasses.replace(DEMO, n_layer=8, n_ff=512, is_tied=False)


def narrow(name: str) -> ModelShape:
    """Return a shape with the pattern of a large one and few values."""
    widths = {"n_layer": 4, "n_embd": 256, "n_ff": 288, "n_vocab": 400, "n_head": 8}
    more = {"n_head_kv": 4, "head_dim": 32, "n_expert": 8, "n_expert_used": 2}
    return dataclasses.replace(SHAPES[name], **widths, **more)


@pytest.mark.parametrize(
    ("name", "n_billion"),
    [
        ("r1-qwen-1.5b", 1.777),
        ("r1-llama-8b", 8.030),
        ("r1-qwen-14b", 14.770),
        ("gpt-oss-20b", 20.915),
        ("qwen3-30b-a3b", 30.532),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, n_billion) -> None:
    plans = plan_tensors(SHAPES[name], "f16")
    n = sum(max(plan.n_rows, 1) * plan.n_cols for plan in plans)
    assert n / 1e9 == pytest.approx(n_billion, abs=0.001)


@pytest.mark.parametrize(
    ("name", "long_name"),
    [
        ("r1-qwen-1.5b", "DeepSeek-R1-Distill-Qwen-1.5B"),
        ("r1-llama-8b", "DeepSeek-R1-Distill-Llama-8B"),
        ("r1-qwen-14b", "DeepSeek-R1-Distill-Qwen-14B"),
        ("gpt-oss-20b", "gpt-oss-20b"),
        ("qwen3-30b-a3b", "Qwen3-30B-A3B"),
    ],
)
def test_shapes_agree_with_the_table_of_sizes(name, long_name) -> None:
    shape = SHAPES[name]
    n_grown = shape.n_layer // shape.window_period
    assert CACHE_SHAPES[long_name][:3] == (n_grown, shape.n_head_kv, shape.head_dim)
    assert CACHE_SHAPES[long_name].n_layer_window == shape.n_layer - n_grown


def test_the_demo_shape_is_that_of_the_shipped_model(demo_model) -> None:
    reader = gguf.GGUFReader(demo_model)

    def value(key: str) -> object:
        return reader.fields[f"qwen2.{key}"].contents()

    assert DEMO.arch == reader.fields["general.architecture"].contents()
    assert DEMO.n_layer == value("block_count")
    assert DEMO.n_embd == value("embedding_length")
    assert DEMO.n_ff == value("feed_forward_length")
    assert (DEMO.n_head, DEMO.n_head_kv) == (
        value("attention.head_count"),
        value("attention.head_count_kv"),
    )
    assert DEMO.n_ctx_train == value("context_length")
    assert {t.name for t in reader.tensors} == {p.name for p in plan_tensors(DEMO, "q8_0")}


@pytest.mark.parametrize("kind", [*FILL])
def test_values_have_the_planned_deviation(kind) -> None:
    std = np.linspace(0.01, 0.02, 300)
    plan = TensorPlan("x", 300, 512, kind, std)
    data = b"".join(tensor_chunks(plan, 7))
    assert len(data) == plan.n_bytes
    floats = {Kind.F16: np.float16, Kind.F32: np.float32}
    raw = np.frombuffer(data, floats.get(kind, np.uint8)).reshape(300, -1)
    values = gguf.quants.dequantize(raw, kind).astype(np.float64)
    assert values.shape == (300, 512)
    assert np.isfinite(values).all()
    assert np.abs(values.mean()) < 0.12 * std.mean()
    # rows of K blocks are only a few blocks long: they scatter more
    assert np.median(values.std(axis=1) / std) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_llama_cpp_loads_it_and_logits_are_finite(tmp_path, kind) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, "wide", WIDE, kind)
    identity = read_identity(path)
    assert (identity.n_layer, identity.n_head_kv, identity.head_dim) == (8, 4, 32)
    with ReasonLlama(path, budget=32, buffer=16, n_ctx=256, n_threads_batch=1) as llama:
        llama.eval(llama.tokenize(b"some text that is read" * 4))
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
        assert np.isfinite(logits).all()
        assert 0.1 < logits.std() < 100.0
        assert llama.detokenize(llama.tokenize(b"any \xc3\xa4 text")) == b"any \xc3\xa4 text"


@pytest.mark.parametrize("kind", ["q4_0", "f16"])
@pytest.mark.parametrize(
    ("name", "heads"), [("gpt-oss-20b", [0, 4, 0, 4]), ("qwen3-30b-a3b", [4, 4, 4, 4])]
)
def test_shapes_with_experts_load(tmp_path, name, heads, kind) -> None:
    """And layers with a window are those that llama.cpp takes for such."""
    path = tmp_path / "m.gguf"
    write_model(path, name, narrow(name), kind)
    with ReasonLlama(path, budget=32, buffer=16, n_ctx=256, n_threads_batch=1) as llama:
        assert [len(layer) for layer in llama.kv_stats().layers] == heads
        llama.eval(llama.tokenize(b"some text that is read" * 4))
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
        assert np.isfinite(logits).all()
        assert 0.1 < logits.std() < 100.0
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{arch}.expert_used_count"].contents() == 2
    experts = {t.name: t for t in reader.tensors}["blk.1.ffn_down_exps.weight"]
    assert experts.shape.tolist() == [288, 256, 8]
    published = {"gpt-oss-20b": Kind.MXFP4, "qwen3-30b-a3b": Kind[kind.upper()]}
    assert experts.tensor_type == published[name]


def test_a_shape_can_have_fewer_layers(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REASONALLOC_CACHE_DIR", str(tmp_path))
    path = open_model("demo", "q8_0", 2)
    assert read_identity(path).n_layer == 2
    assert path != cached_path("demo", "q8_0")
    assert cached_path("demo", "q8_0", 6) == cached_path("demo", "q8_0")
    for name, n_layer, message in (
        ("demo", 7, "1 to 6"),
        ("gpt-oss-20b", 5, "a multiple of 2"),
        (str(path), 2, "a file has layers of its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_model(name, None, n_layer)


def test_types_follow_llama_quantize() -> None:
    def kinds(weights: str) -> dict[str, Kind]:
        return {plan.name: plan.kind for plan in plan_tensors(WIDE, weights)}

    assert kinds("q4_0")["output.weight"] == Kind.Q6_K
    assert kinds("q4_0")["token_embd.weight"] == kinds("q4_0")["blk.3.ffn_down.weight"] == Kind.Q4_0
    mixed = kinds("q4_k_m")
    assert mixed["output.weight"] == mixed["blk.0.attn_v.weight"] == Kind.Q6_K
    assert mixed["blk.1.attn_v.weight"] == mixed["blk.0.attn_q.weight"] == Kind.Q4_K
    assert set(kinds("q8_0").values()) == {Kind.Q8_0, Kind.F32}
    short = {plan.name: plan.kind for plan in plan_tensors(DEMO, "q4_k_m")}
    assert short["blk.1.ffn_down.weight"] == Kind.Q4_0  # rows of 384 values
    assert short["blk.2.ffn_down.weight"] == Kind.Q8_0


def test_a_seed_gives_one_file(tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_model(tmp_path / name, "demo", DEMO, "q4_0", seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert len(a) == len(c)
    assert 0 < len(a) - model_bytes(DEMO, "q4_0") < 1 << 16


def test_a_large_matrix_is_never_held(tmp_path) -> None:
    shape = dataclasses.replace(DEMO, n_layer=1, n_embd=4096, n_head=128, n_vocab=10000)
    path = tmp_path / "m.gguf"
    tracemalloc.start()
    try:
        write_model(path, "large", shape, "f16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 130e6
    assert peak < 32e6


def test_the_cache_is_used(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REASONALLOC_CACHE_DIR", str(tmp_path))
    written: list[int] = []
    path = model_file("demo", "q8_0", written.append)
    assert path == cached_path("demo", "q8_0")
    assert path.is_relative_to(tmp_path)
    assert cached_path("acereason-14b", "q4_0") == cached_path("r1-qwen-14b", "q4_0")
    assert 0 < sum(written) <= model_bytes(DEMO, "q8_0")
    n_calls = len(written)
    assert model_file("demo", "q8_0", written.append) == path
    assert len(written) == n_calls
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_seen_first(tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(ModelFileError, match=r"needs 0\.1 GB, the disk has 0\.0 GB free"):
        write_model(tmp_path / "m.gguf", "demo", DEMO, "q4_0")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "tensor_chunks", fail)
    with pytest.raises(ModelFileError, match="cannot be written: No space left"):
        write_model(tmp_path / "m.gguf", "demo", DEMO, "q4_0")
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_taken_as_it_is(make_gguf) -> None:
    path = make_gguf()
    assert model_file(str(path), "q4_0") == Path(path)
    with pytest.raises(ModelFileError, match="no such file"):
        model_file(str(path) + "x", "q4_0")
