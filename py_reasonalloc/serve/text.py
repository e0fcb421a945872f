"""From tokens to text: whole characters, stop strings, and thinking apart from the answer."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..session.sequences.request import TokenLogprob


@dataclass
class Delta:
    """A piece of one choice.

    Attributes
    ----------
    index : int
        Which choice.
    text, reasoning : str
        Of the answer, and of the thinking before it.
    logprobs : list
        Of tokens that the piece is made of, with the offset of each in the text.
    finish : str or None
        Why the choice ends with this piece.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    logprobs: list[tuple[TokenLogprob, int]] = field(default_factory=list)
    finish: str | None = None


def held_back(text: str, wanted: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a wanted one."""
    longest = max((len(one) for one in wanted), default=0)
    for n in range(min(longest - 1, len(text)), 0, -1):
        if any(one.startswith(text[-n:]) for one in wanted if len(one) > n):
            return n
    return 0


class Splitter:
    """Tells thinking from the answer: one block of it at the beginning, between two tags.

    Parameters
    ----------
    start, end : str
        The tags.
    is_open : bool
        The prompt has opened it already.
    """

    def __init__(self, start: str, end: str, is_open: bool) -> None:
        self._start, self._end = start, end
        self._state = "thinking" if is_open or not start else "beginning"
        self._text = ""
        self._is_fresh = True  # nothing but white space was in this part yet

    def feed(self, text: str, is_end: bool = False) -> tuple[str, str]:
        """Take more text; return what is sure to be thinking, and answer."""
        self._text += text
        reasoning = ""
        if self._state == "beginning":
            begun = self._text.lstrip()
            if begun.startswith(self._start):
                self._state, self._text = "thinking", begun[len(self._start) :]
            elif is_end or not self._start.startswith(begun):
                self._state, self._is_fresh = "answer", False
            else:
                return "", ""
        if self._state == "thinking":
            reasoning = self._think(is_end)
            if self._state == "thinking":
                return reasoning, ""
        answer, self._text = self._fresh(self._text), ""
        return reasoning, answer

    def _think(self, is_end: bool) -> str:
        self._text = self._fresh(self._text)
        found = self._text.find(self._end)
        if found >= 0:
            part, self._text = self._text[:found], self._text[found + len(self._end) :]
            self._state, self._is_fresh = "answer", True
            return part.rstrip()
        n = 0 if is_end else held_back(self._text, [self._end])
        part = self._text[: len(self._text) - n]
        kept = len(part.rstrip()) if not is_end else len(part)
        part, self._text = part[:kept], self._text[kept:]
        return part

    def _fresh(self, text: str) -> str:
        if self._is_fresh:
            text = text.lstrip()
            self._is_fresh = not text
        return text


class Writer:
    """Makes the text of one choice, token by token.

    Parameters
    ----------
    index : int
        Which choice.
    pieces, special : mapping of int to bytes
        What tokens stand for; with control tokens spelled out.
    stops : sequence of str
        The text ends before the first of them.
    tags : tuple of str and str, optional
        Between which the model thinks; None: thinking is part of the text.
    is_open : bool
        The prompt has opened thinking already.

    Attributes
    ----------
    is_stopped : bool
        A stop string was found.
    n_tokens : int
        Taken so far.
    """

    def __init__(
        self,
        index: int,
        pieces: Mapping[int, bytes],
        special: Mapping[int, bytes],
        stops: Sequence[str],
        tags: tuple[str, str] | None = None,
        is_open: bool = False,
    ) -> None:
        self.index, self.is_stopped, self.n_tokens = index, False, 0
        self._pieces, self._special, self._stops = pieces, special, list(stops)
        self._tags = [tag.encode() for tag in tags or () if tag]
        self._splitter = None if tags is None else Splitter(*tags, is_open)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._n_out = 0  # characters handed on
        self._pending: list[tuple[TokenLogprob, int]] = []

    def take(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Take a token; return what can be said of the text now."""
        self.n_tokens += 1
        if logprob is not None:
            self._pending.append((logprob, self._n_out + len(self._held)))
        return self._hand_on(self._decoder.decode(self._bytes(token)), False)

    def finish(self, reason: str) -> Delta:
        """Return the rest of the text."""
        rest = "" if self.is_stopped else self._decoder.decode(b"", final=True)
        delta = self._hand_on(rest, True)
        delta.finish = reason
        return delta

    def _bytes(self, token: int) -> bytes:
        piece = self._pieces[token]
        if not piece and self._tags:
            spelled = self._special[token]
            if spelled and any(spelled in tag for tag in self._tags):
                return spelled
        return piece

    def _hand_on(self, text: str, is_end: bool) -> Delta:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found and not self.is_stopped:
            self.is_stopped, self._held = True, self._held[: min(found)]
        is_over = is_end or self.is_stopped
        n = len(self._held) - (0 if is_over else held_back(self._held, self._stops))
        ready, self._held = self._held[:n], self._held[n:]
        self._n_out += n
        delta = Delta(self.index)
        delta.logprobs = [one for one in self._pending if one[1] < self._n_out or is_end]
        if self.is_stopped:  # tokens of the stop string are no part of the text
            delta.logprobs = [one for one in delta.logprobs if one[1] < self._n_out]
            self._pending = []
        else:
            self._pending = self._pending[len(delta.logprobs) :]
        if self._splitter is None:
            delta.text = ready
        else:
            delta.reasoning, delta.text = self._splitter.feed(ready, is_over)
        return delta
