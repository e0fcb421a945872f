"""Data sets: files and what can be wrong with them, Hugging Face, the demo, order and prompts."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.cases import datasets
from py_reasonalloc.eval.cases.datasets import (
    BOXED_TEMPLATE,
    MAX_LINE_BYTES,
    default_template,
    fingerprint,
    load_dataset,
    load_problems,
    make_prompt,
    read_template,
    shuffled,
)
from py_reasonalloc.eval.cases.rows import Problem
from py_reasonalloc.task.problems import TRAIN_SEED_BASE, generate_problem, is_eval_prompt

DATA_DIR = os.environ.get("REASONALLOC_DATA_DIR")

#: Records as the two benchmarks have them.
MATH = {
    "problem": "What is $1+1$?",
    "solution": "It is $\\boxed{2}.$",
    "answer": "2",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}
AIME = {"id": 60, "problem": "Find $n$.", "solution": "$\\boxed{025}$", "answer": "025", "url": ""}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes records, or text or bytes as they are, and returns the path."""

    def write_file(*lines, name="data.jsonl") -> Path:
        parts = [line if isinstance(line, bytes) else _line(line) for line in lines]
        path = tmp_path / name
        path.write_bytes(b"".join(parts))
        return path

    def _line(line) -> bytes:
        return ((line if isinstance(line, str) else json.dumps(line)) + "\n").encode()

    return write_file


def message_of(*arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load_problems(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- files ---------------------------------------------------------------------------------------


def test_math500_file(write) -> None:
    second = {**MATH, "unique_id": "b", "answer": "\\frac{1}{2}"}
    problems = load_problems("math500", path=write(MATH, second))
    assert problems[0] == Problem(
        "test/prealgebra/1.json", "What is $1+1$?", "2", "It is $\\boxed{2}.$"
    )
    assert (problems[1].key, problems[1].answer) == ("b", "\\frac{1}{2}")


def test_aime24_file(write) -> None:
    problem = load_problems("aime24", path=write(AIME))[0]
    assert problem == Problem("60", "Find $n$.", "025", "$\\boxed{025}$")


def test_any_file_by_its_path(write) -> None:
    path = write({"question": "q", "answer": " 4 "}, "", {"question": "r", "answer": -2})
    assert load_problems(str(path)) == [Problem("line-1", "q", "4"), Problem("line-3", "r", "-2")]


def test_fields_named_by_the_user(write) -> None:
    path = write({"Prompt": "q", "Target": 2.5, "id": "2024-I-1", "solution": None})
    problems = load_problems(str(path), question_field="Prompt", answer_field="Target")
    assert problems == [Problem("2024-I-1", "q", "2.5")]


def test_a_benchmark_under_other_field_names(write) -> None:
    path = write({"Problem": "q", "Answer": "7"})
    problems = load_problems("aime24", path=path, question_field="Problem", answer_field="Answer")
    assert problems == [Problem("line-1", "q", "7")]


def test_windows_files_and_a_missing_last_newline(write) -> None:
    line = json.dumps({"question": "Größe?", "answer": "1"}, ensure_ascii=False).encode()
    problems = load_problems(str(write(b"\xef\xbb\xbf" + line + b"\r\n", line)))
    assert [(p.key, p.question) for p in problems] == [("line-1", "Größe?"), ("line-2", "Größe?")]


GOOD = {"question": "q", "answer": "1"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "data.jsonl: holds no problem"),
        (["", "  "], "data.jsonl: holds no problem"),
        (
            [GOOD, "{'question': 1}"],
            "line 2: not JSON: Expecting property name enclosed in double quotes",
        ),
        ([GOOD, '{"question": "q", "ans'], "line 2: not JSON: Invalid control character"),
        (["[" * 100_000], "data.jsonl, line 1: not JSON: "),
        (["[]"], "data.jsonl, line 1: an object with fields was expected"),
        (["3"], "data.jsonl, line 1: an object with fields was expected"),
        ([GOOD, {"question": "q"}], "line 2: no field 'answer' (fields: question)"),
        ([{"problem": "q", "answer": "1"}], "no field 'question' (fields: problem, answer)"),
        (["{}"], "data.jsonl, line 1: no field 'question' (fields: none)"),
        ([{**GOOD, "answer": " "}], "data.jsonl, line 1: field 'answer' is empty"),
        ([{**GOOD, "question": ""}], "data.jsonl, line 1: field 'question' is empty"),
        ([{**GOOD, "answer": None}], "field 'answer' must be text or a number"),
        ([{**GOOD, "answer": True}], "field 'answer' must be text or a number"),
        ([{**GOOD, "answer": ["1"]}], "field 'answer' must be text or a number"),
        (['{"question": "q", "answer": NaN}'], "field 'answer' must be text or a number"),
        ([{**GOOD, "answer": "\ud800"}], "field 'answer' is not valid Unicode"),
        ([{**GOOD, "id": {}}], "field 'id' must be text or a number"),
        (
            [{**GOOD, "id": "a"}, "", {**GOOD, "id": "a"}],
            "data.jsonl, line 3: id 'a' is that of line 1 already",
        ),
        ([{**GOOD, "id": 1}, {**GOOD, "id": "1"}], "line 2: id '1' is that of line 1 already"),
        ([GOOD, b"\xff\xfe\n"], "data.jsonl, line 2: not UTF-8 text"),
        ([b"\x00\x01\x02"], "data.jsonl, line 1: not JSON: "),
        (
            [GOOD, {**GOOD, "question": "x" * MAX_LINE_BYTES}],
            f"data.jsonl, line 2: longer than {MAX_LINE_BYTES} bytes",
        ),
    ],
)
def test_what_can_be_wrong_with_a_file(write, lines, expected) -> None:
    path = write(*lines)
    message = message_of(str(path))
    assert message.startswith(str(path))
    assert expected in message


def test_a_line_may_be_as_long_as_the_limit(write) -> None:
    shell = len(json.dumps({**GOOD, "question": ""})) + 1
    path = write({**GOOD, "question": "x" * (MAX_LINE_BYTES - shell)})
    assert path.stat().st_size == MAX_LINE_BYTES
    assert len(load_problems(str(path))) == 1


def test_files_that_cannot_be_read(tmp_path) -> None:
    missing = tmp_path / "missing.jsonl"
    assert message_of("math500", path=missing) == (
        f"{missing}: cannot be read: No such file or directory"
    )
    assert message_of(str(tmp_path)) == f"{tmp_path}: cannot be read: Is a directory"
    assert message_of("math50") == ("math50: no such file, nor a data set (math500, aime24, demo)")


def test_options_that_do_not_go_together(write) -> None:
    path = write(GOOD)
    assert "path goes with math500 or aime24" in message_of(str(path), path=path)
    for options in ({"path": path}, {"question_field": "q"}, {"answer_field": "a"}):
        assert "it has no path and no fields" in message_of("demo", **options)


@pytest.mark.skipif(not DATA_DIR, reason="REASONALLOC_DATA_DIR names no folder with the data")
@pytest.mark.parametrize(("name", "n_problems"), [("math500", 500), ("aime24", 30)])
def test_the_real_files(name, n_problems) -> None:
    problems = load_problems(name, path=Path(DATA_DIR or "") / f"{name}.jsonl")
    assert len(problems) == n_problems
    assert all(problem.solution for problem in problems)


# --- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package that keeps how it was called; `.answer` is a list or an exception."""
    fake = types.SimpleNamespace(calls=[], answer=[])

    def load_dataset(*arguments, **options):
        fake.calls.append((arguments, options))
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return iter(fake.answer)

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_benchmarks_by_name(hub) -> None:
    hub.answer = [MATH]
    assert load_problems("math500")[0].key == MATH["unique_id"]
    hub.answer = [AIME]
    assert load_problems("aime24")[0].answer == "025"
    assert hub.calls == [
        (("HuggingFaceH4/MATH-500",), {"split": "test"}),
        (("HuggingFaceH4/aime_2024",), {"split": "train"}),
    ]


def test_what_the_hub_may_answer(hub) -> None:
    hub.answer = ConnectionError("no\nroute")
    assert message_of("aime24") == (
        "aime24: HuggingFaceH4/aime_2024 cannot be loaded from Hugging Face: no route"
    )
    hub.answer = TimeoutError()
    assert message_of("aime24").endswith("Hugging Face: TimeoutError")
    hub.answer = [AIME, {"id": 1}]
    assert message_of("aime24") == (
        "HuggingFaceH4/aime_2024, row 2: no field 'problem' (fields: id)"
    )
    hub.answer = []
    assert message_of("math500") == "HuggingFaceH4/MATH-500: holds no problem"


def test_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message_of("math500") == (
        "math500: give the path of its JSON Lines file, or load it by name with Hugging Face's "
        "datasets: pip install '.[datasets]' in the checkout"
    )


# --- demo ----------------------------------------------------------------------------------------


def test_demo() -> None:
    problems = load_problems("demo", n_problems=18)
    assert [p.key for p in problems] == [f"demo-2-{i}" for i in range(18)]
    drawn = generate_problem(datasets.DEMO_SEED, 17, 2)
    assert problems[17] == Problem("demo-2-17", drawn.prompt, drawn.answer, drawn.chain)
    assert all(is_eval_prompt(p.question) for p in problems)
    assert datasets.DEMO_SEED < TRAIN_SEED_BASE
    other = load_problems("demo", n_problems=18, demo_level=1)
    assert other[3].key == "demo-1-3"
    assert other[3].question == generate_problem(datasets.DEMO_SEED, 3, 1).prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_problems": 0}, "n_problems must be at least 1, got 0"),
        ({"demo_level": 9}, "demo_level must be one of"),
    ],
)
def test_demo_arguments_out_of_range(options, message) -> None:
    assert message in message_of("demo", **options)


# --- order, prompts, fingerprint -----------------------------------------------------------------

PROBLEMS = [Problem(f"k{i}", f"question {i}", str(i)) for i in range(10)]


def test_the_order_is_the_same_everywhere() -> None:
    # a literal, so that every platform and version of Python is held to it
    keys = ["k5", "k6", "k7", "k3", "k1", "k4", "k8", "k9", "k2", "k0"]
    assert [p.key for p in shuffled(PROBLEMS, seed=0)] == keys


@given(st.permutations(PROBLEMS), st.integers())
def test_a_shuffle_is_a_permutation_that_depends_on_the_seed_alone(problems, seed) -> None:
    order = shuffled(problems, seed)
    assert sorted(p.key for p in order) == [p.key for p in PROBLEMS]
    assert order == shuffled(PROBLEMS, seed)


def test_seeds_give_different_orders() -> None:
    orders = {tuple(p.key for p in shuffled(PROBLEMS, seed)) for seed in range(20)}
    assert len(orders) == 20


def test_fingerprint() -> None:
    digits = fingerprint(PROBLEMS)
    assert len(digits) == 16
    assert int(digits, 16) >= 0
    assert fingerprint(reversed(PROBLEMS)) == digits
    changed = [
        Problem("k0", "question 0", "1"),
        Problem("k0", "question 0 ", "0"),
        Problem("k00", "question 0", "0"),
        Problem("k0question 0", "", "0"),
    ]
    others = {fingerprint([problem, *PROBLEMS[1:]]) for problem in changed}
    assert len(others | {digits, fingerprint(PROBLEMS[1:])}) == 6
    with_solution = [Problem(p.key, p.question, p.answer, "so") for p in PROBLEMS]
    assert fingerprint(with_solution) == digits


def test_prompts() -> None:
    boxed = default_template("math500")
    assert default_template("aime24") == default_template("some/file.jsonl") == boxed
    tricky = Problem("k", "Is \\frac{1}{2} in {x} or {question}? {{}} %s \\1", "1")
    assert make_prompt(boxed, tricky) == (
        tricky.question
        + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert make_prompt(default_template("demo"), tricky) == tricky.question


def test_a_template_of_one_s_own(write) -> None:
    path = write("Q: {question}", "", "A {short} answer:", name="template.txt")
    template = read_template(path)
    assert make_prompt(template, PROBLEMS[1]) == "Q: question 1\n\nA {short} answer:"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a prompt has {question} once, not 0 times"),
        (b"{Question}", "a prompt has {question} once, not 0 times"),
        (b"{question} {question}", "a prompt has {question} once, not 2 times"),
        (b"\xff{question}", "the template is not UTF-8 text (byte 1)"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_what_can_be_wrong_with_a_template(tmp_path, content, expected) -> None:
    path = tmp_path / "template.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_template(path)
    assert str(caught.value) == f"{path}: {expected}"


# --- a whole data set ----------------------------------------------------------------------------


def test_a_data_set_of_a_file(write) -> None:
    path = write(*({"id": p.key, "q": p.question, "a": p.answer} for p in PROBLEMS))
    template = write("{question}!", name="t.txt")
    fields = {"question_field": "q", "answer_field": "a"}
    plain = load_dataset(str(path), **fields)
    assert plain.name == "data.jsonl"
    assert plain.problems == tuple(PROBLEMS)
    assert plain.template == BOXED_TEMPLATE
    assert plain.prompts[2] == make_prompt(BOXED_TEMPLATE, PROBLEMS[2])
    mixed = load_dataset(str(path), template=template, shuffle_seed=3, **fields)
    assert mixed.problems == tuple(shuffled(PROBLEMS, 3)) != plain.problems
    assert mixed.prompts == tuple(p.question + "!" for p in mixed.problems)
    assert mixed.fingerprint == plain.fingerprint == fingerprint(PROBLEMS)


def test_data_sets_with_a_name(write) -> None:
    assert load_dataset("math500", path=write(MATH)).name == "math500"
    assert load_dataset("aime24", path=write(AIME)).prompts[0].startswith("Find $n$.\nPlease")


def test_a_file_with_the_name_of_a_data_set_is_told_from_it(write) -> None:
    path = write(GOOD, name="demo")
    assert load_dataset(str(path)).name == str(path)


def test_the_demo_data_set_is_the_same_whatever_part_of_it_is_used() -> None:
    part = load_dataset("demo", level=1, n_problems=3)
    assert part == load_dataset("demo", level=1)
    assert (part.name, len(part.problems)) == ("demo", datasets.DEMO_PROBLEMS)
    assert part.prompts == tuple(p.question for p in part.problems)
    more = load_dataset("demo", level=1, n_problems=datasets.DEMO_PROBLEMS + 1)
    assert more.problems[:-1] == part.problems
    assert more.fingerprint == part.fingerprint  # so that problems can be added to results
