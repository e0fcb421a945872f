"""What is read: files of plain text, and texts that the model wrote itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import ConfigError
from .rows import TEXT

#: A text file may not be larger: far more than is ever read of it.
_MAX_BYTES = 1 << 26
#: Bytes of a file that are looked at per token that is wanted; no tokenizer needs more for text.
_BYTES_PER_TOKEN = 64


class Text(NamedTuple):
    """A sequence of tokens to score.

    Attributes
    ----------
    kind : str
        `TEXT` or `OWN`.
    name : str
        Of the file, without its folder; "own 1", "own 2", ...
    tokens : tuple of int
        Prompt included.
    n_prompt : int
        Tokens of the prompt, which is not scored; 0 for a file.
    """

    kind: str
    name: str
    tokens: tuple[int, ...]
    n_prompt: int


def text_files(names: Iterable[str]) -> list[Path]:
    """Return the files that a command line names; a folder stands for its ``.txt`` files.

    Raises
    ------
    ConfigError
        There is no such file, a folder has none, or two files have one name.
    """
    files: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(path.glob("*.txt"))
            if not found:
                raise ConfigError(f"{path}: this folder has no .txt files")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path}: no such text file")
    called = [file.name for file in files]
    twice = sorted({name for name in called if called.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)}: two texts have this name")
    return files


def read_text(path: Path) -> str:
    """Read a text file.

    Raises
    ------
    ConfigError
        It cannot be read, is not UTF-8 text, or is empty.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MiB: pass a part of it")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not plain text: it is not UTF-8") from None
    if "\0" in text:
        raise ConfigError(f"{path}: not plain text: it holds zero bytes")
    if not text.strip():
        raise ConfigError(f"{path}: the text is empty")
    return text


def encode_text(model: Any, path: Path, max_tokens: int) -> Text:
    """Return the first tokens of a file.

    Parameters
    ----------
    model : llama_cpp._internals.LlamaModel
        With its vocabulary loaded.
    """
    data = read_text(path).encode("utf-8")[: max_tokens * _BYTES_PER_TOKEN]
    tokens = model.tokenize(data, add_bos=True, special=False)
    if not tokens:
        raise ConfigError(f"{path}: the text has no tokens in this model's vocabulary")
    return Text(TEXT, path.name, tuple(tokens[:max_tokens]), 0)


def digest(tokens: Sequence[int]) -> str:
    """Return 16 hexadecimal digits that name a sequence of tokens."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:16]
