"""Texts side by side on models with windows or recurrent layers: each is what it gives alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_architectures import program  # noqa: F401  (a fixture)
from test_commands_on_classes import with_vocabulary
from test_engine_classes import save

from py_reasonalloc import ReasonLlama
from py_reasonalloc.engine.prompts import encode_prompt
from py_reasonalloc.session.generate import Generation
from py_reasonalloc.session.sequences.prefixes import Prefixes
from py_reasonalloc.session.sequences.request import Request
from py_reasonalloc.session.sequences.scheduler import Sequences
from py_reasonalloc.session.steering import Sampling

#: In f32 rounding is too small to turn a draw.
EXACT: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": False, "n_threads": 1}


@pytest.fixture(scope="module", params=["granitehybrid dense", "qwen3next moe", "gemma2 dense"])
def llama(program: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Any:  # noqa: F811
    folder = tmp_path_factory.mktemp("classes")
    source = save(program, folder, *request.param.split())
    path = with_vocabulary(source, folder / "model.gguf")
    with ReasonLlama(path, 32, buffer=16, n_ctx=256, n_seq_max=3, **EXACT) as session:
        yield session


def test_side_by_side_as_alone(llama: Any) -> None:
    shared = "The same words begin two of these prompts, and they are longer than the cache. "
    texts = [shared + "One.", "Other words, few.", shared + "Two!", "And so on. " * 6, "Last"]
    requests = [
        Request(tuple(encode_prompt(llama._model, text)), 50, Sampling(temp=1.0, seed=i))
        for i, text in enumerate(texts)
    ]
    expected = []
    for one in requests:
        text = Generation(llama, one.prompt, 50, sampling=one.sampling)
        list(text)
        expected.append(text.tokens)
        llama.clear()
    prefixes = Prefixes(llama, 64 << 20)
    with Sequences(llama, prefixes=prefixes) as sequences:
        chains = [sequences.add(one) for one in requests]
        list(sequences.run())
        assert [chain.tokens for chain in chains] == expected
        again = sequences.add(requests[0])
        list(sequences.run())
        assert again.n_reused > 0
        assert again.tokens == expected[0]
        assert sequences.counts.n_steps < 0.7 * sequences.counts.n_tokens
