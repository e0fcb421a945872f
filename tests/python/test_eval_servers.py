"""Evaluation over HTTP: servers of ours as real processes, others played by a script."""

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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from py_reasonalloc import ConfigError, ReasonAllocError, __version__
from py_reasonalloc.eval import exchange
from py_reasonalloc.eval.datasets import DEMO_DATASET, load_dataset
from py_reasonalloc.eval.http_server import ModelServer
from py_reasonalloc.eval.methods import Arm, Common, Setup, parse_arms, setup_of
from py_reasonalloc.eval.run import plan_tasks, solve_here
from py_reasonalloc.eval.servers import PAUSES, Server, read_servers, solve_on_servers
from py_reasonalloc.eval.wire import (
    CHAT_PATH,
    FIELD,
    MEASURED,
    Served,
    parse_request,
    setup_from_json,
    setup_to_json,
)
from py_reasonalloc.eval.worker import Job, Task, request_of
from py_reasonalloc.identity import read_identity
from py_reasonalloc.lookup import find_profile

httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parents[2]
ARMS = parse_arms(["full", "rkv", "reasonalloc+kv=q8_0"], [112, 128])
N_PROBLEMS = 4
NO_PAUSE = (0.0,) * 3


@pytest.fixture(scope="module")
def job(demo_model: Path) -> Job:
    """Return short texts: they are cut off, which is no matter here."""
    dataset = load_dataset(DEMO_DATASET)
    common = Common(
        buffer=16,
        sinks=4,
        window=8,
        n_protect=90,
        kv_type="f16",
        profile=find_profile(demo_model),
    )
    return Job(
        model=demo_model,
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


@pytest.fixture(scope="module")
def tasks(job: Job) -> list[Task]:
    return plan_tasks(ARMS, job.problems, 1, ())


@pytest.fixture(scope="module")
def expected(job: Job, tasks: list[Task]) -> dict[Any, dict[str, Any]]:
    return by_key(solve_here(job, tasks))


def by_key(rows: Any) -> dict[Any, dict[str, Any]]:
    """Return key -> row without its times; no key may come twice."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        assert row.key not in found
        found[row.key] = {k: v for k, v in row.to_json().items() if not k.endswith("_seconds")}
    return found


def test_every_text_has_seeds_of_its_own(job: Job, tasks: list[Task]) -> None:
    seeds = {}
    for task in tasks:
        request = request_of(job, task)
        if request.setup.config is not None:
            assert request.setup.config.policy_seed == request.sampling.seed
        assert seeds.setdefault(task.problem, request.sampling.seed) == request.sampling.seed
    assert len(set(seeds.values())) == N_PROBLEMS


# --- servers of ours ------------------------------------------------------------------------------

COMMAND = (
    "from py_reasonalloc.console import run_command; "
    "from py_reasonalloc.eval.serve import serve_command; "
    "run_command(serve_command, 'reasonalloc-eval serve')"
)


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
        rows = solve_on_servers(job, tasks, [Server(server.url)])
        with pytest.raises(KeyboardInterrupt):
            interrupt_when(under_way, lambda: next(rows))
        assert ends.get(timeout=60) is KeyboardInterrupt
        monkeypatch.undo()  # and the server is free for others
        assert len(list(solve_on_servers(job, tasks[:1], [Server(server.url)]))) == 1
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


# --- the protocol ---------------------------------------------------------------------------------


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


def test_every_cache_survives_the_wire(demo_model) -> None:
    common = Common(16, 4, 8, 40, "q4_0", find_profile(demo_model))
    labels = ["full", "rkv+lambda=0.3", "h2o", "random", "pyramid-rkv", "wave+gamma=1", "adaptive"]
    labels += ["adaptive+attention=layer", "reasonalloc+policy=snapkv+clip_lo=0+value_guard=2"]
    for arm in parse_arms(labels, [200]):
        setup = setup_of(arm, common)
        if setup.config is not None:
            setup = setup._replace(config=replace(setup.config, policy_seed=2**63))
        assert setup_from_json(json.loads(json.dumps(setup_to_json(setup))), 4096) == setup


SERVED = Served("model.gguf", "sha256:1", 1000, 500)
MESSAGES = [{"role": "user", "content": "2+2?"}]


def own(**fields: object) -> dict[str, Any]:
    base = setup_to_json(setup_of(Arm("rkv", 64), Common(16, 4, 8, 0, "f16", None)))
    ours = {"version": __version__, "fingerprint": "sha256:1", "n_ctx": 100, "raw": False, **base}
    return {"messages": MESSAGES, FIELD: {**ours, **fields}}


def with_config(**fields: object) -> dict[str, Any]:
    body = own()
    body[FIELD]["config"] |= fields
    return body


BAD_BODIES = [
    ([], "must be an object"),
    ({}, "messages must be a list"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": MESSAGES * 2}, "list of one message"),
    ({"messages": ["hi"]}, "messages must be a list"),
    ({"messages": [{"role": "system", "content": "hi"}]}, "must be user"),
    ({"messages": [{"role": "user", "content": 3}]}, "content must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content must be text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": MESSAGES, "temperature": "hot"}, "temperature = 'hot' must be a number"),
    ({"messages": MESSAGES, "temperature": -1}, "temperature = -1 is out of range"),
    ({"messages": MESSAGES, "top_p": 1.5}, "top_p = 1.5 is out of range"),
    ({"messages": MESSAGES, "seed": -1}, "seed = -1 is out of range"),
    ({"messages": MESSAGES, "seed": True}, "seed = True must be a whole number"),
    ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens = 0 is out of range"),
    ({"messages": MESSAGES, "max_tokens": 1e9}, "max_tokens = 1000000000.0 must be a whole"),
    ({"messages": MESSAGES, "stream": True}, "stream: this server does without"),
    ({"messages": MESSAGES, "n": 2}, "n: this server does without"),
    ({"messages": MESSAGES, "stop": ["x"]}, "stop: this server does not know"),
    ({"messages": MESSAGES, FIELD: []}, "reasonalloc must be an object"),
    ({"messages": MESSAGES, FIELD: {}}, "reasonalloc: the field 'config' is missing"),
    (own(version="0.0.1"), f"this server is reasonalloc {__version__}, the evaluation 0.0.1"),
    (own(fingerprint="sha256:2"), "another model than the evaluation: model.gguf"),
    (own(more=1), "reasonalloc: the field 'more' is unknown"),
    (own(n_ctx=1001), "n_ctx = 1001 is out of range: must be 1 to 1000"),
    (own(n_ctx="all"), "n_ctx = 'all' must be a whole number"),
    (own(raw=1), "raw = 1 must be true or false"),
    (own(kv_type=99), "kv_type = 99 must be a name"),
    (own(kv_type="q3"), "cache type = 'q3' is unknown"),
    (own(config=[]), "config must be an object"),
    (own(config={}), "config: the field 'budget' is missing"),
    (with_config(more=1), "config: the field 'more' is unknown"),
    (with_config(budget="64"), "budget = '64' must be a whole number"),
    (with_config(budget=1 << 20), "more than twice the model's context"),
    (with_config(buffer=1 << 20), "more than twice the model's context"),
    (with_config(budget=9), "budget"),
    (with_config(policy="best"), "policy = 'best' is unknown"),
    (with_config(policy="\ud800"), "wrong type"),
    (with_config(mu=None), "wrong type"),
    (with_config(policy=None), "policy = None must be a name"),
    (with_config(layers=[64] * 6), "tables of budgets are not taken"),
    (with_config(head_budgets=[64] * 24), "tables of budgets are not taken"),
    (with_config(layers="wave"), "needs a profile"),
    (with_config(profile="/etc/passwd"), "profile must be an object"),
    (with_config(profile={}), "profile: the field 'architecture' is missing"),
    (with_config(protect_prompt=[1]), "protect_prompt = [1] must be a whole number"),
]


@pytest.mark.parametrize(("body", "message"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_bad_requests_are_named(body, message) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_request(json.dumps(body).encode(), SERVED)
    assert message in str(caught.value)


def test_a_bad_profile_is_named(demo_model) -> None:
    setup = setup_of(Arm("wave", 64), Common(16, 4, 8, 0, "f16", find_profile(demo_model)))
    for field, value in (("demand", []), ("demand", "x"), ("n_layer", -1), ("gamma", None)):
        body = own(**setup_to_json(setup))
        assert parse_request(json.dumps(body).encode(), SERVED).request.setup == setup
        body[FIELD]["config"]["profile"][field] = value
        with pytest.raises(ConfigError, match=field):
            parse_request(json.dumps(body).encode(), SERVED)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def nearly_right_bodies(draw: Any) -> bytes:
    """Draw a good body with one value, somewhere in it, replaced by any other."""
    root: Any = own(config=dict(own()[FIELD]["config"])) | {"seed": 1, "temperature": 0.5}
    root = json.loads(json.dumps(root))
    place = root
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
            place[key] = draw(json_values)
            return json.dumps(root).encode()
        place = place[key]


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60)
    | json_values.map(lambda v: json.dumps(v).encode())
    | nearly_right_bodies()
)
def test_a_body_is_understood_or_refused_with_one_error(body: bytes) -> None:
    try:
        wanted = parse_request(body, SERVED)
    except ConfigError:
        return
    assert 1 <= wanted.n_ctx <= 1000 and wanted.request.prompt == wanted.request.prompt


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


# --- servers of others ----------------------------------------------------------------------------


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


RKV = Arm("rkv", 112)


def rkv_tasks(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.arm == RKV]


def test_a_labelled_server_gets_openai_requests(job, tasks) -> None:
    with Fake(
        lambda n, body: (200, completion("</think>\n\n14", ["stop", "length"][n % 2]))
    ) as fake:
        rows = list(solve_on_servers(job, rkv_tasks(tasks), [Server(fake.url, RKV)]))
    assert len(rows) == N_PROBLEMS
    assert Counter(row.stop for row in rows) == {"end": 2, "length": 2}
    for row, body in zip(rows, fake.bodies):
        assert (row.n_prompt, row.n_generated, row.text) == (7, 9, "</think>\n\n14")
        assert (row.method, row.budget) == RKV
        assert all(getattr(row, name) is None for name in MEASURED[3:])
        assert body == {
            "model": "their-name",
            "messages": [{"role": "user", "content": body["messages"][0]["content"]}],
            "temperature": 0.8,
            "top_p": 0.95,
            "seed": row.seed,
            "max_tokens": 60,
            "top_k": -1,
            "min_p": 0.0,
        }
        assert body["messages"][0]["content"] in job.prompts


def test_raw_prompts_go_to_completions(job, tasks) -> None:
    answer = {"choices": [{"text": "5", "finish_reason": "stop"}]}
    answer |= {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    with Fake(lambda n, body: (200, answer)) as fake:
        fake.models = (404, b"no such page")
        raw = replace(job, raw=True, temp=0.0)
        list(solve_on_servers(raw, rkv_tasks(tasks)[:1], [Server(fake.url, RKV)]))
    (body,) = fake.bodies
    assert fake.paths == ["/v1/completions"] and body["prompt"] == job.prompts[0]
    assert body["model"] == job.model.stem
    assert not {"messages", "top_k", "min_p"} & set(body)


def test_thoughts_that_a_server_cut_off_are_put_back(job, tasks) -> None:
    answers = [
        completion("14", reasoning_content="so"),
        completion("14", reasoning="so"),
        completion(None, "length", reasoning_content="so"),
        completion("14", reasoning_content=None),
    ]
    with Fake(lambda n, body: (200, answers[n - 1])) as fake:
        rows = list(solve_on_servers(job, rkv_tasks(tasks), [Server(fake.url, RKV)]))
    close = "</think>"
    assert [row.text for row in rows] == [f"so{close}14", f"so{close}14", "so", "14"]


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


@pytest.mark.parametrize(
    "failure",
    [
        (500, {"error": {"message": "out of slots"}}),
        (503, b"<html>busy</html>"),
        (429, {"error": "too many"}),
        (200, completion("half", "abort")),
        (0, b"closed without an answer"),
    ],
)
def test_failures_pass(job, tasks, failure, capfd) -> None:
    def respond(number: int, _: object) -> tuple[int, object]:
        return failure if number % 4 else (200, completion("1"))

    with Fake(respond) as fake:
        rows = list(solve_on_servers(job, rkv_tasks(tasks), [Server(fake.url, RKV)], NO_PAUSE))
    assert len(by_key(rows)) == N_PROBLEMS and len(fake.bodies) == 4 * N_PROBLEMS
    assert capfd.readouterr().err == ""


def test_one_failure_too_many(job, tasks, capfd) -> None:
    fake, message = (
        Fake(lambda n, body: (500, {"error": "out\nof slots"})),
        "is left for rkv@112; .*: HTTP 500: out of slots .* same",
    )
    with fake, pytest.raises(ReasonAllocError, match=message):
        list(solve_on_servers(job, rkv_tasks(tasks), [Server(fake.url, RKV)], NO_PAUSE))
    assert len(fake.bodies) == len(NO_PAUSE) + 1
    assert capfd.readouterr().err == ""  # the error says it all


@pytest.fixture
def attempts(monkeypatch) -> list[str]:
    """URLs of all requests made."""
    urls: list[str] = []
    request = httpx.AsyncClient.request

    async def counted(client: Any, method: str, url: str, **options: Any) -> Any:
        urls.append(url)
        return await request(client, method, url, **options)

    monkeypatch.setattr(httpx.AsyncClient, "request", counted)
    return urls


@pytest.fixture
def closed_url() -> str:
    """A port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_wrong_url_ends_the_run_at_once(job, tasks, attempts, closed_url, capfd) -> None:
    with pytest.raises(ReasonAllocError) as caught:  # with the real pauses
        list(solve_on_servers(job, rkv_tasks(tasks), [Server(closed_url, RKV)]))
    assert attempts == [f"{closed_url}/v1/models"]
    assert f"{closed_url}: cannot be reached: ConnectError: " in str(caught.value)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_a_wrong_url_leaves_its_work_to_another(job, tasks, attempts, closed_url, capfd) -> None:
    with Fake(lambda n, body: (200, completion("1"))) as good:
        servers = [Server(closed_url, RKV), Server(good.url, RKV)]
        rows = list(solve_on_servers(job, rkv_tasks(tasks), servers))
    assert len(by_key(rows)) == len(good.bodies) == N_PROBLEMS
    assert [url for url in attempts if url.startswith(closed_url)] == [f"{closed_url}/v1/models"]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{closed_url} is given up: cannot be reached: ")


def test_a_server_that_was_there_keeps_all_its_attempts(job, tasks, attempts) -> None:
    def respond(number: int, _: object) -> tuple[int, object]:
        if number == 2:
            fake.server_close()
        return (200, completion("1")) if number == 1 else (0, b"")

    fake = Fake(respond)
    with pytest.raises(ReasonAllocError, match="cannot be reached: ConnectError"), fake:
        list(solve_on_servers(job, rkv_tasks(tasks), [Server(fake.url, RKV)], NO_PAUSE))
    assert len(fake.bodies) == 2  # one text, one failure; then it is gone
    assert attempts[3:] == [f"{fake.url}/v1/models"] * len(NO_PAUSE)


def test_a_server_that_hangs(job, tasks, monkeypatch) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(exchange, "TEXT_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "TOKEN_SECONDS", 0.0)
    with Fake(lambda n, body: (200 if is_over.wait() else 0, b"")) as fake:
        with pytest.raises(ReasonAllocError, match="no server is left for rkv@112; .*ReadTimeout"):
            list(solve_on_servers(job, rkv_tasks(tasks), [Server(fake.url, RKV)], NO_PAUSE))
        is_over.set()


def test_a_failing_server_leaves_its_work_to_another(job, tasks, capfd) -> None:
    bad = Fake(lambda n, body: (500, b""))
    good = Fake(lambda n, body: (200, completion("1")))
    with bad, good:
        servers = [Server(bad.url, RKV), Server(good.url, RKV)]
        rows = list(solve_on_servers(job, rkv_tasks(tasks), servers, (3600.0,)))
    assert len(by_key(rows)) == len(good.bodies) == N_PROBLEMS
    assert len(bad.bodies) <= 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": {"message": "max_tokens is too large"}}), "HTTP 400: max_tokens is too"),
        ((401, {"detail": "who are you"}), "HTTP 401: "),
        ((404, {"object": "error", "message": "no such model"}), "HTTP 404: no such model"),
        ((301, b""), "HTTP 301: Moved Permanently"),
        ((200, b"<html>"), "cannot be understood: no JSON"),
        ((200, []), "cannot be understood"),
        ((200, {"choices": []}), "cannot be understood"),
        ((200, {**completion("x"), "usage": None}), "cannot be understood"),
        ((200, completion(3)), "a value has the wrong type"),  # type: ignore[arg-type]
        (
            (200, {**completion("x"), "usage": {"prompt_tokens": 1}}),
            "'completion_tokens' is missing",
        ),
    ],
)
def test_answers_that_end_the_run(job, tasks, answer, message) -> None:
    with Fake(lambda n, body: answer) as fake, pytest.raises(ReasonAllocError) as caught:
        list(solve_on_servers(job, rkv_tasks(tasks), [Server(fake.url, RKV)], NO_PAUSE))
    assert str(caught.value).startswith(fake.url) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_servers_of_ours_stand_without_an_arm(job, tasks) -> None:
    with Fake(lambda n, body: (200, completion("x"))) as fake:
        with pytest.raises(ReasonAllocError, match="is not a reasonalloc-eval serve: write behind"):
            list(solve_on_servers(job, tasks, [Server(fake.url)], NO_PAUSE))
        ours = {"version": "0.0.1", "fingerprint": "sha256:0"}
        fake.models = (200, {"data": [{"id": "m", FIELD: ours}]})
        with pytest.raises(ReasonAllocError, match="is reasonalloc 0.0.1, this is"):
            list(solve_on_servers(job, tasks, [Server(fake.url)], NO_PAUSE))
    assert not fake.bodies


def test_a_server_of_several_models(job, tasks) -> None:
    with Fake(lambda n, body: (200, completion("x"))) as fake:
        fake.models = (200, {"data": [{"id": "a"}, {"id": job.model.stem}]})
        list(solve_on_servers(job, rkv_tasks(tasks)[:1], [Server(fake.url, RKV)]))
        assert fake.bodies[0]["model"] == job.model.stem
        fake.models = (200, {"data": [{"id": "a"}, {"id": "b"}]})
        with pytest.raises(ReasonAllocError, match=r"has several models \(a, b\)"):
            list(solve_on_servers(job, rkv_tasks(tasks), [Server(fake.url, RKV)]))


def test_arms_and_servers_must_fit(job, tasks) -> None:
    with pytest.raises(ConfigError, match="rkv@999 is not evaluated: only full, rkv@112"):
        solve_on_servers(job, tasks, [Server("http://a"), Server("http://b", Arm("rkv", 999))])
    with pytest.raises(ConfigError, match="no server does full: add a line URL, or URL full"):
        solve_on_servers(job, tasks, [Server("http://b", RKV)])
    with pytest.raises(ConfigError, match="not the URL of a server"):
        solve_on_servers(job, tasks, [Server("http://\x00")])


def test_httpx_is_optional(job, tasks, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[server\]' in the checkout"):
        solve_on_servers(job, tasks, [Server("http://a")])


# --- files ----------------------------------------------------------------------------------------


def test_server_files(tmp_path) -> None:
    path = tmp_path / "servers.txt"
    path.write_text(
        "\ufeff# two of ours\nhttp://one:8080\nhttp://one:8080/v1/  # again\n\n"
        "https://[::1]:9/prefix/v1 full\n  http://u:pw@three rkv+lambda=0.5@256 # fast\n",
        encoding="utf-8",
    )
    servers = read_servers(path)
    assert servers == [
        Server("http://one:8080"),
        Server("http://one:8080"),
        Server("https://[::1]:9/prefix", Arm("full", 0)),
        Server("http://u:pw@three", Arm("rkv+lambda=0.5", 256)),
    ]
    assert str(servers[-1]) == "http://three"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no server in it"),
        ("# http://a\n\n", "no server in it"),
        ("http://a\nlocalhost:8080", "line 2: 'localhost:8080' is not the URL"),
        ("ftp://a", "line 1: 'ftp://a' is not the URL"),
        ("http://", "line 1: 'http://' is not the URL"),
        ("/v1", "line 1: '/v1' is not the URL"),
        ("http://a:99999", "line 1: 'http://a:99999' is not the URL"),
        ("http://a:b", "line 1: 'http://a:b' is not the URL"),
        ("http://[a", "line 1: 'http://[a' is not the URL"),
        ("http://a?x=1", "line 1: 'http://a?x=1' is not the URL"),
        ("http://a#x", "line 1: 'http://a#x' is not the URL"),
        ("http://a rkv@64 4", "line 1: must be URL or URL METHOD@BUDGET"),
        ("http://a best@64", "line 1: method = 'best' is unknown"),
        ("http://a rkv", "line 1: rkv needs its budget: write rkv@BUDGET"),
        ("http://a rkv@x", "line 1: rkv@x: 'x' is not a number"),
        ("http://a full@64", "line 1: full@64: the full cache has no budget"),
        ("http://a\n\nhttp://a/v1 full", "line 3: http://a stands for all arms already"),
        ("http://a rkv@8\nhttp://a rkv@9", "line 2: http://a stands for rkv@8 already"),
    ],
)
def test_bad_server_files(tmp_path, text, message) -> None:
    path = tmp_path / "servers.txt"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_servers(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_server_files_that_cannot_be_read(tmp_path) -> None:
    path = tmp_path / "servers.txt"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_servers(path)
    path.write_bytes(b"http://\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_servers(path)


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


def test_pauses_grow() -> None:
    assert list(PAUSES) == sorted(PAUSES) and 30 <= sum(PAUSES) <= 120
