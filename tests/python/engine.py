"""The engine through its C interface, token by token: what the tests of the cache drive.

`Engine` is one model with one context, stock (``budget=None``) or budgeted. It returns logits and
reads back what the cache holds; nothing of it is shipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as lib

from py_reasonalloc.engine import bindings as c

#: Layers on a GPU, for runs of these tests on one (tests/gpu/check.sh).
N_GPU_LAYERS = int(os.environ.get("REASONALLOC_TEST_GPU_LAYERS", "0"))

KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}


@lib.llama_log_callback
def _silent(level: int, text: bytes, user: Any) -> None:
    pass


lib.llama_log_set(_silent, ctypes.c_void_p(0))


@contextlib.contextmanager
def aborting(ctx: Any, n_calls: int = 0) -> Iterator[None]:
    """Let llama.cpp abort inside the block, when it asks for the time after `n_calls` times."""
    left = n_calls

    def abort(_: object) -> bool:
        nonlocal left
        left -= 1
        return left < 0

    callback = lib.ggml_abort_callback(abort)
    lib.llama_set_abort_callback(ctx, callback, None)
    try:
        yield
    finally:
        lib.llama_set_abort_callback(ctx, lib.ggml_abort_callback(0), None)


def policy_index(name: bytes) -> int:
    """Number of a policy in the registry, -1 if there is none of that name."""
    names = [c.ra_policy_name(i) for i in range(c.ra_policy_count())]
    return names.index(name) if name in names else -1


def random_centres(model: Any) -> np.ndarray:
    """Query centres for a model whose heads are alike: [n_layer, n_head, 3 head_dim / 2]."""
    text = ctypes.create_string_buffer(64)
    lib.llama_model_meta_val_str(model, b"general.architecture", text, 64)
    key = text.value + b".attention.key_length"
    n_head, n_layer = lib.llama_model_n_head(model), lib.llama_model_n_layer(model)
    if lib.llama_model_meta_val_str(model, key, text, 64) > 0:
        head_dim = int(text.value)
    else:
        head_dim = lib.llama_model_n_embd(model) // n_head
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((n_layer, n_head, head_dim))
    spread = 1.0 + rng.random((n_layer, n_head, head_dim // 2))
    return np.concatenate([mean, 2.0 * spread], axis=2).astype(np.float32)


@dataclass
class LayerTrace:
    """One layer of one compression, as the trace callback reported it. Lists are per KV head."""

    seq_id: int
    i_compression: int
    n_pos: int
    il: int
    positions: list[np.ndarray]
    scores: list[np.ndarray]
    keep: list[np.ndarray]
    budgets: list[int]
    target: list[np.ndarray] | None = None
    share: list[np.ndarray] | None = None
    bias: list[np.ndarray] | None = None

    def kept(self, ih: int) -> np.ndarray:
        """Return the positions that head `ih` kept."""
        return self.positions[ih][self.keep[ih]]


@dataclass
class Engine:
    """A model and a context.

    Parameters
    ----------
    path : path-like
        GGUF file.
    budget : int or None
        Tokens per head, or None for the stock cache.
    kv : str
        Cache type of K and V.
    flash_attn : bool
        Flash attention on or off.
    n_ctx, n_batch, n_ubatch : int
        As in llama.h; n_ctx = 0: the trained length.
    n_threads : int
        For both prompt and decoding; tiny models are fastest with one.
    config : dict
        Further fields of ra_config; tables are given as lists. A policy that needs query centres
        gets `random_centres` unless it is given others.
    cb_eval : ggml_backend_sched_eval_callback or None
        As in llama_context_params.
    n_seq_max : int
        Sequences of the context; each may be n_ctx tokens long.
    model_params, context_params : dict
        Further fields of llama_model_params and llama_context_params.
    """

    path: Path | str
    budget: int | None = None
    kv: str = "f16"
    flash_attn: bool = True
    n_ctx: int = 0
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    cb_eval: Any = None
    n_seq_max: int = 1
    model_params: dict[str, Any] = field(default_factory=dict)
    context_params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_pos = 0
        self.traces: list[LayerTrace] = []
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = N_GPU_LAYERS
        for name, value in self.model_params.items():
            setattr(model_params, name, value)
        self.model = lib.llama_model_load_from_file(str(self.path).encode(), model_params)
        if not self.model:
            raise RuntimeError(f"cannot load {self.path}")
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.ctx = self._make_context()
        if not self.ctx:
            lib.llama_model_free(self.model)
            raise RuntimeError(c.last_error())

    def _make_context(self) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = self.n_ctx
        params.n_batch = self.n_batch
        params.n_ubatch = self.n_ubatch
        params.n_seq_max = self.n_seq_max
        params.kv_unified = self.n_seq_max > 1
        params.type_k = params.type_v = KV_TYPES[self.kv]
        params.n_threads = params.n_threads_batch = self.n_threads
        params.flash_attn_type = 1 if self.flash_attn else 0
        if self.cb_eval is not None:
            params.cb_eval = self.cb_eval
        for name, value in self.context_params.items():
            setattr(params, name, value)
        if self.budget is not None:
            c.check(c.ra_configure_next(ctypes.byref(self._config())))
        return lib.llama_init_from_model(self.model, params)

    def _config(self) -> c.ra_config:
        config = c.ra_config_default_params()
        config.budget = self.budget
        for name, value in self.config.items():
            if isinstance(value, (list, tuple)):
                setattr(config, name, (ctypes.c_int32 * len(value))(*value))
                setattr(config, f"n_{name}", len(value))
            elif isinstance(value, str):
                setattr(config, name, value.encode())
            else:
                setattr(config, name, value)
        if c.ra_policy_needs_centres(policy_index(config.policy)) and "centres" not in self.config:
            table = random_centres(self.model).ravel()
            config.centres = (ctypes.c_float * table.size)(*table)
            config.n_centres = table.size
        return config

    def decode(self, tokens: Sequence[int], status: int = 0) -> np.ndarray:
        """Decode tokens at the end of the sequence; returns logits [n_tokens, n_vocab].

        With another expected `status` (the return value of llama_decode), returns no rows.
        """
        logits = self._decode(
            [(0, self.n_pos + i, token) for i, token in enumerate(tokens)], status
        )
        self.n_pos += len(logits)
        return logits

    def decode_many(
        self, runs: Sequence[tuple[int, Sequence[int]]], status: int = 0
    ) -> list[np.ndarray]:
        """Decode one batch: (seq_id, tokens) one after the other, each at the end of its sequence.

        Returns logits [n_tokens, n_vocab] of each run, or with another expected `status` no rows.
        """
        ends = {seq_id: self.length(seq_id) for seq_id, _ in runs}
        entries = []
        for seq_id, tokens in runs:
            entries += [(seq_id, ends[seq_id] + i, token) for i, token in enumerate(tokens)]
            ends[seq_id] += len(tokens)
        logits = self._decode(entries, status)
        self.n_pos = self.length(0)
        return np.split(logits, np.cumsum([len(tokens) for _, tokens in runs])[:-1])

    def length(self, seq_id: int) -> int:
        """Length of a sequence."""
        return int(lib.llama_memory_seq_pos_max(self.memory, seq_id)) + 1

    def _decode(self, entries: Sequence[tuple[int, int, int]], status: int) -> np.ndarray:
        batch = lib.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (seq_id, pos, token) in enumerate(entries):
            batch.token[i] = int(token)
            batch.pos[i] = pos
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq_id
            batch.logits[i] = 1
        result = lib.llama_decode(self.ctx, batch)
        lib.llama_batch_free(batch)
        assert result == status, f"llama_decode returned {result}: {c.last_error()}"
        if result != 0:
            return np.empty((0, self.n_vocab), np.float32)
        shape = (len(entries) * self.n_vocab,)
        return (
            np.ctypeslib.as_array(lib.llama_get_logits(self.ctx), shape)
            .reshape(len(entries), self.n_vocab)
            .copy()
        )

    def decode_each(self, tokens: Sequence[int]) -> np.ndarray:
        """Decode tokens one at a time; returns logits [n_tokens, n_vocab]."""
        return np.concatenate([self.decode([token]) for token in tokens])

    def greedy(self, prompt: Sequence[int], n: int) -> list[int]:
        """Decode the prompt, then `n` tokens, each the arg-max of the last logits."""
        logits = self.decode(prompt)[-1]
        tokens = []
        for _ in range(n):
            tokens.append(int(np.argmax(logits)))
            logits = self.decode(tokens[-1:])[-1]
        return tokens

    @property
    def memory(self) -> Any:
        """The llama_memory_t of the context."""
        return lib.llama_get_memory(self.ctx)

    def remove(self, p0: int, p1: int = -1) -> bool:
        """llama_memory_seq_rm of sequence 0; keeps n_pos in step."""
        done = bool(lib.llama_memory_seq_rm(self.memory, 0, p0, p1))
        self.n_pos = lib.llama_memory_seq_pos_max(self.memory, 0) + 1
        return done

    def clear(self) -> None:
        """llama_memory_clear."""
        lib.llama_memory_clear(self.memory, True)
        self.n_pos = 0

    def stats(self, seq_id: int = 0) -> c.ra_stats:
        """ra_stats_get."""
        stats = c.ra_stats(size=ctypes.sizeof(c.ra_stats))
        c.check(c.ra_stats_get(self.ctx, seq_id, ctypes.byref(stats)))
        return stats

    def head(self, il: int, ih: int, seq_id: int = 0) -> c.ra_head_stats:
        """ra_head_stats_get."""
        stats = c.ra_head_stats(size=ctypes.sizeof(c.ra_head_stats))
        c.check(c.ra_head_stats_get(self.ctx, seq_id, il, ih, ctypes.byref(stats)))
        return stats

    def kept(self, il: int, ih: int, seq_id: int = 0) -> np.ndarray:
        """ra_kept_positions."""
        n = c.ra_kept_positions(self.ctx, seq_id, il, ih, None, 0)
        assert n >= 0, c.last_error()
        pos = (ctypes.c_int32 * n)()
        assert c.ra_kept_positions(self.ctx, seq_id, il, ih, pos, n) == n
        return np.array(pos[:], dtype=np.int32)

    def set_head_budgets(self, il: int, budgets: Sequence[int]) -> int:
        """ra_set_head_budgets; returns the status."""
        table = (ctypes.c_int32 * len(budgets))(*budgets)
        return int(c.ra_set_head_budgets(self.ctx, 0, il, table, len(budgets)))

    def trace(self) -> None:
        """Record every compression from now on in `traces`."""

        def record(user: Any, pointer: Any) -> None:
            event = pointer.contents
            ends = np.cumsum(event.n_kv[: event.n_head_kv])

            def split(values: Any, dtype: Any) -> Any:
                if not values:
                    return None
                return np.split(np.array(values[: int(ends[-1])], dtype=dtype), ends[:-1])

            self.traces.append(
                LayerTrace(
                    seq_id=event.seq_id,
                    i_compression=event.i_compression,
                    n_pos=event.n_pos,
                    il=event.il,
                    positions=split(event.pos, np.int32),
                    scores=split(event.score, np.float32),
                    keep=split(event.keep, bool),
                    budgets=list(event.budgets[: event.n_head_kv]),
                    target=split(event.target, np.int32),
                    share=split(event.share, np.float32),
                    bias=split(event.bias, np.float32),
                )
            )

        self._trace_cb = c.ra_trace_cb(record)
        c.check(c.ra_set_trace(self.ctx, self._trace_cb, None))

    def close(self) -> None:
        """Free context and model."""
        if self.ctx:
            lib.llama_free(self.ctx)
            lib.llama_model_free(self.model)
            self.ctx = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
