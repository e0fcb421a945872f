"""From tokens to text: whole characters, stop strings, and thinking apart from the answer."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..session.marks import StopStrings, Thoughts
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
        self.index, self.n_tokens = index, 0
        self._pieces, self._special, self._stop = pieces, special, StopStrings(stops)
        self._tags = [tag.encode() for tag in tags or () if tag]
        self._thoughts = Thoughts(tags, is_open)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_out = 0  # characters handed on
        self._pending: list[tuple[TokenLogprob, int]] = []

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.is_met

    def take(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Take a token; return what can be said of the text now."""
        self.n_tokens += 1
        if logprob is not None:
            self._pending.append((logprob, self._n_out + self._stop.n_held))
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
        ready = self._stop.feed(text)
        if is_end:
            ready += self._stop.rest()
        self._n_out += len(ready)
        delta = Delta(self.index)
        delta.logprobs = [one for one in self._pending if one[1] < self._n_out or is_end]
        if self.is_stopped:  # tokens of the stop string are no part of the text
            delta.logprobs = [one for one in delta.logprobs if one[1] < self._n_out]
            self._pending = []
        else:
            self._pending = self._pending[len(delta.logprobs) :]
        parts = self._thoughts.feed(ready)
        if is_end:
            parts += self._thoughts.rest()
        delta.reasoning = "".join(text for text, is_thinking in parts if is_thinking)
        delta.text = "".join(text for text, is_thinking in parts if not is_thinking)
        return delta
