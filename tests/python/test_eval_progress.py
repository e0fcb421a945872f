"""How far an evaluation is, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

from py_reasonalloc.commands.eval_progress import LINE_SECONDS, Progress
from py_reasonalloc.eval.cases.rows import Row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(problem: int, correct: bool = True, method: str = "rkv", budget: int = 96) -> Row:
    counts = {"n_prompt": 1, "n_generated": 1, "stop": "end", "seed": 0}
    return Row(method, budget, str(problem), 0, gold="1", answer="1", correct=correct, **counts)


def test_lines_now_and_then_where_there_is_no_terminal() -> None:
    stream, now = io.StringIO(), [1000.0]
    done = [row(i, i % 2 == 0) for i in range(50)] + [row(0, method="full", budget=0)]
    with Progress(200, 2, done, stream, lambda: now[0]) as progress:
        for i in range(10):
            now[0] += 10.0
            progress.add(row(50 + i))
    # the 51 that were there took no time: 10 s a text are to come, not two
    assert LINE_SECONDS == 60 and stream.getvalue() == (
        "2 arms, 51 done before: 6 of 200 texts, 32 min left; rkv@96 55% of 56\n"
    )
    now[0] += 7200
    progress.add(row(60, method="full", budget=0))
    assert stream.getvalue().endswith(": 11 of 200 texts, 34 h 50 min left; full 100% of 2\n")


def test_a_run_that_is_soon_over_says_nothing() -> None:
    stream = io.StringIO()
    with Progress(2, 1, [], stream) as progress:
        progress.add(row(0))
        progress.add(row(1))
    assert stream.getvalue() == ""


def test_the_bar_of_a_resumed_run_counts_what_is_left() -> None:
    stream = Terminal()
    with Progress(4, 1, [row(i) for i in range(96)], stream) as progress:
        for i in range(4):
            progress.add(row(96 + i, correct=False))
    text = re.sub(r"\x1b\[.*?[A-Za-z]", "", stream.getvalue())
    assert "1 arm, 96 done before" in text and "2 arms" not in text
    shares = [int(share) for share in re.findall(r"(\d+)%  ", text)]
    assert shares[0] < 96 and "100%" in text and "rkv@96 96% of 100" in text


def test_nothing_left_is_no_bar() -> None:
    stream = Terminal()
    with Progress(0, 3, [row(0)], stream):
        pass
    assert stream.getvalue() == ""
