"""Models on one device and on two, layer by layer: what they write is what the CPU writes.

The devices are those of tests/devices: their memory is out of the host's reach, and what they are
asked for they do when somebody waits for it, as a GPU may. They compute with the CPU's functions,
so logits, states and compressions are the CPU's, bit for bit.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import ON_CPU, TestDevices, needs_devices
from engine import Engine
from llama_cpp import llama_cpp as lib
from test_architectures import program  # noqa: F401  (a fixture)
from test_engine_bytes import breakdown
from test_engine_classes import save
from test_engine_memory import get_state, set_state
from test_engine_parity import random_tokens

from py_reasonalloc import ReasonLlama
from py_reasonalloc.engine import bindings as c
from py_reasonalloc.run.calibrate import Settings, calibrate
from py_reasonalloc.task.shipped import DEMO_MODEL

pytestmark = needs_devices

ROOT = Path(__file__).resolve().parents[2]
TOKENS = random_tokens(200)
SMALL = {"buffer": 16}
UNEVEN = {**SMALL, "head_alloc": "adaptive"}
METHODS = {
    "rkv": {**SMALL, "policy": "rkv"},
    "rkv, uneven": {**UNEVEN, "policy": "rkv"},
    "rkv, one op per layer": {**UNEVEN, "policy": "rkv", "attention": "layer"},
    "merged": {**SMALL, "policy": "loss", "merge": 1},
    "merged, uneven": {**UNEVEN, "policy": "loss", "merge": 1},
    "merged, one op per layer": {**UNEVEN, "policy": "loss", "merge": 1, "attention": "layer"},
    "value guard": {**UNEVEN, "policy": "mass", "value_guard": 2.0},
    "query centres": {**UNEVEN, "policy": "triattention"},
    "pyramid": {**SMALL, "policy": "h2o", "layer_alloc": "pyramid"},
}
#: Heads of 64, which CUDA has kernels for; those of the demo, 32, it has not.
HEADS_OF_64 = {"arch": "llama", "n_layer": 4, "n_head": 8, "n_head_kv": 2, "head_dim": 64}


@pytest.fixture(scope="module")
def devices() -> TestDevices:
    return TestDevices()


def run(path: Path, params: dict[str, Any], tokens: Any = TOKENS, **arguments: Any) -> Any:
    """Logits of a prompt and of single tokens, and the cache of 40 afterwards."""
    with Engine(path, 40, n_ctx=256, model_params=params, **arguments) as engine:
        logits = np.concatenate([engine.decode(tokens[:100]), engine.decode_each(tokens[100:])])
        assert engine.stats().n_compressions > 5
        return logits, engine.stats().n_compressions, get_state(engine)


def assert_same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert found[2] == expected[2]


def test_their_memory_is_out_of_reach() -> None:
    script = (
        "import ctypes; from devices import TestDevices, ggml; p = ctypes.c_void_p\n"
        "buft = ggml('ggml_backend_dev_buffer_type', p, p)(TestDevices().all[0])\n"
        "buf = ggml('ggml_backend_buft_alloc_buffer', p, p, ctypes.c_size_t)(buft, 4096)\n"
        "base = ggml('ggml_backend_buffer_get_base', p, p)(buf)\n"
        "print(base > 0, flush=True); ctypes.string_at(base, 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "tests/python", capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("True\n", -signal.SIGSEGV), done.stderr


@pytest.mark.parametrize("n", [1, 2])
def test_a_budget_that_holds_all_tokens(devices: TestDevices, n: int) -> None:
    prompt = random_tokens(40)
    with Engine(DEMO_MODEL, n_ctx=512, model_params=ON_CPU) as engine:
        expected = engine.greedy(prompt, 300)
    for budget in (None, 400):
        before = [devices.counts(i)[1] for i in range(2)]
        with Engine(DEMO_MODEL, budget, n_ctx=512, model_params=devices.on(n)) as engine:
            assert engine.greedy(prompt, 300) == expected
        n_nodes = [devices.counts(i)[1] - before[i] for i in range(2)]
        assert [count > 300 * 50 for count in n_nodes] == [True, n == 2]


@pytest.mark.parametrize("method", METHODS)
def test_small_budgets(devices: TestDevices, method: str) -> None:
    config = METHODS[method]
    expected = run(DEMO_MODEL, ON_CPU, config=config)
    for n in (1, 2):
        assert_same(run(DEMO_MODEL, devices.on(n), config=config), expected)


@pytest.mark.parametrize("policy", ["rkv", "streaming"])  # one scores on the device, one does not
@pytest.mark.parametrize("kv", ["f32", "bf16", "q8_0", "iq4_nl"])
def test_types_of_cache(devices: TestDevices, kv: str, policy: str) -> None:
    """Rows of whole words are gathered on the device, others (34 or 18 bytes) in a host copy."""
    arguments = {"kv": kv, "config": {**UNEVEN, "policy": policy}}
    expected = run(DEMO_MODEL, ON_CPU, **arguments)
    assert_same(run(DEMO_MODEL, devices.on(2), **arguments), expected)


def test_without_flash_attention(devices: TestDevices) -> None:
    expected = run(DEMO_MODEL, ON_CPU, flash_attn=False, config=UNEVEN)
    assert_same(run(DEMO_MODEL, devices.on(2), flash_attn=False, config=UNEVEN), expected)


@pytest.mark.parametrize("method", ["rkv, uneven", "rkv, one op per layer", "merged"])
def test_a_part_on_the_host(devices: TestDevices, method: str) -> None:
    """Some layers, or the cache of all."""
    config = METHODS[method]
    expected = run(DEMO_MODEL, ON_CPU, config=config)
    assert_same(run(DEMO_MODEL, devices.on(2, n_gpu_layers=4), config=config), expected)
    on_host = {"context_params": {"offload_kqv": False}}
    assert_same(run(DEMO_MODEL, devices.on(2), config=config, **on_host), expected)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("gemma3", ""),  # windows
        ("granitehybrid", "dense"),  # recurrent layers
        ("deepseek2", "moe"),  # latent rows
        ("gpt-oss", "moe"),  # windows, sinks, experts
        ("gemma2", "dense"),  # windows, soft caps
        ("bloom", "dense"),  # ALiBi
    ],
)
def test_other_kinds_of_memory(
    devices: TestDevices,
    arch: str,
    kind: str,
    make_gguf: Any,
    program: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    if arch == "gemma3":
        path = make_gguf(arch=arch, n_layer=6, head_dim=64, n_ctx_train=1024)
    else:
        path = save(program, tmp_path, arch, kind)
    tokens = [token % 100 for token in TOKENS]
    arguments = {"config": UNEVEN, "n_ubatch": 64}
    expected = run(path, ON_CPU, tokens, **arguments)
    for n in (1, 2):
        assert_same(run(path, devices.on(n), tokens, **arguments), expected)
        goes_on_alike(path, expected[2], ON_CPU, devices.on(n))


# --- what is done with a cache --------------------------------------------------------------------


def goes_on_alike(path: Path, state: bytes, *params: dict[str, Any]) -> None:
    """The same state, loaded in different places."""
    logits = []
    for where in params:
        with Engine(path, 40, n_ctx=256, config=UNEVEN, model_params=where) as engine:
            assert set_state(engine, state) == len(state)
            engine.n_pos = engine.length(0)
            logits.append(engine.decode_each([token % 100 for token in TOKENS[:40]]))
            assert engine.stats().n_compressions > 1
    np.testing.assert_array_equal(logits[0], logits[1])


def test_states_go_from_any_place_to_any_other(devices: TestDevices) -> None:
    states = [run(DEMO_MODEL, p, config=UNEVEN)[2] for p in (ON_CPU, devices.on(2))]
    assert states[0] == states[1]
    goes_on_alike(DEMO_MODEL, states[0], ON_CPU, devices.on(2))


def test_a_copied_sequence_goes_on_like_the_original(devices: TestDevices) -> None:
    config = {**UNEVEN, "policy": "loss", "merge": 1}
    found = []
    for params in (ON_CPU, devices.on(2)):
        with Engine(
            DEMO_MODEL, 40, n_ctx=256, n_seq_max=2, config=config, model_params=params
        ) as engine:
            engine.decode_many([(0, TOKENS[:100]), (1, TOKENS[50:90])])
            lib.llama_memory_seq_rm(engine.memory, 1, -1, -1)
            lib.llama_memory_seq_cp(engine.memory, 0, 1, -1, -1)
            for token in TOKENS[100:150]:
                logits = engine.decode_many([(0, [token]), (1, [token])])
                np.testing.assert_array_equal(logits[0], logits[1])
            found.append(engine.decode_many([(0, TOKENS[:60]), (1, TOKENS[60:120])]))
    np.testing.assert_array_equal(np.stack(found[0]), np.stack(found[1]))


def test_budgets_that_move_segments_both_ways(devices: TestDevices) -> None:
    with (
        Engine(DEMO_MODEL, 64, config=SMALL, model_params=ON_CPU) as there,
        Engine(DEMO_MODEL, 64, config=SMALL, model_params=devices.on(2)) as here,
    ):
        for step, first in enumerate((64, 100, 20, 64, 13)):
            budgets = [first, 128 - first, 64, 64]
            for engine in (there, here):
                assert engine.set_head_budgets(0, budgets) == 0
                assert engine.set_head_budgets(5, budgets[::-1]) == 0
                engine.decode(random_tokens(90, seed=step))
            assert get_state(here) == get_state(there)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_bytes_of_a_device_are_those_of_its_layers(devices: TestDevices, kv: str) -> None:
    """Pools of a device are one buffer; the last row of q8_0 is padded there, as on CUDA."""
    config = {**UNEVEN, "policy": "rkv", "merge": 1}
    params = devices.on(2)
    with Engine(DEMO_MODEL, 40, n_ctx=256, kv=kv, config=config, model_params=params) as engine:
        stats = engine.stats()
        rows = stats.kv_bytes // 12 + (480 // 32 * 34 if kv == "q8_0" else 0)  # K or V
        layer = 2 * (rows + -rows % 128) + stats.window_bytes // 6
        # weights, pools, compute buffers
        at_first = [devices.buffers(i) for i in range(2)]
        pools = [sizes[1] for sizes in at_first]
        assert [len(sizes) for sizes in at_first] == [3, 3]
        assert sum(pools) == 6 * layer == breakdown(engine)[1]
        assert all(size >= 2 * layer and size % layer == 0 for size in pools)

        planned = c.ra_planned_scratch_bytes(engine.ctx)
        engine.decode([5])
        with_scratch = [devices.buffers(i) for i in range(2)]
        assert [sizes[:3] for sizes in with_scratch] == at_first
        assert sum(sizes[3] for sizes in with_scratch) < planned == engine.stats().scratch_bytes
        engine.decode(TOKENS)
        assert engine.stats().n_compressions > 5
        assert [devices.buffers(i) for i in range(2)] == with_scratch
        assert engine.stats().scratch_bytes == planned
    assert [devices.buffers(i) for i in range(2)] == [[], []]


# --- a device that lacks operations ---------------------------------------------------------------


def graphs_of(devices: TestDevices, path: Path, **arguments: Any) -> tuple[int, int]:
    """Graphs that a device computes for two tokens, and for one with a compression."""
    counts = []
    with Engine(path, 40, n_ctx=256, model_params=devices.on(1), **arguments) as engine:
        engine.decode(TOKENS[:100])
        compressed = engine.stats().n_compressions
        while engine.stats().n_compressions == compressed:
            before = devices.counts(0)[0]
            engine.decode([5])
            counts.append(devices.counts(0)[0] - before)
    return counts[-3] + counts[-2], counts[-1]


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("method", METHODS)
def test_cuda_has_all_operations(
    devices: TestDevices, make_gguf: Any, method: str, kv: str
) -> None:
    """No op goes to the CPU, which would cut a graph in pieces: one graph for a token."""
    path = make_gguf(**HEADS_OF_64, n_ctx_train=1024)
    arguments = {"kv": kv, "config": METHODS[method]}
    expected = graphs_of(devices, path, **arguments)
    assert expected[0] == 2
    with devices.as_cuda():
        assert graphs_of(devices, path, **arguments) == expected


@pytest.mark.parametrize("method", METHODS)
def test_attention_goes_to_the_cpu_where_the_device_has_none(
    devices: TestDevices, method: str
) -> None:
    config = METHODS[method]
    expected = run(DEMO_MODEL, ON_CPU, config=config)
    with devices.as_cuda():  # no flash attention for heads of 32
        assert_same(run(DEMO_MODEL, devices.on(2), config=config), expected)
        assert graphs_of(devices, DEMO_MODEL, config=config)[0] > 2 * 6


def test_attention_is_summed_without_sums_of_columns(devices: TestDevices) -> None:
    """As on Metal. In another order, so bits differ; transposes take more graphs of scores."""
    config = {**SMALL, "policy": "loss", "merge": 1}
    expected = run(DEMO_MODEL, devices.on(2), config=config)
    with devices.as_metal():
        found = run(DEMO_MODEL, devices.on(2), config=config)
        assert graphs_of(devices, DEMO_MODEL, config=config)[0] == 2
    assert found[1] == expected[1]
    assert found[2] != expected[2]
    np.testing.assert_allclose(found[0], expected[0], atol=0.05)


def test_tensor_split_is_refused_by_name(devices: TestDevices) -> None:
    params = devices.on(2, split_mode=3)  # LLAMA_SPLIT_MODE_TENSOR
    with Engine(DEMO_MODEL, n_ctx=256, model_params=params) as engine:
        engine.decode([5])  # llama.cpp itself can
    with pytest.raises(RuntimeError) as error:
        Engine(DEMO_MODEL, 64, n_ctx=256, model_params=params)
    assert str(error.value) == (
        "a budgeted cache cannot be split tensor by tensor over devices: split the model by layers"
    )


# --- the package on them --------------------------------------------------------------------------


def test_sessions_and_profiles(devices: TestDevices) -> None:
    """llama.cpp finds the devices by itself, as it finds GPUs; budgets by measured curves."""
    found = []
    for n_gpu_layers in (0, -1):
        with devices.registered():
            before = devices.counts(1)[0]
            settings = Settings(steps=80, n_threads=1, n_gpu_layers=n_gpu_layers, buffer=16)
            profile = calibrate(DEMO_MODEL, ["a = 4"], settings)
            with ReasonLlama(
                DEMO_MODEL,
                48,
                "loss",
                buffer=16,
                layers="error",
                profile=profile,
                n_ctx=1024,
                n_gpu_layers=n_gpu_layers,
                tensor_split=[0.5, 0.5],
                n_threads=1,
                n_threads_batch=1,
            ) as llama:
                first = llama("a = 4\nb = a + 7\n", max_tokens=100, temperature=0.0)
                state = llama.save_state()
                more = [llama.sample(temp=0.0)]
                llama.clear()
                llama.load_state(state)
                assert llama.sample(temp=0.0) == more[0]
                assert llama.kv_stats().n_compressions > 2
                found.append((profile, first["choices"][0]["text"]))
            assert (devices.counts(1)[0] > before) == (n_gpu_layers == -1)
    assert found[0] == found[1]
