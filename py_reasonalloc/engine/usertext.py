"""Text that people hand over, the same by every way in: an argument, a file, standard input.

It is UTF-8. A byte-order mark at the start is dropped; line ends (CR LF, or CR alone) become LF;
line ends at the end are dropped, as the shell does in ``-p "$(cat FILE)"``.
"""

from __future__ import annotations

import os
import sys

from .errors import ConfigError

#: Name of standard input where a file is expected.
STDIN = "-"


def read_text(path: str | os.PathLike[str], what: str = "text", n_max: int = -1) -> str:
    """Return the text of a file; ``-``: of standard input.

    Parameters
    ----------
    what : str
        For messages: what the text is.
    n_max : int
        Most bytes; negative: any number.

    Raises
    ------
    ConfigError
        It cannot be read, is too long, or is not UTF-8.
    """
    is_stdin = os.fspath(path) == STDIN
    name = "standard input" if is_stdin else path_text(path)
    try:
        if not is_stdin:
            with open(path, "rb") as stream:
                data = stream.read(n_max + 1 if n_max >= 0 else -1)
        elif sys.stdin is None:
            raise ConfigError("standard input is closed: there is nothing to read")
        else:
            data = sys.stdin.buffer.read(n_max + 1 if n_max >= 0 else -1)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    if 0 <= n_max < len(data):
        raise ConfigError(f"{name}: larger than {n_max} bytes")
    return _normal(data, f"{name}: the {what}")


def argument_text(text: str, name: str) -> str:
    """Return a text given on the command line; `name` is its option, for messages.

    Raises
    ------
    ConfigError
        Its bytes are not text in the encoding of the locale.
    """
    try:
        return _normal(text.encode("utf-8"), f"{name}: the text")
    except UnicodeEncodeError:
        raise ConfigError(f"{name}: the text is not UTF-8 text") from None


def path_text(path: str | os.PathLike[str]) -> str:
    """Return a path as text that can be written anywhere: bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def _normal(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text (byte {error.start + 1})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
