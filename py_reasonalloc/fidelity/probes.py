"""What a cache must still hold later: facts that were stated once, and passages that come again.

Each fact and each passage is a sequence of its own, with text of the user's in between. A fact is
stated in one sentence and asked for by the same words; nothing before says that it will be. It is
recalled if all tokens of its value are the likeliest ones, each after the right ones before it. A
passage is read twice; a cache that still holds the first copy finds the second one easy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

_COLOURS = (
    "amber black blue bronze brown copper crimson golden green grey ivory orange purple red "
    "scarlet silver violet white yellow pale"
).split()
_THINGS = (
    "anchor basket bell bridge candle castle drum falcon garden hammer harbour lantern ladder "
    "mirror needle orchard pencil river saddle window"
).split()
#: Tokens of text before a fact, so that it is not among the first that always stay.
LEAD = 16
#: Tokens of a passage.
PASSAGE = 96


class Fact(NamedTuple):
    """A sentence, in two parts.

    Attributes
    ----------
    opening : str
        "The code of the amber lantern is"
    value : str
        "4817"
    """

    opening: str
    value: str


class Probe(NamedTuple):
    """Tokens to read, and what is scored.

    Attributes
    ----------
    tokens : tuple of int
        All of them.
    spans : tuple of range
        Positions of the tokens that are scored (not those whose logits are wanted: one less).
        Facts: the value that is asked for. Passages: the first copy, the second.
    """

    tokens: tuple[int, ...]
    spans: tuple[range, ...]


def make_facts(n: int, seed: int) -> list[Fact]:
    """Return facts that have neither names nor values in common; the same for the same seed."""
    rng = random.Random(seed)
    names = [f"{colour} {thing}" for colour, thing in product(_COLOURS, _THINGS)]
    rng.shuffle(names)
    codes = rng.sample(range(1000, 10000), n)
    return [Fact(f"The code of the {name} is", str(code)) for name, code in zip(names, codes)]


#: Most facts: one per name.
MAX_FACTS = len(_COLOURS) * len(_THINGS)


class Filler:
    """Tokens of the user's texts, one after the other, round and round."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._tokens = [token for text in texts for token in text]

    def __len__(self) -> int:
        return len(self._tokens)

    def take(self, first: int, n: int) -> list[int]:
        """Return n tokens from one on."""
        return [self._tokens[(first + i) % len(self._tokens)] for i in range(n)]


Tokenize = Callable[[str], list[int]]


def fact_sequences(
    facts: Sequence[Fact], distance: int, filler: Filler, tokenize: Tokenize, bos: Sequence[int]
) -> list[Probe]:
    """Return one sequence per fact: text, the fact, `distance` tokens of text, the fact again.

    Parameters
    ----------
    tokenize : callable
        Text -> tokens, without a token for its beginning.
    bos : sequence of int
        What a text begins with.
    """
    found = []
    for i, fact in enumerate(facts):
        first = i * len(filler) // len(facts)
        stated = tokenize(f" {fact.opening} {fact.value}.")
        asked = tokenize(f" {fact.opening} {fact.value}")
        n_opening = min(_n_common(asked, tokenize(f" {fact.opening}")), len(asked) - 1)
        before = [*bos, *filler.take(first, LEAD), *stated]
        tokens = (*before, *filler.take(first + LEAD, distance), *asked)
        found.append(Probe(tokens, (range(len(before) + distance + n_opening, len(tokens)),)))
    return found


def passage_sequences(n: int, distance: int, filler: Filler, bos: Sequence[int]) -> list[Probe]:
    """Return sequences of a passage, `distance` tokens of the text after it, and it again."""
    found = []
    for i in range(n):
        first = i * len(filler) // n
        passage = filler.take(first, PASSAGE)
        tokens = (*bos, *passage, *filler.take(first + PASSAGE, distance), *passage)
        # the first token of all has nothing before it
        copies = (
            range(max(len(bos), 1), len(bos) + PASSAGE),
            range(len(tokens) - PASSAGE, len(tokens)),
        )
        found.append(Probe(tokens, copies))
    return found


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
