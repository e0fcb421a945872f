"""Decoding speed with drafts by prompt lookup, and without, in a budgeted cache.

    python -m py_reasonalloc.bench.drafts demo
    python -m py_reasonalloc.bench.drafts "$(python -m py_reasonalloc.fidelity.smollm2)"

Two sessions take turns with the same greedy text, one with a draft model that looks up what
followed the last two tokens before (`llama_cpp.llama_speculative.LlamaPromptLookupDecoding`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import click

from ..output.console import open_library, run_command, threads_option
from ..task.problems import SAMPLE_PROBLEM
from ..task.shipped import DEMO, model_path

#: What other models than the demo are asked.
QUESTION = "Explain step by step how a bicycle stays upright. Then sum up every step in a list."


class Counted:
    """A draft model that counts what it drafts."""

    def __init__(self, model: Any) -> None:
        self._model, self.num_pred_tokens = model, model.num_pred_tokens
        self.n_drafted = 0

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        """Return the draft."""
        draft = self._model(input_ids, **kwargs)
        self.n_drafted += len(draft)
        return draft


def _decode(llama: Any, prompt: Sequence[int], n: int) -> tuple[list[int], float]:
    """Return greedy tokens, and the seconds of those after the first."""
    from llama_cpp import llama_cpp as bindings

    vocab, tokens = llama._model.vocab, []
    stream = llama.generate(prompt, temp=0.0, top_k=0)
    tokens.append(next(stream))
    begin = time.perf_counter()
    for token in islice(stream, n - 1):
        tokens.append(token)
        if bindings.llama_vocab_is_eog(vocab, token):
            break
    seconds = time.perf_counter() - begin
    stream.close()
    return tokens, seconds


def _n_same(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("-p", "--prompt", help="What to ask.")
@click.option("-n", "--tokens", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--budget", type=int, default=128, show_default=True)
@click.option("--stock", is_flag=True, help="With llama.cpp's own cache, to compare.")
@click.option("--draft", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True)
@threads_option(default="  [default: all]")
def main(
    model: str,
    prompt: str | None,
    tokens: int,
    budget: int,
    stock: bool,
    draft: int,
    repeat: int,
    threads: int,
) -> int:
    """Measure tokens/s of MODEL, a GGUF file or "demo", with drafts and without."""
    open_library()
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    from ..engine.prompts import encode_prompt
    from ..session.reason_llama import ReasonLlama

    text = prompt or (SAMPLE_PROBLEM.prompt if model == DEMO else QUESTION)
    shared: dict[str, Any] = {"budget": budget, "buffer": 64, "checkpoints": 0}
    if stock:
        shared = {"budget": None, "n_ctx": 2048}
    if threads:
        shared |= {"n_threads": threads, "n_threads_batch": threads}
    lookup = Counted(LlamaPromptLookupDecoding(num_pred_tokens=draft))
    path = model_path(model)
    with (
        ReasonLlama(path, **shared) as plain,
        ReasonLlama(path, draft_model=lookup, **shared) as drafting,
    ):
        ids = encode_prompt(plain._model, text)
        rows = []
        for _ in range(repeat):
            for llama in (plain, drafting):
                llama.clear()
            expected, without = _decode(plain, ids, tokens)
            found, with_drafts = _decode(drafting, ids, tokens)
            rows.append((without, with_drafts))
        n_compressions = 0 if stock else drafting.kv_stats().n_compressions
    n = len(expected) - 1
    without, with_drafts = (statistics.median(row[i] for row in rows) for i in (0, 1))
    ratio = statistics.median(first / second for first, second in rows)
    click.echo(
        f"{n + 1} tokens, {n_compressions} compressions, {lookup.n_drafted // repeat} drafted: "
        f"{n / without:.1f} tokens/s without drafts, {n / with_drafts:.1f} with, "
        f"{ratio:.2f} x (median of {repeat}); the first {_n_same(expected, found)} tokens are equal"
    )
    return 0


def run(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run_command(main, "py_reasonalloc.bench.drafts", arguments)


if __name__ == "__main__":
    run()
