"""Saving and loading a session: right, or refused with the session left usable."""

from __future__ import annotations

import pytest
from llama_cpp import LlamaRAMCache
from sessions import SMALL

from py_reasonalloc import ReasonLlama, StateError


def tokens_after(llama, n: int) -> list[int]:
    """Decode greedily after what the session holds, without a prompt of its own."""
    found = []
    for _ in range(n):
        found.append(llama.sample(temp=0.0))
        llama.eval(found[-1:])
    return found


def test_a_loaded_state_goes_on_like_the_saved_one(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama, ReasonLlama(make_gguf(), **SMALL) as other:
        llama.eval(llama.tokenize(b"hello" * 20))
        state = llama.save_state()
        assert llama.kv_stats().n_evicted > 0
        first = llama.sample(temp=0.0)
        llama.eval([first])
        expected = tokens_after(llama, 60)
        for session in (llama, other):
            session.load_state(state)
            assert session.n_tokens == session.n_cached() == 101
            session.eval([first])
            assert tokens_after(session, 60) == expected


@pytest.mark.parametrize(
    "arguments",
    [{"budget": 40, "buffer": 16}, {"budget": None}, {**SMALL, "type_k": "q8_0"}],
    ids=["other-budget", "stock", "other-type"],
)
def test_a_state_of_another_cache_is_refused(make_gguf, arguments) -> None:
    with ReasonLlama(make_gguf(), **arguments) as other:
        other.eval(other.tokenize(b"hello" * 20))
        state = other.save_state()
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        expected = llama("hello", max_tokens=60, temperature=0.0)["choices"][0]["text"]
        with pytest.raises(StateError, match="does not fit this session"):
            llama.load_state(state)
        assert llama.n_tokens == llama.n_cached() == 0
        assert llama("hello", max_tokens=60, temperature=0.0)["choices"][0]["text"] == expected


def test_a_damaged_state_is_refused(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        llama.eval(llama.tokenize(b"hello" * 20))
        state = llama.save_state()
        state.llama_state = state.llama_state[: len(state.llama_state) // 2]
        state.llama_state_size = len(state.llama_state)
        with pytest.raises(StateError):
            llama.load_state(state)
        assert llama.n_tokens == llama.n_cached() == 0


def test_a_state_of_another_context_length_is_refused(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL, n_ctx=512) as other:
        other.eval(other.tokenize(b"hello"))
        state = other.save_state()
    with ReasonLlama(make_gguf(), **SMALL) as llama, pytest.raises(StateError, match="512 tokens"):
        llama.load_state(state)


def test_protection_is_part_of_a_state(make_gguf) -> None:
    arguments = {"budget": 64, "buffer": 8, "protect_prompt": "all"}
    with ReasonLlama(make_gguf(), **arguments) as llama:
        llama("x" * 30, max_tokens=100, temperature=0.0)
        state = llama.save_state()
        llama("y" * 10, max_tokens=10, temperature=0.0)
        assert llama.n_protect == 11
        llama.load_state(state)
        assert llama.n_protect == 31


def test_the_prompt_cache_of_the_base_class(make_gguf) -> None:
    """It puts states back before a prompt: answers stay those of a fresh session."""
    prompts = ("hello world", "other", "hello world, again", "hello world")
    expected = []
    for prompt in prompts:
        with ReasonLlama(make_gguf(), **SMALL) as llama:
            done = llama(prompt, max_tokens=80, temperature=0.0)
            expected.append(done["choices"][0]["text"])
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        llama.set_cache(LlamaRAMCache())
        for prompt, text in zip(prompts, expected):
            done = llama(prompt, max_tokens=80, temperature=0.0)
            assert done["choices"][0]["text"] == text
