"""Exceptions of this package.

Every error is a `ReasonAllocError` (a `RuntimeError`, which is what `llama_cpp` raises); those that
stem from a value the caller gave are a `ValueError` as well.
"""

from __future__ import annotations


class ReasonAllocError(RuntimeError):
    """Base of all errors that this package raises on its own."""


class LibraryError(ReasonAllocError):
    """The native library is missing, is not ours, or does not fit this package."""


class ModelFileError(ReasonAllocError, ValueError):
    """The model file is missing, is not a GGUF, is damaged, or llama.cpp cannot load it."""


class ConfigError(ReasonAllocError, ValueError):
    """An argument is out of its range (RA_STATUS_INVALID)."""


class BudgetError(ConfigError):
    """The budget cannot hold what must be kept (RA_STATUS_BUDGET)."""


class NotFoundError(ConfigError):
    """No such policy or allocator, or the context has no budget (RA_STATUS_NOT_FOUND)."""


class ProfileError(ConfigError):
    """A layer profile cannot be read or written, is not valid, or does not fit the model."""


class UnsupportedError(ReasonAllocError, ValueError):
    """The model, cache type or operation does not work with a budget (RA_STATUS_UNSUPPORTED)."""


class ContextError(ReasonAllocError, ValueError):
    """The context could not be made, or it has been closed."""


class ContextFullError(ReasonAllocError, ValueError):
    """The tokens do not fit into the context; nothing was decoded."""


class ComputeError(ReasonAllocError):
    """A decode failed or was aborted (RA_STATUS_COMPUTE).

    The session is consistent: it holds the tokens that were decoded before the failure, and the
    call may be tried again.
    """


class NoMemoryError(ReasonAllocError, MemoryError):
    """An allocation failed (RA_STATUS_NO_MEMORY)."""


class StateError(ReasonAllocError):
    """A saved state could not be made or does not fit this session."""


class TraceError(ReasonAllocError, ValueError):
    """A trace file cannot be written, is missing, or is damaged; or it has no such part."""


#: ra_status -> exception; the names are in reasonalloc.h.
STATUS_ERRORS: dict[int, type[ReasonAllocError]] = {
    1: ConfigError,
    2: UnsupportedError,
    3: NoMemoryError,
    4: BudgetError,
    5: NotFoundError,
    6: ComputeError,
}


def error_from_status(status: int, message: str) -> ReasonAllocError:
    """Return (not raise) the exception for a status other than 0."""
    return STATUS_ERRORS.get(status, ReasonAllocError)(message or f"ra_status {status}")
