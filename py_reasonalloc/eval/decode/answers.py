r"""What counts as a correct answer.

Mathematics is judged by the library math-verify: it reads expressions, sets, intervals, matrices,
text, percentages, units and thousands separators, and asks sympy whether two of them are equal.

Which part of a text holds the answer is decided here. Of the text after the last ``</think>``, or
all of it where there is none, that is the last ``\boxed{...}`` (several close to each other, joined
by a comma, "and" or "or", are one answer); without a box, what follows a phrase such as "the final
answer is" near the end. If that yields nothing, as when the tokens ran out between the thought and
the answer, the whole text is read the same way: R-KV's evaluation takes the last box wherever it
stands, while one that strips the thought first, as lighteval can, would call such a text wrong. A
bare number without box or phrase is not an answer, or a text that never comes to an end would be
right by chance.

Sympy can run for hours or fill the memory on an innocent ``9^{9^{9^9}}``, and math-verify's own
timeouts are signals: they need the main thread and cannot interrupt the C code of big integers. So
a process of its own reads and compares; it ends itself when its time is up, and the next answer
gets a new one.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ...engine.errors import ConfigError
from ...task.problems import THINK_CLOSE, extract_answer
from ..cases.datasets import DEMO_DATASET

#: Wall-clock seconds for reading and comparing one answer; then it is not correct.
TIMEOUT_SECONDS = 20.0
#: Address space of the process that compares, where the system can limit it.
MEMORY_BYTES = 4 << 30
#: Characters before and after the start of the last box that are read, and of a text without one.
BEFORE_BOX, AFTER_BOX, WITHOUT_BOX = 500, 2000, 1000

#: What also draws a box in LaTeX, or stands between the command and its brace.
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)")

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from py_reasonalloc.eval.decode.answers import _serve; _serve(float(sys.argv[2]))"
)


class Judgement(NamedTuple):
    """What was read out of a text, and whether it is right.

    Attributes
    ----------
    answer : str or None
        The answer as it was read, None if there is none or reading it took too long.
    correct : bool
        Whether it equals the gold answer.
    """

    answer: str | None
    correct: bool


Judge = Callable[[str, str], Judgement]


def judge_demo(text: str, gold: str) -> Judgement:
    """Judge a text of the demo reasoner: the same number, in digits or as a word.

    Parameters
    ----------
    text : str
        What the model wrote.
    gold : str
        Answer in digits.
    """
    answer = extract_answer(text)
    return Judgement(answer, answer == gold)


def judge_math(text: str, gold: str) -> Judgement:
    r"""Judge a text with math-verify; may be called from any thread.

    Parameters
    ----------
    text : str
        What the model wrote; see the module for where the answer is looked for.
    gold : str
        LaTeX as it would stand inside a box, e.g. ``3``, ``\text{Evelyn}`` or ``(3,4]``.

    Returns
    -------
    Judgement
        Not correct if reading or comparing fails or takes longer than `TIMEOUT_SECONDS`.

    Raises
    ------
    ConfigError
        math-verify is missing or does not work.
    """
    return _shared_checker(os.getpid()).judge(text, gold)


def judge_for(dataset: str) -> Judge:
    """Return the function that judges answers to a data set.

    Parameters
    ----------
    dataset : str
        As in `datasets.load_dataset`. The demo wants an exact match; all others are mathematics.

    Raises
    ------
    ConfigError
        math-verify is missing or does not work; found out here, not after the first text.
    """
    if dataset == DEMO_DATASET:
        return judge_demo
    judge_math(r"\boxed{1}", "1")
    return judge_math


class MathChecker:
    """A process that reads and compares answers, started when first needed.

    Parameters
    ----------
    timeout_seconds : float
        Wall-clock limit per answer.
    """

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def judge(self, text: str, gold: str) -> Judgement:
        """Judge a text; see `judge_math`."""
        request = json.dumps({"excerpts": list(_excerpts(text)), "gold": gold})
        with self._lock:
            process = self._started()
            answer = None
            try:
                _send(process.stdin, request)
                answer = _receive(process.stdout)["answer"]
                return Judgement(answer, _receive(process.stdout)["correct"])
            except (EOFError, OSError):  # its time was up, or it ran out of memory
                self._kill()
                return Judgement(answer, False)
            except BaseException:  # Ctrl-C: the reply on its way must not be the next one's
                self._kill()
                raise

    def close(self) -> None:
        """End the process; the next `judge` would start another."""
        with self._lock:
            self._kill()

    def _started(self) -> subprocess.Popen[str]:
        """Return the running process.

        Raises
        ------
        ConfigError
            math-verify is missing or does not work.
        """
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "math-verify is missing, which checks the answers: pip install '.[eval]' in the "
                "checkout (Python 3.10 or later)"
            )
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(self._timeout_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        try:
            error = _receive(self._process.stdout)["error"]
        except EOFError:
            error = "its process ended at once"
        except BaseException:
            self._kill()
            raise
        if error:
            self._kill()
            raise ConfigError(
                f"math-verify does not work: {error} (pip install '.[eval]' in the checkout)"
            )
        return self._process

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes
            self._process = None


@lru_cache(maxsize=1)
def _shared_checker(pid: int) -> MathChecker:
    """Return this process's checker; `pid` tells it from that of the process it was forked from."""
    checker = MathChecker()

    def close() -> None:
        if os.getpid() == pid:  # a forked process inherits this, but the checker is not its own
            checker.close()

    atexit.register(close)
    return checker


def _excerpts(text: str) -> Iterator[str]:
    """Yield where to look for an answer, best first; bounded, so that a regex cannot run away."""
    tail = text.rsplit(THINK_CLOSE, 1)[-1]
    for part in dict.fromkeys((tail, text)):
        boxes = [found.start() for found in _BOX.finditer(part)]
        if boxes:
            excerpt = part[max(0, boxes[-1] - BEFORE_BOX) : boxes[-1] + AFTER_BOX]
            yield _BOX.sub(r"\\boxed", excerpt)
        else:
            yield part[-WITHOUT_BOX:]


def _send(stream: Any, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


def _receive(stream: Any) -> dict[str, Any]:
    line = stream.readline()
    if not line.endswith("\n"):
        raise EOFError("the process has ended")
    message: dict[str, Any] = json.loads(line)
    return message


# --- in the process that compares ----------------------------------------------------------------


def _serve(timeout_seconds: float) -> None:
    """Answer requests on stdin until it is closed: {excerpts, gold} -> {answer}, {correct}."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    try:
        reader = _Reader()
    except Exception as error:
        _send(replies, json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return
    _send(replies, json.dumps({"error": None}))
    for line in sys.stdin:
        request = json.loads(line)
        faulthandler.dump_traceback_later(timeout_seconds, exit=True)
        parsed = reader.read_first(request["excerpts"])
        answer = str(parsed[-1]) if parsed else None
        _send(replies, json.dumps({"answer": answer}))
        _send(replies, json.dumps({"correct": reader.is_equal(request["gold"], parsed)}))
        faulthandler.cancel_dump_traceback_later()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, OSError, ValueError):
        pass  # Windows; macOS


class _Reader:
    """math-verify with our settings."""

    def __init__(self) -> None:
        import math_verify

        self._library = math_verify
        self._targets = (
            math_verify.LatexExtractionConfig(
                boxed_match_priority=0, try_extract_without_anchor=False
            ),
            math_verify.ExprExtractionConfig(try_extract_without_anchor=False),
        )
        self._gold = lru_cache(maxsize=1024)(self._read_gold)
        if not self.is_equal("1", self.read(r"\boxed{1}")):
            raise RuntimeError("it cannot read a box (is an antlr4 runtime installed?)")

    def read(self, excerpt: str) -> list[Any]:
        """Return [expression, text], [text] if it is no expression, or [] if there is no answer."""
        return self._library.parse(
            excerpt, self._targets, extraction_mode="first_match", parsing_timeout=None
        )

    def read_first(self, excerpts: list[str]) -> list[Any]:
        """Return the first answer that there is, [] if there is none."""
        parsed = next(filter(None, map(self.read, excerpts)), [])
        text = str(parsed[-1]).strip() if parsed else ""
        if text.endswith("."):  # a full stop inside the box; math-verify takes it for text
            return self.read(rf"\boxed{{{text[:-1]}}}")
        return parsed

    def is_equal(self, gold: str, parsed: list[Any]) -> bool:
        """Tell whether an answer that was read equals the gold answer."""
        return bool(self._library.verify(self._gold(gold), parsed, timeout_seconds=None))

    def _read_gold(self, gold: str) -> list[Any]:
        return self.read(rf"\boxed{{{gold}}}")
