"""An evaluation: which tasks are left, who works on them, and rows as they come."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event

from ...engine.errors import ReasonAllocError
from ..cases.methods import Arm
from ..cases.rows import Problem, Row, RowKey
from .worker import Job, Task, Worker

#: Problems that all arms get before the next ones are begun, so that a run that is stopped early
#: can be compared.
BLOCK = 25


def plan_tasks(
    arms: Sequence[Arm], problems: Sequence[Problem], n_samples: int, done: Iterable[RowKey]
) -> list[Task]:
    """Return what is left to do: blocks of `BLOCK` problems, in each block arm after arm."""
    done = set(done)
    tasks = []
    for first in range(0, len(problems), BLOCK):
        for arm in arms:
            for index in range(first, min(first + BLOCK, len(problems))):
                for sample in range(n_samples):
                    key = RowKey(arm.method, arm.budget, problems[index].key, sample)
                    if key not in done:
                        tasks.append(Task(arm, index, sample))
    return tasks


def solve_here(job: Job, tasks: Sequence[Task]) -> Iterator[Row]:
    """Work on tasks in this process, in order."""
    worker = Worker(job)
    try:
        for task in tasks:
            yield worker.solve(task)
    finally:
        worker.close()


_worker: Worker | None = None


def _start_process(job: Job, stop: Event) -> None:
    """Prepare a process of the pool; it ends with its parent, however that ends."""
    global _worker
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker = Worker(job, stop.is_set)


def _solve(task: Task) -> Row:
    assert _worker is not None
    return _worker.solve(task)


def solve_in_processes(job: Job, tasks: Sequence[Task], n_jobs: int) -> Iterator[Row]:
    """Work on tasks in several processes, each with the model loaded; rows come as they are ready.

    Raises
    ------
    ReasonAllocError
        A task failed, or a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(n_jobs, context, _start_process, (job, stop))
    waiting: set[Future[Row]] = set()
    try:
        for task in tasks:
            waiting.add(pool.submit(_solve, task))
            if len(waiting) >= 2 * n_jobs:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
    except BrokenProcessPool:
        raise ReasonAllocError(
            "a worker process was killed (out of memory?): run the same command again to go on, "
            "with fewer --jobs if it was"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
