"""The lines of a results file: how they are written, and what is believed of those that are read.

Any line may come from anyone: types and ranges of all values are checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...engine.errors import ConfigError, ReasonAllocError
from ..cases.rows import END, LENGTH, LOOP, Row, RowKey, arm_label

MAGIC, FORMAT = "reasonalloc_eval", 1
#: Limits of what is read: bytes of a line, counts, values of a list in the settings.
MAX_LINE = 1 << 24
MAX_COUNT = 1 << 53
MAX_VALUES = 1 << 12

_MAX_DIGITS = 40


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
        In the order of the file; no key twice. Of another format, that format's rows.
    n_dropped : int
        1 if the last line was broken and left out, else 0.
    n_bytes : int
        Length of all lines that are whole.
    """

    path: Path
    settings: dict[str, Any]
    rows: tuple[Any, ...]
    n_dropped: int
    n_bytes: int


class RowFormat(NamedTuple):
    """What the lines of a results file hold.

    Attributes
    ----------
    magic, version : str, int
        What the first line says.
    read : callable
        Returns a row for the values of a line; BadLineError for values that cannot be. A row has
        `key`, `to_json()` and `without_text()` as `Row` has them.
    show_key : callable
        Returns a row's key as text.
    """

    magic: str
    version: int
    read: Callable[[dict[str, Any]], Any]
    show_key: Callable[[Any], str]


# --- lines ---------------------------------------------------------------------------------------


class BadLineError(Exception):
    """What is wrong with a line."""


class _BrokenLineError(BadLineError):
    """It is not a line that was written to its end."""


def header_line(settings: dict[str, Any], form: RowFormat) -> bytes:
    """Return a file's first line; BadLineError for settings that cannot be written."""
    _check_settings(settings)
    return _line({form.magic: form.version, "settings": settings})


def row_line(row: Any, form: RowFormat) -> bytes:
    """Return a row's line; BadLineError for one that could not be read back."""
    values = row.to_json()
    form.read(values)
    return _line(values)


def _line(values: dict[str, Any]) -> bytes:
    line = json.dumps(values, allow_nan=False).encode("ascii") + b"\n"
    if len(line) > MAX_LINE:
        raise BadLineError(f"its line would be longer than {MAX_LINE} bytes")
    return line


def read_lines(stream: BinaryIO, path: Path, keep_texts: bool, form: RowFormat) -> Results:
    """Read a file from its start; see `read_results`."""
    settings: dict[str, Any] | None = None
    rows: dict[Any, Any] = {}
    line_of: dict[Any, int] = {}
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
                settings = _settings(values, form)
                continue
            row = form.read(values)
            if row.key in rows:
                raise BadLineError(
                    f"{form.show_key(row.key)} is in line {line_of[row.key]} already: delete one "
                    "of the two lines"
                )
            rows[row.key] = row if keep_texts else row.without_text()
            line_of[row.key] = number
        if settings is None:
            raise BadLineError("it is empty")
    except BadLineError as error:
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
        raise BadLineError(f"it is longer than {MAX_LINE} bytes")
    if not line.endswith(b"\n"):
        raise _BrokenLineError("it is cut off")
    try:
        values = json.loads(line.decode("utf-8"), parse_int=_int, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise _BrokenLineError("it is not JSON that this program writes") from None
    if not isinstance(values, dict):
        raise BadLineError("it is not a JSON object")
    return values


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("an integer that Python before 3.11 would take forever to read")
    return int(text)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _settings(values: dict[str, Any], form: RowFormat) -> dict[str, Any]:
    """Return the settings in a header."""
    if form.magic not in values:
        raise BadLineError("its first line does not say so")
    version = values[form.magic]
    if type(version) is not int or version != form.version:
        raise BadLineError(
            f"its format is {shown(version)}, this program reads format {form.version}"
        )
    settings = values.get("settings")
    if not isinstance(settings, dict):
        raise BadLineError("its first line has no settings")
    _check_settings(settings)
    return settings


def _check_settings(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if re.fullmatch(r"[A-Za-z0-9_]{1,64}", name) is None:
            raise BadLineError(f"{shown(name)} is no name of a setting")
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_VALUES or not all(map(_is_plain, values)):
            raise BadLineError(
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
    "profile": (_is_name, "a text of 1 to 500 printable characters"),
    "version": (_is_name, "a text of 1 to 500 printable characters"),
}
_NEEDED = {field.name for field in fields(Row) if field.default is MISSING}


def _row(values: dict[str, Any]) -> Row:
    """Return a row whose values have been checked; fields with a default may be missing or null."""
    for name in values:
        if name not in _RULES:
            raise BadLineError(f"a row has no field {shown(name)}")
    for name, (is_right, what) in _RULES.items():
        value = values.get(name)
        if name in _NEEDED and name not in values:
            raise BadLineError(f"{name} is missing")
        if (value is not None or name in _NEEDED) and not is_right(value):
            raise BadLineError(f"{name} must be {what}, not {shown(value)}")
    return Row(**values)


# --- for people ----------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """Return a value as ASCII, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:40] + " ... " + text[-15:]


def shown_key(key: RowKey) -> str:
    """Return a key as text."""
    return f"{arm_label(key.method, key.budget)}, problem {shown(key.problem)}, sample {key.sample}"


#: Texts that were judged: what `reasonalloc-eval` writes.
EVALUATION = RowFormat(MAGIC, FORMAT, _row, shown_key)
