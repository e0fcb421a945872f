"""A device in another process: ggml's RPC server over loopback, for tests and for a figure.

``python tests/python/rpc.py`` prints what a compression of the demo's cache takes here and there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from devices import FOLDER, ON_CPU, ggml, load, params_on

#: Seconds that a server may take to listen.
PATIENCE = 60.0


def serve(endpoint: str) -> None:
    """Serve the CPU, with one thread, until standard input ends: until whoever started it does."""
    threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
    cpu = ggml("ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int)(0)
    start = load("libggml-rpc.so").ggml_backend_rpc_start_server
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_size_t] * 2, ctypes.c_void_p]
    start(endpoint.encode(), None, 1, 1, (ctypes.c_void_p * 1)(cpu))


@contextlib.contextmanager
def server() -> Iterator[int]:
    """Run a server in a process of its own; gives its device, a ggml_backend_dev_t."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            add = load("libggml-rpc.so").ggml_backend_rpc_add_server
            add.restype = ctypes.c_void_p
            reg = add(f"127.0.0.1:{port}".encode())
            get = ggml(
                "ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
            )
            yield get(reg, 0)
        finally:
            process.kill()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody listens at the port."""
    give_up = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None and time.monotonic() < give_up, "the RPC server is not there"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return


def measure(where: str, params: dict[str, Any], policy: str, budget: int | None) -> None:
    """Print what a compression and a token take, in the fastest of ten contexts."""
    from engine import Engine

    from py_reasonalloc.task.shipped import DEMO_MODEL

    n_buffer = (budget or 256) // 2
    config = {"policy": policy, "buffer": n_buffer}
    compression, token = [], []
    for _ in range(10):
        with Engine(DEMO_MODEL, budget, n_ctx=1024, config=config, model_params=params) as engine:
            engine.decode([5 + i % 300 for i in range(budget or 256)])
            begin = time.perf_counter()
            engine.decode_each([5 + 7 * i % 300 for i in range(2 * n_buffer)])
            seconds = time.perf_counter() - begin
            if budget is not None:
                stats = engine.stats()
                seconds -= stats.compress_us / 1e6
                compression.append(stats.compress_us / stats.n_compressions / 1000)
            token.append(1000 * seconds / (2 * n_buffer))
    cost = f"{min(compression):.1f}" if compression else ""
    name = f"{policy}, {budget}" if budget else "none"
    print(f"| {name} | {where} | {cost} | {min(token):.2f} |", flush=True)


def main() -> None:
    """Measure."""
    print("| policy, budget | cache | ms per compression | ms per token beside it |")
    print("|---|---|---:|---:|")
    with server() as device:
        for policy, budget in (
            ("", None),
            ("streaming", 64),
            ("rkv", 64),
            ("rkv", 256),
            ("loss", 64),
            ("loss", 256),
        ):
            measure("here", ON_CPU, policy, budget)
            measure("over loopback", params_on([device]), policy, budget)


if __name__ == "__main__":
    if not FOLDER:
        sys.exit("REASONALLOC_TEST_DEVICES names no folder of native/cmake/build_test_devices.sh")
    serve(sys.argv[1]) if len(sys.argv) > 1 else main()
