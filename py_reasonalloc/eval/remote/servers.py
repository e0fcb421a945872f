"""Evaluation on model servers: tasks go out over HTTP, answers are judged here.

A file names the servers, one per line. ``URL`` alone is `reasonalloc-eval serve` on another machine
with the same model: it makes the cache of any arm and measures what an evaluation here would.
``URL METHOD[@BUDGET]`` is any OpenAI-compatible server (llama-server, vLLM, ...) whose own cache
stands for that arm: the arm's texts are then written by such servers only, so that no arm is a
mixture, and what they do not tell (cache sizes, times) stays open. They count tokens in their own
way (``usage``). A URL on several lines gets as many requests at once.

Connections are direct: proxies named in the environment are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import click

from ...engine.errors import ConfigError, ReasonAllocError
from ..cases.methods import parse_arms
from ..cases.rows import Row
from ..decode.worker import Job, Task, judge_row
from .exchange import Exchange, PassingError, Server, UnreachableError

#: Seconds from one failure of a server in a row to the next attempt; after them it is given up.
PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)


def read_servers(path: str | Path) -> list[Server]:
    """Read a file of servers: ``URL`` or ``URL METHOD[@BUDGET]`` per line; ``#`` begins a comment.

    Raises
    ------
    ConfigError
        The file cannot be read, names no server, or has a bad line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a file of servers: not UTF-8 text") from None
    servers: list[Server] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        comment = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
        if comment == 0:
            continue
        try:
            server = _parse_line(words[:comment])
            for other in servers:
                if other.url == server.url and other.arm != server.arm:
                    raise ConfigError(f"{server} stands for {other.arm or 'all arms'} already")
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        servers.append(server)
    if not servers:
        raise ConfigError(f"{path}: no server in it: write one URL per line")
    return servers


def _parse_line(words: Sequence[str]) -> Server:
    if len(words) > 2:
        raise ConfigError("must be URL or URL METHOD@BUDGET")
    url = words[0].rstrip("/")
    url = url[: -len("/v1")] if url.endswith("/v1") else url
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or not url.isascii() or "?" in url or "#" in url:
        raise ConfigError(f"{words[0]!r} is not the URL of a server, such as http://host:8080")
    if len(words) == 1:
        return Server(url)
    (arm,) = parse_arms(words[1:], [1])
    if arm.budget > 0 and "@" not in words[1]:
        raise ConfigError(f"{words[1]} needs its budget: write {words[1]}@BUDGET")
    return Server(url, arm)


def solve_on_servers(
    job: Job, tasks: Sequence[Task], servers: Sequence[Server], pauses: Sequence[float] = PAUSES
) -> Iterator[Row]:
    """Let servers work on tasks, one at a time each; rows come as they are ready.

    A server that breaks off, says HTTP 5xx or cannot be reached any more hands its task back, is
    tried again after each of the pauses, and is given up with a line on stderr if it fails once
    more. One that could never be reached is given up at once: its URL may be wrong.

    Raises
    ------
    ConfigError
        See `check_servers`.
    ReasonAllocError
        A server refuses a request, or is not what the file says; or none is left for a task.
    """
    httpx = check_servers(job, tasks, servers)
    return _judged(job, tasks, _Dispatcher(httpx, job, tasks, servers, pauses))


def check_servers(job: Job, tasks: Sequence[Task], servers: Sequence[Server]) -> ModuleType:
    """Check what can be checked before anything is sent; return httpx.

    Raises
    ------
    ConfigError
        There is a task that no server does, or a server for an arm that is none; httpx is missing.
    """
    httpx = _import_httpx()
    labelled = {server.arm for server in servers if server.arm is not None}
    for server in servers:
        try:
            httpx.URL(server.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{server}: not the URL of a server: {error}") from None
        if server.arm is not None and server.arm not in job.setups:
            known = ", ".join(map(str, job.setups))
            raise ConfigError(f"{server}: {server.arm} is not evaluated: only {known}")
    if all(server.arm is not None for server in servers):
        for task in tasks:
            if task.arm not in labelled:
                raise ConfigError(f"no server does {task.arm}: add a line URL, or URL {task.arm}")
    return httpx


def _import_httpx() -> ModuleType:
    try:
        import httpx
    except ImportError:
        raise ConfigError(
            "httpx is missing, which speaks to servers: pip install '.[server]' in the checkout"
        ) from None
    return httpx


def _judged(job: Job, tasks: Sequence[Task], dispatcher: _Dispatcher) -> Iterator[Row]:
    dispatcher.start()
    try:
        for _ in tasks:
            task, text, measured = dispatcher.next_reply()
            yield judge_row(job, task, text, **measured)
    finally:
        dispatcher.stop()


class _Dispatcher:
    """Hands tasks to servers, in a thread of its own that runs an event loop.

    So requests can be cut off at any moment, and no server waits while an answer is judged.
    """

    def __init__(
        self,
        httpx: ModuleType,
        job: Job,
        tasks: Sequence[Task],
        servers: Sequence[Server],
        pauses: Sequence[float],
    ) -> None:
        self._httpx, self._job, self._pauses = httpx, job, pauses
        self._waiting = list(tasks)
        self._n_undone = len(tasks)
        self._servers = list(servers)
        self._labelled = {server.arm for server in servers}
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="servers", daemon=True)

    # --- for the thread that judges --------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._loop = asyncio.new_event_loop()
        self._main = self._loop.create_task(self._dispatch())
        self._thread.start()

    def next_reply(self) -> tuple[Task, str, dict[str, Any]]:
        """Wait for the next text, or raise what ended the work."""
        reply = self._replies.get()
        if isinstance(reply, BaseException):
            raise reply
        task, (text, measured) = reply
        return task, text, measured

    def stop(self) -> None:
        """Cut off what is under way."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    # --- in the loop -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._replies.put(error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _dispatch(self) -> None:
        self._changed = asyncio.Condition()
        limits = self._httpx.Limits(max_connections=None)
        transport = self._httpx.AsyncHTTPTransport(
            limits=limits, socket_options=_keepalive_options()
        )
        async with self._httpx.AsyncClient(transport=transport) as client:
            workers = [
                asyncio.ensure_future(self._work(Exchange(server, client, self._httpx, self._job)))
                for server in self._servers
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, exchange: Exchange) -> None:
        """Let one server work until nothing is left for it, or it is given up."""
        n_failures = 0
        while True:
            task = await self._take(exchange.server)
            if task is None:
                return
            try:
                written = await exchange.write(task)
            except PassingError as failure:
                await self._give_back(task)
                is_hopeless = isinstance(failure, UnreachableError) and not exchange.has_answered
                if is_hopeless or n_failures == len(self._pauses):
                    self._give_up(exchange.server, str(failure))
                    return
                await asyncio.sleep(self._pauses[n_failures])
                n_failures += 1
            else:
                n_failures = 0
                self._replies.put((task, written))
                async with self._changed:
                    self._n_undone -= 1
                    self._changed.notify_all()

    def _can_do(self, server: Server, task: Task) -> bool:
        return server.arm == (task.arm if task.arm in self._labelled else None)

    async def _take(self, server: Server) -> Task | None:
        """Wait for a task that the server can do; None: all are done."""
        async with self._changed:
            while self._n_undone > 0:
                for i, task in enumerate(self._waiting):
                    if self._can_do(server, task):
                        return self._waiting.pop(i)
                await self._changed.wait()  # a task may be handed back
        return None

    async def _give_back(self, task: Task) -> None:
        async with self._changed:
            self._waiting.insert(0, task)
            self._changed.notify_all()

    def _give_up(self, server: Server, reason: str) -> None:
        self._servers.remove(server)
        for task in self._waiting:
            if not any(self._can_do(other, task) for other in self._servers):
                raise ReasonAllocError(
                    f"no server is left for {task.arm}; {server}: {reason} (what is done is in "
                    "the results file: the same command goes on)"
                )
        newline = "\n" if sys.stderr.isatty() else ""  # after the progress bar
        click.echo(f"{newline}{server} is given up: {reason}", err=True)


def _keepalive_options() -> list[tuple[int, int, int]]:
    """Return socket options by which a machine that was switched off is noticed in two minutes."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
