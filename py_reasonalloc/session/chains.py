"""A chain of thought in a file, to be continued another day: `reasonalloc-run --save-state`.

A file is a line with the format's name, the length of a header (8 bytes, little endian), the header
(JSON), the tokens (int32, little endian), the state of their sequence as llama.cpp gives it, and
the SHA-256 of all that. Nothing of it is used before its length and digest are right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import ConfigError, StateError
from ..engine.tempfiles import temporary_file
from .checkpoints import read_sequence

MAGIC = b"reasonalloc-state 1\n"
_N_DIGEST = 32
#: Longest header that is read, bytes.
_MAX_HEADER = 1 << 20


@dataclass(frozen=True, eq=False)
class Chain:
    """What a chain is continued from.

    Attributes
    ----------
    tokens : tuple of int
        Prompt and text. The cache stands for the first of them: for all but the last, where a text
        was cut.
    n_prompt : int
        Tokens of the prompt among them.
    n_protect : int
        Positions that are never evicted.
    is_ended : bool
        The model ended its text: there is nothing to continue.
    signature : mapping
        What the state depends on, see `signature`.
    state : ndarray of uint8
        Of the sequence.
    """

    tokens: tuple[int, ...]
    n_prompt: int
    n_protect: int
    is_ended: bool
    signature: Mapping[str, str]
    state: npt.NDArray[np.uint8]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises
        ------
        StateError
            It cannot be written.
        """
        header = {
            "n_tokens": len(self.tokens),
            "n_prompt": self.n_prompt,
            "n_protect": self.n_protect,
            "is_ended": self.is_ended,
            "signature": dict(self.signature),
            "n_bytes": self.state.nbytes,
        }
        head = json.dumps(header).encode()
        parts = (
            MAGIC,
            len(head).to_bytes(8, "little"),
            head,
            np.asarray(self.tokens, dtype="<i4").tobytes(),
            self.state.data,
        )
        digest = hashlib.sha256()
        try:
            with temporary_file(path) as file:
                with file.path.open("wb") as stream:
                    for part in parts:
                        digest.update(part)
                        stream.write(part)
                    stream.write(digest.digest())
                file.publish()
        except OSError as error:
            raise StateError(f"{path}: the state cannot be written: {error.strerror}") from None

    def put_into(self, session: Any) -> None:
        """Let a session hold the chain, as the one did that it was taken of.

        Raises
        ------
        StateError
            It is of another model or configuration, or too long. Nothing has changed then.
        """
        session.load_sequence(self.tokens, self.state, self.n_protect, self.signature)


def take_chain(session: Any, tokens: tuple[int, ...], n_prompt: int, is_ended: bool) -> Chain:
    """Return what a session's chain is continued from.

    Raises
    ------
    StateError
        The prompt was not read to its end, or the engine could not give the state.
    """
    n_held = session.n_cached()
    held = tuple(session.input_ids[:n_held].tolist())
    if n_held < n_prompt or held != tokens[:n_held]:
        raise StateError("there is no state to save: the prompt was not read to its end")
    state = read_sequence(session.ctx)
    if state is None:
        raise StateError("the state could not be saved")
    return Chain(tokens, n_prompt, session.n_protect, is_ended, session.signature(), state)


def read_chain(path: Path) -> Chain:
    """Read such a file.

    Raises
    ------
    StateError
        It is missing, cannot be read, or is damaged, or is no such file.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if stream.read(len(MAGIC)) != MAGIC:
                raise StateError(f"{path}: not a state that reasonalloc-run saved")
            n_head = int.from_bytes(stream.read(8), "little")
            if n_head > min(size, _MAX_HEADER):
                raise StateError(f"{path}: the state is damaged")
            head = stream.read(n_head)
            body = stream.read()
    except OSError as error:
        raise StateError(f"{path}: the state cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(MAGIC + n_head.to_bytes(8, "little") + head)
    digest.update(body[:-_N_DIGEST])
    if len(body) < _N_DIGEST or digest.digest() != body[-_N_DIGEST:]:
        raise StateError(f"{path}: the state is damaged: its digest is another")
    try:
        return _chain(json.loads(head), body[:-_N_DIGEST])
    except (ValueError, TypeError, KeyError):
        raise StateError(f"{path}: the state is damaged: its parts do not fit together") from None


def _chain(header: dict[str, Any], body: bytes) -> Chain:
    counts = [header[name] for name in ("n_tokens", "n_prompt", "n_protect", "n_bytes")]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError
    n_tokens, n_prompt, n_protect, n_bytes = counts
    if 4 * n_tokens + n_bytes != len(body) or n_prompt > n_tokens or n_prompt == 0:
        raise ValueError
    tokens = np.frombuffer(body, dtype="<i4", count=n_tokens)
    signature = {str(name): str(value) for name, value in header["signature"].items()}
    return Chain(
        tokens=tuple(tokens.tolist()),
        n_prompt=n_prompt,
        n_protect=n_protect,
        is_ended=bool(header["is_ended"]),
        signature=signature,
        state=np.frombuffer(body, dtype=np.uint8, offset=4 * n_tokens),
    )


def check_target(name: str, inputs: tuple[str | None, ...]) -> Path:
    """Return where a state may be written, without touching it.

    Raises
    ------
    ConfigError
        It is a folder, is in none, cannot be written, or is one of the run's own `inputs`.
    """
    file = Path(name)
    fault = None
    if file.is_dir():
        fault = "it is a folder"
    elif not file.parent.is_dir():
        fault = f"there is no folder {file.parent}"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        fault = "no permission"
    elif any(other and file.exists() and os.path.samefile(file, other) for other in inputs):
        fault = "this run reads it"
    if fault is not None:
        raise ConfigError(f"{file}: the state cannot be written: {fault}")
    return file
