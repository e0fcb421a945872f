"""Measure a GGUF of the demo reasoner through llama.cpp with the full cache, greedy.

``python -m py_reasonalloc.demo.evaluate [MODEL.gguf] [--problems N]`` checks the tokenizer and
measures every level. For budgets there is `reasonalloc-eval`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import click

from ..engine.errors import ModelFileError
from ..engine.identity import read_identity
from ..output.console import run_command
from ..task.problems import LEVEL_STEPS, extract_answer, generate_problem
from ..task.shipped import DEMO_MODEL
from ..task.vocab import BOS_ID, FILE_NAMES, encode

#: Seed of the evaluation problems in MODEL_CARD.md.
EVAL_SEED = 20_000
_MAX_TOKENS = 1200


def check_tokenizer(llm: Any, n_problems: int = 100) -> int:
    """Count problems on which llama.cpp's ids differ from the training ids, prompt and chain."""
    wrong = 0
    for level in LEVEL_STEPS:
        for index in range(n_problems):
            problem = generate_problem(EVAL_SEED + 1, index, level)
            text = problem.chat_prompt + problem.chain
            wrong += llm.tokenize(text.encode(), add_bos=True, special=True) != [
                BOS_ID,
                *encode(text),
            ]
    return wrong


def evaluate(llm: Any, level: int, n_problems: int, seed: int = EVAL_SEED) -> dict[str, float]:
    """Solve fresh problems greedily.

    Returns
    -------
    dict
        ``accuracy`` and ``exact`` (share whose whole text is the gold text), ``tokens`` (mean
        length of the answer), ``prompt_tokens``, ``runaways`` (share that never ended),
        ``tokens_per_s``.
    """
    right: list[bool] = []
    exact: list[bool] = []
    lengths: list[int] = []
    prompts: list[int] = []
    runaway = 0
    start = time.perf_counter()
    for index in range(n_problems):
        problem = generate_problem(seed, index, level)
        out = llm.create_completion(
            problem.chat_prompt, max_tokens=_MAX_TOKENS, temperature=0.0, seed=0
        )
        text = out["choices"][0]["text"]
        runaway += out["choices"][0]["finish_reason"] != "stop"
        right.append(extract_answer(text) == problem.answer)
        exact.append(text == problem.chain)
        lengths.append(out["usage"]["completion_tokens"])
        prompts.append(out["usage"]["prompt_tokens"])
    seconds = time.perf_counter() - start
    return {
        "level": level,
        "problems": n_problems,
        "accuracy": mean(right),
        "exact": mean(exact),
        "tokens": round(mean(lengths), 1),
        "prompt_tokens": round(mean(prompts), 1),
        "runaways": runaway / n_problems,
        "tokens_per_s": round(sum(lengths) / seconds, 1),
    }


def evaluate_file(path: Path, n_problems: int, n_threads: int = 1) -> list[dict[str, float]]:
    """Check the tokenizer of a file and measure every level; prints a JSON line each.

    Raises
    ------
    ModelFileError
        No such file, or llama.cpp cannot load it.
    """
    read_identity(path)
    from llama_cpp import Llama

    try:
        llm = Llama(str(path), n_ctx=2048, n_threads=n_threads, verbose=False)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None
    print(json.dumps({"file": path.name, "tokenizer_mismatches": check_tokenizer(llm)}), flush=True)
    rows = []
    for level in LEVEL_STEPS:
        rows.append(evaluate(llm, level, n_problems))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def evaluate_all(out_dir: Path, n_problems: int = 200) -> None:
    """Measure the q8_0 file that `export` wrote into a folder."""
    evaluate_file(out_dir / FILE_NAMES["q8_0"], n_problems)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path), default=DEMO_MODEL)
@click.option(
    "--problems", type=click.IntRange(min=1), default=200, show_default=True, help="Per level."
)
def main(model: Path, problems: int) -> None:
    """Measure MODEL, a GGUF of the demo reasoner, with the full cache, greedy."""
    evaluate_file(model, problems)


if __name__ == "__main__":
    run_command(main, "demo.evaluate")
