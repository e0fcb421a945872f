"""Texts decoded side by side in one context are those that each gives alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
from engine import aborting
from gguf_factory import CHAT_TEMPLATE
from llama_cpp import LlamaGrammar
from llama_cpp import llama_cpp as bindings

from py_reasonalloc import ConfigError, ContextFullError, ReasonLlama
from py_reasonalloc.engine.prompts import encode_prompt
from py_reasonalloc.session.generate import Generation
from py_reasonalloc.session.sequences.prefixes import Prefixes
from py_reasonalloc.session.sequences.request import Request
from py_reasonalloc.session.sequences.scheduler import Sequences
from py_reasonalloc.session.steering import Sampling
from py_reasonalloc.session.thinking import ThinkLimit
from py_reasonalloc.task.problems import generate_problem
from py_reasonalloc.task.shipped import DEMO_MODEL

GREEDY = Sampling(temp=0.0)
N_CTX = 1024
#: Threads; batches of several texts count as batches.
ONE = {"n_threads": 1, "n_threads_batch": 1}


def seeded(seed: int) -> Sampling:
    narrow = {"top_k": 60, "min_p": 0.001} if seed % 4 == 2 else {}
    return Sampling(temp=1.5, top_p=0.98, seed=seed, repeat_penalty=1.05, **narrow)


#: Caches: llama.cpp's own; budgets so small that every text is compressed, prompts too.
CACHES = {
    "stock": {"budget": None, "n_ctx": 4 * N_CTX},
    "budget": {"budget": 32, "buffer": 16, "n_ctx": N_CTX},
    "adaptive": {
        "budget": 32,
        "buffer": 16,
        "n_ctx": N_CTX,
        "heads": "adaptive",
        "layers": "pyramid",
        "protect_prompt": 8,
    },
}


@pytest.fixture(scope="module", params=CACHES)
def llama(make_gguf, request):
    """All in f32, attention too: the rounding of a batch is then too small to turn a draw."""
    path = make_gguf(chat_template=CHAT_TEMPLATE)
    types = {"type_k": "f32", "type_v": "f32", "flash_attn": False, **ONE}
    with ReasonLlama(path, n_seq_max=4, **CACHES[request.param], **types) as session:
        yield session


@pytest.fixture(scope="module")
def demo():
    with ReasonLlama(DEMO_MODEL, None, n_ctx=4 * N_CTX, n_seq_max=4, **ONE) as session:
        yield session


def problem(demo, i: int) -> tuple[int, ...]:
    return tuple(encode_prompt(demo._model, generate_problem(seed=7, index=i, level=1).prompt))


@pytest.fixture
def sequences(llama):
    with Sequences(llama) as made:
        yield made


@pytest.fixture(scope="module")
def prompts(llama) -> list[tuple[int, ...]]:
    return [tuple(encode_prompt(llama._model, f"{text} " * 9)) for text in "abcdef"]


@pytest.fixture(scope="module")
def alone(llama):
    """Return a function: the tokens that a request gives alone, by the session's own loop."""
    known: dict[tuple[object, ...], list[int]] = {}

    def generate(request: Request) -> list[int]:
        key = (request.prompt, request.sampling, request.max_tokens, request.think)
        if key not in known:
            text = Generation(
                llama,
                request.prompt,
                request.max_tokens or 0,
                sampling=request.sampling,
                think=request.think,
            )
            list(text)
            known[key] = text.tokens
            llama.clear()
        return known[key]

    return generate


def requests_of(prompts, n: int = 8, max_tokens: int = 60) -> list[Request]:
    return [
        Request(prompts[i % len(prompts)], max_tokens, GREEDY if i % 2 else seeded(i))
        for i in range(n)
    ]


def finish(sequences: Sequences) -> list:
    return list(sequences.run())


# --- the same texts ------------------------------------------------------------------------------


def test_texts_side_by_side_are_those_of_each_alone(llama, prompts, alone) -> None:
    requests = requests_of(prompts)
    expected = [alone(request) for request in requests]
    with Sequences(llama) as sequences:
        chains = [sequences.add(request) for request in requests]
        assert (sequences.n_running, sequences.n_waiting) == (0, 8)
        sequences.step()
        assert (sequences.n_running, sequences.n_waiting) == (4, 4)
        events = finish(sequences)
        assert sequences.is_idle
        assert [chain.tokens for chain in chains] == expected
        assert len({tuple(text) for text in expected}) > 5
        counts = sequences.counts
        assert counts.n_tokens == sum(map(len, expected))
        assert counts.n_prompt_tokens == sum(len(request.prompt) for request in requests)
        assert (counts.n_added, counts.n_ended, counts.n_failed) == (8, 8, 0)
        # one step serves all: alone every token takes a step of its own
        assert counts.n_steps < 0.5 * counts.n_tokens
    ended = [event.chain for event in events if event.chain.stop_reason is not None]
    assert {chain.id for chain in ended} == {chain.id for chain in chains}


def test_a_request_enters_at_any_step(llama, sequences, prompts, alone) -> None:
    requests = requests_of(prompts, max_tokens=40)
    rng = random.Random(3)
    left, chains = list(requests), []
    while left or not sequences.is_idle:
        if left and rng.random() < 0.3:
            chains.append(sequences.add(left.pop(0)))
        sequences.step()
    got = [chain.tokens for chain in chains]
    sequences.close()
    assert got == [alone(request) for request in requests]


def test_long_prompts_are_read_in_pieces_while_texts_go_on(llama, prompts, alone) -> None:
    first, second = Request(prompts[1], 30, GREEDY), Request((prompts[0] * 50)[:900], 10, GREEDY)
    with Sequences(llama, prompt_step=32) as sequences:
        chain = sequences.add(first)
        sequences.step()
        other = sequences.add(second)
        n_steps = 0
        while not other.tokens:
            before = len(chain.tokens)
            sequences.step()
            n_steps += 1
            # the long prompt never takes the other's turn
            assert chain.stop_reason is not None or len(chain.tokens) == before + 1
        assert n_steps > 20
        finish(sequences)
        texts = [chain.tokens, other.tokens]
    assert texts == [alone(first), alone(second)]


def test_a_session_goes_on_after_its_sequences(llama, prompts, alone) -> None:
    request = Request(prompts[2], 20, GREEDY)
    expected = alone(request)
    with Sequences(llama) as sequences:
        sequences.add(Request(prompts[3], 5, GREEDY))
        sequences.step()
    assert llama.n_tokens == 0
    text = Generation(llama, request.prompt, 20, sampling=GREEDY)
    list(text)
    assert text.tokens == expected


def test_a_limit_on_thinking(llama, prompts, alone) -> None:
    requests = [Request(p, 60, seeded(i), think=ThinkLimit(10 + i)) for i, p in enumerate(prompts)]
    expected = [alone(request) for request in requests]
    with Sequences(llama) as sequences:
        chains = [sequences.add(request) for request in requests]
        finish(sequences)
    assert [chain.tokens for chain in chains] == expected
    assert all(chain.thinking is not None and chain.thinking.is_cut for chain in chains)


# --- ends ----------------------------------------------------------------------------------------


def test_problems_of_the_demo_side_by_side(demo) -> None:
    requests = [Request(problem(demo, i), None, GREEDY) for i in range(6)]
    expected = []
    for request in requests:
        text = Generation(demo, request.prompt, sampling=GREEDY)
        list(text)
        expected.append(text.tokens)
    with Sequences(demo) as sequences:
        chains = [sequences.add(request) for request in requests]
        finish(sequences)
    assert [chain.tokens for chain in chains] == expected
    assert {chain.stop_reason for chain in chains} == {"stop"}


def test_ends(demo) -> None:
    prompt = problem(demo, 0)
    with Sequences(demo) as sequences:
        whole = sequences.add(Request(prompt, None, GREEDY))
        finish(sequences)
        assert whole.stop_reason == "stop"
        stop = whole.tokens[12]
        cut = sequences.add(Request(prompt, None, GREEDY, stop_tokens=frozenset({stop})))
        none = sequences.add(Request(prompt, 0, GREEDY))
        events = finish(sequences)
    assert (cut.stop_reason, cut.tokens) == ("stop", whole.tokens[: whole.tokens.index(stop)])
    assert (none.stop_reason, none.tokens) == ("length", [])
    assert [event.token for event in events if event.chain is none] == [None]
    assert whole.made <= whole.started <= whole.first <= whole.ended


def test_the_end_of_a_sequence(make_gguf) -> None:
    with (
        ReasonLlama(make_gguf(), None, n_ctx=2 * 256, n_seq_max=2, **ONE) as llama,
        Sequences(llama) as sequences,
    ):
        assert sequences.n_ctx == 256
        prompt = tuple(llama.tokenize(b"hello"))
        chain = sequences.add(Request(prompt, None, GREEDY))
        finish(sequences)
        assert chain.stop_reason == "context"
        assert len(prompt) + len(chain.tokens) == 256 + 1  # as alone: the last one is not decoded
        with pytest.raises(ContextFullError, match="257 tokens, more than the 256"):
            sequences.add(Request(prompt[:1] * 257))


def test_cancelling_ends_a_chain_within_a_step(llama, sequences, prompts, alone) -> None:
    requests = requests_of(prompts, 6, max_tokens=50)
    chains = [sequences.add(request) for request in requests]
    for _ in range(5):
        sequences.step()
    chains[1].cancel()
    chains[5].cancel()  # waits still
    n_before = len(chains[1].tokens)
    events = sequences.step()
    over = [event.chain for event in events if event.chain.stop_reason == "interrupted"]
    assert over == [chains[1], chains[5]]
    assert len(chains[1].tokens) == n_before
    finish(sequences)
    assert sequences.counts.n_cancelled == 2
    got = [chains[i].tokens for i in (0, 2, 3, 4)]
    sequences.close()
    assert got == [alone(requests[i]) for i in (0, 2, 3, 4)]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (10**6,)}, "there is no token 1000000"),
        ({"prompt": (1,), "stop_tokens": frozenset({-1})}, "there is no token -1"),
        ({"prompt": (1,), "grammar": LlamaGrammar.from_string("root ::= (")}, "cannot be read"),
        ({"prompt": (1,), "draw": {"temp": 1}}, "has no 'temp'"),
        ({"prompt": (1,), "max_tokens": -1}, "max_tokens = -1"),
    ],
)
def test_bad_requests(sequences, request_, words) -> None:
    with pytest.raises(ConfigError, match=words):
        sequences.add(Request(**request_))
    assert sequences.is_idle


# --- forks ---------------------------------------------------------------------------------------


def test_forks_share_the_reading_of_a_prompt(llama, sequences, prompts, alone) -> None:
    request = Request(prompts[0], 50, seeded(0))
    chains = [sequences.add(request)]
    chains += [sequences.fork(chains[0], seeded(seed)) for seed in (1, 2)]
    finish(sequences)
    n = len(request.prompt)
    assert (sequences.counts.n_prompt_tokens, sequences.counts.n_reused) == (n, 2 * n)
    got = [chain.tokens for chain in chains]
    sequences.close()
    assert got == [alone(dataclasses.replace(request, sampling=seeded(s))) for s in (0, 1, 2)]


def test_more_forks_than_sequences(llama, sequences, prompts, alone) -> None:
    request = Request(prompts[4], 30, seeded(0))
    first = sequences.add(request)
    chains = [first] + [sequences.fork(first, seeded(seed)) for seed in range(1, 7)]
    assert sequences.n_waiting == 7
    finish(sequences)
    assert sequences.counts.n_prompt_tokens == 4 * len(request.prompt)
    got = [chain.tokens for chain in chains]
    sequences.close()
    assert got == [alone(dataclasses.replace(request, sampling=seeded(s))) for s in range(7)]


@pytest.mark.parametrize("n_others", [0, 3])
def test_a_fork_in_the_middle_of_a_text(sequences, prompts, n_others) -> None:
    for prompt in prompts[:n_others]:
        sequences.add(Request(prompt, 60, GREEDY))
    chain = sequences.add(Request(prompts[5], 40, seeded(5)))
    for _ in range(12):
        sequences.step()
    twin = sequences.fork(chain)
    other = sequences.fork(chain, seeded(6))
    assert twin.tokens == other.tokens == chain.tokens
    n = len(chain.tokens)
    finish(sequences)
    assert twin.tokens == chain.tokens  # it draws from the same state
    assert other.tokens[:n] == chain.tokens[:n]
    assert other.tokens != chain.tokens
    assert (sequences.counts.n_reused > 0) == (n_others == 0)
    with pytest.raises(ConfigError, match="over"):
        sequences.fork(chain)


def test_forks_outlive_the_chain_whose_prompt_they_wanted(sequences, llama, prompts, alone) -> None:
    request = Request(prompts[1], 20, seeded(0))
    first = sequences.add(request)
    chains = [sequences.fork(first, seeded(seed)) for seed in (1, 2, 3)]
    first.cancel()
    chains[1].cancel()
    finish(sequences)
    assert [chain.stop_reason for chain in (first, chains[1])] == ["interrupted"] * 2
    assert sequences.counts.n_prompt_tokens == len(request.prompt)
    got = [chains[0].tokens, chains[2].tokens]
    sequences.close()
    assert got == [alone(dataclasses.replace(request, sampling=seeded(s))) for s in (1, 3)]


# --- failures ------------------------------------------------------------------------------------


def test_a_failed_batch_is_decoded_again_chain_by_chain(llama, sequences, prompts, alone) -> None:
    requests = requests_of(prompts, 4, max_tokens=30)
    chains = [sequences.add(request) for request in requests]
    for _ in range(10):
        sequences.step()
    decode, n_failed = sequences._cells.decode, 0

    def fail_together(pieces):
        nonlocal n_failed
        if len(pieces) > 1:
            n_failed += 1
            with aborting(llama.ctx):
                return decode(pieces)
        return decode(pieces)

    sequences._cells.decode = fail_together
    for _ in range(3):
        sequences.step()
    assert n_failed == 3
    sequences._cells.decode = decode
    finish(sequences)
    got = [chain.tokens for chain in chains]
    assert [chain.error for chain in chains] == [None] * 4
    sequences.close()
    assert got == [alone(request) for request in requests]


def test_only_the_chain_that_fails_ends(llama, sequences, prompts, alone) -> None:
    requests = requests_of(prompts, 4, max_tokens=30)
    chains = [sequences.add(request) for request in requests]
    for _ in range(10):
        sequences.step()
    decode = sequences._cells.decode

    def fail_with(pieces):
        if any(piece.chain is chains[2] for piece in pieces):
            with aborting(llama.ctx):
                return decode(pieces)
        return decode(pieces)

    sequences._cells.decode = fail_with
    events = finish(sequences)
    assert [e.chain for e in events if e.chain.stop_reason == "failed"] == [chains[2]]
    assert "llama_decode returned 2" in str(chains[2].error)
    assert (sequences.counts.n_failed, sequences.n_running) == (1, 0)
    got = [chains[i].tokens for i in (0, 1, 3)]
    sequences.close()
    assert got == [alone(requests[i]) for i in (0, 1, 3)]


def test_a_grammar_without_a_token_ends_its_chain(demo) -> None:
    """There is no such character; llama.cpp's own chain would abort."""
    hopeless = LlamaGrammar.from_string(r"root ::= [\U7FFFFFF0]")
    prompt = problem(demo, 0)
    with Sequences(demo) as sequences:
        chain = sequences.add(Request(prompt, 20, GREEDY, grammar=hopeless))
        other = sequences.add(Request(prompt, 20, GREEDY))
        finish(sequences)
    assert chain.stop_reason == "failed"
    assert "admits no token" in str(chain.error)
    assert len(other.tokens) == 20


# --- grammars and log-probabilities --------------------------------------------------------------


def test_a_grammar_is_that_of_the_session(llama, sequences, prompts) -> None:
    grammar = LlamaGrammar.from_string('root ::= ("the " | "Next ")+ "."')
    request = Request(prompts[0], 25, seeded(4), grammar=grammar)
    chains = [sequences.add(request), sequences.add(Request(prompts[1], 25, GREEDY))]
    finish(sequences)
    text = llama.detokenize(chains[0].tokens)
    sequences.close()
    llama.set_seed(4)
    tokens = llama.generate(
        list(prompts[0]),
        top_k=0,
        min_p=0.0,
        top_p=0.98,
        temp=1.5,
        repeat_penalty=1.05,
        grammar=grammar,
    )
    expected = []
    for token in tokens:
        if bindings.llama_vocab_is_eog(llama._model.vocab, token) or len(expected) == 25:
            break
        expected.append(token)
    assert text == llama.detokenize(expected)
    assert text.startswith((b"the ", b"Next "))


def test_log_probabilities(llama, sequences, prompts) -> None:
    n = 12
    plain = sequences.add(Request(prompts[0], n, GREEDY, n_top=3, prompt_logprobs=True))
    others = [sequences.add(Request(prompt, 30, GREEDY)) for prompt in prompts[1:3]]
    events = [event for event in finish(sequences) if event.chain is plain]
    assert all(chain.tokens for chain in others)
    text = [*prompts[0], *plain.tokens]
    reported = [*plain.prompt_logprobs, *[event.logprob for event in events]]
    assert [one.token for one in reported] == text[1:]
    again = sequences.add(Request(tuple(text), 0, GREEDY, n_top=0, prompt_logprobs=True))
    finish(sequences)
    for one, two in zip(reported, again.prompt_logprobs):
        assert one.token == two.token
        assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
        assert len(one.top) == 3
        assert one.top[0][1] >= one.top[1][1] >= one.top[2][1]
    for event in events:  # greedy: the likeliest one
        assert event.logprob.top[0] == (event.token, event.logprob.logprob)


# --- the session ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 10**6, True, "4"])
def test_a_number_of_sequences_that_cannot_be(make_gguf, n) -> None:
    with pytest.raises(ConfigError, match="n_seq_max"):
        ReasonLlama(make_gguf(), None, n_ctx=64, n_seq_max=n)
    with pytest.raises(ConfigError, match="embedding"):
        ReasonLlama(make_gguf(), None, n_ctx=64, n_seq_max=2, embedding=True)


# --- snapshots -----------------------------------------------------------------------------------


def test_prompts_that_begin_alike_go_on_from_snapshots(llama, alone) -> None:
    if llama.config is None:
        pytest.skip("snapshots are for budgets")
    rng = random.Random(11)
    common = tuple(rng.randrange(60, 100) for _ in range(150))
    prompts = [
        common[:n] + tuple(rng.randrange(60, 100) for _ in range(rng.randrange(1, 60)))
        for n in (150, 150, 100, 149, 30, 150)
    ]
    requests = [Request(prompt, 20, GREEDY) for prompt in prompts]
    expected = [alone(request) for request in requests]
    prefixes = Prefixes(llama, 64 << 20)
    with Sequences(llama, prefixes=prefixes) as sequences:
        first = sequences.add(requests[0])
        finish(sequences)
        assert (first.tokens, first.n_reused) == (expected[0], 0)
        assert len(prefixes.store) > 0
        chains = [sequences.add(request) for request in [*requests, requests[0]]]
        finish(sequences)
        got = [chain.tokens for chain in chains]
        n_reused = [chain.n_reused for chain in chains]
    assert got == [*expected, expected[0]]
    assert n_reused[0] > 0
    assert 0 < sum(n_reused) == sequences.counts.n_reused
