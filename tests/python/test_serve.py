"""`reasonalloc-serve` as its clients see it: real processes, the openai client, plain HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import ROOT
from servers import PATIENCE, Server, serving

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from py_reasonalloc import BudgetConfig, ReasonLlama  # noqa: E402
from py_reasonalloc.task.problems import SAMPLE_PROBLEM, generate_problem  # noqa: E402
from py_reasonalloc.task.shipped import DEMO_MODEL  # noqa: E402

#: So small that problems of the demo are compressed.
CACHE = ("--budget", 96, "--buffer", 16, "--window", 16, "--profile", "none")
GREEDY = {"temperature": 0.0}
PROMPTS = [generate_problem(seed=5, index=i, level=1).prompt for i in range(8)]


@pytest.fixture(scope="module")
def server():
    with serving("demo", *CACHE) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, server, prompt: str, **options):
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model=server.name, messages=messages, **options)


# --- answers -------------------------------------------------------------------------------------


def test_sixteen_clients_at_once_get_the_answers_of_single_calls(server, client) -> None:
    def one(i: int) -> tuple[str, str, str]:
        sampling = GREEDY if i % 2 else {"temperature": 0.7, "seed": i}
        done = ask(client, server, PROMPTS[i // 2], max_tokens=90, **sampling)
        choice = done.choices[0]
        return choice.message.content, choice.message.reasoning_content, choice.finish_reason

    before = server.metrics()
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(one, range(16)))
    after = server.metrics()
    alone = [one(i) for i in range(16)]
    # batches round otherwise than single tokens do, which may turn a draw, though no clear choice
    assert [together[i] for i in range(1, 16, 2)] == [alone[i] for i in range(1, 16, 2)]
    assert sum(a == b for a, b in zip(together, alone)) >= 12
    assert len(set(together)) >= 8
    n_steps = after["steps_total"] - before["steps_total"]
    n_tokens = after["generated_tokens_total"] - before["generated_tokens_total"]
    assert n_steps < 0.5 * n_tokens
    assert after["compressions_total"] > before["compressions_total"]


def test_an_answer_is_that_of_the_library(server) -> None:
    config = BudgetConfig(budget=96, buffer=16, window=16, protect_prompt="all")
    with ReasonLlama(DEMO_MODEL, config, n_threads=1) as llama:
        expected = llama.create_completion(
            SAMPLE_PROBLEM.prompt, max_tokens=200, temperature=0.0, repeat_penalty=1.0
        )
        assert llama.kv_stats().n_compressions > 0
    got = server.text(SAMPLE_PROBLEM.prompt, max_tokens=200, **GREEDY)
    assert got["choices"][0]["text"] == expected["choices"][0]["text"]
    usage = {name: got["usage"][name] for name in expected["usage"]}
    assert usage == expected["usage"]


def test_thinking_is_apart_from_the_answer(server, client) -> None:
    done = ask(client, server, SAMPLE_PROBLEM.prompt, **GREEDY).choices[0]
    assert done.finish_reason == "stop"
    assert "think" not in done.message.content + done.message.reasoning_content
    assert len(done.message.reasoning_content) > 5 * len(done.message.content)
    assert "answer is" in done.message.content
    prompt = SAMPLE_PROBLEM.prompt
    chunks = list(ask(client, server, prompt, stream=True, **GREEDY))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == done.message.content
    thinking = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(thinking) == done.message.reasoning_content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_is_the_whole_answer_in_pieces(server) -> None:
    whole = server.text(PROMPTS[0], max_tokens=60, logprobs=2, echo=True, **GREEDY)
    options = {"max_tokens": 60, "logprobs": 2, "echo": True, **GREEDY}
    options["stream_options"] = {"include_usage": True}
    chunks = server.events("/v1/completions", prompt=PROMPTS[0], **options)
    assert len(chunks) > 50
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    choice = whole["choices"][0]
    parts = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name, expected in choice["logprobs"].items():
        got = [value for part in parts for value in (part["logprobs"] or {}).get(name, [])]
        assert got == expected, name


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(server, stream) -> None:
    whole = server.text(PROMPTS[1], max_tokens=80, **GREEDY)["choices"][0]["text"]
    stop = whole[40:47]
    options = {"max_tokens": 80, "stop": ["zzz", stop], **GREEDY}
    if stream:
        parts = server.events("/v1/completions", prompt=PROMPTS[1], **options)
        text = "".join(part["choices"][0]["text"] for part in parts)
        reason = parts[-1]["choices"][0]["finish_reason"]
    else:
        choice = server.text(PROMPTS[1], **options)["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_several_choices_read_the_prompt_once(server) -> None:
    before = server.metrics()
    options = {"max_tokens": 40, "temperature": 2.0, "min_p": 0.0, "top_p": 1.0}
    done = server.text(PROMPTS[2], n=3, seed=7, **options)
    after = server.metrics()
    texts = [choice["text"] for choice in done["choices"]]
    assert len(set(texts)) == 3
    n_prompt = done["usage"]["prompt_tokens"]
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == n_prompt
    assert done["usage"]["completion_tokens"] == 120
    assert texts[0] == server.text(PROMPTS[2], n=3, seed=7, **options)["choices"][0]["text"]
    both = server.text(PROMPTS[:2], n=2, max_tokens=5, **GREEDY)["choices"]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    assert both[0]["text"] == both[1]["text"] != both[2]["text"] == both[3]["text"]


def test_prompts_that_begin_alike_are_read_once(server) -> None:
    prompt = "So " * 20
    first = server.text(prompt + "one", max_tokens=20, **GREEDY)
    before = server.metrics()
    second = server.text(prompt + "two", max_tokens=20, **GREEDY)
    after = server.metrics()
    n_cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert n_cached >= 48
    n_read = after["prompt_tokens_total"] - before["prompt_tokens_total"]
    assert n_read == second["usage"]["prompt_tokens"] - n_cached
    assert after["checkpoint_bytes"] > 0
    again = server.text(prompt + "one", max_tokens=20, **GREEDY)
    assert again["choices"] == first["choices"]


# --- log-probabilities ---------------------------------------------------------------------------


def test_log_probabilities_of_a_chat(client, server) -> None:
    done = ask(client, server, PROMPTS[0], max_tokens=20, logprobs=True, top_logprobs=3, **GREEDY)
    content = done.choices[0].logprobs.content
    assert len(content) == 20
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token
        assert one.logprob == one.top_logprobs[0].logprob <= 0.0
    text = b"".join(bytes(one.bytes) for one in content).decode()
    assert text.strip().endswith(done.choices[0].message.reasoning_content[-20:])


def test_what_an_evaluation_asks_for(server) -> None:
    """As lm-eval-harness computes a loglikelihood: tokens in, echo, log-probabilities."""
    tokens = [server.post("/tokenize", prompt=prompt).json()["tokens"] for prompt in PROMPTS[:4]]
    assert server.post("/detokenize", tokens=tokens[0]).json()["prompt"].endswith(PROMPTS[0])
    assert {"bos_token", "eos_token"} <= set(httpx.get(f"{server.url}/tokenizer_info").json())
    options = {"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, **GREEDY}
    done = server.text(tokens, **options)
    for choice, prompt in zip(done["choices"], tokens):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(prompt) + 1
        assert found["token_logprobs"][0] is None
        assert all(value <= 0.0 for value in found["token_logprobs"][1:])
        tops = found["top_logprobs"][1:]
        assert all(1 <= len(top) <= 2 and max(top.values()) <= 0.0 for top in tops)
    only = server.text(tokens[0], **{**options, "max_tokens": 0})["choices"][0]
    assert only["text"] == PROMPTS[0] or only["text"].endswith(PROMPTS[0])
    first = done["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    assert only["logprobs"]["token_logprobs"][1:] == pytest.approx(first, abs=0.2)
    config = {"n_ctx": 512, "n_threads": 1, "logits_all": True}
    with ReasonLlama(DEMO_MODEL, None, **config) as llama:
        llama.eval(tokens[0])
        logprobs = llama.logits_to_logprobs(llama.scores[: len(tokens[0])])
    reference = [float(logprobs[i, token]) for i, token in enumerate(tokens[0][1:])]
    assert first == pytest.approx(reference, abs=0.2)


# --- JSON, grammars, tools -----------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
    },
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def test_a_json_schema_is_followed(client, server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    done = ask(client, server, PROMPTS[0], max_tokens=60, response_format=wanted, **GREEDY)
    found = json.loads(done.choices[0].message.content)
    assert set(found) == {"n", "ok"}
    free = ask(client, server, "x", max_tokens=40, response_format={"type": "json_object"})
    assert free.choices[0].message.content.lstrip().startswith("{")


def test_a_grammar_is_followed(server) -> None:
    done = server.text("x", grammar='root ::= ("yes" | "no") "!"', max_tokens=20)
    assert done["choices"][0]["text"] in ("yes!", "no!")
    assert done["choices"][0]["finish_reason"] == "stop"


def test_a_tool_that_must_be_called(client, server) -> None:
    tool = {"type": "function", "function": {"name": "answer", "parameters": SCHEMA}}
    chosen = {"type": "function", "function": {"name": "answer"}}
    options = {"tools": [tool], "tool_choice": chosen, "max_tokens": 60, **GREEDY}
    done = ask(client, server, PROMPTS[0], **options).choices[0]
    assert done.finish_reason == "tool_calls"
    call = done.message.tool_calls[0].function
    assert call.name == "answer"
    assert set(json.loads(call.arguments)) == {"n", "ok"}
    chunks = list(ask(client, server, PROMPTS[0], stream=True, **options))
    calls = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert calls[0].function.name == "answer"
    assert "".join(part.function.arguments for part in calls) == call.arguments


# --- what is refused -----------------------------------------------------------------------------

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BAD_SCHEMA = {"type": "json_object", "schema": {"$ref": "x"}}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"messages": []}, "at least 1 item"),
        (CHAT, {"messages": "hello"}, "messages: "),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "role"),
        (CHAT, {"messages": HELLO, "temprature": 1}, "temprature: there is no such field"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature: "),
        (CHAT, {"messages": HELLO, "temperature": -1}, "greater than or equal to 0"),
        (CHAT, {"messages": HELLO, "n": 0}, "n: "),
        (CHAT, {"messages": HELLO, "n": 100}, "the whole queue"),
        (CHAT, {"messages": HELLO, "stop": [""]}, "stop takes"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "needs logprobs"),
        (CHAT, {"messages": HELLO, "seed": -5}, "seed must be"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "yaml"}}, "response_format"),
        (
            CHAT,
            {
                "messages": HELLO,
                "response_format": {"type": "json_object", "schema": {"$ref": "x"}},
            },
            "JSON schema cannot be read",
        ),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "needs tools"),
        (CHAT, {"messages": HELLO, "functions": []}, "functions"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        (TEXT, {"prompt": []}, "the prompt is empty"),
        (TEXT, {"prompt": [1, 10**7]}, "there is no token 10000000"),
        (TEXT, {"prompt": "x", "grammar": "root ::= ("}, "grammar cannot be read"),
        (TEXT, {"prompt": "x", "grammar": "root ::= " + "(" * 30000}, "nested deeper"),
        (TEXT, {"prompt": "x", "grammar": 'root ::= (")" ' * 9000}, "longer than"),
        (TEXT, {"prompt": "x", "grammar": "root ::= " + '(")" ' * 9000}, "nested deeper"),
        (TEXT, {"prompt": "x", "grammar": "root ::= root"}, "grammar cannot be read"),
        (TEXT, {"prompt": "x", "logit_bias": {"x": 1}}, "there is no token 'x'"),
        (TEXT, {"prompt": "x", "best_of": 2}, "best_of"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
        (TEXT, {"prompt": "so " * 5000}, "context is 4096 tokens"),
        (TEXT, [1], "must be a JSON object"),
    ],
)
def test_errors_have_openais_form(server, path, body, words) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=PATIENCE)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert str(ROOT) not in answer.text


def test_other_errors(server, client) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-x' here"):
        client.chat.completions.create(model="gpt-x", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-x")
    assert [model.id for model in client.models.list()] == [server.name]
    for text in (b"{", b"\xff\xfe", b'{"prompt": NaN', b"[" * 100_000):
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{server.url}{TEXT}", content=text, headers=headers, timeout=PATIENCE)
        assert answer.status_code == 400, answer.text
        assert "error" in answer.json()
    large = server.post(TEXT, prompt="x" * (5 << 20))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    endless = iter([b" " * (1 << 20)] * 5)
    chunked = httpx.post(f"{server.url}{TEXT}", content=endless, timeout=PATIENCE)
    assert chunked.status_code == 413
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_prompt_that_the_budget_cannot_hold() -> None:
    with serving("demo", *CACHE, "--protect-prompt", "all", "--alias", "m") as server:
        done = server.post(TEXT, prompt=" ".join(PROMPTS), max_tokens=5)
        assert done.status_code == 400
        assert "protect" in done.json()["error"]["message"]
        assert server.text("x", max_tokens=3)["model"] == "m"


def test_the_key_and_the_queue() -> None:
    with serving("demo", "--parallel", 2, "--queue", 2, "--api-key", "k3y") as server:
        url = f"{server.url}{TEXT}"
        assert server.post(TEXT, prompt="x").status_code == 401
        assert httpx.get(f"{server.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").status_code == 200
        headers = {"Authorization": "Bearer k3y"}
        body = {"prompt": PROMPTS[0], "max_tokens": 300, "temperature": 0.0}

        def one(_: int) -> httpx.Response:
            return httpx.post(url, json=body, headers=headers, timeout=PATIENCE)

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(one, range(12)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 4
        refused = answers[codes.index(429)]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        texts = {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}
        assert len(texts) == 1


# --- ends ----------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


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


# --- the page ------------------------------------------------------------------------------------


def test_the_programs_of_the_page_run(server, tmp_path) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.+?)```", page, flags=re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        text = program.replace("http://127.0.0.1:8000", server.url)
        # tests share the processors: threads that wait for each other take minutes then
        text = text.replace("n_seq_max=4", "n_seq_max=4, n_threads=1, n_threads_batch=1")
        command = [sys.executable, "-c", text]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout) > 40
    if shutil.which("curl") and shutil.which("sh"):
        command = re.search(r"^curl .+?\}'$", page, flags=re.DOTALL | re.MULTILINE)[0]
        command = command.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=PATIENCE)
        answer = json.loads(done.stdout)["choices"][0]["message"]
        assert "eight" in answer["content"]


def test_lm_evals_task_is_what_its_script_writes(tmp_path) -> None:
    folder = ROOT / "examples" / "lm-eval"
    copy = tmp_path / "make_steps.py"
    copy.write_text((folder / "make_steps.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, str(copy)], check=True, timeout=PATIENCE, cwd=ROOT)
    written = (tmp_path / "demo_steps.jsonl").read_bytes()
    assert written == (folder / "demo_steps.jsonl").read_bytes()
