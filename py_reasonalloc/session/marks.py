"""Texts that are looked for in another one as it comes: stops, tags of thinking."""

from __future__ import annotations

from collections.abc import Sequence


def held_back(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may begin a mark."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)


class StopStrings:
    """Finds the texts that end another one, and holds back what may begin one.

    Attributes
    ----------
    is_met : bool
        One was found; what comes after it is dropped.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.is_met = False
        self._stop = [text for text in stop if text]
        self._held = ""

    @property
    def n_held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def feed(self, piece: str) -> str:
        """Take the next piece; return what is certain to be part of the text."""
        if self.is_met:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [i for i in (text.find(stop) for stop in self._stop) if i >= 0]
        if found:
            self.is_met, self._held = True, ""
            return text[: min(found)]
        n_held = max(held_back(text, stop) for stop in self._stop)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def rest(self) -> str:
        """Return what was held back: the text ended otherwise."""
        rest, self._held = self._held, ""
        return rest


class Thoughts:
    """Tells thinking from answer, without the tags between them.

    Parameters
    ----------
    tags : (str, str) or None
        What opens and closes thinking; an empty opening tag: the text begins with it. None: all is
        answer.
    is_open : bool
        The prompt has opened it.

    Attributes
    ----------
    thinking, answer : str
        So far; line ends between the two are in neither.
    """

    def __init__(self, tags: tuple[str, str] | None, is_open: bool = False) -> None:
        self.thinking = self.answer = ""
        self._tags = tags
        self._is_open = tags is not None and (is_open or not tags[0])
        self._held = ""

    def feed(self, piece: str) -> list[tuple[str, bool]]:
        """Take the next piece; return (text, whether it is thinking) for what is certain."""
        parts: list[tuple[str, bool]] = []
        text, self._held = self._held + piece, ""
        while text:
            mark = "" if self._tags is None else self._tags[self._is_open]
            i = text.find(mark) if mark else -1
            if i < 0:
                n_held = held_back(text, mark) if mark else 0
                self._add(parts, text[: len(text) - n_held])
                self._held = text[len(text) - n_held :]
                break
            self._add(parts, text[:i])
            text = text[i + len(mark) :]
            self._is_open = not self._is_open
        return parts

    def rest(self) -> list[tuple[str, bool]]:
        """Return what was held back: the text has ended."""
        parts: list[tuple[str, bool]] = []
        self._add(parts, self._held)
        self._held = ""
        return parts

    def _add(self, parts: list[tuple[str, bool]], text: str) -> None:
        before = self.thinking if self._is_open else self.answer
        if not before and self._tags is not None:
            text = text.lstrip("\n")
        if not text:
            return
        if self._is_open:
            self.thinking += text
        else:
            self.answer += text
        parts.append((text, self._is_open))
