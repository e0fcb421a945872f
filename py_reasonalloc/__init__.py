"""ReasonAlloc: llama.cpp with a fixed KV-cache budget per layer and head.

Importing this package loads nothing: the library comes in with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


def _find_version() -> str:
    try:
        from ._version import version
    except ImportError:  # a source folder: what it loads is the library of the installed package
        import importlib.metadata

        try:
            return importlib.metadata.version("reasonalloc")
        except importlib.metadata.PackageNotFoundError:
            return "0.0.0+unknown"
    return str(version)


#: Names the commit where the build knew it: 0.2.0.dev84+gabc1234d5, and the day if files differed.
__version__ = _find_version()

#: Public name -> module that defines it.
_HOMES = {
    "BudgetConfig": "config",
    "KVStats": "stats",
    "Profile": "profiles",
    "ReasonLlama": "session",
    "BudgetError": "errors",
    "ComputeError": "errors",
    "ConfigError": "errors",
    "ContextError": "errors",
    "ContextFullError": "errors",
    "LibraryError": "errors",
    "ModelFileError": "errors",
    "NoMemoryError": "errors",
    "NotFoundError": "errors",
    "ProfileError": "errors",
    "ReasonAllocError": "errors",
    "StateError": "errors",
    "TraceError": "errors",
    "UnsupportedError": "errors",
    "read_trace": "trace_read",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .config import BudgetConfig as BudgetConfig
    from .errors import BudgetError as BudgetError
    from .errors import ComputeError as ComputeError
    from .errors import ConfigError as ConfigError
    from .errors import ContextError as ContextError
    from .errors import ContextFullError as ContextFullError
    from .errors import LibraryError as LibraryError
    from .errors import ModelFileError as ModelFileError
    from .errors import NoMemoryError as NoMemoryError
    from .errors import NotFoundError as NotFoundError
    from .errors import ProfileError as ProfileError
    from .errors import ReasonAllocError as ReasonAllocError
    from .errors import StateError as StateError
    from .errors import TraceError as TraceError
    from .errors import UnsupportedError as UnsupportedError
    from .profiles import Profile as Profile
    from .session import ReasonLlama as ReasonLlama
    from .stats import KVStats as KVStats
    from .trace_read import read_trace as read_trace


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
