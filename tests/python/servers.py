"""A `reasonalloc-serve` process for tests, and what they ask it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from conftest import ROOT

from py_reasonalloc.task.problems import generate_problem

#: Seconds that anything may take.
PATIENCE = 120.0
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
#: So small that problems of the demo are compressed.
CACHE = ("--budget", 96, "--buffer", 16, "--window", 16, "--profile", "none")
GREEDY = {"temperature": 0.0}
HELLO = [{"role": "user", "content": "hello"}]
PROMPTS = [generate_problem(seed=5, index=i, level=1).prompt for i in range(8)]


class Server:
    """A running server.

    Attributes
    ----------
    url : str
        Without the /v1.
    process : subprocess.Popen
        It.
    """

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "py_reasonalloc.commands.serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+?(?=/v1:)", self.line)
        if found is None:
            self.process.kill()
            raise AssertionError(f"{self.line!r}: {self.process.communicate()}")
        self.url = found[0]
        self.name = self.line.split()[1]
        # nobody else reads what it says
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Return the answer to a body."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE)

    def text(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """Return the answer of /v1/completions."""
        answer = self.post("/v1/completions", prompt=prompt, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, content: str, **body: Any) -> dict[str, Any]:
        """Return the answer of /v1/chat/completions to one message."""
        messages = [{"role": "user", "content": content}]
        answer = self.post("/v1/chat/completions", **{"messages": messages, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """Return the events of a streamed answer."""
        answer = self.post(path, stream=True, **body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", lines[-1]
        return [json.loads(line) for line in lines[:-1]]

    def metrics(self) -> dict[str, float]:
        """Return what /metrics says, without our prefix and without labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        found = re.findall(r"^reasonalloc_(\w+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def resident(self) -> int:
        """Return the bytes of memory that the process has now (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; return its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def serving(*arguments: object) -> Iterator[Server]:
    """Run a server inside the block; it must end with exit code 0 and no error."""
    server = Server(*arguments)
    try:
        yield server
    except BaseException:
        server.process.kill()
        server.end()
        raise
    assert server.end() == 0, server.errors
    said = "".join(server.errors)  # llama.cpp itself says what is wrong with a grammar
    assert "Traceback" not in said and "ERROR" not in said, said


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition holds, and fail if it does not."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
