"""One prompt after another: no answer comes from a cache compressed for another continuation."""

from __future__ import annotations

from itertools import islice

import pytest
from gguf_factory import CHAT_TEMPLATE
from sessions import SMALL, complete, fresh, kept_by_all, n_decoded

from py_reasonalloc import ReasonLlama


@pytest.fixture
def llama(make_gguf):
    with ReasonLlama(make_gguf(chat_template=CHAT_TEMPLATE), **SMALL) as session:
        yield session


def test_prefix_is_reused_while_nothing_was_evicted(make_gguf) -> None:
    with ReasonLlama(make_gguf(), budget=200) as llama:
        first = complete(llama, "hello world", max_tokens=20)
        before = n_decoded(llama)
        second = complete(llama, "hello world, again", max_tokens=20)
        assert n_decoded(llama) - before == 7 + 19  # only what is new of the prompt
    with ReasonLlama(make_gguf(), budget=200) as llama:
        assert complete(llama, "hello world, again", max_tokens=20) == second != first


def test_prefix_of_a_compressed_cache_is_read_again(make_gguf) -> None:
    """The cache is compressed for one continuation; the next prompt leaves it half way."""
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        text = complete(llama, "hello world")
        assert llama.kv_stats().n_evicted > 0
        for prompt in ("hello world", "hello", "hello world" + text[:50] + "?", "other"):
            assert complete(llama, prompt) == fresh(make_gguf, prompt)


def test_continuation_of_a_compressed_cache_is_reused(make_gguf) -> None:
    """A prompt that repeats everything so far goes on from the compressed cache."""
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        text = complete(llama, "hello world")
        before = n_decoded(llama)
        prompt = "hello world" + text + "so"
        complete(llama, prompt, max_tokens=10)
        assert n_decoded(llama) - before == 1 + 2 + 9  # the last token was never decoded


def test_other_protection_starts_clean(make_gguf) -> None:
    config = {**SMALL, "budget": 64, "buffer": 8, "protect_prompt": "all"}
    with ReasonLlama(make_gguf(), **config) as llama:
        text = complete(llama, "hello world", max_tokens=80)
        assert llama.kv_stats().n_evicted > 0
        prompt = "hello world" + text[:30]
        before = n_decoded(llama)
        assert complete(llama, prompt) == fresh(make_gguf, prompt, **config)
        # everything was read again but the first piece, of 8 tokens, that no eviction had touched
        assert llama.n_reused == 8
        assert n_decoded(llama) - before == 12 + 30 - 8 + 119
        assert llama.n_protect == 42


def test_generator_that_is_left_early(llama, make_gguf) -> None:
    stream = llama.generate(llama.tokenize(b"hello"), temp=0.0)
    for _ in range(60):
        next(stream)
    stream.close()
    assert complete(llama, "hello") == fresh(make_gguf, "hello")


def test_reset_false_goes_on(llama) -> None:
    tokens = llama.tokenize(b"hello")
    whole = list(islice(llama.generate(tokens, temp=0.0), 80))
    llama.reset()
    llama.eval(tokens + whole[:40])
    more = list(islice(llama.generate(whole[40:41], temp=0.0, reset=False), 5))
    assert llama.n_tokens == len(tokens) + 41 + 4
    assert len(more) == 5


def test_cutting_the_session_reads_again_what_was_evicted(llama, make_gguf) -> None:
    tokens = llama.tokenize(b"hello" * 20)
    llama.eval(tokens)
    assert llama.kv_stats().n_evicted > 0
    llama.n_tokens = 50  # as the base class does when it steps back
    llama.eval(tokens[50:60])
    assert llama.n_tokens == llama.n_cached() == 60
    with ReasonLlama(make_gguf(), **SMALL) as other:
        other.eval(tokens[:50])
        other.eval(tokens[50:60])
        assert llama.sample(temp=0.0) == other.sample(temp=0.0)
        assert kept_by_all(llama) == kept_by_all(other)


@pytest.mark.parametrize("protect", [16, "auto", "off"])
def test_a_conversation_goes_on_whatever_is_protected(make_gguf, protect) -> None:
    """The first prompt is shorter than what is to be protected; the second is not."""
    config = {"budget": 64, "buffer": 8, "protect_prompt": protect}
    with ReasonLlama(make_gguf(), **config) as llama:
        text = complete(llama, "hello", max_tokens=100)
        assert llama.kv_stats().n_evicted > 0
        assert llama.n_protect == (0 if protect == "off" else 6)
        before = n_decoded(llama)
        complete(llama, "hello" + text + "so", max_tokens=10)
        assert n_decoded(llama) - before == 1 + 2 + 9
        held = kept_by_all(llama)
        assert set(range(llama.n_protect)) <= held
        if protect != "off":  # all that was left to protect
            assert 6 <= llama.n_protect <= 26
            assert llama.n_protect == 16 or llama.n_protect not in held or protect == "auto"


def test_evictions_of_a_dropped_tail_do_not_count(make_gguf) -> None:
    """Nothing before the tail was evicted: the cache is as if the tail had never been."""
    config = {"budget": 64, "buffer": 8, "protect_prompt": "all", "policy": "rkv"}
    with ReasonLlama(make_gguf(), **config) as llama:
        prompt = llama.tokenize(b"hello world")
        text = list(islice(llama.generate(prompt, temp=0.0), 100))
        assert llama.kv_stats().n_evicted > 0
        before = n_decoded(llama)
        llama.n_tokens = 11
        llama.eval(prompt[11:])
        found = []
        for _ in range(20):
            found.append(llama.sample(temp=0.0))
            llama.eval(found[-1:])
        assert found == text[:20]
        assert n_decoded(llama) - before == 1 + 20  # the prompt's last token, and the text
        stats = llama.kv_stats()
        assert stats.n_evicted == 0
        assert all(head.n_evicted == 0 for layer in stats.layers for head in layer)
        before = n_decoded(llama)  # what was evicted once is no bar to another cut
        llama.n_tokens -= 5
        llama.eval([5])
        assert n_decoded(llama) - before == 1
