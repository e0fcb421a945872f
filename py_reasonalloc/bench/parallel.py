"""Many sequences in one context: what a step costs that decodes a token of each.

Contexts take turns in one process, as in `turns`. For every number K of sequences: a budgeted
context with K full sequences; and an empty stock context that reads K tokens of one text at once,
which is the products with the weights and next to nothing else. Their ratio to K = 1 is the most
that any cache can gain from sharing the weights on this processor. For the largest K, and for one:
a stock context whose sequences all have the depth, each with rows of its own.

With one thread the processor's time is counted, not the clock's: what else the machine does then
hardly matters. (With several it would count how long they spin waiting for each other.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from .jobs import Arm, Job
from .measure import PARALLEL, Row, Settings, budget_arms, stock_arms
from .models import bench_folder
from .summary import spread
from .turns import Child, Group, slice_tokens

#: Steps of a turn where no compression happens: all steps are alike.
N_STEADY = 4
BUDGET, STOCK, PRODUCTS = "budget", "stock", "products"


def plan_parallel(settings: Settings) -> list[Group]:
    """Return what takes turns, a group for each budgeted cache; without one, the products alone.

    Raises
    ------
    ConfigError
        See `budget_arms`.
    """
    if PARALLEL not in settings.parts or not settings.parallel:
        return []
    stock, n_most = stock_arms(settings)[0], max(settings.parallel)

    def job(arm: Arm, depth: int, n_steps: int, n_seq: int = 1, n_at_once: int = 1) -> Job:
        return Job(
            PARALLEL,
            arm,
            str(settings.model),
            settings.n_threads,
            settings.n_gpu_layers,
            depth=depth,
            n_tokens=n_steps * n_at_once,
            is_decoded=settings.is_decoded,
            folder=str(bench_folder()),
            n_seq=n_seq,
            n_at_once=n_at_once,
        )

    products = [job(stock, 0, N_STEADY, n_at_once=k) for k in settings.parallel]
    groups = []
    for arm in budget_arms(settings):
        depth = max(settings.parallel_depth, arm.n_fill())
        n_steps = settings.n_buffers * settings.buffer
        jobs = [job(arm, depth, n_steps, n_seq=k) for k in settings.parallel]
        jobs += products
        jobs += [
            job(stock, settings.parallel_depth, N_STEADY, n_seq=k)
            for k in settings.parallel
            if k in (1, n_most)
        ]
        groups.append(Group(arm.name, jobs))
    return groups or [Group("products alone", products)]


def what(job: Job) -> str:
    """Return what a job of a group stands for: "budget", "stock" or "products"."""
    if job.arm.budget is not None:
        return BUDGET
    return STOCK if job.depth > 0 else PRODUCTS


def measure_group(group: Group, n_buffers: int, buffer: int) -> list[Row]:
    """Let the contexts of a group take turns until the budgeted ones decoded `n_buffers` each.

    Returns
    -------
    list of dict
        One row per job: "what" it is, "n_seq", "n_at_once", "seconds" (one sum per buffer),
        "n_steps" that each sum is of, "compress_seconds", "cache_bytes", "row_bytes"; or a single
        row with "error".
    """
    n_slice = slice_tokens(buffer)
    n_rounds = buffer // n_slice
    steps = [n_slice if job.arm.budget is not None else N_STEADY for job in group.jobs]
    seconds: list[list[float]] = [[] for _ in group.jobs]
    spent = [0.0] * len(group.jobs)
    with closing(Child(group.jobs)) as child:
        for i_round in range(n_buffers * n_rounds):
            order = range(len(group.jobs))
            for i in order if i_round % 2 == 0 else reversed(order):
                answer = child.ask([i, steps[i]])
                if answer is None:
                    return [{"kind": PARALLEL, "arm": group.name, "error": child.error}]
                seconds[i].append(answer[0])
                spent[i] += answer[1]
        sizes = child.sizes or []
    return [
        {
            "kind": PARALLEL,
            "group": group.name,
            "arm": job.arm.name,
            "what": what(job),
            "depth": job.depth,
            "n_seq": job.n_seq,
            "n_at_once": job.n_at_once,
            "budget": job.arm.budget,
            "buffer": None if job.arm.budget is None else job.arm.buffer,
            "seconds": [
                sum(seconds[i][at : at + n_rounds]) for at in range(0, len(seconds[i]), n_rounds)
            ],
            "n_steps": n_rounds * steps[i],
            "compress_seconds": spent[i],
            "cache_bytes": sizes[i]["cache_bytes"],
            "row_bytes": sizes[i]["row_bytes"],
        }
        for i, job in enumerate(group.jobs)
    ]


def summarize_parallel(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a line for each budgeted cache and number of sequences.

    Speeds are tokens/s of all sequences together; ratios are formed per buffer and repetition.
    "most" is the ratio of the products alone, "of_most" the share of it that was reached.
    """
    groups: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["group"], {}).setdefault(row["repetition"], []).append(row)
    lines = []
    for name, repetitions in groups.items():
        found = [_Figures(repetition) for repetition in repetitions.values()]
        first = next(iter(repetitions.values()))
        own = [row for row in first if row["what"] == BUDGET]
        for row in own or first:
            lines.append({"arm": name, **_line(row, first, found)})
    return lines


class _Figures:
    """Tokens/s of a repetition of a group, one for each buffer; by what and how many."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._speeds: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            n = row["n_seq"] * row["n_at_once"]
            speeds = [n * row["n_steps"] / seconds for seconds in row["seconds"]]
            self._speeds[row["what"], n] = speeds

    def of(self, kind: str, n: int) -> list[float]:
        return self._speeds.get((kind, n), [])

    def ratios(self, above: tuple[str, int], below: tuple[str, int]) -> list[float]:
        return [a / b for a, b in zip(self.of(*above), self.of(*below))]


def _line(row: Row, rows: Sequence[Row], found: Sequence[_Figures]) -> dict[str, Any]:
    n = row["n_seq"] * row["n_at_once"]

    def over(above: tuple[str, int], below: tuple[str, int]) -> list[float]:
        return [ratio for figures in found for ratio in figures.ratios(above, below)]

    def speeds(kind: str) -> list[float]:
        return [speed for figures in found for speed in figures.of(kind, n)]

    is_ours = row["what"] == BUDGET
    over_one, most = over((BUDGET, n), (BUDGET, 1)), over((PRODUCTS, n), (PRODUCTS, 1))
    stock = next((r for r in rows if r["what"] == STOCK and r["n_seq"] == n), None)
    return {
        "n_seq": n,
        "tokens_per_second": spread(speeds(BUDGET)),
        "over_one": spread(over_one),
        "most": spread(most),
        "of_most": spread(a / b for a, b in zip(over_one, most)),
        "products_tokens_per_second": spread(speeds(PRODUCTS)),
        "cache_bytes": row["cache_bytes"] if is_ours else None,
        "cache_bytes_formula": n * (row["budget"] + row["buffer"]) * row["row_bytes"]
        if is_ours
        else None,
        "stock_depth": None if stock is None else stock["depth"],
        "stock_tokens_per_second": spread(speeds(STOCK)),
        "over_stock": spread(over((BUDGET, n), (STOCK, n))),
        "stock_cache_bytes": None if stock is None else stock["cache_bytes"],
    }
