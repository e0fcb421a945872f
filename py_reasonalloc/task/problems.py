"""Problems of the demo reasoner: a list of named sums, worked through in the order given.

A problem names a start value and then ``n_steps`` lines; each line takes the result of the line
before, adds or subtracts a second operand (a plain number, or a value found *earlier*) and names
the result. The gold chain of thought works through the lines one by one, states every value it
looks up, checks every sum the other way round, and writes a recap of all values wherever a line
asks for one.

What a cache must remember is therefore: the prompt, the last result, and the values found earlier
that a later line may ask for. Nothing in the chain says which of them will be asked for.

Splits
------
Training and evaluation problems are disjoint by construction, not by luck: a prompt belongs to the
evaluation side if ``crc32(prompt) % 16 == 0`` and to the training side otherwise, and the
generator redraws until the prompt falls on the side its seed stands for. Seeds from
``TRAIN_SEED_BASE`` up are training seeds; all smaller seeds are evaluation seeds.

Pure standard library. The same (seed, index, level) gives the same problem on every platform.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

#: Number words; the index is the value. Values never leave 0..20.
NUMBERS: tuple[str, ...] = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty".split()
)
#: Names of values (A, I and O read badly in a sentence).
NAMES: tuple[str, ...] = tuple("BCDEFGHJKLMNPQRSTUVWXYZ")
MAX_VALUE = len(NUMBERS) - 1
MAX_CONSTANT = 9
MAX_STEPS = 12

#: Difficulty level -> number of lines.
LEVEL_STEPS = {1: 5, 2: 8, 3: 11}
#: Share of lines (from the third on, where possible) whose second operand is an earlier value.
RECALL_SHARE = 0.6
#: A recap is asked for after every 4th, 5th or 6th line.
RECAP_GAPS = (4, 5, 6)

TRAIN_SEED_BASE = 1_000_000_000
_EVAL_MODULUS = 16

USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
END_TOKEN = "<|end|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


@dataclass(frozen=True)
class Step:
    """One line of a problem: ``result = first (plus | minus) second``.

    Attributes
    ----------
    first, result : str
        Names.
    second : str
        A name or a number word.
    is_sum : bool
        True for plus, False for minus.
    recap : bool
        Whether a recap of all values follows this line.
    """

    first: str
    second: str
    result: str
    is_sum: bool
    recap: bool

    @property
    def operator(self) -> str:
        """``"plus"`` or ``"minus"``."""
        return "plus" if self.is_sum else "minus"


@dataclass(frozen=True)
class Problem:
    """A problem with its gold solution.

    Attributes
    ----------
    prompt : str
        What the user asks (the content of the user message).
    chain : str
        Everything the assistant should write: chain of thought, then the answer line.
    answer : str
        Gold answer in digits, e.g. ``"12"``.
    level : int
        Difficulty, a key of `LEVEL_STEPS`, or 0 when the number of lines was given directly.
    n_steps : int
        Number of lines.
    seed, index : int
        Where the problem came from.
    """

    prompt: str
    chain: str
    answer: str
    level: int
    n_steps: int
    seed: int
    index: int

    @property
    def chat_prompt(self) -> str:
        """Prompt text as the model was trained on it, without the start token."""
        return USER_TOKEN + self.prompt + ASSISTANT_TOKEN


def is_eval_prompt(prompt: str) -> bool:
    """Tell on which side of the train/evaluation split a prompt falls."""
    return zlib.crc32(prompt.encode("utf-8")) % _EVAL_MODULUS == 0


def _outcomes(current: int, amount: int) -> list[tuple[int, bool]]:
    """List the (result, is_sum) pairs that stay within 0..`MAX_VALUE`."""
    pairs = ((current + amount, True), (current - amount, False))
    return [(value, is_sum) for value, is_sum in pairs if 0 <= value <= MAX_VALUE]


def _draw(rng: random.Random, n_steps: int) -> tuple[str, int, list[Step], list[int]]:
    """Draw one problem: start name, start value, lines, and the value after each line."""
    names = rng.sample(NAMES, n_steps + 1)
    values = [rng.randint(3, MAX_VALUE - 3)]
    unused = [0]  # indices of values not yet used as a second operand
    next_recap = rng.choice(RECAP_GAPS)
    steps: list[Step] = []
    for i in range(1, n_steps + 1):
        current = values[-1]
        candidates = [j for j in unused if j < i - 2 and _outcomes(current, values[j])]
        if candidates and rng.random() < RECALL_SHARE:
            weights = [(i - 1 - j) ** 2 for j in candidates]
            operand_index = rng.choices(candidates, weights)[0]
            unused.remove(operand_index)
            second, amount = names[operand_index], values[operand_index]
        else:
            amount = rng.randint(1, MAX_CONSTANT)
            second = NUMBERS[amount]
        outcome, is_sum = rng.choice(_outcomes(current, amount))
        recap = i == next_recap and i < n_steps
        if recap:
            next_recap += rng.choice(RECAP_GAPS)
        steps.append(Step(names[i - 1], second, names[i], is_sum, recap))
        values.append(outcome)
        unused.append(i)
    return names[0], values[0], steps, values[1:]


def _write_prompt(start: str, start_value: int, steps: Sequence[Step]) -> str:
    """Write the user's text."""
    lines = []
    for step in steps:
        line = f" {step.first} {step.operator} {step.second} gives {step.result}"
        lines.append(line + (", recap" if step.recap else ""))
    return (
        f"Given {start} is {NUMBERS[start_value]};"
        + ";".join(lines)
        + f". What is {steps[-1].result}?"
    )


def _write_chain(start: str, start_value: int, steps: Sequence[Step], values: Sequence[int]) -> str:
    """Write the gold chain of thought and answer line."""
    known = {start: start_value}
    out = [THINK_OPEN, "\nLet me work down the list.\n"]
    for step, value in zip(steps, values):
        first = NUMBERS[known[step.first]]
        result = NUMBERS[value]
        recalled = step.second in known
        second = NUMBERS[known[step.second]] if recalled else step.second
        inverse = "minus" if step.is_sum else "plus"
        origin = (
            f"{step.second} is {second}, as we found before"
            if recalled
            else (f"{second} is just a number")
        )
        out.append(f"Next: {step.first} {step.operator} {step.second} gives {step.result}.\n")
        out.append(f"Here {step.first} is {first}, and {origin}.\n")
        out.append(f"So {first} {step.operator} {second} gives {step.result}.\n")
        out.append(f"So {first} {step.operator} {second} makes {result}.\n")
        out.append(f"Check: {result} {inverse} {second} makes {first}, good.\n")
        known[step.result] = value
        out.append(f"So {step.result} is {result}")
        if step.recap:
            entries = ", ".join(f"{name} is {NUMBERS[v]}" for name, v in known.items())
            out.append(f", and a recap up to {step.result}: {entries}.\n")
        elif step is steps[-1]:
            out.append(" as asked.\n")
        else:
            out.append(".\n")
    out.append(f"{THINK_CLOSE}\nThe answer is {NUMBERS[values[-1]]}.")
    return "".join(out)


def generate_problem(seed: int, index: int, level: int = 2, n_steps: int | None = None) -> Problem:
    """Generate a problem.

    Parameters
    ----------
    seed : int
        Non-negative. Below `TRAIN_SEED_BASE`: evaluation side; from there up: training side.
    index : int
        Which problem of that seed, non-negative.
    level : int
        Difficulty, a key of `LEVEL_STEPS`. Ignored when `n_steps` is given.
    n_steps : int, optional
        Number of lines, 1 to `MAX_STEPS`, in place of a level.

    Returns
    -------
    Problem

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed={seed}, index={index}")
    if n_steps is None:
        if level not in LEVEL_STEPS:
            raise ValueError(f"level must be one of {sorted(LEVEL_STEPS)}, got {level}")
        n_steps = LEVEL_STEPS[level]
    else:
        level = 0
        if not 1 <= n_steps <= MAX_STEPS:
            raise ValueError(f"n_steps must be 1..{MAX_STEPS}, got {n_steps}")
    rng = random.Random(f"reasonalloc-demo/{seed}/{index}/{n_steps}")
    wants_eval = seed < TRAIN_SEED_BASE
    while True:
        start, start_value, steps, values = _draw(rng, n_steps)
        prompt = _write_prompt(start, start_value, steps)
        if is_eval_prompt(prompt) == wants_eval:
            break
    return Problem(
        prompt=prompt,
        chain=_write_chain(start, start_value, steps, values),
        answer=str(values[-1]),
        level=level,
        n_steps=n_steps,
        seed=seed,
        index=index,
    )


_ANSWER_PATTERN = re.compile(r"answer is\s+([a-z]+|\d+)", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    """Read the final answer out of a model's output.

    Only what follows the last ``</think>`` counts when there is one; the last answer phrase wins.

    Parameters
    ----------
    text : str
        What the model wrote, with or without the chain of thought.

    Returns
    -------
    str or None
        The answer in digits, None if there is none that can be read.
    """
    tail = text.rsplit(THINK_CLOSE, 1)[-1]
    found = _ANSWER_PATTERN.findall(tail)
    if not found:
        return None
    word = found[-1].lower()
    if word.isdigit():
        return str(int(word))
    return str(NUMBERS.index(word)) if word in NUMBERS else None


#: The problem that the command line's demo shows.
SAMPLE_PROBLEM = generate_problem(seed=38, index=0, level=2)
