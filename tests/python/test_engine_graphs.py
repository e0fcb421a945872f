"""Every operation of every graph is one that CPU, CUDA and Metal support.

The judge is llama.cpp's own tables (docs/ops/*.csv of the pinned tree), made with test-backend-ops
on real devices: which operation, with which types, runs on which backend. They come with the source
distribution that the package is built from. A table knows types and head sizes, not our very shapes
and strides: this test keeps us to operations that can run on a GPU, it does not run them there.

Kept rows are packed by moves of memory where the cache is in host memory; for a device there is a
graph, which is run on the CPU here.
"""

from __future__ import annotations

import csv
import ctypes
import io
import re
import sys
import tarfile
from pathlib import Path

import pytest
from engine import Engine
from llama_cpp import llama_cpp as lib
from test_engine_parity import random_tokens

from py_reasonalloc.engine import bindings as c

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "native" / "cmake"))

import llama_source  # noqa: E402

BACKENDS = ("CPU", "CUDA", "Metal")
MODEL = {"arch": "qwen3", "n_layer": 2, "n_head": 4, "n_head_kv": 2, "head_dim": 64}
#: views cost nothing and need no support
NO_WORK = {"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"}
POLICIES = [c.ra_policy_name(i).decode() for i in range(c.ra_policy_count())]

#: op -> parameters of the table that our node decides, from (node, sources) as (type, sizes)
PARAMETERS = {
    "MUL_MAT": lambda out, src: {"type_a": src[0][0], "type_b": src[1][0]},
    "CPY": lambda out, src: {"type_src": src[0][0], "type_dst": out[0]},
    "GET_ROWS": lambda out, src: {"type": src[0][0]},
    "SET_ROWS": lambda out, src: {"type": out[0], "type_idx": src[1][0]},
    "FLASH_ATTN_EXT": lambda out, src: {
        "hsk": str(src[1][1][0]),
        "hsv": str(src[2][1][0]),
        "type_KV": src[1][0],
        "mask": str(int(len(src) > 3)),
        "sinks": str(int(len(src) > 4)),
        "batch": str(int(src[0][1][3] > 1)),
    },
    "SOFT_MAX": lambda out, src: {
        "type": src[0][0],
        "mask": str(int(len(src) > 1)),
        "m_prec": src[1][0] if len(src) > 1 else "f32",
    },
}


def read_tables() -> dict[str, list[dict[str, str]]]:
    """Rows of each backend's table; empty if the package was built from something else."""
    archive = llama_source.cache_dir() / llama_source.load_pin().sdist_name
    tables = {}
    if archive.is_file():
        with tarfile.open(archive, "r:gz") as tar:
            for backend in BACKENDS:
                name = (
                    f"{archive.name[: -len('.tar.gz')]}/{llama_source.TREE}/docs/ops/{backend}.csv"
                )
                stream = tar.extractfile(name)
                assert stream is not None
                tables[backend] = list(csv.DictReader(io.StringIO(stream.read().decode())))
    return tables


@pytest.fixture(scope="module")
def tables() -> dict[str, list[dict[str, str]]]:
    """Tables of all backends."""
    tables = read_tables()
    if not tables:
        pytest.skip("the source distribution of llama-cpp-python is not in the download cache")
    return tables


def describe(node: int) -> str:
    """One line: operation, type and sizes of the node, then of its sources."""
    text = ctypes.create_string_buffer(512)
    c._lib.ra_debug_describe(ctypes.c_void_p(node), text, ctypes.c_size_t(512))
    return text.value.decode()


def run(path: Path, gathers: bool = False, **parameters) -> tuple[set[str], set[str]]:
    """Read a prompt and decode: nodes of the model's graphs, and of those of compressions."""
    attention: set[str] = set()
    scores: set[str] = set()

    @lib.ggml_backend_sched_eval_callback
    def on_eval(node, ask, user) -> bool:
        attention.add(describe(node))
        return False

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    def on_score(user, node) -> None:
        scores.add(describe(node))

    with Engine(path, 40, cb_eval=on_eval, **parameters) as engine:
        context = ctypes.c_void_p(engine.ctx)
        assert c._lib.ra_debug_watch_scores(context, on_score, None) == 0
        assert c._lib.ra_debug_gather_always(context, int(gathers)) == 0
        engine.decode(random_tokens(90))
        engine.decode_each(random_tokens(60))
        assert engine.stats().n_compressions > 3
    return attention, scores


def parse(line: str) -> tuple[str, tuple, list[tuple]]:
    """Operation, node and sources as (type, sizes), of a line of `describe`."""
    op, *tensors = line.split(" ")
    parsed = []
    for tensor in tensors:
        match = re.fullmatch(r"(\w+)\[([\d,]+)\]", tensor)
        assert match, line
        parsed.append((match.group(1), [int(n) for n in match.group(2).split(",")]))
    return op, parsed[0], parsed[1:]


def requirement(line: str) -> tuple[str, tuple] | None:
    """Operation and the parameters that the tables must list as supported."""
    op, out, sources = parse(line)
    if op in NO_WORK:
        return None
    rule = PARAMETERS.get(op, lambda out, src: {"type": src[0][0]})
    return op, tuple(sorted(rule(out, sources).items()))


def with_batch(row: dict[str, str]) -> dict[str, str]:
    """Add to a row of flash attention whether it has a batch dimension (ne[3], "nr23=[_,n]")."""
    if "nr23" in row:
        row["batch"] = str(int(row["nr23"].strip("[]").split(",")[1] != "1"))
    return row


def unsupported(tables, required: set[tuple[str, tuple]]) -> list[str]:
    """What no supported row of a backend's table covers."""
    missing = []
    for backend, rows in tables.items():
        listed: dict[str, list[dict[str, str]]] = {op: [] for op, _ in required}
        for row in rows:
            if row["op_name"] in listed and row["supported"] == "1":
                found = re.findall(r"(\w+)=(\[[^\]]*\]|[^,]*)", row["op_params"])
                listed[row["op_name"]].append(with_batch(dict(found)))
        for op, parameters in sorted(required):
            if not any(all(row.get(k) == v for k, v in parameters) for row in listed[op]):
                missing.append(f"{backend}: {op} {dict(parameters)}")
    return missing


def requirements(lines: set[str]) -> set[tuple[str, tuple]]:
    return {r for r in map(requirement, lines) if r is not None}


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0", "f32"])
def test_attention_by_layer(make_gguf, tables, kv: str) -> None:
    """One op for the uneven heads of a layer: for a decoded token, not for a prompt."""
    required = set()
    attention = []
    for table in ({"head_alloc": "adaptive"}, {"head_budgets": [30, 50, 45, 35]}):
        config = {"buffer": 16, "attention": "layer", **table}
        nodes, _ = run(make_gguf(**MODEL), kv=kv, config=config)
        required |= requirements(nodes)
        attention += [src for op, _, src in map(parse, nodes) if op == "FLASH_ATTN_EXT"]
    batched = [src for src in attention if src[0][1][3] > 1]
    assert batched and {src[0][1][1] for src in batched} == {1}
    assert {src[0][1][1] for src in attention} >= {1, 16}
    assert all(src[3] == ("f16", [src[1][1][1], 1, 1, 2]) for src in batched)
    assert unsupported(tables, required) == []


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
@pytest.mark.parametrize(
    "kv,flash_attn", [("f16", True), ("f16", False), ("q8_0", True), ("q4_0", True)]
)
def test_attention_graphs(make_gguf, tables, kv: str, flash_attn: bool, heads: str) -> None:
    """One query and a piece of a prompt; heads of equal and of different budgets."""
    config = {"buffer": 16, "head_alloc": heads}
    nodes, scores = run(make_gguf(**MODEL), kv=kv, flash_attn=flash_attn, config=config)
    if heads == "adaptive":
        config = {"buffer": 16, "head_budgets": [30, 50, 45, 35]}
        more = run(make_gguf(**MODEL), kv=kv, flash_attn=flash_attn, config=config)
        nodes |= more[0]
        scores |= more[1]
    required = requirements(nodes | scores)
    ops = {op for op, _ in required}
    assert {"SET_ROWS", "CPY", "L2_NORM", "MUL_MAT"} <= ops
    assert ("FLASH_ATTN_EXT" if flash_attn else "SOFT_MAX") in ops
    assert ("CONCAT" in ops) == (heads == "adaptive" or not flash_attn)
    queries = {src[0][1][1] for op, _, src in map(parse, nodes) if op == "FLASH_ATTN_EXT"}
    assert not flash_attn or {1, 16} <= queries
    assert unsupported(tables, required) == []


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_score_graphs_of_every_policy(make_gguf, tables, kv: str) -> None:
    required = set()
    for policy in POLICIES:
        for guard in (0.0, 1.0):
            config = {"buffer": 16, "policy": policy, "value_guard": guard}
            _, scores = run(make_gguf(**MODEL), kv=kv, config=config)
            assert bool(scores) == (policy not in ("random", "streaming") or guard > 0)
            required |= requirements(scores)
    assert {op for op, _ in required} == {
        "CPY", "CONT", "GET_ROWS", "L2_NORM", "MUL_MAT", "REPEAT_BACK", "SOFT_MAX", "SQR", "SQRT",
        "SUM_ROWS",
    }  # fmt: skip
    # sums of columns: without them it is CONT and SUM_ROWS (test_engine_devices.py)
    others = {one for one in required if one[0] != "REPEAT_BACK"}
    assert unsupported(tables, others) == []


@pytest.mark.parametrize("kv", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_graphs_that_move_rows(make_gguf, tables, kv: str) -> None:
    config = {"buffer": 16, "policy": "random", "head_alloc": "adaptive"}
    _, nodes = run(make_gguf(**MODEL), gathers=True, kv=kv, config=config)
    required = requirements(nodes)
    assert required == {
        ("GET_ROWS", (("type", "i32"),)),
        ("CPY", (("type_dst", "i32"), ("type_src", "i32"))),
    }
    assert unsupported(tables, required) == []


def test_the_check_itself_sees_what_is_missing(tables) -> None:
    """bfloat16 flash attention on CUDA and OUT_PROD on Metal are known to be unsupported."""
    attention = "FLASH_ATTN_EXT f32[64,2,1,1] f32[64,1,2,1] bf16[64,96,1,1] bf16[64,96,1,1]"
    required = requirements({attention + " f16[96,1,1,1]", "OUT_PROD f32[8,8,1,1] f32[8,2,1,1]"})
    missing = unsupported(tables, required)
    assert any(line.startswith("CUDA: FLASH_ATTN_EXT") for line in missing)
    assert not any(line.startswith("CPU: FLASH_ATTN_EXT") for line in missing)
    assert any(line.startswith("Metal: OUT_PROD") for line in missing)
