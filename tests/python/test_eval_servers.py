"""The client of model servers, which a script plays; and files of servers."""

from __future__ import annotations

import socket
import sys
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from eval_servers import (
    N_PROBLEMS,
    NO_PAUSE,
    RKV,
    Fake,
    by_key,
    completion,
    rkv_tasks,
)

from py_reasonalloc import ConfigError, ReasonAllocError
from py_reasonalloc.eval.cases.methods import Arm
from py_reasonalloc.eval.decode.worker import Job, Task, request_of
from py_reasonalloc.eval.remote import exchange
from py_reasonalloc.eval.remote.servers import PAUSES, Server, read_servers, solve_on_servers
from py_reasonalloc.eval.remote.wire import FIELD, MEASURED

httpx = pytest.importorskip("httpx")


def test_every_text_has_seeds_of_its_own(job: Job, tasks: list[Task]) -> None:
    seeds = {}
    for task in tasks:
        request = request_of(job, task)
        if request.setup.config is not None:
            assert request.setup.config.policy_seed == request.sampling.seed
        assert seeds.setdefault(task.problem, request.sampling.seed) == request.sampling.seed
    assert len(set(seeds.values())) == N_PROBLEMS


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


def test_pauses_grow() -> None:
    assert list(PAUSES) == sorted(PAUSES) and 30 <= sum(PAUSES) <= 120
