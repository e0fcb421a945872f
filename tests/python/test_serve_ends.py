"""How requests, servers and clients of `reasonalloc-serve` end, and what a storm of them leaves."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import ROOT
from servers import CACHE, CHAT, GREEDY, HELLO, PATIENCE, PROMPTS, TEXT, Server, serving, wait_for

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from py_reasonalloc import ReasonLlama  # noqa: E402
from py_reasonalloc.task.shipped import DEMO_MODEL  # noqa: E402


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_sequence(server, stream) -> None:
    before = server.metrics()
    body = {"prompt": PROMPTS[3], "max_tokens": 3900, "stream": stream, "temperature": 0.0}
    # never ends by itself
    body["logit_bias"] = {"3": -100, "2": -100, "1": -100, "0": -100}
    text = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        wait_for(lambda: server.metrics()["sequences_running"] == 1)
        time.sleep(0.3)
    wait_for(lambda: server.metrics()["sequences_running"] == 0, 5.0)
    after = server.metrics()
    assert after["sequences_cancelled_total"] == before["sequences_cancelled_total"] + 1
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < 3000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server(number, foreground) -> None:
    server = Server("demo", *CACHE, "--grace", 1)
    body = {"prompt": PROMPTS[3], "max_tokens": 4000, "temperature": 0.0}
    body["logit_bias"] = {"3": -100, "2": -100, "1": -100, "0": -100}
    with ThreadPoolExecutor(3) as pool:
        short = pool.submit(server.text, PROMPTS[0], max_tokens=3)
        long = pool.submit(server.post, TEXT, **body)
        wait_for(lambda: server.metrics()["sequences_running"] >= 1)
        short.result()
        began = time.monotonic()
        code = server.end(number)
        assert code == 0
        assert time.monotonic() - began < 10
        cut = long.result()
    assert cut.status_code == 503
    assert "shutting down" in cut.json()["error"]["message"]
    assert server.errors == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nothing.gguf",), 1, "nothing.gguf"),
        (("demo", "--budget", "3"), 2, "budget"),
        (("demo", "--parallel", "0"), 2, "--parallel"),
        (("demo", "--host", "256.0.0.1"), 2, "cannot listen"),
        (("demo", "--api-key", " "), 2, "--api-key"),
    ],
)
def test_wrong_usage_is_one_line(arguments, code, words) -> None:
    command = [sys.executable, "-m", "py_reasonalloc.commands.serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 4
    assert "Traceback" not in done.stderr


def test_the_extra_is_named_when_it_is_missing(in_process, monkeypatch) -> None:
    from py_reasonalloc.commands import serve

    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "no_such_module"))
    code, out, err = in_process(serve.run, "demo")
    assert (code, out) == (2, "")
    assert err == "reasonalloc-serve: no_such_module is not installed: pip install '.[serve]'\n"


def test_an_engine_that_has_failed_says_so() -> None:
    from py_reasonalloc.serve.app import make_app
    from py_reasonalloc.serve.engine import Engine
    from py_reasonalloc.serve.work import Planner

    def fail() -> list:
        raise RuntimeError("no luck")

    async def ask_twice(app) -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as made:
            return [
                await made.get("/health"),
                await made.post(TEXT, json={"prompt": "x", "stream": True}),
                await made.post(TEXT, json={"prompt": "x"}),
                await made.get("/health"),
            ]

    with ReasonLlama(DEMO_MODEL, 96, n_seq_max=2, n_threads=1) as llama:
        engine = Engine(llama, n_queue=4)
        engine._sequences.step = fail
        app = make_app(engine, Planner(llama, "m", engine.n_ctx))
        engine.start()
        answers = asyncio.run(ask_twice(app))
        engine.join()
    assert [answer.status_code for answer in answers] == [200, 500, 503, 503]
    assert answers[1].json()["error"]["message"] == "the engine has failed"


def storm(server: Server, n: int, seed: int) -> None:
    """Ask for all sorts of things, go away in the middle of some, and check what is left."""
    rng = random.Random(seed)
    plans = [(rng.randrange(6), rng.randrange(len(PROMPTS)), rng.random()) for _ in range(n)]

    def one(plan: tuple[int, int, float]) -> str:
        kind, i, luck = plan
        body = {"max_tokens": 1 + int(luck * 40), "temperature": luck, "seed": i}
        try:
            if kind == 0:  # goes away
                timeout = httpx.Timeout(PATIENCE, read=0.02 + luck / 4)
                body["max_tokens"] = 2000
                httpx.post(
                    f"{server.url}{TEXT}", json={"prompt": PROMPTS[i], **body}, timeout=timeout
                )
                return "done"
            if kind == 1:  # goes away after the first pieces
                body |= {"prompt": PROMPTS[i], "stream": True, "max_tokens": 500}
                with httpx.stream(
                    "POST", f"{server.url}{TEXT}", json=body, timeout=PATIENCE
                ) as got:
                    next(got.iter_lines())
                return "gone"
            if kind == 2:
                answer = server.post(TEXT, prompt=PROMPTS[i], n=1 + int(luck * 3), **body)
            elif kind == 3:
                answer = server.post(TEXT, prompt="x" * int(luck * 20000), **body)
            elif kind == 4:
                answer = server.post(CHAT, messages=HELLO, bad=1)
            else:
                messages = [{"role": "user", "content": PROMPTS[i]}]
                answer = server.post(CHAT, messages=messages, stream=luck < 0.5, **body)
            assert answer.status_code in (200, 400, 429), answer.text
            return str(answer.status_code)
        except httpx.ReadTimeout:
            return "gone"

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, plans))
    assert {"200", "400", "gone"} <= set(results)
    wait_for(lambda: server.metrics()["sequences_running"] == 0)
    after = server.metrics()
    assert after["queue_length"] == 0
    assert after["sequences_failed_total"] == 0
    assert after["cache_entries"] == 0


def test_a_storm_of_requests(server) -> None:
    expected = server.text(PROMPTS[0], max_tokens=50, **GREEDY)["choices"]
    storm(server, 60, seed=1)
    assert server.text(PROMPTS[0], max_tokens=50, **GREEDY)["choices"] == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_requests_leave_memory_as_it_was() -> None:
    with serving("demo", *CACHE, "--checkpoints", 16) as server:
        expected = server.text(PROMPTS[0], max_tokens=50, **GREEDY)["choices"]
        storm(server, 250, seed=2)
        before = server.resident()
        for part in range(3):
            storm(server, 250, seed=3 + part)
        assert server.resident() < before + (8 << 20)
        assert server.text(PROMPTS[0], max_tokens=50, **GREEDY)["choices"] == expected
