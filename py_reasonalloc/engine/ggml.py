"""The few functions of ggml that the bindings do not have: reading tensors while a graph runs.

ggml's functions live in a library of their own beside libllama, which libllama has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import LibraryError, UnsupportedError
from .library import library_path, load_library

_TYPE_F32, _TYPE_F16, _TYPE_BF16 = 0, 1, 30  # enum ggml_type


class _TensorHead(ctypes.Structure):
    """The first fields of struct ggml_tensor; `tensor_shape` and `_fields` check what they can."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
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


def _fields(tensor: int) -> _TensorHead:
    """Return the fields of the tensor at an address.

    Raises
    ------
    LibraryError
        struct ggml_tensor is not laid out as this package expects.
    """
    name = _function("ggml_get_name", ctypes.c_void_p, ctypes.c_void_p)
    if name(tensor) != tensor + _TensorHead.name.offset:
        raise LibraryError("struct ggml_tensor of this library is not the one expected")
    return _TensorHead.from_address(tensor)


def source(tensor: int, i: int) -> int | None:
    """Return the address of source i, 0 to 9, of the operation that makes a tensor; None: none."""
    address: int | None = _fields(tensor).src[i]
    return address


def parameter_f32(tensor: int, i: int) -> float:
    """Return parameter i of the operation that makes a tensor, read as f32."""
    return ctypes.c_float.from_buffer_copy(ctypes.c_int32(_fields(tensor).op_params[i])).value


class View(NamedTuple):
    """A tensor's place in the memory of the tensor that it is a view of.

    Attributes
    ----------
    root : int
        Address of that tensor (its own, if it is none).
    offset : int
        Where it begins in there, bytes.
    type : int
        enum ggml_type.
    shape, strides : tuple of int
        ne[0..3]; nb[0..3], bytes.
    """

    root: int
    offset: int
    type: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def view_of(tensor: int) -> View:
    """Return where a tensor lies; a view of a cache can be read as long as the cache is there."""
    head = _fields(tensor)
    root = head.view_src or tensor
    return View(root, head.view_offs, head.type, tensor_shape(tensor), tuple(head.nb))


def read_view(view: View) -> npt.NDArray[np.float32]:
    """Copy a view from its device, as f32.

    Returns
    -------
    array [ne3, ne2, ne1, ne0]

    Raises
    ------
    UnsupportedError
        It is not of f32, f16 or bf16.
    """
    kinds = {_TYPE_F32: np.float32, _TYPE_F16: np.float16, _TYPE_BF16: np.uint16}
    if view.type not in kinds:
        raise UnsupportedError(f"tensor {tensor_name(view.root)!r} is not of f32, f16 or bf16")
    kind = np.dtype(kinds[view.type])
    extent = sum((n - 1) * stride for n, stride in zip(view.shape, view.strides)) + kind.itemsize
    data = np.empty(extent, dtype=np.uint8)
    _read(view.root, data, view.offset)
    values = np.ndarray(view.shape[::-1], kind, data, strides=view.strides[::-1])
    if view.type == _TYPE_BF16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(values, dtype=np.float32)


def _read(tensor: int, target: npt.NDArray[Any], offset: int) -> None:
    read = _function(
        "ggml_backend_tensor_get",
        None,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    )
    read(tensor, target.ctypes.data, offset, target.nbytes)


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
    _read(tensor, values, 0)
    return values
