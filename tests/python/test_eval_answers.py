"""What counts as correct: mathematics through math-verify, where an answer is read, the demo."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.cases.datasets import load_problems
from py_reasonalloc.eval.decode import answers
from py_reasonalloc.eval.decode.answers import (
    AFTER_BOX,
    Judgement,
    MathChecker,
    judge_demo,
    judge_for,
    judge_math,
)
from py_reasonalloc.task.problems import generate_problem

DATA_DIR = os.environ.get("REASONALLOC_DATA_DIR")

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify is missing (extra eval, Python 3.10 or later)",
)
needs_data = pytest.mark.skipif(
    not DATA_DIR, reason="REASONALLOC_DATA_DIR names no folder with the data"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")

#: Sympy would compute this number before it compares it.
ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture
def checker():
    """A checker of its own that gives up soon."""
    found = MathChecker(timeout_seconds=3)
    yield found
    found.close()


def is_correct(answer: str, gold: str) -> bool:
    return judge_math(rf"So it is $\boxed{{{answer}}}$.", gold).correct


# --- mathematics ---------------------------------------------------------------------------------

#: gold, then what is the same; golds are of the kinds that MATH-500 has.
SAME = [
    ("3", ["3", "3.0", "3.", r"\text{3}", "x = 3", "1+2", r"\frac{6}{2}", r"\$3", "3 \\text{ cm}"]),
    (r"10,\!080", ["10080", "10,080", "10{,}080"]),
    ("58,500", ["58500", "58,500"]),
    (r"\$32,\!348", ["32348", r"\$32,348", r"32,\!348 \text{ dollars}"]),
    (r"\frac43", [r"\frac{4}{3}", r"\dfrac43", "4/3", r"1\frac{1}{3}"]),
    (r"1\frac{4}{5}", [r"\frac{9}{5}", "1.8"]),
    (".0000672", ["0.0000672", r"6.72 \times 10^{-5}"]),
    (r"90^\circ", ["90", r"90^{\circ}", r"90 \text{ degrees}"]),
    (r"5.4 \text{ cents}", ["5.4"]),
    (r"864 \mbox{ inches}^2", ["864", r"864 \text{ square inches}"]),
    (r"50\%", ["50", r"50\%"]),
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}", r"\text{evelyn}"]),
    (r"\text{(C)}", ["C", "(C)", r"\text{C}", r"\textbf{(C)}"]),
    ("52_8", ["52_{8}"]),
    ("x=5", ["5", "x = 5"]),
    ("y = 2x + 3", ["y=3+2x", "2x+3"]),
    ("6 - 5i", ["-5i + 6"]),
    (r"\frac{11+9a}{20}", [r"\frac{9a + 11}{20}"]),
    ("5x - 7y + 11z + 4 = 0", ["-5x + 7y - 11z - 4 = 0"]),
    (r"3 \sqrt{5}", [r"\sqrt{45}", r"3\sqrt5"]),
    ("1,-2", ["-2,1", r"1 \text{ and } -2", r"\{-2, 1\}"]),
    (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"(3, \pi/2)", r"\left(3,\tfrac{\pi}{2}\right)"]),
    ("(3,4]", ["(3,4]", r"\left(3, 4\right]"]),
    (r"x \in [-2,7]", ["[-2,7]"]),
    (r"(0,9) \cup (9,36)", [r"(9,36) \cup (0,9)"]),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
        [r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{pmatrix}"],
    ),
    ("025", ["25", "025"]),
]
OTHER = [
    ("3", ["2", "-3", "3, 4", r"3 \text{ or } 4", "x", "", r"\text{none}", "0.3"]),
    (r"10,\!080", ["10", "80", "1080"]),
    (r"\frac43", ["0.75", "1.33", r"\frac{4}{30}"]),
    (r"\text{Evelyn}", [r"\text{Navin}", "E"]),
    (r"\text{(C)}", ["B", r"\text{(D)}"]),
    ("1,-2", ["1", "-2", "1,2"]),
    ("(3,4]", ["[3,4]", "(3,4)", "(4,3]"]),
    ("(1,-16)", ["(-16,1)", "1"]),
    ("6 - 5i", ["6 + 5i", "6"]),
    (r"288 \pi", ["288", "904.78"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"]),
]


@needs_library
@pytest.mark.parametrize(("gold", "same"), SAME)
def test_equal_answers(gold, same) -> None:
    assert [answer for answer in [gold, *same] if not is_correct(answer, gold)] == []


@needs_library
@pytest.mark.parametrize(("gold", "other"), OTHER)
def test_other_answers(gold, other) -> None:
    assert [answer for answer in other if is_correct(answer, gold)] == []


@needs_library
@settings(max_examples=40, deadline=None)
@given(st.integers(-99, 99), st.integers(1, 99), st.integers(2, 9), st.integers(-99, 99))
def test_fractions(numerator, denominator, factor, other) -> None:
    gold = rf"\frac{{{numerator}}}{{{denominator}}}"
    assert is_correct(rf"\frac{{{factor * numerator}}}{{{factor * denominator}}}", gold)
    assert is_correct(str(other), gold) == (Fraction(numerator, denominator) == other)


@needs_library
@settings(max_examples=60, deadline=None)
@given(st.text(st.characters() | st.sampled_from("\\{}$^_0"), max_size=60))
def test_any_text_can_be_judged(text) -> None:
    for whole in (text, rf"\boxed{{{text}}}"):
        answer, correct = judge_math(whole, "12345")
        assert answer is None or isinstance(answer, str)
        assert not correct or "12345" in whole


# --- where the answer is looked for --------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("There is no answer.", None),
        ("It is 4.", None),
        ("Then $x = 4$ and $y = 5$.", None),
        (r"It is $\boxed{4}$.", "4"),
        (r"It is $\boxed{3}$. No: " + "that was not asked for. " * 4 + r"So $\boxed{4}$.", "4"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1 and 2"),
        (r"\[ \boxed{ \frac{1}{2} } \]", r"\frac{1}{2}"),
        (r"\boxed {4}", "4"),
        (r"\fbox{4}", "4"),
        (r"\framebox{4}", "4"),
        (r"\boxed{4", None),
        (r"\boxed{}", None),
        ("**Final Answer**: 4", "4"),
        ("The final answer is $x^2$. I hope it is correct.", "x^2"),
        ("<think>Is it 3? The answer is 3.</think>The answer is 4.", "4"),
        (r"<think>\boxed{3}</think>\boxed{4}", "4"),
        (r"<think>\boxed{3}</think> a </think> The answer is 4.", "4"),
        (r"<think>So it is \boxed{4}.</think>", "4"),
        (r"<think>So it is \boxed{4}.</think>Let me write", "4"),
        (r"<think>So it is \boxed{4}. Wait, let me", "4"),
        (r"\boxed{4}" + " and so on" * 10_000, "4"),
        ("and so on $ " * 10_000 + r"\boxed{4}", "4"),
    ],
)
def test_where_the_answer_is_read(text, answer) -> None:
    found = judge_math(text, "4")
    assert found == Judgement(answer, answer == "4")


@needs_library
def test_a_box_without_an_end_is_no_answer() -> None:
    assert not judge_math(r"\boxed{4" + "0" * AFTER_BOX + "}", "4").correct


@needs_library
def test_long_texts_are_judged_at_once() -> None:
    started = time.monotonic()
    for filler in ("$ ", "the answer: is ", "\\[ ", "{", "1 + ", r"\frac{", "= "):
        judge_math(filler * 30_000, "4")
    assert time.monotonic() - started < 30


# --- the process that compares -------------------------------------------------------------------


@needs_library
def test_an_endless_computation_is_given_up(checker) -> None:
    assert checker.judge(r"\boxed{4}", "4").correct
    started = time.monotonic()
    assert not checker.judge(ENDLESS, "4").correct
    assert not checker.judge(r"\boxed{4}", "9^{9^{9^{9}}}").correct
    assert time.monotonic() - started < 30
    assert checker.judge(r"\boxed{4}", "4") == Judgement("4", True)


@needs_library
@pytest.mark.parametrize(
    "answer", ["{" * 500 + "1" + "}" * 500, "(" * 500 + "1" + ")" * 500, "7" * 1900, "-" * 1000]
)
def test_odd_answers(checker, answer) -> None:
    assert not checker.judge(rf"\boxed{{{answer}}}", "4").correct
    assert checker.judge(r"\boxed{4}", "4").correct


@needs_library
def test_a_process_that_dies_between_two_answers_is_replaced(checker) -> None:
    assert checker.judge(r"\boxed{4}", "4").correct
    checker._process.kill()
    checker._process.wait()
    assert checker.judge(r"\boxed{4}", "4").correct
    checker.close()
    assert checker.judge(r"\boxed{4}", "4").correct


@needs_library
def test_an_interrupt_does_not_mix_up_replies(checker, monkeypatch) -> None:
    assert checker.judge(r"\boxed{4}", "4").correct

    def interrupt(stream):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checker.judge(r"\boxed{5}", "5")
    assert checker.judge(r"\boxed{4}", "4") == Judgement("4", True)


@needs_library
def test_threads() -> None:
    found: dict[int, Judgement] = {}

    def judge(i: int) -> None:
        found[i] = judge_math(rf"\boxed{{{i}}}", str(i - i % 2))

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: Judgement(str(i), i % 2 == 0) for i in range(20)}


def run_script(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


@needs_library
@linux
def test_a_forked_process_has_a_checker_of_its_own() -> None:
    script = r"""
import os, sys
from py_reasonalloc.eval.decode import answers
right = lambda n: answers.judge_math(r"\boxed{%d}" % n, str(n)).correct
assert right(1)
process = answers._shared_checker(os.getpid())._process
child = os.fork()
if child == 0:
    sys.exit(0 if right(2) else 1)
assert os.waitpid(child, 0)[1] == 0
assert process.poll() is None and right(3)
print("done")
"""
    assert run_script(script) == "done\n"


@needs_library
@linux
def test_no_process_stays_behind_when_its_parent_is_killed() -> None:
    script = r"""
import os, signal
from py_reasonalloc.eval.decode import answers
answers.judge_math(r"\boxed{1}", "1")
print(answers._shared_checker(os.getpid())._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with pytest.raises(subprocess.CalledProcessError) as killed:
        run_script(script)
    status = Path("/proc") / killed.value.stdout.strip() / "status"
    deadline = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- without math-verify -------------------------------------------------------------------------


def test_math_verify_is_missing(checker, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"math-verify is missing.*pip install .\.\[eval\]"):
        checker.judge(r"\boxed{4}", "4")
    monkeypatch.setattr(answers, "_shared_checker", lambda pid: checker)
    with pytest.raises(ConfigError, match="math-verify is missing"):
        judge_for("math500")
    assert judge_for("demo") is judge_demo


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('no antlr4')", "ImportError: no antlr4"),
        ("import os; os._exit(3)", "its process ended at once"),
        (
            "LatexExtractionConfig = ExprExtractionConfig = dict\n"
            "def parse(*a, **o): return []\n"
            "def verify(*a, **o): return False\n",
            "it cannot read a box",
        ),
    ],
)
def test_math_verify_does_not_work(checker, monkeypatch, tmp_path, source, reason) -> None:
    (tmp_path / "math_verify.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    with pytest.raises(ConfigError, match="math-verify does not work") as caught:
        checker.judge(r"\boxed{4}", "4")
    assert reason in str(caught.value)
    assert "pip install '.[eval]' in the checkout" in str(caught.value)


# --- demo ----------------------------------------------------------------------------------------


def test_demo() -> None:
    problem = generate_problem(20_000, 3, 2)
    assert judge_demo(problem.chain, problem.answer) == Judgement(problem.answer, True)
    assert judge_demo("<think> The answer is two. </think>\nThe answer is three.", "3").correct
    assert judge_demo("The answer is 12.", "3") == Judgement("12", False)
    assert judge_demo("So B is", "3") == Judgement(None, False)


@needs_library
def test_judge_for() -> None:
    assert judge_for("demo") is judge_demo
    for dataset in ("math500", "aime24", "some/file.jsonl"):
        assert judge_for(dataset) is judge_math


# --- gold solutions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gold_problems():
    """All problems of both benchmarks, with the solution as what a model might have written."""
    names = ("math500", "aime24")
    return [p for name in names for p in load_problems(name, path=f"{DATA_DIR}/{name}.jsonl")]


@needs_library
@needs_data
def test_gold_solutions_are_correct(gold_problems) -> None:
    assert len(gold_problems) == 530
    wrong = [p.key for p in gold_problems if not judge_math(p.solution, p.answer).correct]
    assert len(wrong) <= 0.02 * len(gold_problems), wrong


@needs_library
@needs_data
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_of_other_problems_are_wrong(gold_problems, seed) -> None:
    """Every solution against the answer of another problem: the order shuffled, then shifted by 1.

    Some problems have the same answer ("2" is that of 18 of them): such a pair is rightly judged
    correct and counts against the limit all the same. No pair with different answers may be.
    """
    shuffled = random.Random(seed).sample(gold_problems, len(gold_problems))
    pairs = list(zip(shuffled, shuffled[1:] + shuffled[:1]))
    correct = [(p, q) for p, q in pairs if judge_math(p.solution, q.answer).correct]
    assert len(correct) < 0.03 * len(pairs)
    assert [(p.key, q.key) for p, q in correct if not is_correct(p.answer, q.answer)] == []
