"""Find the native library and check that it is ours.

The library is the very one that the `llama_cpp` bindings have loaded, so a process holds exactly
one copy of llama.cpp and objects of `llama_cpp` can be used with our functions. Nothing happens at
import; `load_library()` does the work once.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

from .errors import LibraryError

# What this package was written against; tests compare them with the header and the build's pin.
ABI_VERSION = 5
BINDINGS_VERSION = "0.3.36"

#: Local version of the entry llama-cpp-python that this package installs with itself.
OWN_BINDINGS = "+reasonalloc"
#: GGML_MAX_N_THREADS: ggml crashes or hangs with more.
MAX_THREADS = 512

_REINSTALL = (
    "pip install --force-reinstall --no-deps PATH, where PATH is ReasonAlloc's folder or wheel file"
)


def _advice() -> str:
    """What the user should do about a library that is not ours."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override:
        return (
            f"LLAMA_CPP_LIB_PATH={override} makes llama_cpp load its library from that folder: "
            "unset it, or point it at a folder with ReasonAlloc's build of libllama."
        )
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return f"Install ReasonAlloc again: {_REINSTALL}"
    if version.endswith(OWN_BINDINGS):
        return f"Something overwrote the llama_cpp package. Install ReasonAlloc again: {_REINSTALL}"
    return (
        f"llama-cpp-python {version} has overwritten the llama_cpp package that ReasonAlloc "
        "brings. Remove it and install ReasonAlloc again: "
        f"pip uninstall -y llama-cpp-python; {_REINSTALL}"
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """Return the loaded and checked library.

    Raises
    ------
    LibraryError
        The bindings or the library cannot be loaded, the library has no ReasonAlloc functions, or
        versions do not fit. The message says what to do.
    """
    try:
        import llama_cpp
        from llama_cpp import llama_cpp as bindings
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # AttributeError: bindings of a newer release name functions that the library lacks.
        raise LibraryError(f"Cannot load llama_cpp: {error}. {_advice()}") from error

    library: ctypes.CDLL = bindings._lib
    path = library_path(library)
    try:
        library.ra_abi_version.argtypes = []
        library.ra_abi_version.restype = ctypes.c_int32
    except AttributeError:
        raise LibraryError(f"{path} is a llama.cpp without ReasonAlloc. {_advice()}") from None
    abi = library.ra_abi_version()
    if abi != ABI_VERSION:
        raise LibraryError(
            f"{path} has interface version {abi}, this package needs {ABI_VERSION}. {_advice()}"
        )
    version = getattr(llama_cpp, "__version__", "unknown")
    if version != BINDINGS_VERSION:
        raise LibraryError(
            f"llama_cpp {version} does not fit ReasonAlloc's library, which needs the bindings "
            f"{BINDINGS_VERSION}. {_advice()}"
        )
    return library


def library_path(library: ctypes.CDLL) -> Path:
    """File that `library` was loaded from."""
    return Path(str(library._name))


def check_struct_sizes(library: ctypes.CDLL, structs: Mapping[str, type[ctypes.Structure]]) -> None:
    """Compare ctypes structures with the library's own sizes.

    Parameters
    ----------
    structs
        Maps the name of a size function, such as ``ra_sizeof_config``, to its mirror.

    Raises
    ------
    LibraryError
        A size differs: library and package are of different builds.
    """
    for name, mirror in structs.items():
        function = getattr(library, name)
        function.argtypes = []
        function.restype = ctypes.c_size_t
        if function() != ctypes.sizeof(mirror):
            raise LibraryError(
                f"{name}() is {function()} in {library_path(library)} but "
                f"{ctypes.sizeof(mirror)} in this package. {_advice()}"
            )
