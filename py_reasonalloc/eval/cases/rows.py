"""What every part of the evaluation speaks of: a problem, and the row that one text makes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

#: Why a text ended: the model ended it; tokens or context ran out; it went round in circles.
END, LENGTH, LOOP = "end", "length", "loop"


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer.

    Attributes
    ----------
    key : str
        Name of the problem, unique within its data set.
    question : str
        Text of the question, without any prompt template.
    answer : str
        Gold answer.
    solution : str
        Gold solution text, "" where the data set has none.
    """

    key: str
    question: str
    answer: str
    solution: str = ""


def arm_label(method: str, budget: int) -> str:
    """Return what an arm is called: ``METHOD``, or ``METHOD@BUDGET`` with a budget."""
    return method if budget == 0 else f"{method}@{budget}"


class RowKey(NamedTuple):
    """What names a row: there is one row per key in a results file.

    Attributes
    ----------
    method : str
        Label of the method, options included, e.g. ``rkv`` or ``rkv+lambda=0.5``.
    budget : int
        Tokens kept per layer and KV head; 0: the full cache.
    problem : str
        `Problem.key`.
    sample : int
        0 up to the number of samples per problem.
    """

    method: str
    budget: int
    problem: str
    sample: int


@dataclass(frozen=True)
class Row:
    """One text that a model wrote, judged and measured. Sizes and times are the engine's own.

    Attributes
    ----------
    method, budget, problem, sample
        See `RowKey`.
    seed : int
        Of the sampling.
    gold : str
        The data set's answer.
    answer : str or None
        The model's, as read out of its text; None if it gave none.
    correct : bool
        Whether the two are the same.
    n_prompt, n_generated : int
        Tokens; the token that ends the text is not counted.
    stop : str
        "end", "length" or "loop".
    n_protect : int or None
        Prompt tokens that could not be evicted. None: full cache, or a server that does not tell.
    peak_tokens : int or None
        Most tokens that any head held: with uniform budgets at most budget + buffer.
    kv_bytes : int or None
        Bytes of K and V: all that a budgeted cache has allocated; the rows in use of a full cache.
    n_evicted : int or None
        (token, head) entries evicted, summed over layers and KV heads.
    n_compressions : int or None
        How often the cache was compressed.
    prompt_seconds, decode_seconds, compress_seconds : float or None
        Reading the prompt; decoding, compressions included; compressions alone.
    text : str or None
        The model's whole text, where the run keeps texts.
    profile : str or None
        Digest of the layer profile that split the budget; see `profile_digest`. None: none did, or
        it is not known.
    version : str or None
        Of the ReasonAlloc that made the row; None: as the file's settings say.
    """

    method: str
    budget: int
    problem: str
    sample: int
    seed: int
    gold: str
    answer: str | None
    correct: bool
    n_prompt: int
    n_generated: int
    stop: str
    n_protect: int | None = None
    peak_tokens: int | None = None
    kv_bytes: int | None = None
    n_evicted: int | None = None
    n_compressions: int | None = None
    prompt_seconds: float | None = None
    decode_seconds: float | None = None
    compress_seconds: float | None = None
    text: str | None = None
    profile: str | None = None
    version: str | None = None

    @property
    def key(self) -> RowKey:
        """What names the row."""
        return RowKey(self.method, self.budget, self.problem, self.sample)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def without_text(self) -> Row:
        """Return the row without the text, which may be larger than all the rest."""
        return replace(self, text=None)
