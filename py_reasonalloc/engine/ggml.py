"""The few functions of ggml that the bindings do not have: reading tensors while a graph runs.

ggml's functions live in a library of their own beside libllama, which libllama has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import LibraryError, UnsupportedError
from .library import library_path, load_library

_TYPE_F32 = 0  # enum ggml_type


class _TensorHead(ctypes.Structure):
    """The first fields of struct ggml_tensor; `tensor_shape` checks what it can."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


@functools.cache
def load_ggml() -> ctypes.CDLL:
    """Return a library that has ggml's functions.

    Raises
    ------
    LibraryError
        None was found.
    """
    library = load_library()
    if hasattr(library, "ggml_get_name"):  # looked up in what it depends on, too
        return library
    from llama_cpp._ctypes_extensions import load_shared_library

    folder = Path(library_path(library)).parent
    try:
        ggml: ctypes.CDLL = load_shared_library("ggml-base", folder)
        ggml.ggml_get_name  # noqa: B018
    except (OSError, RuntimeError, AttributeError) as error:
        raise LibraryError(f"Cannot load ggml from {folder}: {error}") from error
    return ggml


@functools.cache
def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = load_ggml()[name]
    function.argtypes = argtypes
    function.restype = restype
    return function


def tensor_name(tensor: int) -> bytes:
    """Return the name of the tensor at an address."""
    name: bytes = _function("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)(tensor)
    return name


def tensor_shape(tensor: int) -> tuple[int, int, int, int]:
    """Return ne[0..3] of the tensor at an address, the fastest dimension first.

    Raises
    ------
    LibraryError
        struct ggml_tensor is not laid out as this package expects.
    """
    ne = tuple(_TensorHead.from_address(tensor).ne)
    n = _function("ggml_nelements", ctypes.c_int64, ctypes.c_void_p)(tensor)
    if min(ne) < 0 or math.prod(ne) != n:
        raise LibraryError("struct ggml_tensor of this library is not the one expected")
    return (ne[0], ne[1], ne[2], ne[3])


def read_f32(tensor: int) -> npt.NDArray[np.float32]:
    """Copy a computed tensor from its device.

    Returns
    -------
    array [ne3, ne2, ne1, ne0]

    Raises
    ------
    UnsupportedError
        It is not a contiguous tensor of f32.
    """
    shape = tensor_shape(tensor)
    n_bytes = _function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)(tensor)
    values = np.empty(shape[::-1], dtype=np.float32)
    if _TensorHead.from_address(tensor).type != _TYPE_F32 or n_bytes != values.nbytes:
        raise UnsupportedError(f"tensor {tensor_name(tensor)!r} is not contiguous f32")
    read = _function(
        "ggml_backend_tensor_get",
        None,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    )
    read(tensor, values.ctypes.data, 0, n_bytes)
    return values
