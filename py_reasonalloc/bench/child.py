"""One measurement in a process of its own, so that its peak of resident memory is its own.

``python -m py_reasonalloc.bench.child`` reads a `Job` from standard input, a line of JSON, and
writes a JSON object to standard output: seconds, tokens and bytes. Given a list of jobs, it keeps
all their contexts and takes further lines: see `turns`. On failure: one line on standard error,
exit code 1.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from ..engine.errors import ReasonAllocError
from ..engine.log import LogCapture
from . import resident, turns
from .jobs import BLOCK, N_LOADS, N_WARM, Job


def measure_decode(job: Job) -> dict[str, Any]:
    """Decode at a depth; a budgeted cache is in its steady state if the depth allows it."""
    from .engine import Engine
    from .fill import skip

    with Engine(job) as engine:
        loaded = resident.current_bytes()
        # a stock cache is allocated whole: no longer than needed
        n_last = 0 if job.arm.budget is None else job.arm.n_ubatch
        engine.open_context(max(512, job.depth + N_WARM + job.n_tokens + n_last))
        start = skip(engine)
        is_peak_exact = resident.reset_peak()  # what only the skipping needed does not count
        engine.read(job.depth - start, start, BLOCK)
        engine.step(N_WARM, job.depth)
        before = engine.stats()
        seconds = engine.step(job.n_tokens, job.depth + N_WARM)
        peak = resident.peak_bytes()
        result: dict[str, Any] = {
            "n_tokens": job.n_tokens,
            "seconds": sum(seconds),
            "median_token_seconds": median(seconds),
            "longest_token_seconds": max(seconds),
            "rss_loaded_bytes": loaded,
            "rss_peak_bytes": peak if is_peak_exact else None,
            **engine.sizes(),
        }
        after = engine.stats()
        if after is not None:
            result |= {
                "n_compressions": after.n_compressions - before.n_compressions,
                "compress_seconds": (after.compress_us - before.compress_us) / 1e6,
                "peak_tokens": after.peak_tokens,
                **_head_budgets(engine),
            }
        if job.is_batch_filled:
            result |= _full_batch(engine, job.depth + N_WARM + job.n_tokens)
    return result


def _full_batch(engine: Any, pos: int) -> dict[str, int | None]:
    """Decode the batch that compute buffers are reserved for: as many tokens as are computed at
    once, with the logits of each.

    Decoding touches a small part of these buffers, and what was never touched is not resident.

    Returns
    -------
    dict
        "rss_full_batch_bytes": the peak since the context's first tokens; "logits_bytes": the
        host's copy of the logits, n_ubatch x n_vocab x 4.
    """
    n = engine.job.arm.n_ubatch
    if engine.job.arm.budget is None:  # no cells are left behind the timed tokens
        pos = max(pos - n, 0)
        engine.take_back(pos)
    engine.read(n, pos, n, all_logits=True)
    return {"rss_full_batch_bytes": resident.peak_bytes(), "logits_bytes": 4 * n * engine.n_vocab}


def _head_budgets(engine: Any) -> dict[str, int]:
    """Return the smallest and largest head budget in force, tokens."""
    from llama_cpp import llama_cpp as bindings

    from ..engine.stats import read_stats

    stats = read_stats(engine.ctx, bindings.llama_model_n_layer(engine.model))
    budgets = [head.budget for layer in stats.layers for head in layer]
    return {"smallest_head_budget": min(budgets), "largest_head_budget": max(budgets)}


def measure_prompt(job: Job) -> dict[str, Any]:
    """Read prompts into an empty cache, and pick the first token after each."""
    from .engine import Engine

    prompts = []
    with Engine(job) as engine:
        engine.open_context(max(512, *job.prompts))
        engine.read(64, 0)  # warm up: buffers are touched, threads are there
        for n in job.prompts:
            engine.clear()
            start = time.perf_counter()
            engine.read(n, 0)
            read = time.perf_counter()
            engine.best_token()
            end = time.perf_counter()
            stats = engine.stats()
            compress = None if stats is None else stats.compress_us / 1e6
            prompts.append(
                {
                    "n_prompt": n,
                    "seconds": read - start,
                    "first_token_seconds": end - start,
                    "compress_seconds": compress,
                }
            )
        return {"prompts": prompts, **engine.sizes()}


def measure_load(job: Job) -> dict[str, Any]:
    """Make a session and a `llama_cpp.Llama` in turn, weights mapped as they are by default."""
    from llama_cpp import Llama

    from ..session.reason_llama import ReasonLlama

    arguments: dict[str, Any] = {
        "n_ctx": 512,
        "n_threads": job.n_threads,
        "n_gpu_layers": job.n_gpu_layers,
        "flash_attn": True,
        "verbose": False,
    }
    budget = job.arm.config()

    def timed(make: Callable[[], Any]) -> float:
        start = time.perf_counter()
        session = make()
        seconds = time.perf_counter() - start
        session.close()
        return seconds

    pairs = []
    for _ in range(1 + N_LOADS):
        base = timed(lambda: Llama(job.model, **arguments))
        own = timed(lambda: ReasonLlama(job.model, budget=budget, **arguments))
        pairs.append({"base_seconds": base, "seconds": own})
    return {"loads": pairs[1:]}  # the first pair warms up


MEASURES = {"decode": measure_decode, "prompt": measure_prompt, "load": measure_load}


def main() -> int:
    """Run the job on standard input; returns the exit code."""
    request = json.loads(sys.stdin.readline())
    try:
        with LogCapture(forward=False):
            if isinstance(request, list):
                turns.serve([Job.from_json(text) for text in request])
                return 0
            job = Job.from_json(json.dumps(request))
            result = MEASURES[job.kind](job)
    except (ReasonAllocError, MemoryError) as error:
        print(" ".join(str(error).split()) or "out of memory", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
