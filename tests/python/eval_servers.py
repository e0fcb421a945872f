"""What tests of an evaluation over HTTP share: short texts, and servers played by a script."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from py_reasonalloc import __version__
from py_reasonalloc.engine.identity import read_identity
from py_reasonalloc.eval.cases.datasets import DEMO_DATASET, load_dataset
from py_reasonalloc.eval.cases.methods import Arm, Common, parse_arms, setup_of
from py_reasonalloc.eval.decode.worker import Job, Task
from py_reasonalloc.eval.remote.wire import CHAT_PATH, FIELD, setup_to_json
from py_reasonalloc.profile.lookup import find_profile

httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (
    "from py_reasonalloc.output.console import run_command; "
    "from py_reasonalloc.commands.eval_serve import serve_command; "
    "run_command(serve_command, 'reasonalloc-eval serve')"
)
ARMS = parse_arms(["full", "rkv", "reasonalloc+kv=q8_0"], [112, 128])
N_PROBLEMS = 4
NO_PAUSE = (0.0,) * 3
RKV = Arm("rkv", 112)


def make_job(model: Path) -> Job:
    """Return short texts: they are cut off, which is no matter here."""
    dataset = load_dataset(DEMO_DATASET)
    common = Common(
        buffer=16,
        sinks=4,
        window=8,
        n_protect=90,
        kv_type="f16",
        profile=find_profile(model),
    )
    return Job(
        model=model,
        dataset=dataset.name,
        problems=tuple(dataset.problems[:N_PROBLEMS]),
        prompts=tuple(dataset.prompts[:N_PROBLEMS]),
        setups={arm: setup_of(arm, common) for arm in ARMS},
        n_ctx=400,
        max_tokens=60,
        temp=0.8,
        top_p=0.95,
        seed=5,
        raw=False,
        keep_texts=True,
        n_threads=1,
        n_gpu_layers=0,
    )


def by_key(rows: Any) -> dict[Any, dict[str, Any]]:
    """Return key -> row without its times; no key may come twice."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        assert row.key not in found
        found[row.key] = {k: v for k, v in row.to_json().items() if not k.endswith("_seconds")}
    return found


def rkv_tasks(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.arm == RKV]


class Fake(ThreadingHTTPServer):
    """A server that says what a test wants it to.

    Attributes
    ----------
    bodies : list
        What was posted.
    """

    daemon_threads = True

    def __init__(self, respond: Callable[[int, dict[str, Any]], tuple[int, object]]) -> None:
        super().__init__(("127.0.0.1", 0), _FakeHandler)
        self.respond, self.bodies, self.paths = respond, [], []
        self.models: tuple[int, object] = (200, {"data": [{"id": "their-name"}]})
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> Fake:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class _FakeHandler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self.send(*self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.paths.append(self.path)
            number = len(self.server.bodies)
        self.send(*self.server.respond(number, body))

    def send(self, code: int, value: object) -> None:
        if code == 0:
            self.close_connection = True
            return
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Proxy(Fake):
    """Passes everything on to another server."""

    def __init__(self, url: str) -> None:
        super().__init__(self.pass_on)
        self.target = url
        self.models = (200, httpx.get(f"{url}/v1/models", trust_env=False).json())

    def pass_on(self, _: int, body: dict[str, Any]) -> tuple[int, object]:
        answer = httpx.post(f"{self.target}{CHAT_PATH}", json=body, timeout=60, trust_env=False)
        return answer.status_code, answer.json()


def completion(text: str, finish: str = "stop", **message: object) -> dict[str, Any]:
    return {
        "choices": [{"message": {"content": text, **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 9},
    }


def request_body(job: Job, arm: Arm = ARMS[-1], **fields: object) -> dict[str, Any]:
    return {
        "model": "any",
        "messages": [{"role": "user", "content": job.prompts[0]}],
        "temperature": 0,
        "max_tokens": 3,
        FIELD: {
            "version": __version__,
            "fingerprint": read_identity(job.model).fingerprint,
            "n_ctx": job.n_ctx,
            "raw": False,
            **setup_to_json(job.setups[arm]),
        },
        **fields,
    }


class Process:
    """A `reasonalloc-eval serve` on a free port."""

    def __init__(self, errors: Path, model: object = "demo") -> None:
        self.errors = errors
        with errors.open("wb") as stream:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(model), "--port", "0", "--threads", "1"],
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                cwd=ROOT,
            )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("serving "), errors.read_text()
        self.url = line.split()[-1]

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()
