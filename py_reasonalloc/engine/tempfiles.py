"""Files that are written whole or not at all, and what a killed process leaves of them.

A file is written under a temporary name beside its own, and renamed when it is whole. A process
that is killed meanwhile leaves the temporary one behind. It had it locked, and a lock ends with its
process, however that ends: so whoever next writes into the folder knows what nobody works on any
more, and deletes it. Files of others in that folder are safe: temporary ones end in `SUFFIX`.

Standard library only, and nothing else of this package: the build scripts load this file, too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".reasonalloc-tmp"
#: What the folder that belongs to a temporary file is called beyond that.
_FOLDER = ".d"

if sys.platform != "win32":  # where a file cannot be deleted while it is open
    import fcntl


class TemporaryFile:
    """A file under a temporary name; see `temporary_file`.

    Attributes
    ----------
    path : Path
        Where it is; empty at first.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        while True:
            self._handle, name = tempfile.mkstemp(SUFFIX, f".{target.name}.", target.parent)
            self.path = Path(name)
            if sys.platform != "win32":
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._handle, fcntl.LOCK_EX)
            # before it was locked, another process may have taken it for a dead one's
            if os.fstat(self._handle).st_nlink > 0:
                return
            os.close(self._handle)

    def publish(self, replace: bool = True) -> None:
        """Give the file its name, when all of it is on the disk.

        Parameters
        ----------
        replace : bool
            Take the place of a file that is there, instead of leaving that one alone.
        """
        os.fsync(self._handle)
        os.chmod(self.path, 0o644)
        if sys.platform == "win32":  # where open files cannot be renamed
            self._close()
        if replace:
            os.replace(self.path, self._target)
            return
        try:
            os.link(self.path, self._target)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.rename(self.path, self._target)

    def discard(self) -> None:
        """Delete the temporary name."""
        if sys.platform == "win32":
            self._close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[TemporaryFile]:
    """Make a temporary file beside `target`, to be filled and published inside the ``with`` block.

    Temporary files that dead processes left in the folder are deleted first.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    remove_stale(target.parent)
    file = TemporaryFile(target)
    try:
        yield file
    finally:
        file.discard()


def write_whole(target: Path, data: bytes) -> None:
    """Write a file, all of it or nothing; see `temporary_file`."""
    with temporary_file(target) as file:
        file.path.write_bytes(data)
        file.publish()


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder for temporary files inside `parent`; it is deleted at the end of the block.

    Parameters
    ----------
    parent : Path
        What dead processes left there is deleted first.
    name : str
        For people: what the folder's name begins with.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    with temporary_file(parent / name) as file:
        folder = Path(f"{file.path}{_FOLDER}")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_stale(folder: Path) -> None:
    """Delete temporary files that dead processes left in a folder; others' are left alone."""
    with contextlib.suppress(OSError):
        for path in list(folder.glob(f".*{SUFFIX}")):
            with contextlib.suppress(OSError):
                _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    """Delete a temporary file and the folder that belongs to it; OSError if somebody has it."""
    beside = Path(f"{path}{_FOLDER}")
    if sys.platform == "win32":
        path.unlink()
        shutil.rmtree(beside, ignore_errors=True)
        return
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(beside, ignore_errors=True)
        if not beside.exists():
            path.unlink()
    finally:
        os.close(handle)
