"""Speeds side by side: contexts that take turns, a few tokens each.

A machine that others use changes its speed from minute to minute; a goal of a few percent is lost
in that when one process is timed after the other. Here everything that is compared is open at once:
one process per build of llama.cpp, weights loaded once in it, and every context decodes a slice of
tokens in turn, forwards in one round and backwards in the next. A ratio is formed per buffer, so
that a budgeted cache pays for its compressions in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any, NamedTuple

from .guard import guarded
from .jobs import Arm, Job

#: Most tokens that a context decodes before it is the next one's turn.
MOST_TOKENS = 16
#: Times that contexts of two builds are opened: processes of one build differ by several percent.
N_PAIRS = 8

Row = dict[str, Any]


class Group(NamedTuple):
    """What takes turns: `jobs[0]` is compared with each of the others."""

    name: str
    jobs: Sequence[Job]


def slice_tokens(buffer: int) -> int:
    """Return the tokens of a turn: the largest divisor of a buffer that is at most 16."""
    return max(n for n in range(1, MOST_TOKENS + 1) if buffer % n == 0)


def depths_of(arm: Arm, depths: Sequence[int]) -> list[int]:
    """Return the deepest depth and the first one where the cache is full; [] if it never is."""
    full = [depth for depth in depths if depth >= arm.n_fill()]
    return sorted({full[0], full[-1]}, reverse=True) if full else []


class Child:
    """A process with the contexts of one build.

    Attributes
    ----------
    sizes : list of dict or None
        `Engine.sizes` of each; None if they could not be opened.
    error : str or None
        Why the process failed.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        environment = dict(os.environ)
        if jobs[0].arm.library is not None:
            environment["LLAMA_CPP_LIB_PATH"] = jobs[0].arm.library
        self.process = subprocess.Popen(
            guarded([sys.executable, "-m", "py_reasonalloc.bench.child"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.error: str | None = None
        self.sizes: list[dict[str, Any]] | None = self.ask([job.to_json() for job in jobs])

    def ask(self, request: object) -> Any:
        """Send one line and return the answer; None once the process failed (see `error`)."""
        if self.error is not None:
            return None
        try:
            stdin, stdout = self._pipes()
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.error = self._reason()
            return None
        return json.loads(answer)

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def _reason(self) -> str:
        errors = self.process.stderr.read() if self.process.stderr is not None else ""
        lines = errors.strip().splitlines()
        return lines[-1] if lines else f"ended with {self.process.wait()}"

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def take_turns(group: Group, n_buffers: int, buffer: int) -> list[Row]:
    """Let the contexts of a group decode `n_buffers` whole buffers each.

    Contexts of two builds, which are in two processes, decode one buffer, and are opened
    `N_PAIRS` times, each build first in turn.

    Returns
    -------
    list of dict
        One row per job: arm, depth, group, and "seconds" (a list, one sum per buffer) with
        "compress_seconds"; or a single row with "error".
    """
    builds: dict[str | None, list[int]] = {}
    for i, job in enumerate(group.jobs):
        builds.setdefault(job.arm.library, []).append(i)
    opened = list(builds.values())
    if len(opened) == 1:
        return _take_turns(group, opened, n_buffers, buffer)
    rows: list[Row] = []
    for i_pair in range(N_PAIRS):
        found = _take_turns(group, opened if i_pair % 2 == 0 else opened[::-1], 1, buffer)
        if "error" in found[0]:
            return found
        for row, more in zip(rows, found):
            row["seconds"] += more["seconds"]
            row["compress_seconds"] += more["compress_seconds"]
        rows = rows or found
    return rows


def _take_turns(
    group: Group, builds: Sequence[Sequence[int]], n_buffers: int, buffer: int
) -> list[Row]:
    """Open one process for each list of jobs in `builds`, and let all decode in turn."""
    n_slice = slice_tokens(buffer)
    slices: list[list[tuple[float, float]]] = [[] for _ in group.jobs]
    with ExitStack() as stack:
        where: dict[int, tuple[Child, int]] = {}
        for members in builds:
            child = Child([group.jobs[i] for i in members])
            stack.callback(child.close)
            where |= {i: (child, at) for at, i in enumerate(members)}
        for i_round in range(n_buffers * buffer // n_slice):
            order = range(len(group.jobs))
            for i in order if i_round % 2 == 0 else reversed(order):
                child, at = where[i]
                answer = child.ask([at, n_slice])
                if answer is None:
                    return [{"kind": "turns", "arm": group.name, "error": child.error}]
                slices[i].append((answer[0], answer[1]))
    per_buffer = buffer // n_slice
    return [
        {
            "kind": "turns",
            "group": group.name,
            "arm": job.arm.name,
            "depth": job.depth,
            "budget": job.arm.budget,
            "seconds": [
                sum(seconds for seconds, _ in found[at : at + per_buffer])
                for at in range(0, len(found), per_buffer)
            ],
            "compress_seconds": sum(seconds for _, seconds in found),
        }
        for job, found in zip(group.jobs, slices)
    ]


def serve(jobs: Sequence[Job]) -> None:
    """Child's side: open every context, then step the one that each line of stdin names.

    Lines are ``[which context, steps]``; answers ``[seconds, of these in compressions]``. A stock
    cache is taken back to its depth after each turn, a budgeted one moves on: it stays full. Every
    sequence of a context holds the same tokens at first.
    """
    from .engine import Engine
    from .fill import skip
    from .jobs import BLOCK, N_WARM

    with ExitStack() as stack:
        engines: list[Engine] = []
        positions: list[int] = []
        for job in jobs:
            engine = stack.enter_context(Engine(job, engines[0] if engines else None))
            n_warm = N_WARM * job.n_at_once
            engine.open_context(max(512, job.depth + n_warm + job.n_tokens))
            start = skip(engine)
            engine.read(job.depth - start, start, BLOCK)
            engine.share()
            engine.step(N_WARM, job.depth)
            engines.append(engine)
            positions.append(job.depth + n_warm)
        print(json.dumps([engine.sizes() for engine in engines]), flush=True)
        for line in sys.stdin:
            i, n_steps = json.loads(line)
            engine = engines[i]
            if engine.job.arm.budget is None:
                positions[i] = engine.job.depth
                engine.take_back(positions[i])
            before = engine.stats()
            seconds = sum(engine.step(n_steps, positions[i]))
            after = engine.stats()
            spent = 0.0 if after is None else (after.compress_us - before.compress_us) / 1e6
            positions[i] += n_steps * engine.job.n_at_once
            print(json.dumps([seconds, spent]), flush=True)
