"""Plan the measurements and run them, one process each, arms in turn."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import ComputeError
from . import llama_bench
from .guard import guarded
from .jobs import Arm, Job
from .models import bench_folder, make_bench_folder
from .turns import Group, depths_of, take_turns

SPLITS = ("even", "uneven")
TURNS = "turns"
MEMORY = "memory"
PARALLEL = "parallel"
PARTS = ("decode", MEMORY, TURNS, "prompt", "load", PARALLEL)
UNPATCHED = "unpatched"

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes
    ----------
    model : Path
        GGUF file.
    depths : tuple of int
        Tokens decoded before the measurement, ascending.
    budgets : tuple of int
        Of the budgeted arms, tokens per KV head.
    stock_types : tuple of str
        Types of the stock caches; the first one is what everything is compared with.
    kv_type : str
        Type of the budgeted caches.
    splits : tuple of str
        "even": the same budget everywhere; "uneven": layers along a wave, heads adaptive.
    attention : tuple of str
        Ways to attend over heads that differ, see `BudgetConfig`.
    policy : str
        Of the budgeted arms.
    buffer : int
        Tokens between compressions.
    n_buffers : int
        Whole buffers to time in a budgeted cache. A stock cache is timed over one.
    prompts : tuple of int
        Lengths of the prompts to read, tokens.
    repeat : int
        Repetitions of everything.
    n_threads, n_gpu_layers : int
        CPU threads; layers on a GPU, -1: all.
    is_decoded : bool
        Budgeted caches decode every token up to a depth.
    unpatched : Path or None
        Folder of a llama.cpp without our patch, of the same version.
    parts : tuple of str
        What to measure: of `PARTS`. "memory" is what the decoding at the deepest depth does last.
    parallel : tuple of int
        Numbers of sequences to decode side by side, ascending; (): none.
    parallel_depth : int
        Tokens that each sequence of a stock cache then has.
    llama_bench : Path or None
        A llama-bench to run beside, in every repetition.
    llama_bench_depth : int
        Deepest depth for it.
    """

    model: Path
    depths: tuple[int, ...]
    budgets: tuple[int, ...]
    stock_types: tuple[str, ...] = ("f16", "q8_0", "q4_0")
    kv_type: str = "f16"
    splits: tuple[str, ...] = ("even",)
    attention: tuple[str, ...] = ("auto",)
    policy: str = "rkv"
    buffer: int = 128
    n_buffers: int = 3
    prompts: tuple[int, ...] = (512, 2048)
    repeat: int = 3
    n_threads: int = 1
    n_gpu_layers: int = 0
    is_decoded: bool = False
    unpatched: Path | None = None
    parts: tuple[str, ...] = PARTS
    parallel: tuple[int, ...] = ()
    parallel_depth: int = 4096
    llama_bench: Path | None = None
    llama_bench_depth: int = 2048

    @property
    def reference(self) -> str:
        """Name of the arm that everything is compared with."""
        return f"stock {self.stock_types[0]}"

    @property
    def small_batches(self) -> str:
        """Name of the reference arm that reads prompts in pieces of one buffer, as ours do."""
        return f"{self.reference}, pieces of {self.buffer}"


def wave_demand(n_layer: int) -> list[float]:
    """Return a demand with the published shape: high at first, low in the middle, a late surge."""
    depths = [il / max(n_layer - 1, 1) for il in range(n_layer)]
    return [1.0 + 2.0 * math.exp(-x / 0.08) + math.exp(-(((x - 0.8) / 0.12) ** 2)) for x in depths]


def wave_layers(n_layer: int, budget: int) -> tuple[int, ...]:
    """Return layer budgets for `wave_demand`, by the library's own rule; their mean is `budget`.

    Raises
    ------
    ConfigError
        The budget is too small to be split.
    """
    from ..engine import bindings as c

    params = c.ra_robustify_params(gamma=0.5, lo=0.25, hi=2.0)
    demand = (ctypes.c_double * n_layer)(*wave_demand(n_layer))
    budgets = (ctypes.c_int32 * n_layer)()
    floor = 16  # sinks + window + 1, and a little
    c.check(
        c.ra_robustify(
            ctypes.byref(params), n_layer, demand, n_layer * budget, min(floor, budget), budgets
        )
    )
    return tuple(budgets)


def stock_arms(settings: Settings) -> list[Arm]:
    """Return the stock caches, the reference first."""
    return [Arm(f"stock {kind}", kv_type=kind) for kind in settings.stock_types]


def budget_arms(settings: Settings) -> list[Arm]:
    """Return the budgeted caches.

    Raises
    ------
    ConfigError
        A budget or another value is out of its range.
    """
    arms = []
    n_layer = 0
    if "uneven" in settings.splits:
        from ..engine.identity import read_identity

        n_layer = read_identity(settings.model).n_layer
    for budget in settings.budgets:
        # heads that are alike are always attended together
        ways = {"even": ("auto",), "uneven": settings.attention}
        for split, attention in [(s, way) for s in settings.splits for way in ways[s]]:
            words = [f"budget {budget}"]
            words += [settings.kv_type] if settings.kv_type != "f16" else []
            words += [split] if split != "even" else []
            way = f", {attention}" if attention != "auto" else ""
            arm = Arm(
                " ".join(words) + way,
                kv_type=settings.kv_type,
                budget=budget,
                buffer=settings.buffer,
                policy=settings.policy,
                layers=wave_layers(n_layer, budget) if split == "uneven" else "uniform",
                heads="adaptive" if split == "uneven" else "uniform",
                attention=attention,
                n_ubatch=min(settings.buffer, Arm.n_ubatch),
            )
            arm.config()  # a value out of range shows before anything runs
            arms.append(arm)
    return arms


def plan(settings: Settings) -> list[Job]:
    """Return the jobs of one repetition, so ordered that what is compared runs close together.

    Raises
    ------
    ConfigError
        See `budget_arms`.
    """
    stock, ours = stock_arms(settings), budget_arms(settings)
    reference = stock[0]
    others = [] if settings.unpatched is None else [Arm(UNPATCHED, library=str(settings.unpatched))]
    folder = bench_folder()

    def job(kind: str, arm: Arm, **more: Any) -> Job:
        return Job(
            kind, arm, str(settings.model), settings.n_threads, settings.n_gpu_layers, **more
        )

    def decode(arm: Arm, depth: int) -> Job:
        n_buffers = 1 if arm.budget is None else settings.n_buffers
        return job(
            "decode",
            arm,
            depth=depth,
            n_tokens=n_buffers * settings.buffer,
            is_decoded=settings.is_decoded,
            is_batch_filled=MEMORY in settings.parts and depth == max(settings.depths),
            folder=str(folder),
        )

    jobs = []
    small = Arm(settings.small_batches, reference.kv_type, n_ubatch=settings.buffer)
    limits = {0, *(budget + settings.buffer for budget in settings.budgets)}
    for depth in sorted({*settings.depths, *limits}):
        if depth not in settings.depths:
            jobs.append(decode(reference, depth))
            if depth == 0 and ours:  # its compute buffer is what ours is held against
                jobs.append(decode(small, depth))
            continue
        at_first = others if depth == min(settings.depths) else []
        jobs += [decode(arm, depth) for arm in (reference, *at_first, *ours, *stock[1:])]
    if settings.prompts:
        arms = [reference, *others, *ours, *([small] if ours else [])]
        jobs += [job("prompt", arm, prompts=settings.prompts) for arm in arms]
    jobs += [job("load", Arm("ReasonLlama, no budget"))]
    jobs += [job("load", arm) for arm in ours[:1]]
    return [job for job in jobs if job.kind in settings.parts]


def plan_turns(settings: Settings) -> list[Group]:
    """Return what takes turns: each budgeted arm at its deepest depth with the caches that it is
    held against (its own first depth; stock there, at its limit, and empty), and the reference
    with an unpatched build.

    Raises
    ------
    ConfigError
        See `budget_arms`.
    """
    if TURNS not in settings.parts:
        return []
    reference = stock_arms(settings)[0]

    def job(arm: Arm, depth: int) -> Job:
        return Job(
            TURNS,
            arm,
            str(settings.model),
            settings.n_threads,
            settings.n_gpu_layers,
            depth=depth,
            n_tokens=settings.n_buffers * settings.buffer,
            is_decoded=settings.is_decoded,
            folder=str(bench_folder()),
        )

    groups = []
    for arm in budget_arms(settings):
        assert arm.budget is not None
        own = [job(arm, depth) for depth in depths_of(arm, settings.depths)]
        if own:
            limit = arm.budget + arm.buffer
            deepest = job(reference, own[0].depth)
            group = (*own, deepest, job(reference, limit), job(reference, 0))
            groups.append(Group(arm.name, group))
    if settings.unpatched is not None:
        other = Arm(UNPATCHED, library=str(settings.unpatched))
        depth = min(settings.depths)
        groups.append(Group(UNPATCHED, (job(reference, depth), job(other, depth))))
    return groups


def run_job(job: Job) -> Row:
    """Run one job in a process of its own.

    Returns
    -------
    dict
        What `child` measured, or its "error".
    """
    environment = dict(os.environ)
    if job.arm.library is not None:
        environment["LLAMA_CPP_LIB_PATH"] = job.arm.library
    done = subprocess.run(
        guarded([sys.executable, "-m", "py_reasonalloc.bench.child"]),
        input=job.to_json(),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode == 0:
        result: Row = json.loads(done.stdout)
        return result
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return {"error": f"ended by {name}{hint}"}
    lines = done.stderr.strip().splitlines()
    return {"error": lines[-1] if lines else f"exit code {done.returncode}"}


def measure(
    settings: Settings,
    rows: list[Row],
    advance: Callable[[], object] = lambda: None,
    others: Sequence[Callable[[], list[Row]]] = (),
) -> None:
    """Run everything; every second repetition runs backwards, so that a drift hits all alike.

    Parameters
    ----------
    rows : list of dict
        Gets one row per measurement as it comes: kind, arm, depth, repetition, what was measured or
        "error". So what was measured is not lost when somebody stops this.
    advance : callable
        Called after each job.
    others : sequence of callable
        Further measurements of a repetition; each returns its rows.

    Raises
    ------
    ConfigError
        See `budget_arms`.
    ComputeError
        The model cannot be loaded at all, or llama-bench cannot be run.
    """
    jobs, groups = plan(settings), plan_turns(settings)
    make_bench_folder()
    # also brings the file into the system's cache
    first = run_job(
        Job("decode", Arm("first"), str(settings.model), settings.n_threads, n_tokens=1)
    )
    if "error" in first:
        raise ComputeError(f"{settings.model}: {first['error']}")
    if settings.llama_bench is not None:
        _beside(settings.llama_bench, settings, depths=(0,), prompts=())
    for repetition in range(settings.repeat):
        for job in jobs if repetition % 2 == 0 else jobs[::-1]:
            rows.append(_labels(job, repetition) | run_job(job))
            advance()
        for group in groups:
            found = take_turns(group, settings.n_buffers, settings.buffer)
            rows += [{**row, "repetition": repetition} for row in found]
            advance()
        for other in others:
            rows += [{**row, "repetition": repetition} for row in other()]
            advance()
        if settings.llama_bench is not None:
            depths = [d for d in (0, *settings.depths) if d <= settings.llama_bench_depth]
            found = _beside(settings.llama_bench, settings, sorted(set(depths)), settings.prompts)
            rows += [{**row, "repetition": repetition} for row in found]
            advance()


def _labels(job: Job, repetition: int) -> Row:
    arm = job.arm
    labels = {
        "kind": job.kind,
        "arm": arm.name,
        "budget": arm.budget,
        "buffer": None if arm.budget is None else arm.buffer,
        "kv_type": arm.kv_type,
        "is_even": arm.layers == "uniform" and arm.heads == "uniform",
        "repetition": repetition,
    }
    return labels | ({"depth": job.depth} if job.kind == "decode" else {})


def _beside(
    binary: Path, settings: Settings, depths: Sequence[int], prompts: Sequence[int]
) -> list[Row]:
    found = llama_bench.run(
        binary,
        settings.model,
        settings.stock_types[0],
        depths,
        settings.buffer,
        prompts,
        settings.n_threads,
        settings.n_gpu_layers,
    )
    return [{**row, "kind": llama_bench.NAME, "arm": row["kind"]} for row in found]
