"""Speculative decoding with a budget: the text and the compressions of a session without it."""

from __future__ import annotations

import pickle
import random
from itertools import islice

import numpy as np
import pytest
from llama_cpp import LlamaPromptLookupDecoding
from sessions import SMALL, kept_by_all, n_decoded

from py_reasonalloc import BudgetConfig, ConfigError, ReasonLlama
from py_reasonalloc.task.problems import SAMPLE_PROBLEM

CONFIGS = {
    "rkv": BudgetConfig(budget=40, buffer=16, policy="rkv"),
    "loss-merge": BudgetConfig(budget=40, buffer=16, policy="loss"),
    "adaptive": BudgetConfig(budget=48, buffer=24, policy="rkv-ema", heads="adaptive"),
}
N_TEXT = 150


class Oracle:
    """Drafts the text that will come, with an error now and then."""

    def __init__(self, text: list[int], n_right: int, n_tokens: int) -> None:
        self.text, self.n_right, self.num_pred_tokens = text, n_right, n_tokens
        self.n_drafted = 0

    def __call__(self, input_ids, /, **_):
        draft = self.text[len(input_ids) : len(input_ids) + self.num_pred_tokens]
        draft = [token if i < self.n_right else 5 for i, token in enumerate(draft)]
        self.n_drafted += len(draft)
        return np.array(draft, dtype=np.intc)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_text_and_compressions_are_those_without_drafts(demo_model, name, kv_type) -> None:
    shared = {"n_ctx": 1024, "n_threads": 1, "type_k": kv_type, "type_v": kv_type}
    with ReasonLlama(demo_model, CONFIGS[name], **shared) as plain:
        prompt = plain.tokenize(SAMPLE_PROBLEM.prompt.encode())
        seen = []
        with plain.trace(seen.append):
            text = list(islice(plain.generate(prompt, temp=0.0, top_k=0), N_TEXT))
        kept = kept_by_all(plain)
    assert len(seen) >= 3
    models = [
        LlamaPromptLookupDecoding(num_pred_tokens=6),
        Oracle(prompt + text, 100, 8),  # always right
        Oracle(prompt + text, 3, 8),
        Oracle(prompt + text, 0, 40),  # never right, and longer than the buffer
    ]
    for model in models:
        with ReasonLlama(demo_model, CONFIGS[name], draft_model=model, **shared) as llama:
            drafted = []
            with llama.trace(drafted.append):
                stream = llama.generate(prompt, temp=0.0, top_k=0)
                assert list(islice(stream, N_TEXT)) == text
                stream.close()
            assert [each.n_pos for each in drafted] == [each.n_pos for each in seen]
            assert kept_by_all(llama) == kept
            assert llama.n_tokens == plain_length(prompt)


def plain_length(prompt: list[int]) -> int:
    return len(prompt) + N_TEXT - 1  # the last token is never decoded


def test_right_drafts_save_steps(demo_model) -> None:
    with ReasonLlama(demo_model, CONFIGS["rkv"], n_ctx=1024) as plain:
        prompt = plain.tokenize(SAMPLE_PROBLEM.prompt.encode())
        text = list(islice(plain.generate(prompt, temp=0.0, top_k=0), 100))
    oracle, calls = Oracle(prompt + text, 100, 7), []
    with ReasonLlama(demo_model, CONFIGS["rkv"], n_ctx=1024, draft_model=oracle) as llama:
        former = llama._ctx.decode
        llama._ctx.decode = lambda batch: (calls.append(batch.n_tokens()), former(batch))[1]
        assert list(islice(llama.generate(prompt, temp=0.0, top_k=0), 100)) == text
        assert len(calls) < 100 / 4
        assert n_decoded(llama) < len(prompt) + 110


def test_sampling_with_a_seed_goes_on_whatever_is_drafted(demo_model) -> None:
    config = {"budget": CONFIGS["rkv"], "n_ctx": 1024, "draft_model": LlamaPromptLookupDecoding()}
    with ReasonLlama(demo_model, **config) as llama:
        llama.set_seed(3)
        tokens = llama.tokenize(SAMPLE_PROBLEM.prompt.encode())
        assert len(list(islice(llama.generate(tokens, temp=1.0), 200))) == 200
        stats = llama.kv_stats()
        assert stats.peak_tokens <= 40 + 16
        assert stats.n_compressions > 5


def test_a_conversation_goes_on_after_a_text_with_drafts(demo_model) -> None:
    """What was drafted and not verified is no part of the session."""
    with ReasonLlama(demo_model, CONFIGS["rkv"], n_ctx=1024) as plain:
        prompt = plain.tokenize(SAMPLE_PROBLEM.prompt.encode())
        text = list(islice(plain.generate(prompt, temp=0.0, top_k=0), 60))
        after = [*prompt, *text, *prompt[1:20]]
        expected = list(islice(plain.generate(after, temp=0.0, top_k=0), 30))
    oracle = Oracle(prompt + text + [7] * 400, 100, 8)
    with ReasonLlama(demo_model, CONFIGS["rkv"], n_ctx=1024, draft_model=oracle) as llama:
        assert list(islice(llama.generate(prompt, temp=0.0, top_k=0), 60)) == text
        assert list(islice(llama.generate(after, temp=0.0, top_k=0), 30)) == expected
        assert llama.n_reused == len(prompt) + 59


def test_random_drafts_to_the_end_of_the_context(make_gguf) -> None:
    rng = random.Random(0)

    def model(input_ids, /, **_):
        return np.array([rng.randrange(3, 250) for _ in range(rng.randrange(20))], dtype=np.intc)

    with ReasonLlama(make_gguf(), **SMALL, n_ctx=256) as plain:
        expected = list(plain.generate(plain.tokenize(b"hello"), temp=0.0))
    with ReasonLlama(make_gguf(), **SMALL, n_ctx=256, draft_model=model) as llama:
        assert llama.config.n_draft == 16
        assert list(llama.generate(llama.tokenize(b"hello"), temp=0.0)) == expected


def test_prompts_need_no_logits_of_every_token(make_gguf) -> None:
    with ReasonLlama(make_gguf(), **SMALL, draft_model=LlamaPromptLookupDecoding()) as llama:
        llama("hello " * 30, max_tokens=40, temperature=0.0)
        assert len(llama.scores) == 1 + 10
        assert len(llama.checkpoints) > 0


def test_drafts_and_logits_of_every_token(make_gguf) -> None:
    arguments = {**SMALL, "logits_all": True}
    with ReasonLlama(make_gguf(), **arguments) as plain:
        expected = plain("hello", max_tokens=60, temperature=0.0, logprobs=2)["choices"][0]
    model = LlamaPromptLookupDecoding()
    with ReasonLlama(make_gguf(), **arguments, draft_model=model) as llama:
        found = llama("hello", max_tokens=60, temperature=0.0, logprobs=2)["choices"][0]
    assert found["text"] == expected["text"]
    assert found["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
    assert np.allclose(
        found["logprobs"]["token_logprobs"], expected["logprobs"]["token_logprobs"], atol=1e-3
    )


def test_the_ring_has_room_for_drafts(make_gguf) -> None:
    model = LlamaPromptLookupDecoding(num_pred_tokens=12)
    config = BudgetConfig(budget=32, buffer=16, policy="rkv")
    with ReasonLlama(make_gguf(), config) as plain:
        before = plain.kv_stats().window_bytes
    with ReasonLlama(make_gguf(), config, draft_model=model) as llama:
        assert llama.kv_stats().window_bytes == before * (8 + 12) // 8
        llama.reconfigure(40)
        assert llama.config.n_draft == 12
        copy = pickle.loads(pickle.dumps(llama))
        assert copy.config == llama.config
        assert type(copy.draft_model.model) is LlamaPromptLookupDecoding
        copy.close()


@pytest.mark.parametrize("n_draft", [-1, 1025, 2.5])
def test_a_draft_is_a_number_of_tokens(n_draft) -> None:
    with pytest.raises(ConfigError, match="n_draft = "):
        BudgetConfig(n_draft=n_draft)
