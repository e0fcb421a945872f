"""The results file: JSON Lines, the settings first, then one row per text.

::

    {"reasonalloc_eval": 1, "settings": {"model": "demo.gguf", "temp": 0.0, ...}}
    {"method": "rkv", "budget": 128, "problem": "7", "sample": 0, "correct": true, ...}

A row is acknowledged when it is on the disk: `ResultsFile.append` returns after the disk said so. A
process can be killed, or the power fail, at any time; what is lost is at most the row under way,
whose line is then broken and is dropped when the file is next opened. Only the last line can be
broken so: one in the middle is damage, and an error.

Any line may come from anyone: types and ranges of all values are checked.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError, ReasonAllocError
from .rows import END, LENGTH, LOOP, Row, RowKey

MAGIC, FORMAT = "reasonalloc_eval", 1
#: Limits of what is read: bytes of a line, counts, values of a list in the settings.
MAX_LINE = 1 << 24
MAX_COUNT = 1 << 53
MAX_VALUES = 1 << 12

_MAX_DIGITS = 40
_N_SHOWN = 3


@dataclass(frozen=True)
class Results:
    """What a results file holds.

    Attributes
    ----------
    path : Path
        Of the file.
    settings : dict
        What all its rows were made with.
    rows : tuple of Row
        In the order of the file; no key twice.
    n_dropped : int
        1 if the last line was broken and left out, else 0.
    n_bytes : int
        Length of all lines that are whole.
    """

    path: Path
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    n_dropped: int
    n_bytes: int


def read_results(path: Path | str, keep_texts: bool = True) -> Results:
    """Read a results file, which another process may be writing.

    Parameters
    ----------
    path : path-like
        The file.
    keep_texts : bool
        Keep `Row.text`, which may take far more memory than everything else.

    Raises
    ------
    ConfigError
        The file is missing, cannot be read, or is no results file.
    ReasonAllocError
        A line other than the last is damaged, a value is out of its range, or a key is there twice.
        One line with the file's name and the number.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            return _read(stream, file, keep_texts)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None


class ResultsFile:
    """A results file that rows are appended to; `open` makes one.

    While it is open no other process can open it so. May be used by several threads.

    Attributes
    ----------
    path : Path
        Of the file.
    done : dict
        `RowKey` -> `Row` of all rows in the file, without their texts.
    """

    def __init__(self, path: Path, file: io.FileIO, done: dict[RowKey, Row]) -> None:
        self.path = path
        self.done = done
        self._file = file
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, settings: dict[str, Any]) -> ResultsFile:
        """Make a file, or go on with one that was made with the same settings.

        Parameters
        ----------
        path : path-like
            The file. A last line that is broken is cut off.
        settings : dict
            What every row of the file must have been made with, and nothing else: names of letters,
            digits and underscores; numbers, text, None, or lists of them.

        Raises
        ------
        ConfigError
            The file cannot be written, is no results file, was made with other settings, or is open
            in another process; or `settings` cannot be written.
        ReasonAllocError
            See `read_results`.
        """
        target = Path(path)
        try:
            header = _header_line(settings)
        except _BadLineError as error:
            raise ConfigError(f"settings: {error}") from None
        try:
            if not target.exists():
                _create(target, header)
            file = target.open("r+b", buffering=0)
        except OSError as error:
            raise _cannot_write(target, error) from None
        try:
            _lock_file(file.fileno(), target)
            reader = io.BufferedReader(file)
            found = _read(reader, target, keep_texts=False)
            reader.detach()
            check_same(json.loads(header)["settings"], found)
            file.truncate(found.n_bytes)
            _sync(file.fileno())
            file.seek(found.n_bytes)
        except OSError as error:
            file.close()
            raise _cannot_write(target, error) from None
        except BaseException:
            file.close()
            raise
        return cls(target, file, {row.key: row for row in found.rows})

    def append(self, row: Row) -> None:
        """Write a row; when this returns, the row is on the disk.

        Raises
        ------
        ConfigError
            There is a row with that key, or a value of the row is out of its range. Nothing was
            written.
        ReasonAllocError
            The file cannot be written (the disk is full), or was closed. The row is not in it, and
            the file is closed.
        """
        try:
            line = _row_line(row)
        except _BadLineError as error:
            raise ConfigError(f"{self.path}: a row cannot be written: {error}") from None
        with self._lock:
            if row.key in self.done:
                raise ConfigError(f"{self.path}: there is a row of {_shown_key(row.key)} already")
            if self._file.closed:
                raise ReasonAllocError(f"{self.path}: the file was closed")
            self.done[row.key] = replace(row, text=None)
            start = self._file.tell()
            try:
                if self._file.write(line) != len(line):
                    raise OSError("no space left")
                _sync(self._file.fileno())
            except OSError as error:
                del self.done[row.key]
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
                self._file.close()
                reason = error.strerror or error
                raise ReasonAllocError(f"{self.path}: cannot be written: {reason}") from None

    def close(self) -> None:
        """Close the file; other processes may open it."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_same(settings: dict[str, Any], other: Results) -> None:
    """Raise ConfigError unless a file was made with these settings: it names what differs."""
    names = dict.fromkeys([*settings, *other.settings])
    missing = object()
    differing = [
        name for name in names if settings.get(name, missing) != other.settings.get(name, missing)
    ]
    if not differing:
        return
    shown = "; ".join(
        f"{name} = {_shown_setting(other.settings, name)} there, {_shown_setting(settings, name)} "
        "here"
        for name in differing[:_N_SHOWN]
    )
    n_more = len(differing) - _N_SHOWN
    more = f"; and {n_more} more" if n_more > 0 else ""
    raise ConfigError(f"{other.path}: made with other settings: {shown}{more}")


# --- on the disk ---------------------------------------------------------------------------------


def _create(path: Path, header: bytes) -> None:
    """Make a file with its header, all of it or nothing; leave one that is there alone."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(header)
            stream.flush()
            _sync(stream.fileno())
        os.chmod(temporary, 0o644)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            os.rename(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            _sync(folder)
        finally:
            os.close(folder)


if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = (1 << 31) - 2  # where no row will be: others may not even read a locked byte

    def _lock_file(handle: int, path: Path) -> None:
        """Lock a file until it is closed or the process ends, however it ends."""
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            raise _in_use(path) from None
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock_file(handle: int, path: Path) -> None:
        """Lock a file until it is closed or the process ends, however it ends."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path) from None


def _in_use(path: Path) -> ConfigError:
    return ConfigError(f"{path}: another process is writing results into it")


def _sync(handle: int) -> None:
    """Return when all that was written is on the disk."""
    if sys.platform == "darwin":  # where fsync leaves it in the drive's own memory
        with contextlib.suppress(OSError):  # a network drive
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    return ConfigError(f"{path}: the results cannot be written: {reason}")


# --- lines ---------------------------------------------------------------------------------------


class _BadLineError(Exception):
    """What is wrong with a line."""


class _BrokenLineError(_BadLineError):
    """It is not a line that was written to its end."""


def _header_line(settings: dict[str, Any]) -> bytes:
    _check_settings(settings)
    return _line({MAGIC: FORMAT, "settings": settings})


def _row_line(row: Row) -> bytes:
    values = row.to_json()
    _row(values)
    return _line(values)


def _line(values: dict[str, Any]) -> bytes:
    line = json.dumps(values, allow_nan=False).encode("ascii") + b"\n"
    if len(line) > MAX_LINE:
        raise _BadLineError(f"its line would be longer than {MAX_LINE} bytes")
    return line


def _read(stream: BinaryIO, path: Path, keep_texts: bool) -> Results:
    """Read a file from its start."""
    settings: dict[str, Any] | None = None
    rows: dict[RowKey, Row] = {}
    line_of: dict[RowKey, int] = {}
    n_bytes = n_dropped = number = 0
    try:
        for line, is_last in _lines(stream):
            number += 1
            try:
                values = _parse(line)
            except _BrokenLineError:
                if settings is None or not is_last:
                    raise
                n_dropped = 1
                break
            n_bytes += len(line)
            if settings is None:
                settings = _settings(values)
                continue
            row = _row(values)
            if row.key in rows:
                raise _BadLineError(
                    f"{_shown_key(row.key)} is in line {line_of[row.key]} already: delete one of "
                    "the two lines"
                )
            rows[row.key] = row if keep_texts else replace(row, text=None)
            line_of[row.key] = number
        if settings is None:
            raise _BadLineError("it is empty")
    except _BadLineError as error:
        if settings is None:
            raise ConfigError(f"{path}: not a results file: {error}") from None
        raise ReasonAllocError(f"{path}: line {number}: {error}") from None
    return Results(path, settings, tuple(rows.values()), n_dropped, n_bytes)


def _lines(stream: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yield lines with their ends, and whether they are the last."""
    line = stream.readline(MAX_LINE + 1)
    while line:
        following = stream.readline(MAX_LINE + 1)
        is_cut = len(line) <= MAX_LINE and not line.endswith(b"\n")  # where the file ended just now
        yield line, is_cut or not following
        if is_cut:
            return
        line = following


def _parse(line: bytes) -> dict[str, Any]:
    """Return the object that a line holds."""
    if len(line) > MAX_LINE:
        raise _BadLineError(f"it is longer than {MAX_LINE} bytes")
    if not line.endswith(b"\n"):
        raise _BrokenLineError("it is cut off")
    try:
        values = json.loads(line.decode("utf-8"), parse_int=_int, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise _BrokenLineError("it is not JSON that this program writes") from None
    if not isinstance(values, dict):
        raise _BadLineError("it is not a JSON object")
    return values


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("an integer that Python before 3.11 would take forever to read")
    return int(text)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a header."""
    if MAGIC not in values:
        raise _BadLineError("its first line does not say so")
    if type(values[MAGIC]) is not int or values[MAGIC] != FORMAT:
        raise _BadLineError(
            f"its format is {_shown(values[MAGIC])}, this program reads format {FORMAT}"
        )
    settings = values.get("settings")
    if not isinstance(settings, dict):
        raise _BadLineError("its first line has no settings")
    _check_settings(settings)
    return settings


def _check_settings(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if re.fullmatch(r"[A-Za-z0-9_]{1,64}", name) is None:
            raise _BadLineError(f"{_shown(name)} is no name of a setting")
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_VALUES or not all(map(_is_plain, values)):
            raise _BadLineError(
                f"{name} must be a number, a text, null, or a list of up to {MAX_VALUES} of them"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


# --- rows ----------------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


_COUNT = _is_count, f"a whole number, 0 to {MAX_COUNT}"
_TEXT = _is_text, "a text"
_SECONDS = _is_seconds, "a number of seconds, at least 0"
_STOPS = (END, LENGTH, LOOP)
#: Field of a row -> whether a value may stand there, and how that is said.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (_is_name, "a text of 1 to 500 printable characters"),
    "budget": _COUNT,
    "problem": _TEXT,
    "sample": _COUNT,
    "seed": (lambda v: type(v) is int and abs(v) <= MAX_COUNT, "a whole number"),
    "gold": _TEXT,
    "answer": (lambda v: v is None or _is_text(v), "a text or null"),
    "correct": (lambda v: isinstance(v, bool), "true or false"),
    "n_prompt": _COUNT,
    "n_generated": _COUNT,
    "stop": (lambda v: v in _STOPS, f"one of {', '.join(_STOPS)}"),
    "n_protect": _COUNT,
    "peak_tokens": _COUNT,
    "kv_bytes": _COUNT,
    "n_evicted": _COUNT,
    "n_compressions": _COUNT,
    "prompt_seconds": _SECONDS,
    "decode_seconds": _SECONDS,
    "compress_seconds": _SECONDS,
    "text": _TEXT,
}
_NEEDED = {field.name for field in fields(Row) if field.default is MISSING}


def _row(values: dict[str, Any]) -> Row:
    """Return a row whose values have been checked; fields with a default may be missing or null."""
    for name in values:
        if name not in _RULES:
            raise _BadLineError(f"a row has no field {_shown(name)}")
    for name, (is_right, what) in _RULES.items():
        value = values.get(name)
        if name in _NEEDED and name not in values:
            raise _BadLineError(f"{name} is missing")
        if (value is not None or name in _NEEDED) and not is_right(value):
            raise _BadLineError(f"{name} must be {what}, not {_shown(value)}")
    return Row(**values)


# --- for people ----------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """Return a value as ASCII, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:40] + " ... " + text[-15:]


def _shown_setting(settings: dict[str, Any], name: str) -> str:
    return _shown(settings[name]) if name in settings else "nothing"


def _shown_key(key: RowKey) -> str:
    arm = key.method if key.budget == 0 else f"{key.method}@{key.budget}"
    return f"{arm}, problem {_shown(key.problem)}, sample {key.sample}"
