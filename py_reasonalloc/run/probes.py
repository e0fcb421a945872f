"""Probe prompts for calibration: what a model is given to reason about."""

from __future__ import annotations

import os

from ..engine.errors import ConfigError
from ..engine.identity import ModelIdentity
from ..engine.usertext import read_text

#: More do not change a profile (ReasonAlloc, arXiv 2606.11164).
MAX_PROMPTS = 8
_MAX_FILE_BYTES = 1 << 20

MATHS = (
    "How many positive integers below 1000 are divisible by 6 but not by 9?",
    "A bag holds 5 red, 4 blue and 3 green marbles. Three are drawn without putting any back. What "
    "is the probability that all three have different colours?",
    "Find all real x with x^4 - 13x^2 + 36 = 0, and the sum of their absolute values.",
    "A train leaves at 9:20 and travels 180 km at 72 km/h; another leaves the same station 25 "
    "minutes later at 90 km/h on the same line. When and where does the second reach the first?",
    "The sides of a triangle are 13, 14 and 15. Find the radius of its inscribed circle.",
    "What is the remainder when 7^2025 is divided by 100?",
    "In how many ways can 8 people sit at a round table if two of them refuse to be neighbours?",
    "The first term of a geometric series is 12 and its sum is 20. A second series has the same "
    "first term and a ratio half as large. What is the sum of the second series?",
)


def default_prompts(identity: ModelIdentity, seed: int) -> tuple[str, ...]:
    """Return the prompts for a model: maths, or for the demo reasoner the problems it knows.

    Parameters
    ----------
    seed : int
        For the demo reasoner: two seeds have no problem in common. They are of the training side,
        so no problem of an evaluation is among them.
    """
    if "reasonalloc-demo-reasoner" not in identity.families:
        return MATHS
    from ..task.problems import TRAIN_SEED_BASE, generate_problem

    base = TRAIN_SEED_BASE + seed
    return tuple(generate_problem(base, i, level=1 + i % 3).prompt for i in range(MAX_PROMPTS))


def read_prompts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read prompts from a file (``-``: standard input), one per line; empty lines do not count.

    Raises
    ------
    ConfigError
        It cannot be read, or holds no prompt or more than `MAX_PROMPTS`.
    """
    lines = read_text(path, "list", _MAX_FILE_BYTES).split("\n")
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt")
    if len(prompts) > MAX_PROMPTS:
        raise ConfigError(f"{path}: holds {len(prompts)} prompts, at most {MAX_PROMPTS} are used")
    return prompts
