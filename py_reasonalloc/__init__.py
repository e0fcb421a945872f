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
    "BudgetConfig": "session.config",
    "KVStats": "engine.stats",
    "Profile": "profile.files",
    "ReasonLlama": "session.reason_llama",
    "BudgetError": "engine.errors",
    "ComputeError": "engine.errors",
    "ConfigError": "engine.errors",
    "ContextError": "engine.errors",
    "ContextFullError": "engine.errors",
    "LibraryError": "engine.errors",
    "ModelFileError": "engine.errors",
    "NoMemoryError": "engine.errors",
    "NotFoundError": "engine.errors",
    "ProfileError": "engine.errors",
    "ReasonAllocError": "engine.errors",
    "StateError": "engine.errors",
    "TraceError": "engine.errors",
    "UnsupportedError": "engine.errors",
    "read_trace": "trace.read",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .engine.errors import BudgetError as BudgetError
    from .engine.errors import ComputeError as ComputeError
    from .engine.errors import ConfigError as ConfigError
    from .engine.errors import ContextError as ContextError
    from .engine.errors import ContextFullError as ContextFullError
    from .engine.errors import LibraryError as LibraryError
    from .engine.errors import ModelFileError as ModelFileError
    from .engine.errors import NoMemoryError as NoMemoryError
    from .engine.errors import NotFoundError as NotFoundError
    from .engine.errors import ProfileError as ProfileError
    from .engine.errors import ReasonAllocError as ReasonAllocError
    from .engine.errors import StateError as StateError
    from .engine.errors import TraceError as TraceError
    from .engine.errors import UnsupportedError as UnsupportedError
    from .engine.stats import KVStats as KVStats
    from .profile.files import Profile as Profile
    from .session.config import BudgetConfig as BudgetConfig
    from .session.reason_llama import ReasonLlama as ReasonLlama
    from .trace.read import read_trace as read_trace


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
