"""Checkpoints: a changed prompt goes on from one as if it had been read from its first token."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
from llama_cpp import llama_cpp as bindings
from sessions import SMALL, complete, n_decoded

from py_reasonalloc import BudgetConfig, ConfigError, ReasonLlama
from py_reasonalloc.session.checkpoints import Checkpoints, Snapshot
from py_reasonalloc.session.reading import Pieces


def snapshot(n_bytes: int = 100, n_protect: int | None = None) -> Snapshot:
    return Snapshot(np.zeros(n_bytes, dtype=np.uint8), n_protect)


# --- the store -----------------------------------------------------------------------------------


def test_the_longest_prefix_is_found() -> None:
    store = Checkpoints(10_000)
    for tokens in ([1, 2], [1, 2, 3, 4], [1, 2, 9], [256]):
        assert store.keep(tokens, snapshot())
    assert store.find([1, 2, 3, 4, 5], 0).n_tokens == 4
    assert store.find([1, 2, 3, 4], 0).n_tokens == 4
    assert store.find([1, 2, 3], 0).n_tokens == 2
    assert store.find([1], 0) is None
    assert store.find([0, 1, 2], 0) is None  # bytes of 256 that start elsewhere are no token


def test_another_protection_does_not_fit() -> None:
    store = Checkpoints(10_000)
    store.keep([1, 2, 3], snapshot(n_protect=3))
    store.keep([1, 2], snapshot())
    assert store.find([1, 2, 3, 4], 3).n_tokens == 3
    assert store.find([1, 2, 3, 4], 2).n_tokens == 2
    store.keep([1, 2], snapshot(n_protect=7))  # what fits any is not given up for it
    assert store.find([1, 2, 5], 2).n_tokens == 2


def test_the_limit_is_in_bytes_and_the_least_used_goes() -> None:
    store = Checkpoints(250)
    assert not store.keep([7], snapshot(251))
    store.keep([1], snapshot(n_protect=0))
    store.keep([2], snapshot())
    assert store.n_bytes == 2 * 104
    assert store.find([1, 5], 0) is not None
    store.keep([3], snapshot())
    assert store.find([2, 5], 0) is None
    assert store.find([1, 5], 0) is not None
    store.keep([1], snapshot(50))
    assert store.n_bytes == 104 + 54
    store.clear()
    assert len(store) == store.n_bytes == 0


def test_nothing_is_kept_without_room() -> None:
    store = Checkpoints(0)
    assert not store.keep([1], snapshot())
    assert store.find([1, 2], 0) is None


# --- where pieces end ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(512, 128), (100, 64), (64, 64), (1, 1)])
def test_decode_calls_cut_no_piece(n_batch: int, n_ubatch: int) -> None:
    def ends(start: int, stop: int) -> list[int]:
        found = range(start, stop, n_ubatch)
        return [min(at + n_ubatch, stop) for at in found]

    pieces, end = Pieces(n_batch, n_ubatch), 3 * n_batch + n_ubatch + 3
    whole = [e for at in range(0, end, n_batch) for e in ends(at, min(at + n_batch, end))]
    for start in (0, *whole[:-1]):
        stops = [place for place in whole[::2] if start < place < end]
        calls = pieces.calls(start, end, stops)
        begins = [start, *calls[:-1]]
        assert [e for a, b in zip(begins, calls) for e in ends(a, b)] == [
            e for e in whole if e > start
        ]
    assert {pieces.last_end(n) for n in range(end)} == {0, *whole[:-1]}


def test_checkpoints_inside_a_prompt_are_few() -> None:
    pieces = Pieces(512, 128)
    assert pieces.stops(0, 100) == []
    assert pieces.stops(0, 129) == [128]
    assert pieces.stops(0, 128) == []  # one token is left to decode
    assert pieces.stops(0, 1100) == [512, 1024]
    assert pieces.stops(512, 1100) == [1024]
    assert 8 <= len(pieces.stops(0, 100_001)) <= 9


# --- sessions ------------------------------------------------------------------------------------


def edited(prompt: list[int], answer: list[int], n_vocab: int, rng: random.Random) -> list[int]:
    """The next prompt: a turn more, with all, some or nothing of the answer; or an edit."""
    new = [rng.randrange(3, n_vocab) for _ in range(rng.randrange(1, 40))]
    kind = rng.randrange(4)
    if kind == 0:
        return prompt + answer + new
    if kind == 1:
        return prompt + answer[rng.randrange(1, len(answer)) :] + new
    at = rng.randrange(len(prompt))
    if kind == 2:
        return prompt[:at] + new + prompt[at + rng.randrange(len(new)) :]
    return list(prompt)  # another answer to the same


def after_prompt(llama: ReasonLlama, prompt: list[int]) -> tuple:
    """Logits after a prompt, what every head holds then, and 20 tokens of greedy text."""
    stream = llama.generate(prompt, temp=0.0, top_k=0)
    text = [next(stream)]
    row = bindings.llama_get_logits_ith(llama.ctx, -1)
    logits = np.ctypeslib.as_array(row, shape=(llama.n_vocab(),)).copy()
    stats = llama.kv_stats()
    held = [
        stats.kept_positions(il, ih).tolist()
        for il, layer in enumerate(stats.layers)
        for ih in range(len(layer))
    ]
    text += list(islice(stream, 19))
    stream.close()
    return text, held, stats.n_evicted, stats.n_compressions, logits.tolist()


ARMS = {
    "rkv": BudgetConfig(budget=48, buffer=16, policy="rkv"),
    "loss-merge": BudgetConfig(budget=48, buffer=16, policy="loss", heads="adaptive"),
    "protected": BudgetConfig(budget=48, buffer=16, policy="rkv-ema", protect_prompt="auto"),
    "all-protected": BudgetConfig(budget=512, buffer=16, policy="rkv", protect_prompt="all"),
    "pyramid": BudgetConfig(
        budget=64, buffer=16, policy="mass", layers="pyramid", pyramid_beta=2, protect_prompt=20
    ),
}


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", list(ARMS))
def test_edits_and_turns_give_what_a_whole_reading_gives(demo_model, name, kv_type) -> None:
    """Bit for bit: logits, rows held, text. But for a conversation that goes on from its cache."""
    shared = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "n_batch": 40}
    shared |= {"type_k": kv_type, "type_v": kv_type}
    rng = random.Random(name + kv_type)
    with (
        ReasonLlama(demo_model, ARMS[name], **shared) as llama,
        ReasonLlama(demo_model, ARMS[name], checkpoints=0, **shared) as anew,
    ):
        n_vocab = llama.n_vocab()
        prompt = [rng.randrange(3, n_vocab) for _ in range(150)]
        n_restored = 0
        for _ in range(14):
            held = llama.input_ids[: llama.n_tokens].tolist()
            found = after_prompt(llama, prompt)
            if not (len(held) == llama.n_reused > 0):
                anew.clear()
                assert found == after_prompt(anew, prompt)
                n_restored += llama.n_reused > 0
            prompt = edited(prompt, found[0], n_vocab, rng)[:400]
        assert n_restored >= 3
        assert 0 < llama.checkpoints.n_bytes <= llama.checkpoints.limit


def test_another_answer_reads_the_last_piece_only(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        text = complete(llama, "hello " * 20)
        before = n_decoded(llama)
        assert complete(llama, "hello " * 20) == text
        assert llama.n_reused == 112  # of 121 tokens
        assert n_decoded(llama) - before == 9 + 119


def test_a_few_bytes_are_a_limit(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL, checkpoints=60_000) as llama:
        for letter in "abcdef":
            complete(llama, letter * 100, max_tokens=5)
            assert llama.checkpoints.n_bytes <= 60_000
        assert 0 < len(llama.checkpoints) < 6
    with ReasonLlama(make_gguf(), **SMALL, checkpoints=0) as llama:
        complete(llama, "a" * 100, max_tokens=50)
        complete(llama, "a" * 100, max_tokens=5)
        assert llama.n_reused == len(llama.checkpoints) == 0


@pytest.mark.parametrize("limit", [-1, 1.5, "much", True])
def test_a_limit_is_a_number_of_bytes(make_gguf, limit) -> None:
    with pytest.raises(ConfigError, match="checkpoints = "):
        ReasonLlama(make_gguf(), **SMALL, checkpoints=limit)


def test_another_configuration_starts_without_checkpoints(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        complete(llama, "a" * 100, max_tokens=5)
        assert len(llama.checkpoints) > 0
        llama.reconfigure(40)
        assert len(llama.checkpoints) == 0
        assert llama.checkpoints.limit == 256 << 20


def test_a_trace_sees_every_compression_of_a_prompt(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        complete(llama, "a" * 100, max_tokens=50)
        seen = []
        with llama.trace(seen.append):
            complete(llama, "a" * 100, max_tokens=5)
        assert llama.n_reused == 0
        assert len(seen) == llama.kv_stats().n_compressions > 0


def test_logits_of_every_token_need_every_token(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL, logits_all=True) as llama:
        complete(llama, "a" * 100, max_tokens=50)
        assert len(llama.checkpoints) == 0
