"""Which model a GGUF file holds: shape, family and fingerprint, read without its weights.

The fingerprint is the SHA-256 of: the file's size (8 bytes, little endian); the whole header, which
is all metadata and every tensor's name, type, shape and place; and a sample of the tensor data,
`N_BLOCKS` blocks of `BLOCK_BYTES` bytes, evenly spaced from its first byte to its last (all of it
if it is no longer than the sample). So a file of 40 GB costs a few dozen MB of reading. Equal
fingerprints: the same file, as far as anybody who does not forge one is concerned. Of a model split
into several files, the first file counts.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelFileError
from .ggml import load_ggml
from .library import load_library
from .log import LogCapture
from .modelfile import check_model_file, load_failure

N_BLOCKS = 64
BLOCK_BYTES = 1 << 16

# enum gguf_type -> the function that reads such a value, and what it returns
_INTEGERS = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
}
_STRING, _ARRAY = 8, 9


class _InitParams(ctypes.Structure):
    """struct gguf_init_params: allocate nothing, make no tensors."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@dataclass(frozen=True)
class ModelIdentity:
    """What a profile is matched with.

    Attributes
    ----------
    architecture : str
        general.architecture.
    families : tuple of str
        Names under which the model's family may be known, the most telling first.
    n_layer : int
        Blocks; 0 if the file does not say.
    n_head_kv : int or tuple of int
        KV heads of every layer, or of each.
    head_dim : int
        Values of a K row.
    fingerprint : str
        ``"sha256:..."``, see above.
    """

    architecture: str
    families: tuple[str, ...]
    n_layer: int
    n_head_kv: int | tuple[int, ...]
    head_dim: int
    fingerprint: str


def family_slug(text: str) -> str:
    """Return a name in lower case, its words joined by dashes: "Qwen 2.5" -> "qwen-2-5"."""
    return "-".join(re.findall(r"[^\W_]+", text.casefold()))[:200]


class _Header:
    """Metadata of a GGUF through ggml's own reader, for as long as a ``with`` block runs."""

    def __init__(self, path: str) -> None:
        self._ggml = load_ggml()
        self._path = path

    def __enter__(self) -> _Header:
        init = self._function("gguf_init_from_file", ctypes.c_void_p)
        init.argtypes = [ctypes.c_char_p, _InitParams]
        with LogCapture(forward=False) as log:
            self._gguf = init(os.fsencode(self._path), _InitParams(True, None))
        if not self._gguf:
            raise load_failure(self._path, log)
        return self

    def __exit__(self, *_: object) -> None:
        self._call("gguf_free", None)

    def _function(self, name: str, restype: Any) -> Any:
        function = self._ggml[name]  # a new object each time: no shared argtypes
        function.restype = restype
        return function

    def _call(self, name: str, restype: Any, *arguments: Any) -> Any:
        return self._function(name, restype)(ctypes.c_void_p(self._gguf), *arguments)

    def _find(self, key: str) -> tuple[Any, int]:
        """Return (key as the functions want it, enum gguf_type), type -1 if there is none."""
        i = self._call("gguf_find_key", ctypes.c_int64, key.encode("utf-8"))
        if i < 0:
            return None, -1
        key_id = ctypes.c_int64(i)
        return key_id, self._call("gguf_get_kv_type", ctypes.c_int, key_id)

    def text(self, key: str) -> str:
        """Return a string, "" if there is none."""
        key_id, kind = self._find(key)
        if kind != _STRING:
            return ""
        value: bytes = self._call("gguf_get_val_str", ctypes.c_char_p, key_id)
        return value.decode("utf-8", errors="replace")

    def integers(self, key: str) -> tuple[int, ...]:
        """Return an integer or an array of them, () if there is none."""
        key_id, kind = self._find(key)
        if kind in _INTEGERS:
            name, ctype = _INTEGERS[kind]
            return (int(self._call(f"gguf_get_val_{name}", ctype, key_id)),)
        if kind != _ARRAY:
            return ()
        kind = self._call("gguf_get_arr_type", ctypes.c_int, key_id)
        n = self._call("gguf_get_arr_n", ctypes.c_size_t, key_id)
        if kind not in _INTEGERS or n == 0:
            return ()
        address = self._call("gguf_get_arr_data", ctypes.c_void_p, key_id)
        return tuple((_INTEGERS[kind][1] * n).from_address(address))

    def data_offset(self) -> int:
        """Return where the tensor data starts, bytes."""
        return int(self._call("gguf_get_data_offset", ctypes.c_size_t))


def read_identity(path: str | os.PathLike[str]) -> ModelIdentity:
    """Read a model file's identity.

    Raises
    ------
    ModelFileError
        No such file, or not a GGUF that can be read.
    """
    load_library()
    name = check_model_file(path)
    with _Header(name) as header:
        arch = header.text("general.architecture")
        names = [
            header.text("general.basename"),
            header.text("general.name"),
            re.sub(r"-\d{5}-of-\d{5}$", "", Path(name).stem),
        ]
        n_layer = _first(header.integers(f"{arch}.block_count"))
        n_head = header.integers(f"{arch}.attention.head_count")
        heads_kv = header.integers(f"{arch}.attention.head_count_kv") or n_head
        head_dim = _first(header.integers(f"{arch}.attention.key_length"))
        if head_dim == 0 and max(n_head, default=0) > 0:
            head_dim = _first(header.integers(f"{arch}.embedding_length")) // max(n_head)
        offset = header.data_offset()
    return ModelIdentity(
        architecture=arch,
        families=tuple(dict.fromkeys(filter(None, map(family_slug, names)))) or ("unnamed",),
        n_layer=n_layer,
        n_head_kv=heads_kv[0] if len(set(heads_kv)) == 1 else heads_kv,
        head_dim=head_dim,
        fingerprint=_fingerprint(name, offset),
    )


def _first(values: tuple[int, ...]) -> int:
    return values[0] if values else 0


def _fingerprint(path: str, offset: int) -> str:
    try:
        n_bytes = os.path.getsize(path)
        digest = hashlib.sha256(n_bytes.to_bytes(8, "little"))
        with open(path, "rb") as stream:
            digest.update(stream.read(min(offset, n_bytes)))
            n_data = max(n_bytes - offset, 0)
            if n_data <= N_BLOCKS * BLOCK_BYTES:
                digest.update(stream.read(n_data))
            else:
                for i in range(N_BLOCKS):
                    stream.seek(offset + i * (n_data - BLOCK_BYTES) // (N_BLOCKS - 1))
                    digest.update(stream.read(BLOCK_BYTES))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    return f"sha256:{digest.hexdigest()}"
