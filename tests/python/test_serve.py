"""`reasonalloc-serve` as its clients see it: real processes, the openai client, plain HTTP."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import ROOT
from servers import GREEDY, PATIENCE, PROMPTS

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from py_reasonalloc import BudgetConfig, ReasonLlama  # noqa: E402
from py_reasonalloc.task.problems import SAMPLE_PROBLEM  # noqa: E402
from py_reasonalloc.task.shipped import DEMO_MODEL  # noqa: E402


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
