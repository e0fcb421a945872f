"""Write trace files."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError, TraceError
from .format import FORMAT, MAGIC, Compression, Header, Held, State, flat_of


def _flat_held(held: Held) -> list[list[list[int]]]:
    return [[flat_of(runs) for runs in layer] for layer in held]


def check_target(path: Path | str, inputs: Sequence[Path] = ()) -> Path:
    """Return where a trace may be written, without touching it.

    Raises
    ------
    ConfigError
        It is a folder, is in none, cannot be written, or is one of the run's own `inputs`.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"{file}: the trace cannot be written: it is a folder")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: the trace cannot be written: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{file}: the trace cannot be written: no permission")
    if any(other.exists() and file.exists() and other.samefile(file) for other in inputs):
        raise ConfigError(f"{file}: the trace would replace a file that this run reads")
    return file


class TraceWriter:
    """Write a trace file line by line; what is written can be read at any time.

    Parameters
    ----------
    path : path-like
        Is replaced. A name that ends in ``.gz`` is compressed.

    Raises
    ------
    TraceError
        Here and from all methods: the file cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.is_broken = False
        self._gzip = zlib.compressobj(6, zlib.DEFLATED, 31) if self.path.suffix == ".gz" else None
        try:
            self._file = self.path.open("wb")
        except OSError as error:
            raise self._failure(error) from None

    def header(self, header: Header) -> None:
        """Write the first line."""
        self._line({MAGIC: FORMAT, **asdict(header)})

    def compression(self, compression: Compression) -> None:
        """Write one compression."""
        layers = [
            {
                "il": layer.il,
                "budgets": layer.budgets,
                "kept": [flat_of(head) for head in layer.kept],
            }
            for layer in compression.layers
        ]
        self._line({"step": compression.step, "n_pos": compression.n_pos, "layers": layers})

    def state(self, state: State) -> None:
        """Write what the whole cache holds."""
        held = _flat_held(state.held)
        self._line({"state": state.n_pos, "n_same": state.n_same, "held": held})

    def end(self, tokens: Sequence[int], pieces: Sequence[str], held: Held) -> None:
        """Write the last line."""
        line = {
            "end": len(tokens),
            "tokens": list(tokens),
            "pieces": pieces,
            "held": _flat_held(held),
        }
        self._line(line)

    def close(self) -> None:
        """Close the file."""
        try:
            if self._gzip is not None and not self.is_broken:
                self._file.write(self._gzip.flush())
            self._file.close()
        except OSError as error:
            raise self._failure(error) from None

    def _line(self, values: dict[str, Any]) -> None:
        text = json.dumps(values, separators=(",", ":"), ensure_ascii=False) + "\n"
        data = text.encode("utf-8", errors="replace")
        if self._gzip is not None:
            data = self._gzip.compress(data) + self._gzip.flush(zlib.Z_SYNC_FLUSH)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> TraceError:
        self.is_broken = True
        return TraceError(f"{self.path}: the trace cannot be written: {error.strerror or error}")
