"""Several sequences in one context: each is what it would be alone."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import Engine, aborting
from llama_cpp import llama_cpp as lib
from test_engine_parity import demo_prompt, random_tokens

from py_reasonalloc.engine import bindings as c
from py_reasonalloc.task.problems import generate_problem
from py_reasonalloc.task.shipped import DEMO_MODEL

MODEL = {"arch": "llama", "n_layer": 2, "n_head": 4, "n_head_kv": 2, "n_ctx_train": 4096}
SMALL = {"buffer": 16, "n_sink": 4, "n_window": 8}
KINDS: dict[str, dict[str, Any]] = {
    "even": {},
    "uneven": {"head_budgets": [24, 40, 32, 48]},
    "adaptive": {"head_alloc": "adaptive"},
    "layer": {"head_alloc": "adaptive", "attention": "layer"},
    "merge": {"policy": "loss", "merge": 1},
    "h2o": {"policy": "h2o"},
}


@pytest.fixture
def path(make_gguf) -> Path:
    return make_gguf(**MODEL)


def held(engine: Engine, seq_id: int) -> dict:
    """What a sequence holds."""
    stats = engine.stats(seq_id)
    kept = [engine.kept(il, ih, seq_id).tolist() for il in range(2) for ih in range(2)]
    return {"kept": kept, "n_pos": stats.n_pos, "n_compressions": stats.n_compressions}


def state(engine: Engine, seq_id: int) -> bytes:
    """llama_state_seq_get_data, for llama_state_seq_set_data."""
    size = lib.llama_state_seq_get_size(engine.ctx, seq_id)
    data = (ctypes.c_uint8 * size)()
    assert lib.llama_state_seq_get_data(engine.ctx, data, size, seq_id) == size
    return bytes(data)


def contents(engine: Engine, seq_id: int) -> bytes:
    """The same without what llama.cpp writes first, the sequence's id among it."""
    return state(engine, seq_id)[8:]


def greedy(engine: Engine, prompts: dict[int, list[int]], n: int) -> dict[int, list[int]]:
    """Decode the prompts in one batch, then `n` tokens of each sequence, one per batch."""
    ids = list(prompts)
    logits = engine.decode_many([(i, prompts[i]) for i in ids])
    texts: dict[int, list[int]] = {i: [] for i in ids}
    for _ in range(n):
        for i, rows in zip(ids, logits):
            texts[i].append(int(np.argmax(rows[-1])))
        logits = engine.decode_many([(i, texts[i][-1:]) for i in ids])
    return texts


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_together_as_alone(kind: str, kv: str) -> None:
    """Texts of the demo reasoner; prompts of other lengths: compressions fall on other steps."""
    problems = [generate_problem(seed, 1 + seed) for seed in range(3)]
    config = {**SMALL, "n_window": 16, **KINDS[kind]}
    if kind == "uneven":
        config["head_budgets"] = [72, 120] * 12
    options: dict[str, Any] = {"kv": kv, "config": config}
    with Engine(DEMO_MODEL, 96, n_seq_max=3, **options) as engine:
        prompts = {i: demo_prompt(engine, problems[i]) for i in (0, 2, 1)}
        texts = greedy(engine, prompts, 110)
        n_compressions = [engine.stats(i).n_compressions for i in range(3)]
        assert engine.stats(-1).n_compressions == sum(n_compressions)
    for i, prompt in prompts.items():
        with Engine(DEMO_MODEL, 96, **options) as alone:
            assert greedy(alone, {0: prompt}, 110) == {0: texts[i]}
            assert alone.stats().n_compressions == n_compressions[i] > 0


def test_logits_together_as_alone(path: Path) -> None:
    """Teacher-forced, a prompt in pieces beside single tokens; without flash attention, too."""
    tokens = {i: random_tokens(120, seed=i) for i in range(3)}
    pieces = {0: [1] * 120, 1: [40] + [1] * 80, 2: [3] * 40}
    for flash_attn in (True, False):
        config = {**SMALL, "head_alloc": "adaptive"}
        with Engine(path, 36, flash_attn=flash_attn, n_seq_max=3, config=config) as engine:
            rows: dict[int, list[np.ndarray]] = {i: [] for i in tokens}
            at = dict.fromkeys(tokens, 0)
            for step in range(120):
                runs = []
                for i in tokens:
                    if step < len(pieces[i]):
                        runs.append((i, tokens[i][at[i] : at[i] + pieces[i][step]]))
                        at[i] += pieces[i][step]
                for (i, _), logits in zip(runs, engine.decode_many(runs)):
                    rows[i].append(logits)
        for i, text in tokens.items():
            with Engine(path, 36, flash_attn=flash_attn, config=config) as alone:
                at_alone, want = 0, []
                for n in pieces[i]:
                    want.append(alone.decode(text[at_alone : at_alone + n]))
                    at_alone += n
            np.testing.assert_allclose(
                np.concatenate(rows[i]), np.concatenate(want), rtol=0, atol=5e-3
            )


def test_interleaved_tokens(path: Path) -> None:
    """Tokens of two sequences by turns are read as they come."""
    a, b = random_tokens(50), random_tokens(50, seed=1)
    with Engine(path, 32, n_seq_max=2, config=SMALL) as engine:
        engine.decode_many(
            [run for i in range(50) for run in ((0, a[i : i + 1]), (1, b[i : i + 1]))]
        )
        with Engine(path, 32, config=SMALL) as alone:
            alone.decode_each(a)
            assert held(engine, 0) == held(alone, 0)


# --- sequence operations --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_like_the_original(path: Path, kind: str) -> None:
    prompt, more = random_tokens(90), random_tokens(60, seed=1)
    with Engine(path, 36, n_seq_max=3, config={**SMALL, **KINDS[kind]}) as engine:
        engine.decode_many([(0, prompt), (2, random_tokens(70, seed=3))])
        other = contents(engine, 1)
        lib.llama_memory_seq_cp(engine.memory, 0, 2, -1, -1)
        assert contents(engine, 2) == contents(engine, 0)
        assert contents(engine, 1) == other
        alone = [engine.decode_many([(0, [t])])[0] for t in more]
        copied = [engine.decode_many([(2, [t])])[0] for t in more]
        assert np.array_equal(np.concatenate(alone), np.concatenate(copied))
        assert contents(engine, 2) == contents(engine, 0)


def test_a_copy_takes_the_protected_prompt_along(path: Path) -> None:
    demand = (ctypes.c_double * 2)(1.0, 3.0)
    config = {**SMALL, "layer_alloc": "wave", "layer_demand": demand, "n_layer_demand": 2}
    with Engine(path, 64, n_seq_max=2, config=config) as engine:
        c.check(c.ra_set_protect(engine.ctx, 0, 20))
        engine.decode_many([(0, random_tokens(150))])
        lib.llama_memory_seq_cp(engine.memory, 0, 1, 0, -1)
        assert held(engine, 1) == held(engine, 0)
        assert contents(engine, 1) == contents(engine, 0)
        engine.decode_many([(1, random_tokens(100, seed=1))])
        for il in range(2):
            assert engine.kept(il, 0, 1)[:20].tolist() == list(range(20))
        assert engine.stats(1).kv_bytes == engine.stats(0).kv_bytes


def test_removal_leaves_the_others(path: Path) -> None:
    with Engine(path, 32, n_seq_max=3, config=SMALL) as engine:
        engine.decode_many([(i, random_tokens(60 + i, seed=i)) for i in range(3)])
        before = {i: contents(engine, i) for i in range(3)}
        assert lib.llama_memory_seq_rm(engine.memory, 1, -1, -1)
        assert engine.length(1) == 0 and engine.stats(1).n_entries == 0
        assert contents(engine, 0) == before[0] and contents(engine, 2) == before[2]
        lib.llama_memory_seq_keep(engine.memory, 2)
        assert [engine.length(i) for i in range(3)] == [0, 0, 62]
        assert contents(engine, 2) == before[2]
        assert lib.llama_memory_seq_rm(engine.memory, -1, -1, -1)
        assert engine.stats(-1).n_entries == 0


def test_what_a_copy_cannot_do_is_refused(path: Path) -> None:
    with Engine(path, 32, n_seq_max=2, config=SMALL) as engine:
        engine.decode_many([(0, random_tokens(60)), (1, random_tokens(20))])
        before = [contents(engine, i) for i in range(2)]
        for src, dst, p0, p1 in ((0, 1, 5, -1), (0, 1, 0, 30), (0, 2, 0, -1), (7, 1, 0, -1)):
            lib.llama_memory_seq_cp(engine.memory, src, dst, p0, p1)
            assert "nothing was changed" in c.last_error()
        assert [contents(engine, i) for i in range(2)] == before


def test_sequences_that_are_not_there(path: Path) -> None:
    with Engine(path, 32, n_seq_max=2, config=SMALL) as engine:
        engine.decode_many([(0, random_tokens(5)), (2, random_tokens(5))], status=-1)
        assert engine.length(0) == 0
        assert c.ra_n_seq(engine.ctx) == 2
        for call in (
            c.ra_set_protect(engine.ctx, 2, 4),
            c.ra_compress(engine.ctx, -2),
            c.ra_stats_get(engine.ctx, 5, ctypes.byref(c.ra_stats(size=ctypes.sizeof(c.ra_stats)))),
        ):
            assert call == 1 and "no sequence" in c.last_error()
        assert c.ra_room(engine.ctx, 2) == -1
        assert c.ra_kept_positions(engine.ctx, 2, 0, 0, None, 0) == -1


def test_a_token_of_two_sequences_is_refused(path: Path) -> None:
    with Engine(path, 32, n_seq_max=2, config=SMALL) as engine:
        batch = lib.llama_batch_init(1, 0, 2)
        batch.n_tokens = 1
        batch.token[0], batch.pos[0], batch.n_seq_id[0] = 3, 0, 2
        batch.seq_id[0][0], batch.seq_id[0][1] = 0, 1
        batch.logits[0] = 1
        assert lib.llama_decode(engine.ctx, batch) != 0
        lib.llama_batch_free(batch)
        assert "belongs to 2 sequences" in c.last_error()


# --- tails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["rkv", "loss", "h2o"])
def test_a_dropped_draft_leaves_no_trace(path: Path, policy: str) -> None:
    """Drafts of up to `room` tokens, taken back in part after every step, over compressions."""
    config = {**SMALL, "policy": policy, "merge": int(policy == "loss"), "n_draft": 8}
    text, wrong = random_tokens(200), random_tokens(8, seed=5)
    with Engine(path, 32, config=config) as engine, Engine(path, 32, config=config) as plain:
        engine.decode(text[:20])
        plain.decode(text[:20])
        for token in text[20:]:
            want = plain.decode([token])
            got = engine.decode([token])
            assert np.array_equal(got, want)
            n = min(8, c.ra_room(engine.ctx, 0))
            if n > 0:
                engine.decode(wrong[:n])
                assert engine.remove(engine.n_pos - n)
            assert held(engine, 0) == held(plain, 0)
        assert engine.stats().n_compressions > 5


def test_what_was_compressed_cannot_be_dropped(path: Path) -> None:
    with Engine(path, 32, config=SMALL) as engine:
        engine.decode(random_tokens(60))
        n_before = engine.stats().n_compressions
        n_room = c.ra_room(engine.ctx, 0)
        engine.decode(random_tokens(n_room))
        assert engine.stats().n_compressions == n_before
        engine.decode(random_tokens(3))
        assert engine.stats().n_compressions == n_before + 1
        at = 60 + n_room
        assert not engine.remove(at - 1)
        assert "evicted" in c.last_error()
        assert engine.remove(at + 1) and engine.n_pos == at + 1
        assert engine.remove(at) and engine.n_pos == at


def test_what_was_merged_cannot_be_taken_apart(path: Path) -> None:
    """Back to the sinks nothing evicted is left; merged values are, in rows that stay."""
    for merge, can in ((0, True), (1, False)):
        with Engine(path, 32, config={**SMALL, "policy": "loss", "merge": merge}) as engine:
            engine.decode(random_tokens(60))
            assert engine.remove(4) == can
            assert engine.n_pos == (4 if can else 60)


# --- memory and failures -----------------------------------------------------------------------


def test_bytes_are_n_times_those_of_one(path: Path) -> None:
    with Engine(path, 32, config=SMALL) as one, Engine(path, 32, n_seq_max=4, config=SMALL) as four:
        single, all_four = one.stats(), four.stats(-1)
        assert all_four.n_seq == 4 and single.n_seq == 1
        assert all_four.kv_bytes == 4 * single.kv_bytes
        assert all_four.window_bytes == 4 * single.window_bytes
        assert [four.stats(i).kv_bytes for i in range(4)] == [single.kv_bytes] * 4
        greedy(four, {i: random_tokens(20 + 9 * i, seed=i) for i in range(4)}, 3)
        size = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int64()
        c.check(c.ra_memory_breakdown(four.ctx, *(ctypes.byref(n) for n in size)))
        before, scratch = size[2].value, four.stats().scratch_bytes
        greedy(four, {i: random_tokens(100 - 9 * i, seed=i) for i in range(4)}, 150)
        c.check(c.ra_memory_breakdown(four.ctx, *(ctypes.byref(n) for n in size)))
        assert size[2].value == before
        assert four.stats().scratch_bytes == scratch
        assert four.stats(-1).kv_bytes == 4 * single.kv_bytes


def test_an_aborted_batch_is_undone_for_all(path: Path) -> None:
    more = {i: random_tokens(30, seed=10 + i) for i in range(2)}
    with (
        Engine(path, 64, n_seq_max=2, config=SMALL) as engine,
        Engine(path, 64, n_seq_max=2, config=SMALL) as calm,
    ):
        for e in (engine, calm):
            e.decode_many([(0, random_tokens(20)), (1, random_tokens(27))])
        before = [held(engine, i) for i in range(2)]
        with aborting(engine.ctx):
            engine.decode_many([(0, [1, 2, 3]), (1, [4])], status=2)
        assert [held(engine, i) for i in range(2)] == before
        runs = [(i, more[i]) for i in range(2)]
        for got, want in zip(engine.decode_many(runs), calm.decode_many(runs)):
            assert np.array_equal(got, want)


def test_states_of_sequences(path: Path) -> None:
    """A sequence's state goes into any other; that of the context holds them all."""
    more = random_tokens(60, seed=9)
    with Engine(path, 32, n_seq_max=2, config=SMALL) as engine:
        engine.decode_many([(0, random_tokens(70)), (1, random_tokens(45, seed=1))])
        size = lib.llama_state_get_size(engine.ctx)
        whole = (ctypes.c_uint8 * size)()
        assert lib.llama_state_get_data(engine.ctx, whole, size) == size
        one = state(engine, 1)
        want = engine.decode_many([(1, more)])[0]
        buffer = (ctypes.c_uint8 * len(one)).from_buffer_copy(one)
        assert lib.llama_state_seq_set_data(engine.ctx, buffer, len(one), 0) == len(one)
        assert np.array_equal(engine.decode_many([(0, more)])[0], want)
        with Engine(path, 32, n_seq_max=2, config=SMALL) as fresh:
            assert lib.llama_state_set_data(fresh.ctx, whole, size) > 0
            assert [fresh.length(i) for i in range(2)] == [70, 45]
            assert np.array_equal(fresh.decode_many([(1, more)])[0], want)
        with Engine(path, 32, config=SMALL) as single:
            assert lib.llama_state_seq_set_data(single.ctx, buffer, len(one), 1) == 0
            assert "fewer sequences" in c.last_error()
