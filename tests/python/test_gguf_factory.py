"""The models that the tests make: repeatable, and valid for stock llama.cpp."""

from __future__ import annotations

import pytest
from gguf_factory import SUPPORTED, UNSUPPORTED, ModelSpec, write_gguf
from llama_cpp import Llama

SHAPES = {
    "gqa": {},
    "mqa": {"n_head_kv": 1, "head_dim": 64},
    "mha": {"n_head_kv": 4, "head_dim": 128, "weight_type": "f16"},
    "large-heads": {"n_head_kv": 2, "head_dim": 256, "weight_type": "q8_0"},
}
PER_LAYER = {"n_layer": 3, "n_head_kv": (4, 0, 1)}


def test_same_specification_same_file(tmp_path) -> None:
    first = write_gguf(tmp_path / "a.gguf").read_bytes()
    assert write_gguf(tmp_path / "b.gguf", ModelSpec()).read_bytes() == first
    assert write_gguf(tmp_path / "c.gguf", ModelSpec(seed=1)).read_bytes() != first
    with pytest.raises(ValueError, match="'gpt9' is not one of"):
        ModelSpec(arch="gpt9")


@pytest.mark.parametrize(
    ("arch", "shape"),
    [(arch, shape) for arch in SUPPORTED for shape in SHAPES.values()]
    + [("deci", PER_LAYER)]
    + [(arch, {}) for arch in UNSUPPORTED],
)
def test_stock_llama_cpp_runs_it(make_gguf, capfd, arch, shape) -> None:
    path = make_gguf(arch=arch, n_ctx_train=512, **shape)
    llama = Llama(str(path), n_ctx=128, verbose=False, n_threads_batch=1)
    assert llama.metadata["general.architecture"] == arch
    assert llama.tokenize(b"Hi") == [0, 4 + ord("H"), 4 + ord("i")]
    text = llama("hello", max_tokens=20, temperature=0.0)["choices"][0]["text"]
    assert len(text) == 20 and text.isascii() and text.isprintable()
    llama.close()
