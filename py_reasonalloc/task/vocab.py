"""Vocabulary of the demo reasoner: whole words, plus every byte so that any text can be encoded.

The text side follows llama.cpp's ``llama-bpe`` pre-tokenizer on the ASCII texts of `problems`: a
word takes the space before it along, punctuation takes the line breaks after it along. That
pre-tokenizer looks a whole pre-token up before it tries merges, so a word list is all it takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .problems import (
    ASSISTANT_TOKEN,
    END_TOKEN,
    NAMES,
    NUMBERS,
    THINK_CLOSE,
    THINK_OPEN,
    USER_TOKEN,
)

BOS_TOKEN = "<s>"
#: Control tokens: never produced by encoding ordinary text, not shown.
CONTROL_TOKENS: tuple[str, ...] = (BOS_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, END_TOKEN)
#: Tokens that are matched as a whole and shown.
VISIBLE_TOKENS: tuple[str, ...] = (THINK_OPEN, THINK_CLOSE)

_WORDS = (
    " plus minus gives is recap What me work down the list makes just a number as we saw found "
    "before good asked and up to answer"
).split()
#: Words that begin a line, so that no space precedes them.
_LINE_STARTS = "Given Let Next Here And So Check The".split()
_PUNCTUATION = [";", ",", ".", "?", ":", ".\n", "\n"]

_PRE_TOKEN = re.compile(
    "|".join(re.escape(t) for t in CONTROL_TOKENS + VISIBLE_TOKENS)
    + r"| ?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9<]+\n*|\n+| +|<"
)


def _byte_symbols() -> dict[int, str]:
    """Map each byte to the printable character that stands for it in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    for offset, byte in enumerate(others):
        table[byte] = chr(256 + offset)
    return table


_BYTE_SYMBOLS = _byte_symbols()


def to_symbols(text: str) -> str:
    """Write a text in byte-level symbols, e.g. ``" is"`` as ``"Ġis"``."""
    return "".join(_BYTE_SYMBOLS[byte] for byte in text.encode("utf-8"))


def _texts() -> list[str]:
    """List all tokens as texts, special tokens first, bytes not included."""
    spaced = [" " + word for word in (*_WORDS, *NUMBERS, *NAMES)]
    words = [*_PUNCTUATION, *_LINE_STARTS, *spaced]
    single_bytes = {chr(b) for b in range(128)}
    return [*CONTROL_TOKENS, *VISIBLE_TOKENS, *(w for w in words if w not in single_bytes)]


_WORD_TEXTS = _texts()
#: Symbols of all tokens, by id: special tokens, words, the 256 bytes, one merge result.
SYMBOLS: list[str] = (
    _WORD_TEXTS[:6]
    + [to_symbols(text) for text in _WORD_TEXTS[6:]]
    + [_BYTE_SYMBOLS[byte] for byte in range(256)]
    + [to_symbols("  ")]
)
#: llama.cpp insists on a merge list; this is its single, harmless entry.
MERGES: list[str] = [f"{to_symbols(' ')} {to_symbols(' ')}"]

_IDS: dict[str, int] = {symbol: i for i, symbol in enumerate(SYMBOLS)}
N_VOCAB = len(SYMBOLS)
#: Files that `export` writes, by the type of their matrices; the second one is shipped.
FILE_NAMES = {"f16": "demo-reasoner-f16.gguf", "q8_0": "demo-reasoner-q8_0.gguf"}

BOS_ID = _IDS[BOS_TOKEN]
END_ID = _IDS[END_TOKEN]


def token_id(text: str) -> int:
    """Return the id of one token given as text."""
    return _IDS[text] if text in CONTROL_TOKENS + VISIBLE_TOKENS else _IDS[to_symbols(text)]


def encode(text: str) -> list[int]:
    """Encode a text of the demo's language, special tokens included, without a start token.

    Words outside the vocabulary are written byte by byte.
    """
    special = CONTROL_TOKENS + VISIBLE_TOKENS
    ids: list[int] = []
    for piece in _PRE_TOKEN.findall(text):
        symbols = piece if piece in special else to_symbols(piece)
        if symbols in _IDS:
            ids.append(_IDS[symbols])
        else:
            ids.extend(_IDS[symbol] for symbol in symbols)
    return ids


def decode(ids: Iterable[int]) -> str:
    """Turn ids back into text, special tokens included."""
    back = {symbol: byte for byte, symbol in _BYTE_SYMBOLS.items()}
    out = bytearray()
    for i in ids:
        symbol = SYMBOLS[i]
        is_special = symbol in CONTROL_TOKENS + VISIBLE_TOKENS
        out += symbol.encode() if is_special else bytes(back[c] for c in symbol)
    return out.decode("utf-8", errors="replace")
