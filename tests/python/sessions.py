"""What the tests of `ReasonLlama` share."""

from __future__ import annotations

from py_reasonalloc import ReasonLlama

#: A cache so small that 120 tokens force several compressions; it merges, so rows carry biases.
SMALL = {"budget": 32, "buffer": 16, "policy": "loss", "n_threads_batch": 1}
GREEDY = {"temperature": 0.0}


def complete(llama, prompt="hello", max_tokens=120, **arguments) -> str:
    done = llama(prompt, max_tokens=max_tokens, **{**GREEDY, **arguments})
    return done["choices"][0]["text"]


def n_decoded(llama) -> int:
    return llama.kv_stats().n_tokens_total


def kept_by_all(llama) -> set[int]:
    stats = llama.kv_stats()
    heads = ((il, ih) for il, layer in enumerate(stats.layers) for ih in range(len(layer)))
    return set.intersection(*(set(stats.kept_positions(il, ih).tolist()) for il, ih in heads))


def fresh(make_gguf, prompt, **arguments) -> str:
    with ReasonLlama(make_gguf(), **{**SMALL, **arguments}) as llama:
        return complete(llama, prompt)
