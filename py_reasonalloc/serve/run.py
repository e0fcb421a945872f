"""Open a model, listen, and end in good order."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from ..engine.errors import ConfigError
from ..session.checkpoints import DEFAULT_BYTES
from ..session.sequences.prefixes import Prefixes
from .app import MAX_BODY, make_app
from .engine import Engine
from .work import Planner


@dataclass(frozen=True)
class ServeOptions:
    """How a model is served.

    Attributes
    ----------
    name : str
        Name of the model in answers.
    host, port : str and int
        Where to listen; port 0: any that is free.
    n_queue : int
        Most texts that wait beside those that run.
    checkpoints : int
        Bytes of RAM for snapshots that requests share; needs a budget. 0: none.
    api_key : str or None
        What callers must bring.
    max_body : int
        Most bytes of a body.
    grace : float
        Seconds that running texts get when the server is told to end.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    n_queue: int = 64
    checkpoints: int = DEFAULT_BYTES
    api_key: str | None = None
    max_body: int = MAX_BODY
    grace: float = 5.0


class _Server(uvicorn.Server):
    """uvicorn's server; SIGINT and SIGTERM end it and are then done with."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle them here; uvicorn would raise them once more at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; the second time, at once."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._on_exit()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound.

    Raises
    ------
    ConfigError
        It cannot be.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen at {host}, port {port}: {reason}") from None
    return bound


def serve(llama: Any, options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serve an open session until SIGINT or SIGTERM.

    Parameters
    ----------
    llama : ReasonLlama
        The server's own until this returns.
    options : ServeOptions
        How.
    say : callable
        Gets a line when it is ready.

    Raises
    ------
    ConfigError
        It cannot listen there.
    """
    bound = listen(options.host, options.port)
    prefixes = None
    if llama.config is not None and options.checkpoints > 0:
        prefixes = Prefixes(llama, options.checkpoints)
    engine = Engine(llama, options.n_queue, prefixes)
    planner = Planner(llama, options.name, engine.n_ctx)
    app = make_app(engine, planner, options.api_key, options.max_body)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=int(options.grace) + 5,
    )
    server = _Server(config, lambda: engine.close(options.grace))
    engine.start()
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(
        f"serving {options.name} at http://{shown}:{port}/v1: {engine.n_parallel} texts at a time "
        f"of up to {engine.n_ctx} tokens, cache {engine.cache_bytes / 2**20:.1f} MiB"
    )
    try:
        server.run(sockets=[bound])
    finally:
        engine.close(0.0)
        engine.join()
        bound.close()
