"""Model files: what can be told without their weights."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ModelFileError
from .log import LogCapture

#: Longest context that llama.cpp can count, tokens.
MAX_CONTEXT = 2**31 - 1

# what llama.cpp says when a file ends before its header or its tensors do
_SIGNS_OF_DAMAGE = (
    "exceeds remaining file size",
    "failed to read",
    "failed to seek",
    "not within the file bounds",
)


class NativePath(str):
    """A path whose ``encode()`` gives its bytes on disk: the bindings hand those to llama.cpp.

    On POSIX a name is bytes, and need not be text in any encoding.
    """

    def encode(self, *_: object) -> bytes:
        """Return what the file system calls it."""
        return os.fsencode(str(self))


def check_model_file(path: str | os.PathLike[str]) -> NativePath:
    """Return the path if it names something that starts like a GGUF.

    Raises
    ------
    ModelFileError
        No such file, not a file, not readable, or not a GGUF.
    """
    file = Path(path)
    if not file.exists():
        raise ModelFileError(f"{file}: no such file")
    if not file.is_file():
        raise ModelFileError(f"{file}: not a file")
    try:
        with file.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise ModelFileError(f"{file}: cannot be read: {error.strerror}") from None
    if head != b"GGUF":
        found = f"it starts with {head!r}" if head else "it is empty"
        raise ModelFileError(f"{file}: not a GGUF file ({found})")
    return NativePath(file)


def load_failure(path: str, log: LogCapture) -> ModelFileError:
    """Return the exception for a model that llama.cpp refused to load."""
    reason = log.reason() or "llama.cpp gave no reason"
    if any(sign in reason for sign in _SIGNS_OF_DAMAGE):
        return ModelFileError(f"{path}: the file is truncated or damaged: {reason}")
    return ModelFileError(f"{path}: cannot be loaded: {reason}")


@contextlib.contextmanager
def open_vocabulary(path: str | os.PathLike[str], verbose: bool = False) -> Iterator[Any]:
    """Load a model's vocabulary and metadata, without its weights.

    Yields
    ------
    llama_cpp._internals.LlamaModel

    Raises
    ------
    ModelFileError
        The file is not a model that llama.cpp can load.
    """
    from llama_cpp import _internals
    from llama_cpp import llama_cpp as bindings

    name = check_model_file(path)
    params = bindings.llama_model_default_params()
    params.vocab_only = True
    with LogCapture(forward=verbose) as log:
        try:
            # verbose=True only keeps the class from redirecting stdout and stderr
            model = _internals.LlamaModel(path_model=name, params=params, verbose=True)
        except ValueError:
            raise load_failure(name, log) from None
    with contextlib.closing(model):
        if model.vocab_type() == bindings.LLAMA_VOCAB_TYPE_NONE:
            raise ModelFileError(
                f"{path}: the file has no tokenizer: no text can be given to the model"
            )
        yield model


def metadata_value(model: Any, key: str) -> bytes | None:
    """Return a value of a model's metadata as llama.cpp spells it; None: it has no such key."""
    from llama_cpp import llama_cpp as bindings

    name, size = key.encode("utf-8", errors="surrogateescape"), 1024
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = bindings.llama_model_meta_val_str(model.model, name, buffer, size)
        if n < size:
            return None if n < 0 else buffer.raw[:n]
        size = n + 1


def trained_context(model: Any) -> int:
    """Return the context that a model was trained with, in tokens.

    0 if its file does not say, or says what cannot be: see `context_fault`.
    """
    n_ctx = _context_in_file(model) or 0
    return n_ctx if n_ctx <= MAX_CONTEXT else 0


def context_fault(path: str | os.PathLike[str], model: Any, advice: str) -> str:
    """Return what is wrong with the length in the file of a model that has no `trained_context`.

    Parameters
    ----------
    advice : str
        How to give a length instead, where that helps.
    """
    n_ctx = _context_in_file(model)
    if n_ctx is None:
        return f"{path}: the file is damaged: it has no {_context_key(model)}"
    fault = f"{_context_key(model)} = {n_ctx} cannot be the length of a context"
    return f"{path}: {fault}: {advice}"


def _context_key(model: Any) -> str:
    architecture = metadata_value(model, "general.architecture") or b"?"
    return f"{architecture.decode('utf-8', errors='replace')}.context_length"


def _context_in_file(model: Any) -> int | None:
    value = metadata_value(model, _context_key(model))
    return int(value) if value is not None and value.isdigit() else None
