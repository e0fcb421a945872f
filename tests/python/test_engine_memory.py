"""The cache keeps the promises of llama_memory_*: removal, refusal, abort, state, bytes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from engine import KV_TYPES, Engine, aborting
from llama_cpp import llama_cpp as lib
from test_engine_parity import random_tokens

from py_reasonalloc.engine import bindings as c

MODEL = {"arch": "llama", "n_layer": 2, "n_head": 4, "n_head_kv": 2, "n_ctx_train": 4096}
SMALL = {"buffer": 16, "n_sink": 4, "n_window": 8}


@pytest.fixture
def path(make_gguf) -> Path:
    return make_gguf(**MODEL)


def snapshot(engine: Engine) -> dict:
    """What the cache holds, to compare before and after."""
    stats = engine.stats()
    kept = [engine.kept(il, ih).tolist() for il in range(2) for ih in range(2)]
    return {"kept": kept, "n_pos": stats.n_pos, "n_entries": stats.n_entries}


# --- removal ------------------------------------------------------------------------------------


def test_tail_removal_before_any_eviction(path: Path) -> None:
    tokens = random_tokens(60)
    with Engine(path, 64, config=SMALL) as engine, Engine(path, 64, config=SMALL) as fresh:
        engine.decode(tokens)
        assert engine.remove(40)
        assert engine.n_pos == 40
        other = random_tokens(20, seed=1)
        fresh.decode(tokens[:40])
        assert np.array_equal(engine.decode_each(other), fresh.decode_each(other))
        assert snapshot(engine) == snapshot(fresh)


def test_tail_removal_after_eviction_is_refused(path: Path) -> None:
    with Engine(path, 32, config=SMALL) as engine:
        engine.decode(random_tokens(100))
        before = snapshot(engine)
        n_after = 32 + 16 - c.ra_room(engine.ctx, 0) - 32  # appended since the last compression
        assert not engine.remove(100 - n_after - 1)
        assert not engine.remove(50)
        assert "evicted" in c.last_error()
        assert snapshot(engine) == before
        assert engine.remove(100)  # nothing there
        assert engine.remove(0)
        assert engine.n_pos == 0
        assert engine.stats().n_entries == 0


def test_who_ignores_a_refusal_learns_of_it_from_the_next_decode(path: Path) -> None:
    with Engine(path, 32, config=SMALL) as engine:
        engine.decode(random_tokens(100))
        assert not engine.remove(50)
        engine.n_pos = 50
        engine.decode([1], status=-1)
        assert "tokens before position 50 were evicted" in c.last_error()


def test_cleared_cache_is_as_new(path: Path) -> None:
    tokens = random_tokens(200)
    with Engine(path, 32, config=SMALL) as engine, Engine(path, 32, config=SMALL) as fresh:
        engine.decode(random_tokens(150, seed=2))
        engine.clear()
        assert np.array_equal(engine.decode(tokens), fresh.decode(tokens))
        assert snapshot(engine) == snapshot(fresh)


def test_middle_removal_is_refused(path: Path) -> None:
    with Engine(path, 64, config=SMALL) as engine:
        engine.decode(random_tokens(50))
        before = snapshot(engine)
        assert not engine.remove(10, 20)
        assert snapshot(engine) == before


def test_positions(path: Path) -> None:
    with Engine(path, 32, config=SMALL) as engine:
        assert lib.llama_memory_seq_pos_max(engine.memory, 0) == -1
        assert lib.llama_memory_seq_pos_min(engine.memory, 0) == -1
        engine.decode(random_tokens(30))
        assert lib.llama_memory_seq_pos_min(engine.memory, 0) == 0
        assert lib.llama_memory_seq_pos_max(engine.memory, 0) == 29
        engine.decode(random_tokens(100))
        assert lib.llama_memory_seq_pos_max(engine.memory, 0) == 129
        # all of [min, max] is present in every head
        first = lib.llama_memory_seq_pos_min(engine.memory, 0)
        assert 0 < first <= 129
        for il in range(2):
            for ih in range(2):
                assert set(range(first, 130)) <= set(engine.kept(il, ih).tolist())


# --- refusals -----------------------------------------------------------------------------------


def test_unsupported_sequence_operations_change_nothing(path: Path) -> None:
    tokens = random_tokens(100)
    with Engine(path, 32, config=SMALL) as engine, Engine(path, 32, config=SMALL) as fresh:
        engine.decode(tokens)
        fresh.decode(tokens)
        memory = engine.memory
        assert not lib.llama_memory_can_shift(memory)
        lib.llama_memory_seq_add(memory, 0, 10, -1, -5)
        lib.llama_memory_seq_div(memory, 0, 0, -1, 2)
        lib.llama_memory_seq_cp(memory, 0, 1, -1, -1)
        assert snapshot(engine) == snapshot(fresh)
        assert np.array_equal(engine.decode([5]), fresh.decode([5]))


@pytest.mark.parametrize(
    "p0,p1", [(-(2**31), 5), (2**31 - 1, -1), (-5, -5), (7, 3), (5, 2**31 - 1)]
)
def test_extreme_ranges_are_safe(path: Path, p0: int, p1: int) -> None:
    with Engine(path, 64, config=SMALL) as engine:
        engine.decode(random_tokens(50))
        for seq_id in (-1, 0, 1, 255):
            lib.llama_memory_seq_rm(engine.memory, seq_id, p0, p1)
            lib.llama_memory_seq_add(engine.memory, 0, p0, p1, -(2**31))
            lib.llama_memory_seq_div(engine.memory, 0, p0, p1, 0)
        stats = engine.stats()
        assert 0 <= stats.n_pos <= 50
        engine.n_pos = stats.n_pos
        assert np.isfinite(engine.decode(random_tokens(30))).all()


def test_second_sequence_is_refused(path: Path) -> None:
    with Engine(path, 64) as engine:
        engine.decode([5, 6, 7])
        batch = lib.llama_batch_init(1, 0, 1)
        batch.n_tokens = 1
        batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.logits[0] = 5, 0, 1, 1
        batch.seq_id[0][0] = 1
        assert lib.llama_decode(engine.ctx, batch) != 0
        lib.llama_batch_free(batch)
        assert np.isfinite(engine.decode([8])).all()


def test_end_of_the_context_is_a_clear_stop(make_gguf) -> None:
    path = make_gguf(**{**MODEL, "n_ctx_train": 256})
    with Engine(path, 32, config=SMALL) as engine:
        engine.decode(random_tokens(250))
        engine.decode_each(random_tokens(6))
        engine.decode([5], status=1)
        assert "beyond the context" in c.last_error()
        assert engine.stats().n_pos == 256


@pytest.mark.parametrize("arch", ["mamba"])
def test_other_architectures_are_refused_by_name(make_gguf, arch: str) -> None:
    path = make_gguf(arch=arch)
    with pytest.raises(RuntimeError, match=f"'{arch}' is not supported with a budget"):
        Engine(path, 64)
    with Engine(path, n_ctx=256) as stock:  # the pending budget does not leak into the next context
        stock.decode([5, 6, 7])
        assert c.ra_is_attached(stock.ctx) == 0


def test_tables_that_do_not_fit_are_refused(path: Path) -> None:
    with pytest.raises(RuntimeError, match="2 layers"):
        Engine(path, 64, config={"layer_budgets": [64, 64, 64]})
    with pytest.raises(RuntimeError, match="4 KV heads"):
        Engine(path, 64, config={"head_budgets": [64, 64]})


def test_quantised_rows_must_fit_the_head_size(make_gguf) -> None:
    path = make_gguf(arch="llama", n_head=2, n_head_kv=1, head_dim=48)
    with Engine(path, 64) as engine:
        q8_0 = KV_TYPES["q8_0"]
        assert c.ra_model_supported(engine.model, q8_0, q8_0) == 2
        assert "divisible by 32" in c.last_error()
        q2_k = 10
        assert c.ra_model_supported(engine.model, q2_k, KV_TYPES["f16"]) == 2
        assert "use f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl" in c.last_error()
    with pytest.raises(RuntimeError):
        Engine(path, 64, kv="q8_0")


# --- aborted and failed decodes -----------------------------------------------------------------


@pytest.mark.parametrize("n_before", [20, 44, 200])
def test_aborted_decode_leaves_the_cache_usable(path: Path, n_before: int) -> None:
    """Abort at every kind of moment: in the first graph, mid-prompt, and in a compression."""
    tokens = random_tokens(n_before)
    for n_calls in (1, 5, 20, 60, 150):
        with Engine(path, 32, config=SMALL) as engine:
            engine.decode(tokens)
            batch = random_tokens(48, seed=3)
            array = (lib.llama_token * 48)(*batch)
            with aborting(engine.ctx, n_calls):
                status = lib.llama_decode(engine.ctx, lib.llama_batch_get_one(array, 48))
            n_pos = engine.stats().n_pos
            assert n_pos == n_before + 48 if status == 0 else n_before <= n_pos < n_before + 48
            for il in range(2):
                for ih in range(2):
                    kept = engine.kept(il, ih)
                    assert (np.diff(kept) > 0).all()
                    assert kept[-1] == n_pos - 1
                    assert len(kept) <= 32 + 16
            # go on where the cache says it is
            engine.n_pos = n_pos
            assert np.isfinite(engine.decode(random_tokens(40, seed=4))).all()


def test_rollback_is_exact(path: Path) -> None:
    """A decode aborted in its first graph leaves the rows as they were.

    (Of the observation window it may lose the oldest queries: the next compression then scores with
    fewer. Here none falls due.)
    """
    tokens, more = random_tokens(20), random_tokens(20, seed=5)
    with Engine(path, 32, config=SMALL) as engine, Engine(path, 32, config=SMALL) as fresh:
        engine.decode(tokens)
        fresh.decode(tokens)
        array = (lib.llama_token * 1)(7)
        with aborting(engine.ctx):
            assert lib.llama_decode(engine.ctx, lib.llama_batch_get_one(array, 1)) != 0
        assert np.array_equal(engine.decode(more), fresh.decode(more))


# --- state --------------------------------------------------------------------------------------


def get_state(engine: Engine) -> bytes:
    size = lib.llama_state_get_size(engine.ctx)
    buffer = (ctypes.c_uint8 * size)()
    n = lib.llama_state_get_data(engine.ctx, buffer, size)
    assert 0 < n <= size
    return bytes(buffer[:n])


def set_state(engine: Engine, state: bytes) -> int:
    buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    return int(lib.llama_state_set_data(engine.ctx, buffer, len(state)))


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_state_round_trip(path: Path, kv: str) -> None:
    tokens, more = random_tokens(120), random_tokens(80, seed=6)
    config = {**SMALL, "head_budgets": [30, 40, 25, 33]}
    with (
        Engine(path, 32, kv, config=config) as engine,
        Engine(path, 32, kv, config=config) as other,
    ):
        engine.decode(tokens)
        other.decode(more)
        state = get_state(engine)
        assert set_state(other, state) == len(state)
        other.n_pos = len(tokens)
        assert snapshot(other) == snapshot(engine)
        assert np.array_equal(engine.decode_each(more), other.decode_each(more))
        assert snapshot(other) == snapshot(engine)


def test_damaged_states_are_refused_and_leave_a_clean_cache(path: Path) -> None:
    with Engine(path, 32, config=SMALL) as engine:
        engine.decode(random_tokens(90))
        state = get_state(engine)
        rng = np.random.default_rng(0)
        n_refused = 0
        for i in range(60):
            damaged = bytearray(state)
            if i < 30:  # truncated
                damaged = damaged[: int(rng.integers(0, len(state) - 1))]
            else:  # flipped bytes near the bookkeeping
                for at in rng.integers(0, 1500, 8):
                    damaged[at] ^= int(rng.integers(1, 256))
            done = set_state(engine, bytes(damaged)) if damaged else 0
            n_refused += done == 0
            n_pos = engine.stats().n_pos
            assert 0 <= n_pos <= 4096 - 40
            engine.n_pos = n_pos
            engine.decode([5, 6, 7])
            engine.clear()
        assert n_refused >= 30


def test_states_of_other_caches_are_refused(path: Path) -> None:
    tokens = random_tokens(60)
    states = []
    for budget, n_ctx in ((None, 512), (96, 0)):
        with Engine(path, budget, n_ctx=n_ctx, config=SMALL) as other:
            other.decode(tokens)
            states.append(get_state(other))
    with Engine(path, 64, config=SMALL) as ours:
        ours.decode(tokens)
        for state in states:
            assert set_state(ours, state) == 0
        assert ours.stats().n_pos == 0
        ours.n_pos = 0
        ours.decode(tokens)


# --- budgets that change, protection ------------------------------------------------------------


def test_head_budgets_move_capacity_inside_a_layer(path: Path) -> None:
    with Engine(path, 64, config=SMALL) as engine:
        bytes_before = engine.stats().kv_bytes
        engine.decode(random_tokens(100))
        for step, budgets in enumerate([(100, 28), (20, 108), (64, 64), (13, 115)]):
            assert engine.set_head_budgets(0, budgets) == 0
            engine.decode_each(random_tokens(40, seed=step))
            assert tuple(engine.head(0, ih).budget for ih in range(2)) == budgets
            assert tuple(engine.head(1, ih).budget for ih in range(2)) == (64, 64)
            heads = [engine.head(0, ih) for ih in range(2)]
            assert heads[1].offset == heads[0].offset + heads[0].capacity
            assert all(h.used <= h.capacity for h in heads)
        assert engine.stats().kv_bytes == bytes_before
        assert engine.set_head_budgets(0, (100, 29)) == 4  # more than the pool
        assert engine.set_head_budgets(0, (116, 12)) == 4  # less than sinks + window + 1
        assert engine.set_head_budgets(2, (64, 64)) == 1
        assert engine.set_head_budgets(0, (64,)) == 1


def test_protected_prompt_stays(path: Path) -> None:
    with Engine(path, 48, config={**SMALL, "policy": "random"}) as engine:
        assert c.ra_set_protect(engine.ctx, 0, 30) == 0
        engine.decode(random_tokens(300))
        for il in range(2):
            for ih in range(2):
                assert set(range(30)) <= set(engine.kept(il, ih).tolist())
        assert c.ra_set_protect(engine.ctx, 0, 40) == 4
        assert "cannot hold the 40" in c.last_error()
        assert c.ra_set_protect(engine.ctx, 0, -1) == 1
