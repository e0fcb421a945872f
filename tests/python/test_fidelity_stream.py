"""Reading many tokens at once gives what reading them one by one gives, compressions included."""

from __future__ import annotations

import numpy as np
import pytest

from py_reasonalloc import BudgetConfig, ReasonLlama
from py_reasonalloc.engine.errors import ContextFullError
from py_reasonalloc.eval.cases.methods import Setup
from py_reasonalloc.fidelity.metrics import Reference
from py_reasonalloc.fidelity.plan import REFERENCE
from py_reasonalloc.fidelity.stream import N_ROWS, Stream
from py_reasonalloc.profile.lookup import find_profile
from py_reasonalloc.task.problems import generate_problem

SMALL = {"budget": 48, "buffer": 16, "window": 8}
CACHES = {
    "rkv": {},
    "h2o": {"policy": "h2o"},
    "ema": {"policy": "rkv-ema"},
    "loss": {"policy": "loss"},
    "pyramid": {"layers": "pyramid"},
    "reasonalloc": {"layers": "wave", "heads": "adaptive"},
}
#: Logits that differ only by rounding, between one token and several at a time: on CPUs that were
#: tried they do not differ at all.
ROUNDING = 0.01


@pytest.fixture(scope="module")
def demo_stream(demo_model):
    with (
        ReasonLlama(demo_model, None, n_ctx=512, n_batch=N_ROWS, n_threads_batch=1) as llama,
        Stream(llama, REFERENCE) as stream,
    ):
        yield stream


@pytest.fixture(scope="module")
def demo_tokens(demo_stream) -> list[int]:
    """Some problems, one after the other: enough for many compressions."""
    text = "".join(generate_problem(1, i, level=2).prompt for i in range(4))
    return demo_stream.llama.tokenize(text.encode())[:260]


def read(stream, setup, tokens, start, n_at_once=N_ROWS):
    """Return logits from a position on, what every head kept, and the number of compressions."""
    stream.open(setup)
    pieces = [
        (pos, rows.copy())
        for pos, rows in stream.read(tokens, [range(start, len(tokens))], n_at_once)
    ]
    at = start
    for pos, rows in pieces:
        assert pos == at
        at += len(rows)
    assert at == len(tokens)
    logits = np.concatenate([rows for _, rows in pieces])
    if setup.config is None:
        return logits, None, 0
    stats = stream.llama.kv_stats()
    kept = [
        stats.kept_positions(il, ih).tolist()
        for il, layer in enumerate(stats.layers)
        for ih in range(len(layer))
    ]
    return logits, kept, stats.n_compressions


@pytest.mark.parametrize("name", CACHES)
def test_pieces_are_one_by_one(demo_stream, demo_tokens, demo_model, name) -> None:
    fields = dict(CACHES[name])
    if fields.get("layers") == "wave":
        fields["profile"] = find_profile(demo_model)
    setup = Setup(BudgetConfig(**SMALL, **fields), "f16")
    logits, kept, n_compressions = read(demo_stream, setup, demo_tokens, 5)
    single, kept_single, n_single = read(demo_stream, setup, demo_tokens, 5, 1)
    assert n_compressions == n_single >= (len(demo_tokens) - 64) // 16
    assert kept == kept_single
    assert np.abs(logits - single).max() < ROUNDING
    # and the cache matters: the full one says something else
    full, _, _ = read(demo_stream, REFERENCE, demo_tokens, 5)
    assert np.abs(logits - full).max() > 20 * ROUNDING


def test_only_what_is_wanted_comes(demo_stream, demo_tokens) -> None:
    setup = Setup(BudgetConfig(**SMALL), "f16")
    every, _, _ = read(demo_stream, setup, demo_tokens, 0)
    demo_stream.open(setup)
    spans = [range(0, 3), range(60, 70), range(200, 240)]
    found = {}
    for pos, rows in demo_stream.read(demo_tokens, spans):
        found |= {pos + i: row.copy() for i, row in enumerate(rows)}
    assert sorted(found) == [pos for span in spans for pos in span]
    for pos, row in found.items():
        assert np.abs(row - every[pos]).max() < ROUNDING


def test_a_protected_prompt_stays(demo_stream, demo_tokens) -> None:
    setup = Setup(BudgetConfig(**SMALL, protect_prompt=20), "f16")
    for n_prompt, n_kept in ((20, 20), (10, 10), (0, 4)):  # 4 sinks
        demo_stream.open(setup, n_prompt)
        list(demo_stream.read(demo_tokens, []))
        stats = demo_stream.llama.kv_stats()
        everywhere = set.intersection(
            *(
                set(stats.kept_positions(il, ih).tolist())
                for il, layer in enumerate(stats.layers)
                for ih in range(len(layer))
            )
        )
        assert set(range(n_kept)) <= everywhere


def test_a_sequence_that_is_too_long(demo_stream) -> None:
    demo_stream.open(REFERENCE)
    with pytest.raises(ContextFullError, match="600 tokens exceed the context of 512"):
        list(demo_stream.read([5] * 600, []))


def test_a_stopped_reading_raises(demo_model, demo_tokens) -> None:
    asked = []

    def is_stopped() -> bool:
        asked.append(True)
        return len(asked) > 2

    with (
        ReasonLlama(demo_model, None, n_ctx=512, n_batch=N_ROWS) as llama,
        Stream(llama, REFERENCE, is_stopped) as stream,
    ):
        stream.open(REFERENCE)
        with pytest.raises(KeyboardInterrupt):
            list(stream.read(demo_tokens, [], 8))


def test_on_a_real_model(smollm2) -> None:
    text = (
        "A bakery sells rolls in bags of six and buns in bags of ten. On Monday it sold thirty-one "
        "bags and two hundred and thirty-four pieces in all. How many bags of each kind did it "
        "sell? Let me call the number of bags of rolls r and the number of bags of buns b. "
    )
    with (
        ReasonLlama(
            smollm2, None, n_ctx=512, n_batch=N_ROWS, n_threads=1, n_threads_batch=1
        ) as llama,
        Stream(llama, REFERENCE) as stream,
    ):
        tokens = llama.tokenize((text + text).encode())[:130]
        assert len(tokens) == 130
        setup = Setup(BudgetConfig(**SMALL), "f16")
        logits, kept, n_compressions = read(stream, setup, tokens, 60)
        single, kept_single, n_single = read(stream, setup, tokens, 60, 1)
        assert n_compressions == n_single == 5
        assert kept == kept_single and np.abs(logits - single).max() < ROUNDING
        following = np.zeros(70, np.intp)
        with Reference(60) as reference:
            full, _, _ = read(stream, REFERENCE, tokens, 60)
            reference.add(full, following)
            assert reference.compare(60, full, following).kl.mean() < 1e-6
            kl = reference.compare(60, logits, following).kl.mean()
        assert kl > 0.01
