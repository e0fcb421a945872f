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
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...engine.errors import ConfigError, ReasonAllocError
from ...engine.tempfiles import temporary_file
from .agreement import check_same
from .lines import (
    EVALUATION,
    MAX_LINE,
    BadLineError,
    Results,
    RowFormat,
    header_line,
    read_lines,
    row_line,
)

__all__ = ["MAX_LINE", "Results", "ResultsFile", "read_results"]


def read_results(
    path: Path | str, keep_texts: bool = True, form: RowFormat = EVALUATION
) -> Results:
    """Read a results file, which another process may be writing.

    Parameters
    ----------
    path : path-like
        The file.
    keep_texts : bool
        Keep `Row.text`, which may take far more memory than everything else.
    form : RowFormat
        What its rows are.

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
            return read_lines(stream, file, keep_texts, form)
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
        Key -> row (`RowKey` -> `Row`) of all rows in the file, without their texts.
    """

    def __init__(
        self, path: Path, file: io.FileIO, done: dict[Any, Any], form: RowFormat = EVALUATION
    ) -> None:
        self.path = path
        self._form = form
        self.done = done
        self._file = file
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: Path | str,
        settings: dict[str, Any],
        methods: Iterable[str] = (),
        profiles: Mapping[str, str] = MappingProxyType({}),
        mix_versions: bool = False,
        form: RowFormat = EVALUATION,
    ) -> ResultsFile:
        """Make a file, or go on with one that was made with the same settings.

        One without any row gets the new settings.

        Parameters
        ----------
        path : path-like
            The file. A last line that is broken is cut off.
        settings : dict
            What every row of the file must have been made with, and nothing else: names of letters,
            digits and underscores; numbers, text, None, or lists of them.
        methods, profiles
            What rows will be added of, and their layer profiles; see `check_same`.
        mix_versions : bool
            Go on in a file that another version of ReasonAlloc has rows in.
        form : RowFormat
            What the rows are.

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
            header = header_line(settings, form)
        except BadLineError as error:
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
            found = read_lines(reader, target, keep_texts=False, form=form)
            reader.detach()
            n_bytes = found.n_bytes
            if found.rows:
                own = json.loads(header)["settings"]
                check_same(own, found, methods, profiles, mix_versions)
            else:  # of a run that failed before it had anything
                file.seek(0)
                n_bytes = file.write(header)
            file.truncate(n_bytes)
            _sync(file.fileno())
            file.seek(n_bytes)
        except OSError as error:
            file.close()
            raise _cannot_write(target, error) from None
        except BaseException:
            file.close()
            raise
        return cls(target, file, {row.key: row for row in found.rows}, form)

    def append(self, row: Any) -> None:
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
            line = row_line(row, self._form)
        except BadLineError as error:
            raise ConfigError(f"{self.path}: a row cannot be written: {error}") from None
        with self._lock:
            if row.key in self.done:
                raise ConfigError(
                    f"{self.path}: there is a row of {self._form.show_key(row.key)} already"
                )
            if self._file.closed:
                raise ReasonAllocError(f"{self.path}: the file was closed")
            self.done[row.key] = row.without_text()
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


# --- on the disk ---------------------------------------------------------------------------------


def _create(path: Path, header: bytes) -> None:
    """Make a file with its header, all of it or nothing; leave one that is there alone."""
    with temporary_file(path) as file:
        with file.path.open("wb") as stream:
            stream.write(header)
            stream.flush()
            _sync(stream.fileno())
        file.publish(replace=False)
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
