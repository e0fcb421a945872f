"""`ReasonLlama` where an application meets its edges: closed, misspelt, threads, forks, caches."""

from __future__ import annotations

import gc
import inspect
import itertools
import warnings
import weakref

import gguf
import numpy as np
import pytest
from llama_cpp import Llama, LlamaDiskCache, LlamaRAMCache
from sessions import SMALL, complete, fresh

from py_reasonalloc import (
    ContextError,
    ModelFileError,
    ReasonLlama,
    StateError,
    UnsupportedError,
)

#: A call of each public method that needs arguments.
ARGUMENTS = {
    "__call__": ("hello",),
    "create_chat_completion": ([{"role": "user", "content": "hello"}],),
    "create_chat_completion_openai_v1": ([{"role": "user", "content": "hello"}],),
    "create_completion": ("hello",),
    "create_embedding": ("hello",),
    "detokenize": ([5],),
    "embed": ("hello",),
    "eval": ([5],),
    "generate": ([5],),
    "load_state": (None,),
    "reconfigure": (64,),
    "set_cache": (None,),
    "set_seed": (1,),
    "tokenize": (b"hello",),
    "trace": (print,),
    "trace_to": ("trace.jsonl",),
}


def public_methods() -> list[str]:
    names = [name for name in dir(ReasonLlama) if not name.startswith("_")] + ["__call__"]
    return [
        name
        for name in names
        if name != "close" and inspect.isfunction(inspect.getattr_static(ReasonLlama, name))
    ]


# --- closed --------------------------------------------------------------------------------------


def test_the_walk_finds_the_methods() -> None:
    assert len(public_methods()) > 25
    assert {"clear", "n_cached", "n_ctx", "embed", "kv_stats", "pieces"} <= set(public_methods())


def test_every_method_of_a_closed_session_says_so(make_gguf, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama = ReasonLlama(make_gguf())
    complete(llama, max_tokens=3)
    llama.close()
    llama.close()
    for name in public_methods():
        with pytest.raises(ContextError, match="the session is closed"):
            getattr(llama, name)(*ARGUMENTS.get(name, ()))
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_closed_under_way(make_gguf) -> None:
    llama = ReasonLlama(make_gguf(), **SMALL)
    stream = llama("hello", max_tokens=20, stream=True)
    next(stream)
    llama.close()
    with pytest.raises(ContextError, match="closed"):
        next(stream)


def test_a_dropped_session_is_freed_at_once(make_gguf) -> None:
    gc.collect()
    gc.disable()
    try:
        llama = ReasonLlama(make_gguf(), **SMALL)
        complete(llama, max_tokens=3)
        gone = weakref.ref(llama)
        del llama
        assert gone() is None
    finally:
        gc.enable()


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"polcy": "snapkv"}, "no argument 'polcy': did you mean 'policy'"),
        ({"protect_promt": "all"}, "no argument 'protect_promt': did you mean 'protect_prompt'"),
        ({"n_gpu_layer": 1}, "no argument 'n_gpu_layer': did you mean 'n_gpu_layers'"),
        ({"zzzz": 1}, "no argument 'zzzz'$"),
        ({"kwargs": {}}, "no argument 'kwargs'"),
    ],
)
def test_misspelt_arguments(make_gguf, arguments, message) -> None:
    with pytest.raises(TypeError, match=message):
        ReasonLlama(make_gguf(), budget=64, **arguments)


def test_every_argument_of_the_base_class_is_taken(make_gguf) -> None:
    parameters = inspect.signature(Llama.__init__).parameters.values()
    plain = {p.name: p.default for p in parameters if p.default is not p.empty}
    with ReasonLlama(make_gguf(), **{**plain, "verbose": False}) as llama:
        assert llama.n_ctx() == 512 and len(complete(llama, max_tokens=3)) == 3


@pytest.mark.parametrize("name", ["lora_path", "lora_base"])
def test_files_that_are_not_there(make_gguf, tmp_path, name) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        ReasonLlama(make_gguf(), **{name: str(tmp_path / "nope.gguf")})


def test_vocab_only(make_gguf) -> None:
    for budget in (64, None):
        with ReasonLlama(make_gguf(), budget=budget, vocab_only=True) as llama:
            assert llama.tokenize(b"hi") == [0, *(4 + byte for byte in b"hi")]
            assert llama.n_ctx() >= 512


def test_embeddings_need_the_stock_cache(make_gguf) -> None:
    with pytest.raises(UnsupportedError, match=r"embedding takes several .*: pass budget=None"):
        ReasonLlama(make_gguf(), budget=64, embedding=True)
    with ReasonLlama(make_gguf(), budget=None, embedding=True, n_ctx=64) as llama:
        assert len(llama.embed("hello")) == 6


# --- logits of all tokens ------------------------------------------------------------------------


def test_rows_of_logits_come_with_the_tokens(make_gguf) -> None:
    path = make_gguf(n_ctx_train=1 << 20)
    with ReasonLlama(path, **SMALL, logits_all=True) as llama:
        tokens = llama.tokenize(b"x" * 700)
        assert llama.scores.nbytes < 1 << 20
        llama.eval(tokens)
        assert len(tokens) <= len(llama.scores) < 2 * len(tokens)
        state = llama.save_state()
        llama.clear()
        llama.load_state(state)
        llama.eval(tokens[:9])
        assert llama.eval_logits[-1] == llama.scores[llama.n_tokens - 1].tolist()


def test_rows_of_logits_are_those_of_the_base_class(make_gguf) -> None:
    path = make_gguf()
    stock = Llama(str(path), n_ctx=512, flash_attn=True, verbose=False, logits_all=True)
    with ReasonLlama(path, budget=None, n_ctx=512, logits_all=True) as llama:
        tokens = llama.tokenize(b"hello world" * 20)
        for session in (stock, llama):
            session.eval(tokens[:150])
            session.eval(tokens[150:])
        assert np.array_equal(llama._scores, stock._scores)
    stock.close()


# --- the prompt cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LlamaRAMCache, LlamaDiskCache])
def test_a_prompt_cache_of_another_budget_is_a_miss(make_gguf, tmp_path, kind) -> None:
    cache = kind() if kind is LlamaRAMCache else kind(str(tmp_path / "cache"))
    prompts = ("hello world", "hello world, again", "hello world, again and again")
    with ReasonLlama(make_gguf(), **SMALL) as small:
        small.set_cache(cache)
        complete(small, prompts[0], max_tokens=80)
    with ReasonLlama(make_gguf(), **{**SMALL, "budget": 48}) as llama:
        if kind is LlamaDiskCache:
            cache = kind(str(tmp_path / "cache"))
        llama.set_cache(cache)
        with pytest.warns(RuntimeWarning, match="prompt cache holds states of another budget"):
            texts = [complete(llama, prompts[0], max_tokens=60)]
        with warnings.catch_warnings():  # once is enough
            warnings.simplefilter("error")
            llama.clear()
            llama.cache[llama.tokenize(b"other")] = next(iter(cache_states(cache)))
            texts += [complete(llama, prompt, max_tokens=60) for prompt in prompts[1:]]
    expected = [fresh(make_gguf, prompt, budget=48)[:60] for prompt in prompts]
    assert texts == expected


def cache_states(cache):
    if isinstance(cache, LlamaRAMCache):
        return list(cache.cache_state.values())
    return [cache.cache[key] for key in cache.cache.iterkeys()]


def test_two_sessions_share_a_prompt_cache(make_gguf) -> None:
    cache, prompt = LlamaRAMCache(), "hello world"
    budgets = (32, 48)
    expected = [fresh(make_gguf, prompt, budget=budget)[:40] for budget in budgets]
    sessions = [ReasonLlama(make_gguf(), **{**SMALL, "budget": budget}) for budget in budgets]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            for llama, text in zip(sessions, expected):
                llama.set_cache(cache)
                assert complete(llama, prompt, max_tokens=40) == text
                llama.clear()
    assert 1 <= sum("prompt cache" in str(each.message) for each in found) <= 2
    state = next(iter(cache.cache_state.values()))
    with pytest.raises(StateError):  # asked for by name it is still an error
        for llama in sessions:
            llama.load_state(state)
    for llama in sessions:
        llama.close()


# --- adapters ------------------------------------------------------------------------------------


def write_adapter(path, rank: int = 4, arch: str = "llama", n_embd: int = 128):
    """Write a LoRA adapter for the models of gguf_factory: q and v of both layers."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for il, (name, n_out) in itertools.product(range(2), (("attn_q", 128), ("attn_v", 64))):
        parts = {"lora_a": (rank, n_embd), "lora_b": (n_out, rank)}
        for part, shape in parts.items():
            array = (rng.standard_normal(shape) * 0.3).astype(np.float32)
            writer.add_tensor(f"blk.{il}.{name}.weight.{part}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_an_adapter_with_a_budget(make_gguf, tmp_path) -> None:
    path, adapter = make_gguf(), write_adapter(tmp_path / "lora.gguf")
    stock = Llama(str(path), n_ctx=512, flash_attn=True, verbose=False, lora_path=adapter)
    expected = complete(stock, max_tokens=200)
    stock.close()
    with ReasonLlama(path, budget=300, lora_path=adapter) as llama:
        assert complete(llama, max_tokens=200) == expected
        assert llama.kv_stats().n_evicted == 0
    texts = []
    for arguments in ({}, {"lora_path": adapter}, {"lora_path": adapter, "lora_scale": 0.5}):
        with ReasonLlama(path, **SMALL, **arguments) as llama:
            texts.append(complete(llama, max_tokens=200))
            assert llama.kv_stats().n_evicted > 0
            assert complete(llama, max_tokens=200) == texts[-1]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("case", ["other-arch", "other-shape", "model", "truncated"])
def test_adapters_that_do_not_fit(make_gguf, tmp_path, capfd, case) -> None:
    path = tmp_path / "lora.gguf"
    if case == "model":
        path = make_gguf()
    else:
        write_adapter(
            path,
            arch="qwen2" if case == "other-arch" else "llama",
            n_embd=64 if case == "other-shape" else 128,
        )
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelFileError, match=r"no LoRA adapter for this model: \w+"):
        ReasonLlama(make_gguf(), **SMALL, lora_path=str(path))
    assert capfd.readouterr() == ("", "")
