"""A text from a model with a fixed KV cache: budget, streaming, statistics.

python generate.py MODEL.gguf [BUDGET] [N_TOKENS]
"""

from __future__ import annotations

import sys

from py_reasonalloc import ReasonAllocError, ReasonLlama


def main(arguments: list[str]) -> int:
    """Stream a text, then say what the cache held."""
    if not arguments:
        print("usage: generate.py MODEL.gguf [BUDGET] [N_TOKENS]", file=sys.stderr)
        return 2
    budget = int(arguments[1]) if len(arguments) > 1 else 256
    n_tokens = int(arguments[2]) if len(arguments) > 2 else 200
    try:
        with ReasonLlama(arguments[0], budget=budget) as llama:
            stream = llama("Once upon a time", max_tokens=n_tokens, temperature=0, stream=True)
            for chunk in stream:
                print(chunk["choices"][0]["text"], end="", flush=True)
            stats = llama.kv_stats()
    except ReasonAllocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"\n{stats.n_pos} tokens, at most {stats.peak_tokens} held, {stats.n_evicted} evicted, "
        f"{stats.kv_bytes} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
