"""The loop detector: against its definition, on real loops and on honest repetition."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from py_reasonalloc import ReasonLlama
from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.cases.datasets import load_problems
from py_reasonalloc.eval.decode.loops import MAX_PERIOD, MIN_REPEATS, MIN_TOKENS, LoopDetector
from py_reasonalloc.task.problems import LEVEL_STEPS, generate_problem

DATA_DIR = os.environ.get("REASONALLOC_DATA_DIR")


def loop_length(tokens, **options):
    """Return after how many tokens the detector says loop, None if it never does."""
    detector = LoopDetector(**options)
    return next((n for n, token in enumerate(tokens, 1) if detector.update(token)), None)


def ends_in_loop(tokens, max_period, min_tokens, min_repeats) -> bool:
    """Say it as the docstring does."""
    n = len(tokens)
    for p in range(1, max_period + 1):
        length = max(min_tokens, min_repeats * p)
        if n >= length and all(tokens[i] == tokens[i - p] for i in range(n - length + p, n)):
            return True
    return False


def words(text: str) -> list[int]:
    """Return an id for every word, about what a tokenizer makes of plain text."""
    ids: dict[str, int] = {}
    return [ids.setdefault(word, len(ids)) for word in text.split()]


# --- the definition ------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 1), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.integers(0, 8),
    st.lists(st.integers(0, 1), max_size=6),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(2, 4),
)
def test_definition(before, cycle, n_cycles, after, max_period, min_tokens, min_repeats) -> None:
    tokens = before + cycle * n_cycles + after
    detector = LoopDetector(max_period, min_tokens, min_repeats)
    found = [detector.update(token) for token in tokens]
    assert found == [
        ends_in_loop(tokens[:n], max_period, min_tokens, min_repeats)
        for n in range(1, len(tokens) + 1)
    ]


@pytest.mark.parametrize("period", [1, 2, 7, 100, MAX_PERIOD])
def test_found_at_the_first_token_that_completes_it(period) -> None:
    before = list(range(1000, 1300))
    tokens = before + list(range(period)) * (3 * MIN_TOKENS // period + MIN_REPEATS)
    assert loop_length(tokens) == len(before) + max(MIN_TOKENS, MIN_REPEATS * period)


def test_longer_periods_are_not_looked_for() -> None:
    assert loop_length(list(range(MAX_PERIOD + 1)) * 20) is None


def test_a_text_may_leave_a_loop() -> None:
    detector = LoopDetector(max_period=4, min_tokens=6, min_repeats=2)
    found = [detector.update(token) for token in [1, 2, 1, 2, 1, 2, 1, 3, 1, 2, 1, 2]]
    assert [n for n, is_loop in enumerate(found, 1) if is_loop] == [6, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_period": 0}, "max_period must be at least 1, got 0"),
        ({"min_tokens": 0}, "min_tokens must be at least 1, got 0"),
        ({"min_repeats": 1}, "min_repeats must be at least 2, got 1"),
    ],
)
def test_arguments_out_of_range(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopDetector(**options)


# --- real loops ----------------------------------------------------------------------------------

#: Enough for a small model that has lost its prompt to fall into a cycle.
MAX_TOKENS = 1500


def test_the_demo_model_without_its_prompt_runs_into_loops(demo_model) -> None:
    """With a budget far too small and no prompt protection some greedy texts become cycles."""
    n_loops = 0
    arms = itertools.product(range(8), [("streaming", 32), ("rkv", 40), ("streaming", 16)])
    for index, (policy, budget) in arms:
        text = greedy_text(demo_model, policy, budget, generate_problem(20_000, index, 2))
        length = loop_length(text)
        if length is not None:
            assert ends_in_loop(text[:length], MAX_PERIOD, MIN_TOKENS, MIN_REPEATS)
            assert loop_length(text[: length - 1]) is None
            n_loops += 1
        if n_loops == 2:
            return
    pytest.fail(f"{n_loops} loops in 24 texts")


def greedy_text(model, policy, budget, problem) -> list[int]:
    """Return tokens until the detector, or `MAX_TOKENS`, says stop; an end of text does not."""
    detector = LoopDetector()
    tokens: list[int] = []
    with ReasonLlama(
        model,
        budget,
        policy,
        buffer=16,
        window=8,
        protect_prompt="off",
        n_threads=1,
        n_threads_batch=1,
    ) as llama:
        prompt = llama.tokenize(problem.chat_prompt.encode(), special=True)
        for token in llama.generate(prompt, temp=0.0):
            tokens.append(token)
            if detector.update(token) or len(tokens) == MAX_TOKENS:
                return tokens
    raise AssertionError("the generator ended")


#: Openings and cycles as runaway reasoning has them.
CYCLES = [
    "Wait ,",
    "So the answer is 12 . But wait , let me check that again .",
    "Alternatively , maybe I can use the formula for the sum of the first n squares . "
    "But I am not sure if that will help . Let me think . Hmm , this seems complicated . "
    "Maybe there is another way to look at it .",
    "</think> The answer is 7 . <think>",
]


@pytest.mark.parametrize("cycle", CYCLES)
def test_runaway_text(cycle) -> None:
    opening = "Let me see . We have three boxes and want to count the ways . " * 2
    length = loop_length(words(opening + (cycle + " ") * 1000))
    assert length is not None
    assert length <= len(opening.split()) + max(MIN_TOKENS, MIN_REPEATS * len(cycle.split()))


def test_near_loops_are_not_found() -> None:
    """A counter that changes in every round: documented as out of reach."""
    text = " ".join(f"Step {i} : we add one and go on to the next step ." for i in range(300))
    assert loop_length(words(text)) is None


# --- honest repetition ---------------------------------------------------------------------------

RECAP = " ".join(f"The value of x{i} is {i * i % 17} ." for i in range(40))
HONEST = {
    "the the": "It is the the the the same .",
    "a long sentence three times": (RECAP + " ") * 3,
    "a recap between other text": " ".join(f"{RECAP} Now try case {i} ." for i in range(20)),
    "a matrix of zeros": " \\\\ ".join([" & ".join(["0"] * 12)] * 12),
    "a row of dots": "Let us fill in the table : " + ". " * 300,
    "one hundred ones": "1 + " * 100,
    "lines of code": "for i in range ( 3 ) : print ( 0 ) \n " * 30,
    "powers of 2 modulo 7": "2 , 4 , 1 , " * 60,
    "an enumeration": " ".join(f"n = {n} : no ." for n in range(500)),
}


@pytest.mark.parametrize("name", HONEST)
def test_handwritten_repetition_is_no_loop(name) -> None:
    assert loop_length(words(HONEST[name] + " So the answer is 12 .")) is None


def test_the_demo_s_gold_chains_are_no_loops(demo_model) -> None:
    with ReasonLlama(demo_model, None, n_ctx=64) as llama:
        for level, index in itertools.product(LEVEL_STEPS, range(15)):
            chain = generate_problem(20_000, index, level).chain
            assert loop_length(llama.tokenize(chain.encode(), special=True)) is None


@pytest.mark.skipif(not DATA_DIR, reason="REASONALLOC_DATA_DIR names no folder with the data")
@pytest.mark.parametrize("name", ["math500", "aime24"])
def test_gold_solutions_are_no_loops(name) -> None:
    """Byte by byte, which repeats more than tokens do."""
    problems = load_problems(name, path=Path(DATA_DIR or "") / f"{name}.jsonl")
    assert [p.key for p in problems if loop_length(p.solution.encode()) is not None] == []
