"""What `reasonalloc-serve` refuses, in OpenAI's form."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import ROOT
from servers import CACHE, CHAT, HELLO, PATIENCE, PROMPTS, TEXT, serving

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")


BAD_SCHEMA = {"type": "json_object", "schema": {"$ref": "x"}}


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
