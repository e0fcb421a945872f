"""Model files that are not quite as they should be: `Tolerant`, the part that copes with them."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as bindings

from ..engine.errors import ModelFileError, UnsupportedError
from ..engine.modelfile import context_fault, metadata_value, trained_context
from ..engine.pieces import Pieces


def read_metadata(model: Any) -> dict[str, str]:
    """Return a model's metadata; bytes that are not UTF-8 are replaced.

    The bindings' own reading raises at such a byte, and a session would go on without any metadata:
    without its chat template, that is.
    """
    found: dict[str, str] = {}
    for i in range(bindings.llama_model_meta_count(model.model)):
        key = _meta_key(model, i)
        value = metadata_value(model, key) or b""
        found[key] = value.decode("utf-8", errors="replace")
    return found


def _meta_key(model: Any, i: int) -> str:
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = bindings.llama_model_meta_key_by_index(model.model, i, buffer, size)
        if n < size:
            return buffer.raw[: max(n, 0)].decode("utf-8", errors="surrogateescape")
        size = n + 1


def _token_text(model: Any, token: int) -> str:
    text: bytes = bindings.llama_vocab_get_text(model.vocab, token)
    return text.decode("utf-8", errors="replace")


class Tolerant(llama_cpp.Llama):
    """A session that opens files with foreign bytes, and says what is wrong with others."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Turn text into tokens, as the base class does.

        Raises
        ------
        UnsupportedError
            The model's file has no tokenizer: only tokens can be given to it.
        """
        if self._model.vocab_type() == bindings.LLAMA_VOCAB_TYPE_NONE:
            raise UnsupportedError(f"{self.model_path}: the file has no tokenizer: pass tokens")
        tokens: list[int] = super().tokenize(text, add_bos, special)
        return tokens

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """Turn tokens into text, as the base class does; ContextError if the session is closed."""
        if type(self.tokenizer_) is not llama_cpp.LlamaTokenizer:
            return super().detokenize(tokens, prev_tokens, special)
        pieces = self.pieces(special)
        text = b"".join([pieces[token] for token in tokens])
        is_start = len(tokens) > 0 and tokens[0] == self.token_bos()
        return text[1:] if is_start and text.startswith(b" ") else text

    def pieces(self, special: bool = False) -> Pieces:
        """Return the table token -> bytes of the model's vocabulary."""
        if special not in self._pieces:
            self._pieces[special] = Pieces(self._model.vocab, special)
        return self._pieces[special]

    @property
    def _model(self) -> Any:
        """The llama_cpp._internals.LlamaModel, set by the base constructor."""
        return self._opened_model

    @_model.setter
    def _model(self, model: Any) -> None:
        self._pieces: dict[bool, Pieces] = {}
        model.metadata = functools.partial(read_metadata, model)
        model.token_get_text = functools.partial(_token_text, model)
        self._opened_model = model
        asks_file = self.context_params.n_ctx == 0 and not self.model_params.vocab_only
        if asks_file and trained_context(model) == 0:
            raise ModelFileError(context_fault(self.model_path, model, "pass n_ctx"))
