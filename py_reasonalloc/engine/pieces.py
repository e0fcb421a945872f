"""The bytes that tokens stand for, looked up once each."""

from __future__ import annotations

import ctypes
from typing import Any

from llama_cpp import llama_cpp as bindings


class Pieces(dict[int, bytes]):
    """Token -> its bytes, filled on demand.

    The base class asks llama.cpp for every token of the text again at every new token, which for a
    long chain of thought takes longer than decoding it.

    Parameters
    ----------
    vocab : address of a llama_vocab
        Must outlive this object.
    special : bool
        Show control tokens as text; else they stand for nothing.
    """

    def __init__(self, vocab: Any, special: bool) -> None:
        super().__init__()
        self._vocab = vocab
        self._special = special

    def __missing__(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = bindings.llama_token_to_piece(self._vocab, token, buffer, size, 0, self._special)
            if n >= 0:
                piece = self[token] = buffer.raw[:n]
                return piece
            size = -n
