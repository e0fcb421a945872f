"""A limit on thinking: after so many tokens, the end of thinking is forced.

As llama.cpp's ``--reasoning-budget`` does it (common/reasoning-budget.cpp): every block of thinking
gets the whole limit, and no character is cut in half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.errors import ConfigError
from ..engine.prompts import chat_template, tokenize
from .config import MAX_TOKENS, check_int

#: Opening and closing tags of the models that llama.cpp knows (common/chat.cpp, common/parsers).
TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|channel>thought", "<channel|>"),
)
#: Tokens at the end of a prompt in which an opening tag is looked for.
_N_TAIL = 64


@dataclass(frozen=True)
class ThinkLimit:
    """How long a model may think.

    Attributes
    ----------
    n_tokens : int
        Most tokens of thinking; 0: none at all.
    start : str or None
        What opens thinking; "": the text begins with it. None: what goes with `end`, or else "".
    end : str or None
        What is forced to close it. None: the first of `TAGS` in the chat template, or else that is
        one token of the vocabulary, or else ``</think>``.
    """

    n_tokens: int
    start: str | None = None
    end: str | None = None

    def __post_init__(self) -> None:
        check_int("think", self.n_tokens, 0, MAX_TOKENS)
        if self.end is not None and not self.end.strip():
            raise ConfigError("think_end is empty: it must be what ends the model's thinking")


def thinking_tags(model: Any, limit: ThinkLimit) -> tuple[str, str]:
    """Return what opens and closes thinking; see `ThinkLimit`."""
    start, end = limit.start, limit.end
    if end is None:
        known = known_tags(model)
        if known is None:
            return start or "", TAGS[0][1]
        return known[0] if start is None else start, known[1]
    if start is None:
        start = next((opening for opening, closing in TAGS if closing in end), "")
    return start, end


def known_tags(model: Any) -> tuple[str, str] | None:
    """Return what opens and closes thinking, as chat template or vocabulary have it; else None."""
    template = chat_template(model) or ""
    for opening, closing in TAGS:
        # many templates have an <|end|> that ends a message
        if closing in template and (opening in template or "think" in closing.lower()):
            return opening, closing
    for opening, closing in TAGS:
        is_telling = "think" in closing.lower()
        if is_telling and len(tokenize(model, closing.encode(), add_special=False)) == 1:
            return opening, closing
    return None


class Thinking:
    """Follows one text and says when the end of thinking is due.

    Parameters
    ----------
    llama : ReasonLlama
        Session whose vocabulary the tokens are of.
    limit : ThinkLimit
        See there.
    prompt : sequence of int
        Tokens before the text: they may open it.

    Attributes
    ----------
    forced : list of int
        Tokens that end thinking.
    n_thought : int
        Tokens of thinking so far, tags left out where they are known.
    is_cut : bool
        The end was forced.
    """

    def __init__(self, llama: Any, limit: ThinkLimit, prompt: Sequence[int]) -> None:
        start, end = thinking_tags(llama._model, limit)
        self.forced = tokenize(llama._model, end.encode("utf-8"), add_special=False)
        self.n_thought, self.is_cut = 0, False
        self._limit, self._start = limit.n_tokens, start.encode()
        # what is forced may say more than what the model writes when it ends by itself
        closings = [closing for _, closing in TAGS if closing in end] or [end.strip()]
        self._ends = [closing.encode() for closing in closings]
        self._pieces = llama.pieces(special=True)
        before = b"".join(self._pieces[token] for token in prompt[-_N_TAIL:]).rstrip()
        self._is_open = before.endswith(self._start)  # an empty tag: always
        self._n_block, self._n_forced, self._tail = 0, 0, b""

    @property
    def still_forced(self) -> list[int]:
        """What of `forced` is yet to come."""
        return self.forced[len(self.forced) - self._n_forced :]

    def is_due(self, is_whole: bool = True) -> bool:
        """Return whether `forced` must come next; if so, it is taken as done.

        Parameters
        ----------
        is_whole : bool
            The text does not end inside a character.
        """
        if not self._is_open or self._n_block < self._limit or not is_whole or self._n_forced > 0:
            return False
        self.is_cut, self._n_forced = True, len(self.forced)
        return True

    def add(self, token: int) -> None:
        """Take the next token of the text."""
        self._tail = (self._tail + self._pieces[token])[-256:]
        if self._n_forced > 0:
            self._n_forced -= 1
            if self._n_forced == 0:
                self._is_open, self._tail = False, b""
        elif self._is_open:
            self._n_block += 1
            self.n_thought += 1
            if any(end in self._tail for end in self._ends):
                self._is_open, self._tail = False, b""
        elif self._start and self._start in self._tail:
            self._is_open, self._n_block, self._tail = True, 0, b""
