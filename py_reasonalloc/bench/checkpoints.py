"""Time to the first token of a changed prompt, with checkpoints and without.

    python -m py_reasonalloc.bench.checkpoints "$(python -m py_reasonalloc.fidelity.smollm2)"

A conversation of about 4,000 tokens has its second turn: the thinking of the first answer is
dropped from the prompt, as most chat templates of reasoners do it. Then that turn is answered once
more, and then its last message is corrected. Two sessions take turns, one with checkpoints, one
without; the texts of both are compared. Every case is measured in a conversation of its own.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import click

from ..engine.errors import ComputeError
from ..output.console import open_library, run_command, threads_option

#: Tokens of the answer; of its thinking; of a new message; of greedy text that is compared.
N_ANSWER, N_THOUGHT, N_MESSAGE, N_TEXT = 192, 128, 48, 16
CASES = ("thinking dropped", "another answer", "message corrected")
_WORDS = (
    "harbour ledger winter engine colour number market theory river signal garden village "
    "copper window teacher problem answer music paper bridge season letter metal island"
).split()


def notes(rng: random.Random) -> Iterator[str]:
    """Yield sentences without end."""
    for i in range(1, 1 << 20):
        first, second, third = rng.sample(_WORDS, 3)
        n = rng.randrange(1000)
        yield f"Note {i}: the {first} of the {second} has {n} parts, the {third} has fewer. "


def _tokens(llama: Any, n: int, rng: random.Random, bos: bool) -> list[int]:
    text, sentences = "", notes(rng)
    while True:
        text += "".join(islice(sentences, 1 + n // 20))
        tokens: list[int] = llama.tokenize(text.encode(), add_bos=bos)
        if len(tokens) >= n:
            return tokens[:n]


def _answer(llama: Any, prompt: Sequence[int], n: int) -> tuple[float, list[int]]:
    """Return the seconds to the first token of a greedy text, and its first `n` tokens."""
    begin = time.perf_counter()
    stream = llama.generate(prompt, temp=0.0, top_k=0)
    tokens = [next(stream)]
    seconds = time.perf_counter() - begin
    tokens += list(islice(stream, n - 1))
    stream.close()
    return seconds, tokens


def _conversation(
    llamas: Sequence[Any], n_tokens: int, seed: int
) -> dict[str, list[tuple[float, int]]]:
    """Return case -> seconds to the first token of each session, and tokens that it read."""
    rng, talker = random.Random(seed), llamas[0]
    turn = _tokens(talker, n_tokens - N_MESSAGE - N_ANSWER + N_THOUGHT, rng, True)
    kept = _answer(talker, turn, N_ANSWER)[1][N_THOUGHT:]  # the other has nothing to gain from it
    message = _tokens(talker, N_MESSAGE, rng, False)
    corrected = message[: N_MESSAGE // 2] + _tokens(talker, N_MESSAGE // 2, rng, False)
    prompts = (turn + kept + message, turn + kept + message, turn + kept + corrected)
    found = {}
    for case, prompt in zip(CASES, prompts):
        pairs = [_answer(llama, prompt, N_TEXT) for llama in llamas]
        if pairs[0][1] != pairs[1][1]:
            raise ComputeError(f"{case}: the texts differ")
        n_read = [len(prompt) - llama.n_reused for llama in llamas]
        found[case] = [(seconds, n) for (seconds, _), n in zip(pairs, n_read)]
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path())
@click.option("--tokens", type=click.IntRange(min=1024), default=4000, show_default=True)
@click.option("--budget", type=int, default=256, show_default=True)
@click.option("--policy", default="loss", show_default=True)
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True)
@threads_option(default="  [default: all]")
def main(model: str, tokens: int, budget: int, policy: str, repeat: int, threads: int) -> int:
    """Measure the time to the first token of MODEL's second turn."""
    open_library()
    from ..engine.modelfile import check_model_file
    from ..session.reason_llama import ReasonLlama

    shared: dict[str, Any] = {"budget": budget, "policy": policy, "n_ctx": tokens + 512}
    if threads:
        shared |= {"n_threads": threads, "n_threads_batch": threads}
    path = check_model_file(model)
    with ReasonLlama(path, **shared) as kept, ReasonLlama(path, **shared, checkpoints=0) as anew:
        rows = [_conversation((kept, anew), tokens, seed) for seed in range(repeat)]
        n_bytes, n_kept = kept.checkpoints.n_bytes, len(kept.checkpoints)
    click.echo(f"{'':<20}{'read anew':>26}{'checkpoint':>26}{'ratio':>9}")
    for case in CASES:
        with_it, without = (statistics.median(row[case][i][0] for row in rows) for i in (0, 1))
        n_with, n_without = (rows[0][case][i][1] for i in (0, 1))
        click.echo(
            f"{case:<20}{without:>10.2f} s,{n_without:>6} tokens{with_it:>10.2f} s,"
            f"{n_with:>6} tokens{without / with_it:>8.1f}x"
        )
    click.echo(f"{n_kept} checkpoints, {n_bytes / 2**20:.0f} MiB; texts are the same")
    return 0


def run(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run_command(main, "py_reasonalloc.bench.checkpoints", arguments)


if __name__ == "__main__":
    run()
