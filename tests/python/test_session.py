"""`ReasonLlama` as a drop-in for `llama_cpp.Llama`, while tokens are being evicted."""

from __future__ import annotations

import ctypes
import json
import pickle

import numpy as np
import pytest
from gguf_factory import CHAT_TEMPLATE
from llama_cpp import Llama, LlamaGrammar, LogitsProcessorList, StoppingCriteriaList
from llama_cpp import llama_cpp as bindings
from sessions import GREEDY, SMALL, complete, fresh, kept_by_all

from py_reasonalloc import (
    BudgetConfig,
    BudgetError,
    ComputeError,
    ConfigError,
    ContextError,
    ContextFullError,
    ModelFileError,
    NotFoundError,
    ReasonLlama,
    UnsupportedError,
)
from py_reasonalloc.task.problems import SAMPLE_PROBLEM


@pytest.fixture
def llama(make_gguf):
    with ReasonLlama(make_gguf(chat_template=CHAT_TEMPLATE), **SMALL) as session:
        yield session


# --- the interface of llama_cpp.Llama ------------------------------------------------------------


def test_is_a_llama_and_evicts(llama) -> None:
    assert isinstance(llama, Llama)
    done = llama("hello", max_tokens=120, **GREEDY)
    assert done["usage"] == {"prompt_tokens": 6, "completion_tokens": 120, "total_tokens": 126}
    assert done["choices"][0]["finish_reason"] == "length"
    assert llama.kv_stats().n_compressions > 0


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "deci"])
def test_a_large_budget_gives_the_text_of_the_base_class(make_gguf, arch) -> None:
    path = make_gguf(arch=arch)
    stock = Llama(str(path), n_ctx=512, flash_attn=True, verbose=False)
    expected = complete(stock, max_tokens=200)
    stock.close()
    with ReasonLlama(path, budget=300) as llama:
        assert complete(llama, max_tokens=200) == expected
        assert llama.kv_stats().n_evicted == 0
    with ReasonLlama(path, budget=None, n_ctx=512) as llama:
        assert complete(llama, max_tokens=200) == expected
        with pytest.raises(NotFoundError, match="no budgeted cache"):
            llama.kv_stats()


def test_streaming(llama) -> None:
    whole = complete(llama)
    chunks = list(llama("hello", max_tokens=120, stream=True, **GREEDY))
    assert len(chunks) > 100
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_strings(llama) -> None:
    whole = complete(llama)
    stop = whole[90:93]
    done = llama("hello", max_tokens=120, stop=[stop], **GREEDY)
    assert done["choices"][0]["finish_reason"] == "stop"
    assert done["choices"][0]["text"] == whole[: whole.index(stop)]


def test_logits_processor_and_stopping_criteria(llama) -> None:
    letter = llama.tokenize(b"z", add_bos=False)[0]
    seen = []

    def only_z(tokens, scores):
        seen.append(len(tokens))
        scores[:] = -np.inf
        scores[letter] = 0.0
        return scores

    assert (
        complete(llama, max_tokens=70, logits_processor=LogitsProcessorList([only_z])) == "z" * 70
    )
    assert seen == list(range(6, 76))  # it saw every token, the evicted ones too
    criteria = StoppingCriteriaList([lambda tokens, scores: len(tokens) >= 80])
    done = llama("hello", max_tokens=100, stopping_criteria=criteria, **GREEDY)
    assert done["choices"][0]["finish_reason"] == "stop"
    assert done["usage"]["completion_tokens"] == 74


def test_logit_bias(llama) -> None:
    letter = llama.tokenize(b"q", add_bos=False)[0]
    assert complete(llama, max_tokens=60, logit_bias={letter: 1e3}) == "q" * 60


def test_grammar(llama) -> None:
    grammar = LlamaGrammar.from_string(
        'root ::= "[" item{60} "]"\nitem ::= [0-9] ","', verbose=False
    )
    text = complete(llama, max_tokens=200, grammar=grammar)
    assert len(text) == 122 and text[0] == "[" and text[-1] == "]"
    assert len(json.loads(text.replace(",]", "]"))) == 60
    assert llama.kv_stats().n_compressions > 0


def test_seeds(llama) -> None:
    def draw(seed: int) -> str:
        return complete(llama, temperature=1.5, top_k=0, seed=seed)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_chat_completion(llama) -> None:
    messages = [{"role": "user", "content": "hello"}]
    done = llama.create_chat_completion(messages, max_tokens=100, **GREEDY)
    content = done["choices"][0]["message"]["content"]
    assert done["usage"]["prompt_tokens"] == 8
    assert content == complete(llama, "<|user|>hello<|assistant|>", max_tokens=100)
    chunks = llama.create_chat_completion(messages, max_tokens=100, stream=True, **GREEDY)
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == content


def test_logprobs(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL, logits_all=True, n_ctx=512) as llama:
        done = llama("hello", max_tokens=80, logprobs=2, **GREEDY)
        found = done["choices"][0]["logprobs"]
        assert len(found["tokens"]) == 80
        best = [max(top, key=top.get) for top in found["top_logprobs"]]
        assert best == found["tokens"]  # greedy took the likeliest token each time


def test_detokenize_is_the_base_classs(llama) -> None:
    tokens = list(range(llama.n_vocab()))
    for special in (False, True):
        for some in (tokens, [0, tokens[4 + ord(" ")], 9], []):
            expected = Llama.detokenize(llama, some, special=special)
            assert llama.detokenize(some, special=special) == expected
    assert llama.detokenize([0], special=True) == b"<s>"


def test_pickle(llama) -> None:
    with pickle.loads(pickle.dumps(llama)) as copy:
        assert copy.config == llama.config
        assert complete(copy) == complete(llama)


# --- what is kept --------------------------------------------------------------------------------


def test_stats_hang_together(llama) -> None:
    complete(llama, max_tokens=150)
    stats = llama.kv_stats()
    heads = [head for layer in stats.layers for head in layer]
    assert [len(layer) for layer in stats.layers] == [2, 2]
    assert (stats.n_pos, stats.budget, stats.buffer) == (llama.n_tokens, 32, 16)
    assert sum(head.used for head in heads) == stats.n_entries
    assert sum(head.n_evicted for head in heads) == stats.n_evicted
    assert stats.n_entries + stats.n_evicted == stats.n_pos * len(heads)
    assert all(head.budget == 32 and head.used <= head.capacity == 48 for head in heads)
    assert stats.kv_bytes == sum(head.capacity for head in heads) * 2 * 32 * 2
    assert stats.kv_bytes + stats.window_bytes == llama.memory_use().context_bytes
    for il in range(2):
        for ih in range(2):
            kept = stats.kept_positions(il, ih)
            assert kept.dtype == np.int32 and not kept.flags.writeable
            assert np.all(np.diff(kept) > 0)
            assert {0, 1, 2, 3} | set(range(stats.n_pos - 8, stats.n_pos)) <= set(kept.tolist())
    with pytest.raises(AttributeError):
        stats.budget = 1
    for il, ih in ((2, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ConfigError, match="out of range"):
            stats.kept_positions(il, ih)


@pytest.mark.parametrize(("protect", "n"), [("all", 25), (17, 17), (100, 25)])
def test_protected_prompt_stays(make_gguf, protect, n) -> None:
    config = BudgetConfig(budget=110, buffer=8, policy="random", protect_prompt=protect)
    with ReasonLlama(make_gguf(), config) as llama:
        complete(llama, "x" * 24, max_tokens=300)
        assert llama.kv_stats().n_compressions > 5
        assert llama.n_protect == n
        assert set(range(n)) <= kept_by_all(llama)
        assert not set(range(n, 200)) <= kept_by_all(llama)


def test_prompt_that_is_too_long_to_protect(make_gguf) -> None:
    with ReasonLlama(make_gguf(), budget=48, buffer=8, protect_prompt="all") as llama:
        with pytest.raises(BudgetError, match="budget"):
            llama("x" * 60, max_tokens=5)
        assert len(complete(llama, "x" * 20)) == 120


# --- failures ------------------------------------------------------------------------------------


def test_aborted_decode_leaves_the_session_usable(make_gguf) -> None:
    calls = []

    @bindings.ggml_abort_callback
    def abort(_):
        calls.append(1)
        return len(calls) > 40

    never = ctypes.cast(None, bindings.ggml_abort_callback)
    with ReasonLlama(make_gguf(), **SMALL, n_batch=256) as llama:
        tokens = llama.tokenize(b"hello" * 60)
        bindings.llama_set_abort_callback(llama.ctx, abort, None)
        with pytest.raises(ComputeError, match="llama_decode"):
            llama.eval(tokens)
        bindings.llama_set_abort_callback(llama.ctx, never, None)
        assert len(calls) > 40
        assert llama.n_tokens == llama.n_cached() < len(tokens)
        assert llama.input_ids[: llama.n_tokens].tolist() == tokens[: llama.n_tokens]
        llama.eval(tokens[llama.n_tokens :])
        assert llama.n_tokens == llama.n_cached() == len(tokens)
        assert complete(llama, "hello") == fresh(make_gguf, "hello")


def test_end_of_the_context(make_gguf) -> None:
    with ReasonLlama(make_gguf(n_ctx_train=300), **SMALL) as llama:
        assert llama.n_ctx() >= 300
        done = llama("hello", max_tokens=None, **GREEDY)
        assert done["choices"][0]["finish_reason"] == "length"
        assert done["usage"]["total_tokens"] == 300
        assert len(list(llama.generate(llama.tokenize(b"hello"), temp=0.0))) == 300 - 6 + 1
        assert llama.n_tokens == 300
        with pytest.raises(ValueError, match="exceed context"):
            llama("x" * 400)
        with pytest.raises(ContextFullError, match="401 tokens"):
            next(llama.generate(llama.tokenize(b"x" * 400)))
        with pytest.raises(ContextFullError):
            llama.eval([5])
        assert complete(llama, "hello", max_tokens=20)


def test_empty_prompt(llama) -> None:
    with pytest.raises(ConfigError, match="prompt is empty"):
        next(llama.generate([]))


def test_closed_session(make_gguf) -> None:
    llama = ReasonLlama(make_gguf())
    llama.close()
    llama.close()
    for use in (llama.kv_stats, llama.memory_use, llama.save_state, lambda: llama("hello")):
        with pytest.raises(ContextError, match="closed"):
            use()


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        ({"budget": 5}, BudgetError, "budget 5 is too small"),
        ({"budget": "64"}, ConfigError, "budget = '64' must be a whole number"),
        ({"budget": BudgetConfig(budget=64), "policy": "random"}, ConfigError, "policy: already"),
        ({"policy": "nope"}, NotFoundError, "policy = 'nope' is unknown"),
        ({"type_k": "q3_k"}, ConfigError, "cache type = 'q3_k' is unknown"),
        ({"type_k": 10}, UnsupportedError, "not supported with a budget"),
        ({"type_v": "q8_0", "flash_attn": False}, ContextError, "flash"),
        ({"draft_model": "lookup"}, ConfigError, "draft_model = 'lookup' must be"),
        ({"embedding": True}, UnsupportedError, "embedding takes several sequences"),
        ({"budget": BudgetConfig(budget=64, layers=[64])}, ContextError, "layer_budgets"),
    ],
)
def test_refused(make_gguf, capfd, arguments, error, pattern) -> None:
    with pytest.raises(error, match=pattern):
        ReasonLlama(make_gguf(), **arguments)
    assert capfd.readouterr() == ("", "")
    # nothing is left pending for the next context of this thread
    with ReasonLlama(make_gguf(), budget=None, n_ctx=64) as llama, pytest.raises(NotFoundError):
        llama.kv_stats()


def test_refused_models(make_gguf, tmp_path, capfd) -> None:
    with pytest.raises(UnsupportedError, match="'mamba' is not supported"):
        ReasonLlama(make_gguf(arch="mamba"))
    with pytest.raises(ModelFileError, match="no such file"):
        ReasonLlama(tmp_path / "x.gguf")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_cache_types(make_gguf, kv_type) -> None:
    with ReasonLlama(make_gguf(), **SMALL, type_k=kv_type, type_v=kv_type) as llama:
        assert len(complete(llama)) == 120
        bits = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}[kv_type]
        assert llama.kv_stats().kv_bytes == 48 * 4 * 2 * 32 * bits / 8


def test_nothing_is_printed(make_gguf, capfd) -> None:
    with ReasonLlama(make_gguf(), **SMALL) as llama:
        complete(llama)
    assert capfd.readouterr() == ("", "")


def test_a_long_context_costs_no_memory(make_gguf) -> None:
    sizes = []
    for n_ctx_train in (2048, 1 << 20):
        with ReasonLlama(make_gguf(n_ctx_train=n_ctx_train), **SMALL) as llama:
            assert llama.n_ctx() == n_ctx_train
            sizes.append(llama.memory_use())
    assert sizes[0] == sizes[1]


def test_reconfigure_is_a_fresh_session_on_the_same_weights(demo_model) -> None:
    arms = [
        (None, "f16"),
        (BudgetConfig(budget=120, buffer=16), "f16"),
        (BudgetConfig(budget=160, buffer=32, policy="snapkv", heads="adaptive"), "q8_0"),
        (80, "q4_0"),
        (None, "q8_0"),
    ]
    prompt = SAMPLE_PROBLEM.chat_prompt
    with ReasonLlama(demo_model, 200, n_ctx=512) as llama:
        weights = llama.model
        for budget, kind in arms:
            llama.reconfigure(budget, type_k=kind, type_v=kind)
            fresh = ReasonLlama(
                demo_model,
                BudgetConfig(budget=budget) if isinstance(budget, int) else budget,
                n_ctx=512,
                type_k=kind,
                type_v=kind,
            )
            with fresh:
                texts = [
                    each.create_completion(prompt, max_tokens=300, temperature=0.0)["choices"][0]
                    for each in (llama, fresh)
                ]
                assert texts[0]["text"] == texts[1]["text"]
                assert llama.memory_use() == fresh.memory_use()
        assert llama.model == weights


def test_reconfigure_refuses_and_closes(demo_model) -> None:
    llama = ReasonLlama(demo_model, 200, n_ctx=512)
    with pytest.raises(NotFoundError):
        llama.reconfigure(BudgetConfig(policy="nothing"))
    llama.reconfigure(120, type_v="q8_0")  # still open: nothing had been touched
    with pytest.raises(ConfigError, match="cache type"):
        llama.reconfigure(120, type_k="q3")
    llama.close()
    with pytest.raises(ContextError, match="closed"):
        llama.reconfigure(120)
