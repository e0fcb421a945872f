"""Models with windows, recurrent layers, latent rows, sinks, soft caps, ALiBi: NumPy as the oracle.

Queries, keys and values of the budgeted layers are taken out of the engine's graph, as it writes
them to the cache, and so is what its attention gives. NumPy computes that attention over the tokens
that the engine says it keeps, and the policy's scores. The models are random ones of llama.cpp's
own generator.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import reference
from engine import Engine
from llama_cpp import llama_cpp as lib
from test_architectures import program  # noqa: F401  (a fixture)
from test_engine_parity import random_tokens

N_WINDOW = 8

ggml = lib._lib
for name, result in (("ggml_get_name", ctypes.c_char_p), ("ggml_op_name", ctypes.c_char_p)):
    getattr(ggml, name).restype = result


class Tensor(ctypes.Structure):
    """The beginning of struct ggml_tensor."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_float * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def values_of(t: Tensor) -> np.ndarray:
    """A contiguous f32 tensor as [ne1, ne0]."""
    assert t.type == 0 and t.nb[0] == 4 and t.nb[1] == 4 * t.ne[0]
    n = t.ne[0] * t.ne[1] * t.ne[2] * t.ne[3]
    pointer = ctypes.cast(t.data, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, (n,)).reshape(-1, t.ne[0]).astype(np.float64)


class Watch:
    """What the graph of a decode writes to the budgeted cache, and its attention."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], list[np.ndarray]] = {}
        self.scale: dict[int, float] = {}
        self.callback = lib.ggml_backend_sched_eval_callback(self._on_node)

    def _on_node(self, pointer: Any, ask: bool, _: Any) -> bool:
        t = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
        name = t.name.decode()
        kind, _, il = name.split(" ")[0].rpartition("_l")
        is_row = kind in ("ra_cache_k", "ra_cache_v", "ra_window_q") and bool(t.src[1])
        # a model may give it another name
        is_out = name.startswith(("kqv_out-", "attn_pregate-"))
        is_softmax = name.startswith("kq_soft_max-")
        if ask or not (is_row or is_out or is_softmax):
            return is_row or is_out or is_softmax
        if is_softmax:
            self.scale[int(name.split("-")[1])] = t.op_params[0]
        elif is_out:
            self.rows.setdefault(("out", int(name.split("-")[1])), []).append(values_of(t))
        else:
            rows = values_of(t.src[0].contents)
            self.rows.setdefault((kind[-1], int(il)), []).append(rows)
        return True

    def all(self, kind: str, il: int) -> np.ndarray:
        return np.concatenate(self.rows[kind, il])


class Model:
    """What NumPy must know of a model beside queries, keys and values."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(str(path))
        self.tensors = {t.name: t.data.astype(np.float64) for t in reader.tensors}
        arch = reader.fields["general.architecture"].contents()
        cap = reader.fields.get(f"{arch}.attn_logit_softcapping")
        window = reader.fields.get(f"{arch}.attention.sliding_window")
        self.window = 0 if window is None else int(window.contents())
        self.n_own = 20 if arch == "gemma3n" else 10**6  # layers with rows of their own
        self.soft_cap = float(cap.contents()) if cap is not None and arch == "gemma2" else 0.0
        self.alibi = 8.0 if arch == "bloom" else 0.0

    def sinks(self, il: int) -> np.ndarray | None:
        return self.tensors.get(f"blk.{il}.attn_sinks.weight")

    def slopes(self, n_head: int) -> np.ndarray:
        """As published, for a power of two of heads; zeros without ALiBi."""
        if self.alibi == 0:
            return np.zeros(n_head)
        assert n_head & (n_head - 1) == 0
        return 2.0 ** (-self.alibi * np.arange(1, n_head + 1) / n_head)


class Layer:
    """A budgeted layer of a run of `n` tokens, as the engine's graph has it."""

    def __init__(self, watch: Watch, model: Model, il: int, n: int, n_head_kv: int) -> None:
        self.n_head_kv = n_head_kv
        self.k = watch.all("k", il).reshape(n, n_head_kv, -1)
        # of the layer itself, and of those that read its rows: one after the other in every graph
        rows = watch.rows["q", il]
        n_readers = len(rows) // len(watch.rows["k", il])
        self.q = [
            np.concatenate(rows[i::n_readers]).reshape(n, -1, self.k.shape[2])
            for i in range(n_readers)
        ]
        self.readers = [il, *(i for kind, i in watch.rows if kind == "out" and i >= model.n_own)]
        self.readers = self.readers[:n_readers]
        self.out = [watch.all("out", i) for i in self.readers]
        n_head = self.q[0].shape[1]
        self.n_group = n_head // n_head_kv
        self.scale = watch.scale.get(il, self.k.shape[2] ** -0.5)  # ALiBi has operations of its own
        self.v_up = model.tensors.get(f"blk.{il}.attn_v_b.weight")
        if ("v", il) in watch.rows:
            self.v_up = None
            self.v = watch.all("v", il).reshape(n, n_head_kv, -1)
        else:  # latent: the first values of the keys
            self.v = self.k[..., : self.v_up.shape[-1]]
            self.v_up = self.v_up.reshape(n_head, -1, self.v.shape[2])
        self.sinks, self.soft_cap = model.sinks(il), model.soft_cap
        self.slopes = model.slopes(n_head)

    def head(
        self, ih: int, pos: np.ndarray, obs: np.ndarray, reader: int | None = None
    ) -> reference.Head:
        """By the queries of all layers that read the rows, or of one of them."""
        own = slice(ih * self.n_group, (ih + 1) * self.n_group)
        queries = self.q if reader is None else [self.q[reader]]
        return reference.Head(
            k=self.k[pos, ih],
            q=np.concatenate([q[obs][:, own] for q in queries], axis=1),
            kq_scale=self.scale,
            pos=pos,
            n_window=N_WINDOW,
            obs_pos=obs,
            sinks=None if self.sinks is None else self.sinks[own],
            soft_cap=self.soft_cap,
            slopes=np.tile(self.slopes[own], len(queries)),
        )

    def attend(self, i: int, kept: list[np.ndarray], reader: int) -> np.ndarray:
        """Attention of token i over the kept positions of each head: [n_head * head_dim_v]."""
        rows = []
        for ih, pos in enumerate(kept):
            h = self.head(ih, pos, np.array([i]), reader)
            weights = reference.softmax(h.logits[0], -np.inf if h.sinks is None else h.sinks)
            rows += list(weights @ self.v[pos, ih])
        if self.v_up is not None:
            rows = [up @ row for up, row in zip(self.v_up, rows)]
        return np.concatenate(rows)


def save(program: Path, folder: Path, arch: str, kind: str) -> Path:  # noqa: F811
    subprocess.run([program, "--save", str(folder), f"^{arch}$"], check=True, capture_output=True)
    return folder / f"{arch}-{kind}.gguf"


def expected_scores(
    layer: Layer,
    pos: np.ndarray,
    n_pos: int,
    ih: int,
    policy: str,
    memory: dict[int, np.ndarray],
) -> np.ndarray:
    """Scores of a head by NumPy; `memory` holds the state of the tokens, by position."""
    head = layer.head(ih, pos, np.arange(n_pos - N_WINDOW, n_pos))
    if policy == "rkv":
        return reference.rkv(head)
    head.v = layer.v[pos, ih]
    head.state = np.array([memory.get(p, np.full(2, np.nan)) for p in pos])
    memory.update(zip(pos, reference.mass_state(head)))
    return reference.mass(head)


@pytest.mark.parametrize("policy", ["rkv", "mass"])  # logits, and what the device sums of them
@pytest.mark.parametrize(
    ("arch", "kind", "budget_swa"),
    [
        ("gpt-oss", "moe", 0),  # windows, sinks
        ("gpt-oss", "moe", 20),  # windows of 32 tokens with a budget of their own
        ("gemma2", "dense", 0),  # windows, soft caps
        ("gemma2", "dense", 20),
        ("qwen3next", "moe", 0),  # hybrid
        ("granitehybrid", "dense", 0),  # hybrid
        ("deepseek2", "moe", 0),  # latent rows
        ("bloom", "dense", 0),  # ALiBi
    ],
)
def test_attention_and_scores(
    program: Path,  # noqa: F811
    tmp_path: Path,
    arch: str,
    kind: str,
    policy: str,
    budget_swa: int,
) -> None:
    path = save(program, tmp_path, arch, kind)
    model = Model(path)
    watch = Watch()
    config = {"buffer": 16, "n_window": N_WINDOW, "policy": policy, "head_alloc": "adaptive"}
    config["budget_swa"] = budget_swa
    tokens = [t % 100 for t in random_tokens(130)]
    n_checked, n_dead, n_pooled = 0, 0, 0
    with Engine(path, 40, "f32", flash_attn=False, config=config, cb_eval=watch.callback) as engine:
        engine.trace()
        # no more at once than the ring of queries holds
        for begin in range(0, 24, N_WINDOW):
            engine.decode(tokens[begin : begin + N_WINDOW])
        visible: dict[tuple[int, int, int], np.ndarray] = {}
        budgeted = {il for _, il in watch.rows if ("k", il) in watch.rows}
        windows = {il: model.window for il in budgeted if engine.head(il, 0).budget == budget_swa}
        for i in range(24, len(tokens)):
            engine.decode([tokens[i]])
            for il in budgeted:
                for ih in range(engine_heads(engine, il)):
                    kept = engine.kept(il, ih)
                    visible[i, il, ih] = kept[kept > i - windows.get(il, 10**6)]
                    n_dead += len(kept) - len(visible[i, il, ih])
        traces = engine.traces
        stats = engine.stats()
    assert stats.n_compressions >= 5
    assert budgeted
    if budget_swa > 0:
        assert model.window == 32 and 0 < len(windows) < len(budgeted)
        assert n_dead > 100 and stats.stock_bytes == 0
    for il in budgeted:
        layer = Layer(watch, model, il, len(tokens), engine_heads_of(visible, il))
        for i in range(24, len(tokens)):
            kept = [visible[i, il, ih] for ih in range(layer.n_head_kv)]
            for reader, out in enumerate(layer.out):
                expected = layer.attend(i, kept, reader)
                assert np.abs(expected - out[i]).max() < 1e-4 * max(1.0, np.abs(expected).max())
        memory: list[dict[int, np.ndarray]] = [{} for _ in range(layer.n_head_kv)]
        for event in (e for e in traces if e.il == il):
            for ih in range(layer.n_head_kv):
                pos, got = event.positions[ih], event.scores[ih]
                live = pos > event.n_pos - windows.get(il, 10**6)
                assert np.array_equal(np.isneginf(got), ~live)
                assert not event.keep[ih][~live].any()
                scores = expected_scores(layer, pos[live], event.n_pos, ih, policy, memory[ih])
                free = np.isfinite(got[live])
                error = np.abs(scores - got[live])[free].max()
                assert error < (2e-3 if policy == "rkv" else 1e-3 * scores[free].max())
                n_checked += int(free.sum())
        n_pooled = max(n_pooled, len(layer.q))
    assert n_checked > 200
    assert n_pooled == (3 if arch == "gemma3n" else 1)


def engine_heads_of(visible: dict[tuple[int, int, int], np.ndarray], il: int) -> int:
    return max(ih for _, layer, ih in visible if layer == il) + 1


def engine_heads(engine: Engine, il: int) -> int:
    from py_reasonalloc.engine import bindings as c

    return int(c.ra_n_head_kv(engine.ctx, il))
