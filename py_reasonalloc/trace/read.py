"""Read trace files: every value is checked, for anyone may have made the file."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import TraceError
from .format import FORMAT, MAGIC, Compression, Header, LayerCompression, Runs, State, Trace

#: Limits of what is read: positions and budgets, layers, heads of a layer, letters of a name or of
#: one token's text, bytes of a line and of all lines.
MAX_POS = 1 << 24
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 12
MAX_TEXT = 1 << 16
MAX_LINE = 1 << 28
MAX_BYTES = 1 << 32

_CHUNK = 1 << 16
_HUGE_NUMBER = re.compile(rb"[0-9]{4000}")  # takes Python before 3.11 forever


def read_trace(path: Path | str) -> Trace:
    """Read a trace file.

    A file without its end (the run was killed) is read as far as it goes, with a note.

    Raises
    ------
    TraceError
        The file is missing, no trace, truncated or damaged: one line with its name and, where there
        is one, the line.
    """
    number = 0
    try:
        reader = _Reader()
        for line in _lines(Path(path), reader.notes):
            number += 1
            reader.line(line)
        if number == 0:
            raise _BadTrace("it is empty")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _BadTrace as error:
        if reader.header is None:
            raise TraceError(f"{path}: not a trace that can be read: {error}") from None
        where = f"line {number + error.ahead}"
        raise TraceError(f"{path}: truncated or damaged: {where}: {error}") from None
    return reader.trace()


class _BadTrace(Exception):
    """What is wrong; `ahead` = 1: with the line after the last whole one."""

    def __init__(self, message: str, ahead: int = 0) -> None:
        super().__init__(message)
        self.ahead = ahead


def _lines(path: Path, notes: list[str]) -> Iterator[bytes]:
    """Yield whole lines without their ends."""
    rest: list[bytes] = []
    n_rest = n_total = 0
    with path.open("rb") as file:
        for chunk in _chunks(file, notes):
            n_total += len(chunk)
            n_rest += len(chunk)
            if n_rest > MAX_LINE or n_total > MAX_BYTES:
                raise _BadTrace("it is longer than any trace", 1)
            *lines, last = chunk.split(b"\n")
            for line in lines:
                yield b"".join([*rest, line])
                rest = []
            n_rest = n_rest if not lines else len(last)
            rest.append(last)
    if n_rest > 0:
        raise _BadTrace("it is cut off", 1)


def _chunks(file: Any, notes: list[str]) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed if they are gzip."""
    chunk = file.read(_CHUNK)
    if not chunk.startswith(b"\x1f\x8b"):
        while chunk:
            yield chunk
            chunk = file.read(_CHUNK)
        return
    gzip = zlib.decompressobj(31)
    while chunk:
        try:
            data = gzip.decompress(chunk, _CHUNK)
        except zlib.error as error:
            raise _BadTrace(f"the compressed data is damaged ({error})", 1) from None
        yield data
        if gzip.eof:
            if gzip.unused_data or file.read(1):
                raise _BadTrace("something follows the compressed data", 1)
            return
        chunk = gzip.unconsumed_tail or file.read(_CHUNK)
    yield gzip.flush()
    notes.append("the compressed data has no end: the run was killed, or the file was cut")


class _Reader:
    """Lines in, a `Trace` out."""

    def __init__(self) -> None:
        self.header: Header | None = None
        self.notes: list[str] = []
        self._records: list[Compression | State] = []
        self._tokens: tuple[int, ...] = ()
        self._pieces: tuple[str, ...] = ()
        self._has_end = False
        self._n_pos = 0

    def trace(self) -> Trace:
        """Return what was read."""
        assert self.header is not None
        if not self._has_end:
            self.notes.append("the trace has no end (was the run killed?): the text is not in it")
        return Trace(
            self.header, tuple(self._records), self._tokens, self._pieces, tuple(self.notes)
        )

    def line(self, line: bytes) -> None:
        """Take one line."""
        if self._has_end:
            raise _BadTrace("something follows the end of the trace")
        if _HUGE_NUMBER.search(line):
            raise _BadTrace("a number has thousands of digits")
        try:
            values = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise _BadTrace("it is not JSON") from None
        if not isinstance(values, dict):
            raise _BadTrace("it is not a JSON object")
        if self.header is None:
            self.header = _header(values)
        elif "step" in values:
            self._compression(values)
        elif "state" in values:
            self._state(values, "state", _int(values, "n_same", 0, MAX_POS))
        elif "end" in values:
            self._end(values)
        else:
            raise _BadTrace("it has none of: step, state, end")

    def _compression(self, values: dict[str, Any]) -> None:
        assert self.header is not None
        step = _int(values, "step", 0, 1 << 53)
        n_pos = _int(values, "n_pos", self._n_pos, MAX_POS)
        layers: list[LayerCompression] = []
        for i, layer in enumerate(_list(values, "layers", (1, self.header.n_layer))):
            where = f"layers[{i}]"
            if not isinstance(layer, dict):
                raise _BadTrace(f"{where} is not an object")
            first = layers[-1].il + 1 if layers else 0
            il = _int(layer, "il", first, self.header.n_layer - 1, where)
            n = self.header.n_head_kv[il]
            budgets = _ints(layer, "budgets", (n, n), 0, MAX_POS, where)
            kept = _list(layer, "kept", (n, n), where)
            runs = tuple(
                _runs(head, f"{where}.kept[{ih}]", n_pos, budgets[ih])
                for ih, head in enumerate(kept)
            )
            layers.append(LayerCompression(il, budgets, runs))
        self._records.append(Compression(step, n_pos, tuple(layers)))
        self._n_pos = n_pos

    def _state(self, values: dict[str, Any], name: str, n_same: int) -> None:
        assert self.header is not None
        n_pos = _int(values, name, 0, MAX_POS)
        n_layer = self.header.n_layer
        held = []
        for il, layer in enumerate(_list(values, "held", (n_layer, n_layer))):
            n = self.header.n_head_kv[il]
            heads = _list({"held": layer}, "held", (n, n), f"layer {il}")
            names = (f"held[{il}][{ih}]" for ih in range(n))
            held.append(tuple(_runs(head, where, n_pos) for head, where in zip(heads, names)))
        self._records.append(State(n_pos, min(n_same, n_pos), tuple(held)))
        self._n_pos = n_pos

    def _end(self, values: dict[str, Any]) -> None:
        n_pos = _int(values, "end", 0, MAX_POS)
        self._tokens = _ints(values, "tokens", (n_pos, n_pos), 0, (1 << 31) - 1)
        pieces = _list(values, "pieces", (n_pos, n_pos))
        self._pieces = tuple(
            _text({"piece": piece}, "piece", f"pieces[{i}]") for i, piece in enumerate(pieces)
        )
        self._state(values, "end", n_pos)
        self._has_end = True


def _header(values: dict[str, Any]) -> Header:
    if MAGIC not in values:
        raise _BadTrace("its first line does not say so")
    if values[MAGIC] != FORMAT or isinstance(values[MAGIC], bool):
        found = json.dumps(values[MAGIC])[:20]
        raise _BadTrace(f"its format version is {found}, this program reads {FORMAT}")
    n_head_kv = _ints(values, "n_head_kv", (1, MAX_LAYERS), 0, MAX_HEADS)
    budgets = []
    for il, layer in enumerate(_list(values, "budgets", (len(n_head_kv), len(n_head_kv)))):
        n = n_head_kv[il]
        budgets.append(_ints({"budgets": layer}, "budgets", (n, n), 0, MAX_POS, f"layer {il}"))
    has_prompt = values.get("n_prompt") is not None
    return Header(
        model=_text(values, "model"),
        n_head_kv=n_head_kv,
        budget=_int(values, "budget", 1, MAX_POS),
        buffer=_int(values, "buffer", 1, MAX_POS),
        sinks=_int(values, "sinks", 0, MAX_POS),
        window=_int(values, "window", 0, MAX_POS),
        policy=_text(values, "policy"),
        layer_alloc=_text(values, "layer_alloc"),
        head_alloc=_text(values, "head_alloc"),
        n_prompt=_int(values, "n_prompt", 0, MAX_POS) if has_prompt else None,
        budgets=tuple(budgets),
    )


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _at(where: str, name: str) -> str:
    return f"{where}: {name}" if where else name


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _int(values: dict[str, Any], name: str, low: int, high: int, where: str = "") -> int:
    value: Any = values.get(name)
    if not _is_int(value, low, high):
        raise _BadTrace(f"{_at(where, name)} must be a whole number, {low} to {high}")
    return int(value)


def _text(values: dict[str, Any], name: str, where: str = "") -> str:
    value = values.get(name)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise _BadTrace(f"{_at(where, name)} must be a text")
    return value


def _list(values: dict[str, Any], name: str, length: tuple[int, int], where: str = "") -> list[Any]:
    value = values.get(name)
    low, high = length
    if not isinstance(value, list) or not low <= len(value) <= high:
        size = f"{low}" if low == high else f"{low} to {high}"
        raise _BadTrace(f"{_at(where, name)} must be a list of {size} values")
    return value


def _ints(
    values: dict[str, Any],
    name: str,
    length: tuple[int, int],
    low: int,
    high: int,
    where: str = "",
) -> tuple[int, ...]:
    found = _list(values, name, length, where)
    if not all(_is_int(value, low, high) for value in found):
        raise _BadTrace(f"{_at(where, name)} must be whole numbers, {low} to {high}")
    return tuple(found)


def _runs(flat: Any, where: str, n_pos: int, n_most: int | None = None) -> Runs:
    """Return the positions of one head, [n_runs, 2]; all below n_pos, at most n_most of them."""
    if not isinstance(flat, list) or len(flat) % 2:
        raise _BadTrace(f"{where} must be a list of pairs: gap, length")
    if not all(_is_int(value, i > 0, n_pos) for i, value in enumerate(flat)):
        raise _BadTrace(f"{where} must be whole numbers, 1 to {n_pos} (the first: 0 to {n_pos})")
    edges = np.cumsum(np.array(flat, dtype=np.int64))
    if len(edges) > 0 and edges[-1] > n_pos:
        raise _BadTrace(f"{where} has positions beyond the sequence of {n_pos}")
    n_held = sum(flat[1::2])
    if n_most is not None and n_held > n_most:
        raise _BadTrace(f"{where} keeps {n_held} tokens, more than the budget of {n_most}")
    return edges.reshape(-1, 2).astype(np.int32)
