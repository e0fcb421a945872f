"""The table of sizes counts what the engine allocates, layers without a budget included."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_architectures import program  # noqa: F401  (a fixture)
from test_bench_weights import narrow
from test_engine_classes import save

from py_reasonalloc import ReasonLlama
from py_reasonalloc.bench.weights import write_model
from py_reasonalloc.sizes import SHAPES, Shape, budget_bytes, delta_state, full_bytes


def allocated(path: Path, budget: int | None, **options: Any) -> int:
    """K, V and whatever else llama.cpp keeps of a text: bytes of a context's memory."""
    arguments = {"swa_full": False, **options}
    with ReasonLlama(path, budget=budget, **arguments) as llama:
        n_bytes = llama.memory_use().context_bytes
        if budget is not None:  # the observation window's queries are no cache
            n_bytes -= llama.kv_stats().window_bytes
        return n_bytes


@pytest.mark.parametrize("n_window", [128, 200])
def test_windows(tmp_path: Path, n_window: int) -> None:
    path = tmp_path / "m.gguf"
    shape = dataclasses.replace(narrow("gpt-oss-20b"), n_window=n_window)
    write_model(path, "narrow", shape, "q4_0")
    sizes = Shape(2, 4, 32, 2, n_window)
    assert allocated(path, None, n_ctx=2048) == full_bytes(sizes, 2048, "f16")
    assert allocated(path, 64, n_ctx=2048) == budget_bytes(sizes, 64, "f16")


@pytest.mark.parametrize(("arch", "kind"), [("qwen35", "dense"), ("qwen3next", "moe")])
def test_recurrent_states(program: Path, tmp_path: Path, arch: str, kind: str) -> None:  # noqa: F811
    path = save(program, tmp_path, arch, kind)
    # two layers, one of them with two K and two V heads of 128 values and a convolution over four
    sizes = Shape(1, 2, 128, n_layer_state=1, n_state=delta_state(2, 2))
    assert allocated(path, None, n_ctx=256) == full_bytes(sizes, 256, "f16")
    assert allocated(path, 64, n_ctx=256) == budget_bytes(sizes, 64, "f16")


def test_published_states() -> None:
    """Values of a layer's state as the models' configurations give it: S and the convolution's."""
    assert SHAPES["Qwen3.5-27B"].n_state == 48 * 128 * 128 + 3 * (16 + 16 + 48) * 128
    assert SHAPES["Qwen3-Next-80B-A3B"].n_state == 32 * 128 * 128 + 3 * (16 + 16 + 32) * 128
