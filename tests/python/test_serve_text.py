"""From tokens to the pieces of an answer: stop strings, thinking, incomplete characters."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("fastapi")

from py_reasonalloc.serve.text import Delta, Writer  # noqa: E402
from py_reasonalloc.session.sequences.request import TokenLogprob  # noqa: E402

BYTES = {i: bytes([i]) for i in range(256)}
TAGS = ("<think>", "</think>")


def write(text: str, stops=(), tags=None, is_open=False, logprobs=False):
    """Return the deltas of a text whose tokens are its bytes."""
    writer = Writer(0, BYTES, BYTES, stops, tags, is_open)
    deltas: list[Delta] = []
    for byte in text.encode():
        logprob = TokenLogprob(byte, -1.0, ()) if logprobs else None
        deltas.append(writer.take(byte, logprob))
        if writer.is_stopped:
            break
    deltas.append(writer.finish("stop"))
    return writer, deltas


def joined(deltas) -> tuple[str, str]:
    return "".join(d.reasoning for d in deltas), "".join(d.text for d in deltas)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello", (), "hello"),
        ("hello world", ("wor",), "hello "),
        ("aab", ("ab",), "a"),
        ("aaaab aab", ("aab",), "aa"),
        ("one two", ("two", "e t"), "on"),
        ("halfway st", ("stop",), "halfway st"),
        ("naïve €", ("€",), "naïve "),
    ],
)
def test_stop_strings(text, stops, expected) -> None:
    writer, deltas = write(text, stops)
    assert joined(deltas) == ("", expected)
    assert writer.is_stopped == (expected != text)
    # nothing is taken back: what was handed on is always a beginning of the whole
    handed = ""
    for delta in deltas:
        handed += delta.text
        assert expected.startswith(handed)


def test_stop_strings_at_random() -> None:
    rng = random.Random(4)
    for _ in range(2000):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(20)))
        stops = ["".join(rng.choice("abc") for _ in range(rng.randrange(1, 4))) for _ in range(2)]
        # the first that is complete; of those that end at once, the longest
        ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
        expected = text
        if ends:
            n = ends[0]
            expected = text[: n - max(len(s) for s in stops if text[:n].endswith(s))]
        _, deltas = write(text, stops)
        assert joined(deltas) == ("", expected), (text, stops)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nbecause", False, ("why\n", "because")),
        ("\n\n<think>a</think>b", False, ("a", "b")),
        ("so <think>hm</think>ok", False, ("hm", "so ok")),
        ("still\n\nhere</think> end", True, ("still\n\nhere", " end")),
        ("never ends", True, ("never ends", "")),
        ("<think>a < b</thin", False, ("a < b</thin", "")),
        ("<thi", False, ("", "<thi")),
        ("<think></think>x", False, ("", "x")),
        ("", False, ("", "")),
    ],
)
def test_thinking(text, is_open, expected) -> None:
    _, deltas = write(text, (), TAGS, is_open)
    assert joined(deltas) == expected


def test_characters_stay_whole() -> None:
    _, deltas = write("a€b😀")
    assert [delta.text for delta in deltas if delta.text] == ["a", "€", "b", "😀"]
    writer = Writer(0, BYTES, BYTES, ())
    writer.take(0xE2, None)
    assert writer.finish("length").text == "\ufffd"


def test_log_probabilities_go_with_their_text() -> None:
    _, deltas = write("abcSTOPd", ("STOP",), logprobs=True)
    found = [(chr(one.token), at) for delta in deltas for one, at in delta.logprobs]
    assert found == [("a", 0), ("b", 1), ("c", 2)]
    _, deltas = write("x€y", logprobs=True)
    found = [(one.token, at) for delta in deltas for one, at in delta.logprobs]
    assert found == [(0x78, 0), (0xE2, 1), (0x82, 1), (0xAC, 1), (0x79, 2)]
