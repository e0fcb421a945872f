"""The answer that most of several texts give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .answers import Judge


class Vote(NamedTuple):
    """What several texts answer.

    Attributes
    ----------
    answers : list of str or None
        Of each text, as it was read; None: it has none.
    groups : list of list of int
        Texts whose answers are equal, by index; the largest group first, of equally large ones that
        whose first text comes first. Texts without an answer are in none.
    """

    answers: list[str | None]
    groups: list[list[int]]

    @property
    def majority(self) -> str | None:
        """The answer of the largest group, as its first text has it; None if there is no answer."""
        return self.answers[self.groups[0][0]] if self.groups else None


def vote(texts: Sequence[str], judge: Judge) -> Vote:
    """Read the answers of texts and put equal ones together, however they are written.

    Parameters
    ----------
    judge : callable
        Reads and compares answers as an evaluation does: see `answers.judge_for`.

    Raises
    ------
    ConfigError
        See `answers.judge_math`.
    """
    # what the text is compared with does not matter to what is read
    answers = [judge(text, "0").answer for text in texts]
    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        for group in groups:
            first = answers[group[0]]
            if answer == first or judge(texts[i], first or "").correct:
                group.append(i)
                break
        else:
            groups.append([i])
    return Vote(answers, sorted(groups, key=len, reverse=True))
