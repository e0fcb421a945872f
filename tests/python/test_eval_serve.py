"""A `reasonalloc-eval serve`: real processes, and what is sent to them."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from eval_servers import (
    ARMS,
    COMMAND,
    N_PROBLEMS,
    NO_PAUSE,
    RKV,
    ROOT,
    Fake,
    Process,
    Proxy,
    by_key,
    completion,
    request_body,
)

from py_reasonalloc import ConfigError, ReasonAllocError
from py_reasonalloc.engine.identity import read_identity
from py_reasonalloc.eval.cases.methods import Arm, Setup
from py_reasonalloc.eval.decode.run import plan_tasks, solve_here
from py_reasonalloc.eval.decode.worker import Job, Task
from py_reasonalloc.eval.remote.http_server import ModelServer
from py_reasonalloc.eval.remote.servers import Server, solve_on_servers
from py_reasonalloc.eval.remote.wire import CHAT_PATH, FIELD, MEASURED

httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def expected(job: Job, tasks: list[Task]) -> dict[Any, dict[str, Any]]:
    return by_key(solve_here(job, tasks))


@pytest.fixture(scope="module")
def start_server(tmp_path_factory) -> Iterator[Callable[..., Process]]:
    folder = tmp_path_factory.mktemp("servers")
    started: list[Process] = []

    def start(**options: Any) -> Process:
        started.append(Process(folder / f"{len(started)}.txt", **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        assert "Traceback" not in process.errors.read_text()


@pytest.fixture(scope="module")
def process(start_server) -> Process:
    return start_server()


@pytest.fixture(scope="module")
def second(start_server) -> Process:
    return start_server()


def test_rows_are_those_of_a_local_run(process, job, tasks, expected) -> None:
    rows = list(solve_on_servers(job, tasks, [Server(process.url)]))
    assert by_key(rows) == expected
    assert {row.stop for row in rows} == {"length"}
    for row in rows:
        assert row.decode_seconds > 0 and row.prompt_seconds > 0
        assert (row.compress_seconds > 0) == (row.n_compressions > 0)
    assert any(row.n_evicted > 0 for row in rows)


def test_other_sampling_prompts_and_contexts_are_passed_on(process, job) -> None:
    other = replace(job, temp=0.0, raw=True, n_ctx=130, keep_texts=False, max_tokens=300)
    few = [Task(arm, 1, 0) for arm in ARMS[:3]]
    here = by_key(solve_here(other, few))
    assert by_key(solve_on_servers(other, few, [Server(process.url)])) == here
    for row in here.values():
        assert row["stop"] == "length" and row["text"] is None
        assert row["n_prompt"] + row["n_generated"] in (130, 131)


def test_servers_share_the_work(process, second, job, tasks, expected) -> None:
    with Proxy(process.url) as one, Proxy(second.url) as other:
        servers = [Server(one.url), Server(other.url)]
        assert by_key(solve_on_servers(job, tasks, servers)) == expected
    assert len(one.bodies) + len(other.bodies) == len(tasks)
    assert one.bodies and other.bodies


def test_a_url_on_two_lines_gets_two_requests_at_once(process, job, tasks, expected) -> None:
    assert by_key(solve_on_servers(job, tasks, [Server(process.url)] * 2)) == expected


def test_kill_loses_and_doubles_nothing(process, start_server, job, tasks, expected, capfd) -> None:
    victim = start_server()
    rows = []
    for row in solve_on_servers(job, tasks, [Server(victim.url), Server(process.url)], NO_PAUSE):
        rows.append(row)
        if len(rows) == 5:
            victim.kill()
    assert by_key(rows) == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{victim.url} is given up: ")


def test_when_no_server_is_left_the_run_can_go_on(
    process, start_server, job, tasks, expected
) -> None:
    victim, rows = start_server(), []
    with pytest.raises(ReasonAllocError, match="no server is left for .* ConnectError: ") as caught:
        for row in solve_on_servers(job, tasks, [Server(victim.url)], NO_PAUSE):
            rows.append(row)
            if len(rows) == 3:
                victim.kill()
    assert not isinstance(caught.value, ConfigError)
    assert 3 <= len(rows) < len(tasks)
    rest = plan_tasks(ARMS, job.problems, 1, [row.key for row in rows])
    rows.extend(solve_on_servers(job, rest, [Server(process.url)]))
    assert by_key(rows) == expected


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_cuts_off_the_text_under_way(job, demo_model, monkeypatch) -> None:
    under_way, ends = threading.Event(), queue.SimpleQueue()
    complete = ModelServer.complete

    def watched(server: ModelServer, body: bytes, is_gone: Callable[[], bool]) -> object:
        n_calls = 0

        def is_gone_at_last() -> bool:
            nonlocal n_calls
            n_calls += 1
            if n_calls == 3:  # two tokens are there: no more until the client has gone
                under_way.set()
                deadline = time.monotonic() + 60
                while not is_gone() and time.monotonic() < deadline:
                    time.sleep(0)
            return is_gone()

        try:
            return complete(server, body, is_gone_at_last)
        except BaseException as error:
            ends.put(type(error))
            raise

    monkeypatch.setattr(ModelServer, "complete", watched)
    tasks = plan_tasks(ARMS[:1], job.problems, 1, ())
    with ModelServer("127.0.0.1", 0, demo_model, 1, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            rows = solve_on_servers(job, tasks, [Server(server.url)])
            with closing(rows), pytest.raises(KeyboardInterrupt):
                interrupt_when(under_way, lambda: next(rows))
            assert ends.get(timeout=60) is KeyboardInterrupt
            monkeypatch.undo()  # and the server is free for others
            assert len(list(solve_on_servers(job, tasks[:1], [Server(server.url)]))) == 1
        finally:
            server.shutdown()
            thread.join()


def interrupt_when(event: threading.Event, call: Callable[[], object]) -> None:
    """Make the call; Ctrl-C is pressed when the event is set."""

    def press() -> None:
        event.wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        call()
    finally:
        thread.join()


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_ends_a_server(start_server) -> None:
    server = start_server()
    server.popen.send_signal(signal.SIGINT)
    assert server.popen.wait(timeout=60) == 130
    assert server.errors.read_text().strip() == ""


def test_another_model_is_refused_by_both_sides(process, job, tasks, make_gguf) -> None:
    other = replace(job, model=make_gguf())
    with pytest.raises(ReasonAllocError, match="has another model: demo-reasoner") as caught:
        list(solve_on_servers(other, tasks, [Server(process.url)]))
    assert read_identity(job.model).fingerprint in str(caught.value)
    body = request_body(job)
    body[FIELD]["fingerprint"] = "sha256:0"
    status, answer = post(process, body)
    assert (status, "another model" in answer["error"]["message"]) == (400, True)


def test_what_a_server_refuses_ends_the_run(process, job, tasks) -> None:
    setup = job.setups[Arm("rkv", 112)]
    config = replace(setup.config, protect_prompt="all", budget=30)
    tight = replace(job, setups={**job.setups, Arm("rkv", 112): Setup(config, "f16")})
    wrong = [task for task in tasks if task.arm == Arm("rkv", 112)]
    with pytest.raises(ReasonAllocError, match=r"HTTP 400: .*budget"):
        list(solve_on_servers(tight, wrong, [Server(process.url)], NO_PAUSE))
    # and the server goes on
    assert post(process, request_body(job))[0] == 200


def test_labelled_and_own_servers_side_by_side(process, job, tasks, expected) -> None:
    with Fake(lambda n, body: (200, completion("x"))) as fake:
        servers = [Server(process.url), Server(fake.url, RKV)]
        rows = list(solve_on_servers(job, tasks, servers))
    found = by_key(rows)
    assert set(found) == set(expected) and len(fake.bodies) == N_PROBLEMS
    for key, row in found.items():
        if (key.method, key.budget) == RKV:
            assert row["text"] == "x" and row["kv_bytes"] is None
        else:
            assert row == expected[key]


# --- the protocol over HTTP -----------------------------------------------------------------------


def send(
    process: Process,
    body: bytes,
    method: str = "POST",
    path: str = CHAT_PATH,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(process.url.partition("//")[2], timeout=60)
    try:
        connection.putrequest(method, path)
        for name, value in (headers or {"Content-Length": str(len(body))}).items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def post(process: Process, body: object) -> tuple[int, dict[str, Any]]:
    return send(process, json.dumps(body).encode())


def test_without_our_field_it_is_a_plain_server_with_the_full_cache(process, job) -> None:
    body = request_body(job, stream=False, n=1, seed=None, user="me")
    del body[FIELD]
    status, answer = post(process, body)
    assert status == 200 and FIELD not in answer
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    full = post(process, request_body(job, Arm("full", 0)))[1]
    assert full["choices"] == answer["choices"]
    assert set(full[FIELD]) == set(MEASURED)
    # parts of a message, and the newer name of max_tokens
    parts = [{"type": "text", "text": body["messages"][0]["content"]}]
    body |= {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 3}
    del body["max_tokens"]
    assert post(process, body)[1]["choices"] == answer["choices"]
    # a client of the labelled kind
    plain = [Task(Arm("full", 0), 0, 0)]
    (row,) = solve_on_servers(job, plain, [Server(process.url, Arm("full", 0))])
    (own,) = solve_here(job, plain)
    assert (row.text, row.n_prompt, row.n_generated) == (own.text, own.n_prompt, own.n_generated)
    assert row.kv_bytes is None


@pytest.mark.parametrize(
    ("body", "changes", "status", "message"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"\xff", {}, 400, "not JSON"),
        (b'{"seed": NaN}', {}, 400, "NaN is not a number"),
        (b"[" * 100_000, {}, 400, "not JSON"),
        (b"9" * 10_000, {}, 400, ""),
        (b"", {}, 400, "not JSON"),
        (b"", {"headers": {"Content-Length": "x"}}, 411, "Content-Length"),
        (b"", {"headers": {"Content-Length": "\xb2"}}, 411, "Content-Length"),
        (b"", {"headers": {"Host2": "x"}}, 411, "Content-Length"),
        (b"", {"headers": {"Transfer-Encoding": "chunked"}}, 411, "Content-Length"),
        (b"", {"headers": {"Content-Length": "99999999"}}, 413, "longer than"),
        (b"{}", {"path": "/v1/other"}, 404, "only GET /v1/models"),
        (b"", {"path": "/", "method": "GET"}, 404, "only GET /v1/models"),
        (b"", {"method": "PUT"}, 501, "PUT"),
    ],
)
def test_malformed_requests(process, body, changes, status, message) -> None:
    found, answer = send(process, body, **changes)
    assert found == status
    assert set(answer) == {"error"} and message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert process.popen.poll() is None


def test_requests_that_no_model_can_do(process, job) -> None:
    for text, message in (("", "prompt is empty"), ("word " * 4000, "exceed")):
        status, answer = post(
            process, request_body(job, messages=[{"role": "user", "content": text}])
        )
        assert status == 400
        assert message in answer["error"]["message"] or "context" in answer["error"]["message"]


def test_garbage_and_clients_that_go_away(process, job) -> None:
    host, port = process.url.partition("//")[2].split(":")
    for data in (b"\x00\xff\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"", b"POST"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(data)
    body = json.dumps(request_body(job, max_tokens=300)).encode()
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for data in (head, head + body[:10], head + body, head + body):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(data)
    assert post(process, request_body(job))[0] == 200


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.gguf"], 1, "no such file"),
        ([str(ROOT / "README.md")], 1, "not a GGUF"),
        (["demo", "--host", "256.0.0.1"], 2, "cannot listen at 256.0.0.1"),
        (["demo", "--port", "70000"], 2, "70000"),
        ([], 2, "MODEL"),
    ],
)
def test_bad_serve_commands(arguments, code, message) -> None:
    result = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr.count("\n")) == (code, 1), result.stderr
    assert message in result.stderr


def test_a_port_that_is_taken(process) -> None:
    port = process.url.rpartition(":")[2]
    result = subprocess.run(
        [sys.executable, "-c", COMMAND, "demo", "--port", port],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and "Address already in use" in result.stderr
