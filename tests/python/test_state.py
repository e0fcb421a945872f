"""Saving and loading a session: right, or refused with the session left usable."""

from __future__ import annotations

import pytest
from llama_cpp import LlamaDiskCache, LlamaRAMCache
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


def refused(llama, state, pattern) -> None:
    """It is, in one line, and the session goes on as if nothing had been."""
    llama.clear()
    llama.eval(llama.tokenize(b"good day" * 12))
    first = llama.sample(temp=0.0)
    llama.eval([first])
    expected = tokens_after(llama, 40)
    llama.clear()
    llama.eval(llama.tokenize(b"good day" * 12))
    with pytest.raises(StateError, match=f"does not fit this session: {pattern}") as caught:
        llama.load_state(state)
    assert "\n" not in str(caught.value)
    assert llama.n_tokens == llama.n_cached() == 97
    assert llama.sample(temp=0.0) == first  # the logits are still there, too
    llama.eval([first])
    assert tokens_after(llama, 40) == expected


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"budget": 40, "buffer": 16}, "it was saved with budget = 40, here it is 32"),
        ({"budget": None}, "it was saved with budget = none, here it is 32"),
        ({**SMALL, "type_k": "q8_0"}, "it was saved with cache types = 8, 1, here it is 1, 1"),
        ({**SMALL, "policy": "rkv"}, "it was saved with policy = rkv, here it is loss"),
        ({**SMALL, "sinks": 2}, "it was saved with sinks = 2, here it is 4"),
        ({**SMALL, "heads": "adaptive"}, "it was saved with heads = adaptive, here it is uniform"),
    ],
)
def test_a_state_of_another_cache_is_refused(make_gguf, arguments, pattern) -> None:
    with ReasonLlama(make_gguf(), **arguments) as other:
        other.eval(other.tokenize(b"hello" * 20))
        state = other.save_state()
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        refused(llama, state, pattern)


def test_a_state_of_another_model_is_refused(make_gguf) -> None:
    with ReasonLlama(make_gguf(seed=5), **SMALL) as other:
        other.eval(other.tokenize(b"hello" * 20))
        state = other.save_state()
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        refused(llama, state, "it was saved with another model")


def test_a_stock_session_refuses_without_a_change(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as other:
        other.eval(other.tokenize(b"hello" * 20))
        state = other.save_state()
    with ReasonLlama(make_gguf(), budget=None, n_ctx=512) as llama:
        state.input_ids = state.input_ids[:512]
        refused(llama, state, "it was saved with budget = 32, here it is none")
        del state.signature  # as another version would leave it
        refused(llama, state, "it is damaged, or of another kind of cache")


def cut(state) -> None:
    state.llama_state = state.llama_state[: len(state.llama_state) // 2]
    state.llama_state_size = len(state.llama_state)


def lose(state) -> None:
    state.llama_state = state.llama_state[:-1]


def miscount(state) -> None:
    state.n_tokens -= 1


def overcount(state) -> None:
    state.n_tokens = 1 << 20


def unsigned(state) -> None:
    del state.signature


def flip(state) -> None:
    data = bytearray(state.llama_state)
    for at in range(0, 400, 4):
        data[at] ^= 0x40
    state.llama_state = bytes(data)


@pytest.mark.parametrize("damage", [cut, lose, miscount, overcount, unsigned, flip])
def test_a_damaged_state_is_refused(make_gguf, damage) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        llama.eval(llama.tokenize(b"hello" * 20))
        state = llama.save_state()
        damage(state)
        refused(llama, state, "it ")


def test_a_protected_session_keeps_its_split_when_it_refuses(make_gguf) -> None:
    config = {"budget": 48, "buffer": 8, "layers": "pyramid", "protect_prompt": "auto"}
    with ReasonLlama(make_gguf(), **config) as llama:
        llama("x" * 30, max_tokens=100, temperature=0.0)
        state = llama.save_state()
        llama("y" * 5, max_tokens=80, temperature=0.0)
        before, n_protect = llama.kv_stats(), llama.n_protect
        cut(state)
        with pytest.raises(StateError):
            llama.load_state(state)
        assert llama.n_protect == n_protect
        after = llama.kv_stats()
        assert [[head[:4] for head in layer] for layer in after.layers] == [
            [head[:4] for head in layer] for layer in before.layers
        ]


def test_a_disk_cache_keeps_what_a_state_depends_on(make_gguf, tmp_path) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        expected = llama("hello world", max_tokens=80, temperature=0.0)["choices"][0]["text"]
        llama.set_cache(LlamaDiskCache(str(tmp_path / "states")))
        llama.clear()
        llama("hello world", max_tokens=40, temperature=0.0)
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        llama.set_cache(LlamaDiskCache(str(tmp_path / "states")))
        assert (
            llama("hello world", max_tokens=80, temperature=0.0)["choices"][0]["text"] == expected
        )
        state = llama.cache[llama.tokenize(b"hello world")]
        assert state.signature == llama.signature()


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
