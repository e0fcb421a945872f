"""The demo's problem generator: reproducible, right, and split as it claims."""

import re

import pytest

from py_reasonalloc.task import problems as dp

_WORD = {word: value for value, word in enumerate(dp.NUMBERS)}


def _solve(prompt):
    """Work a problem out from its prompt alone; return {name: value} and the name asked for."""
    body, asked = re.fullmatch(r"Given (.*)\. What is ([A-Z])\?", prompt).groups()
    start, *lines = body.split("; ")
    name, word = start.split(" is ")
    values = {name: _WORD[word]}
    for line in lines:
        first, operator, second, result = re.fullmatch(
            r"([A-Z]) (plus|minus) (\w+) gives ([A-Z])(?:, recap)?", line
        ).groups()
        amount = values[second] if second in values else _WORD[second]
        values[result] = values[first] + (amount if operator == "plus" else -amount)
    return values, asked


@pytest.mark.parametrize("level", sorted(dp.LEVEL_STEPS))
def test_gold_answer_follows_from_the_prompt(level):
    for index in range(50):
        problem = dp.generate_problem(3, index, level)
        values, asked = _solve(problem.prompt)
        assert len(values) == dp.LEVEL_STEPS[level] + 1 == problem.n_steps + 1
        assert all(0 <= value <= dp.MAX_VALUE for value in values.values())
        assert problem.answer == str(values[asked])
        assert dp.extract_answer(problem.chain) == problem.answer


def test_every_statement_of_the_chain_is_true():
    for index in range(50):
        problem = dp.generate_problem(4, index, 3)
        values, _ = _solve(problem.prompt)
        stated = re.findall(r"\b([A-Z]) is ([a-z]+)", problem.chain)
        assert len(stated) > 2 * problem.n_steps
        assert all(values[name] == _WORD[word] for name, word in stated)
        for a, operator, b, result in re.findall(
            r"(\w+) (plus|minus) (\w+) makes (\w+)", problem.chain
        ):
            assert _WORD[a] + (_WORD[b] if operator == "plus" else -_WORD[b]) == _WORD[result]


def test_facts_are_recalled_from_far_back():
    recalls = [dp.generate_problem(5, i, 3).chain.count("as we found before") for i in range(50)]
    assert sum(recalls) / len(recalls) > 3
    assert all("recap up to" in dp.generate_problem(5, i, 2).chain for i in range(20))


def test_same_arguments_give_the_same_problem():
    assert dp.generate_problem(11, 5, 2) == dp.generate_problem(11, 5, 2)
    prompts = {
        dp.generate_problem(seed, i, level).prompt
        for seed in (1, 2)
        for i in range(20)
        for level in (1, 2, 3)
    }
    assert len(prompts) == 120


def test_sample_problem_is_pinned():
    """A generator that draws other problems must be noticed: the model was trained on these."""
    assert dp.SAMPLE_PROBLEM.prompt == (
        "Given P is three; P plus five gives W; W plus five gives L; L minus P gives V; V "
        "minus nine gives G; G plus nine gives X; X plus V gives N, recap; N minus W gives K;"
        " K plus G gives F. What is F?"
    )
    assert dp.SAMPLE_PROBLEM.answer == "13"
    assert dp.SAMPLE_PROBLEM.chat_prompt == f"<|user|>{dp.SAMPLE_PROBLEM.prompt}<|assistant|>"


def test_training_and_evaluation_sides_cannot_meet():
    base = dp.TRAIN_SEED_BASE
    for n_steps in (1, 2, 6, 12):
        for index in range(30):
            assert dp.is_eval_prompt(dp.generate_problem(0, index, n_steps=n_steps).prompt)
            assert dp.is_eval_prompt(dp.generate_problem(base - 1, index, n_steps=n_steps).prompt)
            assert not dp.is_eval_prompt(dp.generate_problem(base, index, n_steps=n_steps).prompt)
            assert not dp.is_eval_prompt(
                dp.generate_problem(base + 1000, index, n_steps=n_steps).prompt
            )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nSo C is eight as asked.\n</think>\nThe answer is eight.", "8"),
        ("The answer is twenty.", "20"),
        ("The ANSWER is 07", "7"),
        ("the answer is two. No, the answer is three.", "3"),
        ("<think>The answer is two.</think> I do not know", None),
        ("The answer is Z.", None),
        ("<think>\nSo C is eight as asked.\n", None),
        ("", None),
    ],
)
def test_extract_answer(text, expected):
    assert dp.extract_answer(text) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": -1, "index": 0},
        {"seed": 0, "index": -1},
        {"level": 9},
        {"n_steps": 0},
        {"n_steps": 13},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        dp.generate_problem(**{"seed": 0, "index": 0, **arguments})


def test_evaluate_needs_no_torch(demo_model) -> None:
    """The measuring command of the model card runs without the training tools."""
    import json
    import subprocess
    import sys

    script = (
        "import sys; sys.modules['torch'] = None; from py_reasonalloc.demo import evaluate as e;"
    )
    command = [sys.executable, "-c", f"{script} sys.argv[1:] = sys.argv[2:]; e.main()", "-"]
    done = subprocess.run(
        [*command, str(demo_model), "--problems", "2"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    head, *rows = map(json.loads, done.stdout.splitlines())
    assert head["tokenizer_mismatches"] == 0
    assert [row["problems"] for row in rows] == [2, 2, 2]
    assert sum(row["accuracy"] for row in rows) >= 2.0
