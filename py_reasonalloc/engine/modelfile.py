"""Model files: what can be told without their weights, and prompts in the model's tokens."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, ModelFileError
from .log import LogCapture

# what llama.cpp says when a file ends before its header or its tensors do
_SIGNS_OF_DAMAGE = (
    "exceeds remaining file size",
    "failed to read",
    "failed to seek",
    "not within the file bounds",
)


def check_model_file(path: str | os.PathLike[str]) -> str:
    """Return the path as text if it names something that starts like a GGUF.

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
    return str(file)


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
        yield model


def trained_context(model: Any) -> int:
    """Return the context that a model was trained with, in tokens (0 if its file does not say)."""
    n_ctx = int(model.n_ctx_train())
    if n_ctx > 0:
        return n_ctx
    metadata = model.metadata()
    return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0))


def encode_prompt(model: Any, text: str, raw: bool = False) -> list[int]:
    """Turn a user's text into tokens.

    Parameters
    ----------
    model : llama_cpp._internals.LlamaModel
        With its vocabulary loaded.
    text : str
        What the user wrote.
    raw : bool
        Leave out the model's chat template. A model without one is always raw.

    Raises
    ------
    ConfigError
        The text is empty, or the chat template cannot be applied to it.
    """
    from llama_cpp import llama_cpp as bindings

    if not text.strip():
        raise ConfigError("the prompt is empty")
    template = None if raw else bindings.llama_model_chat_template(model.model, None)
    if template is None:
        tokens = model.tokenize(text.encode("utf-8"), add_bos=True, special=True)
    else:
        text = _apply_template(model, template.decode("utf-8", errors="replace"), text)
        tokens = model.tokenize(text.encode("utf-8"), add_bos=False, special=True)
    if not tokens:
        raise ConfigError("the prompt has no tokens in this model's vocabulary")
    return list(tokens)


@functools.lru_cache(maxsize=8)
def _formatter(template: str, eos_token: str, bos_token: str) -> Any:
    """Return the compiled template: an evaluation uses it for hundreds of prompts."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(template=template, eos_token=eos_token, bos_token=bos_token)


def _apply_template(model: Any, template: str, text: str) -> str:
    import jinja2

    def symbol(token: int) -> str:
        return str(model.token_get_text(token)) if token >= 0 else ""

    try:
        formatter = _formatter(template, symbol(model.token_eos()), symbol(model.token_bos()))
        return str(formatter(messages=[{"role": "user", "content": text}]).prompt)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the model's chat template failed ({reason}): pass --raw to go without it"
        ) from None
