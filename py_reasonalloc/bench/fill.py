"""Bring a cache to a depth cheaply.

Budgeted cache: it is full after budget + buffer tokens, so what lies before does not matter: the
sequence starts at a late position, and only as many tokens are decoded as bring it into its steady
state.

Stock cache: `BLOCK` random tokens are decoded and saved with llama.cpp's own sequence state; a
state whose cells repeat these rows up to the depth is put together from them and loaded. The last
`BLOCK` tokens before the depth are decoded, so compute buffers are used as they would be. (A stock
cache attends over all its cells whatever is in them, so repeated rows cost what others cost;
llama-bench decodes random tokens instead, which at a depth of 32k takes many minutes on a CPU.)
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llama_cpp import llama_cpp as bindings

from ..engine.errors import StateError
from ..engine.tempfiles import scratch_folder
from .engine import Engine
from .jobs import BLOCK

#: Bytes of the file's head: magic, version, number of prompt tokens (0).
_HEAD = struct.Struct("<3I")
_CELL = struct.Struct("<iIi")  # position, number of sequences (1), sequence (0)
_PAIR = struct.Struct("<2I")
_ROWS = struct.Struct("<iQ")  # enum ggml_type, bytes of a row


def skip(engine: Engine) -> int:
    """Bring the empty cache of an engine near the depth of its job.

    Returns
    -------
    int
        Position from which tokens must be decoded to reach the depth; the cache stands there.

    Raises
    ------
    ComputeError
        llama.cpp refused to decode.
    StateError
        The stock cache's state is not laid out as expected, or cannot be written.
    """
    job = engine.job
    if job.arm.budget is not None:
        return 0 if job.is_decoded else max(job.depth - job.arm.n_fill(), 0)
    start = max(job.depth - BLOCK, 0)
    if start > 0:
        _repeat_rows(engine, start, Path(job.folder))
    return start


def _repeat_rows(engine: Engine, n_cells: int, folder: Path) -> None:
    n_block = min(n_cells, BLOCK)
    engine.read(n_block, 0)
    try:
        with scratch_folder(folder, "rows") as scratch:
            block, whole = scratch / "block", scratch / "whole"
            ctx, no_tokens = engine.ctx, (bindings.llama_token * 1)()
            if not bindings.llama_state_seq_save_file(ctx, os.fsencode(block), 0, no_tokens, 0):
                raise StateError("the stock cache's rows could not be saved")
            with whole.open("wb") as stream:
                repeat_state(block.read_bytes(), n_block, n_cells, stream, engine.job.n_seq)
            engine.clear()
            n_read = ctypes.c_size_t()
            if not bindings.llama_state_seq_load_file(
                ctx, os.fsencode(whole), 0, no_tokens, 1, ctypes.byref(n_read)
            ):
                raise StateError("the stock cache's rows could not be loaded")
    except OSError as error:
        raise StateError(f"{folder}: rows cannot be written: {error.strerror}") from None


def repeat_state(
    block: bytes, n_block: int, n_cells: int, out: BinaryIO, n_stream: int = 1
) -> None:
    """Write a sequence state of `n_cells` cells that repeats the `n_block` cells of another.

    Parameters
    ----------
    n_stream : int
        Sequences of the cache, each with rows of its own.

    Raises
    ------
    StateError
        `block` is not the state of the first sequence at positions [0, n_block) in a plain cache.
    """
    empty = bytes(4 * (n_stream - 1))  # no cells in the rows of the others
    try:
        _expect(block.endswith(empty))
        pieces = list(_pieces(block[: len(block) - len(empty)], n_block, n_stream))
    except struct.error:
        raise StateError("the stock cache's state ends too early") from None
    out.write(block[: _HEAD.size])
    out.write(_PAIR.pack(n_stream, n_cells))
    for pos in range(n_cells):
        out.write(_CELL.pack(pos, 1, 0))
    for head, rows in pieces:
        out.write(head)
        n_whole, n_rest = divmod(n_cells, n_block)
        for _ in range(n_whole if rows else 0):
            out.write(rows)
        out.write(rows[: len(rows) // n_block * n_rest])
    out.write(empty)


def _pieces(block: bytes, n_block: int, n_stream: int = 1) -> Iterator[tuple[bytes, bytes]]:
    """Yield (head, rows of n_block cells) for what comes after the cells."""
    view = memoryview(block)
    at = _HEAD.size
    _expect(_HEAD.unpack_from(view)[2] == 0 and _PAIR.unpack_from(view, at) == (n_stream, n_block))
    at += _PAIR.size
    for pos in range(n_block):
        _expect(_CELL.unpack_from(view, at) == (pos, 1, 0))
        at += _CELL.size
    is_transposed, n_layer = _PAIR.unpack_from(view, at)
    _expect(is_transposed == 0 and n_layer > 0)
    yield bytes(view[at : at + _PAIR.size]), b""
    at += _PAIR.size
    for _ in range(2 * n_layer):  # K of all layers, then V
        n_bytes = _ROWS.unpack_from(view, at)[1] * n_block
        start = at + _ROWS.size
        _expect(start + n_bytes <= len(view))
        yield bytes(view[at:start]), bytes(view[start : start + n_bytes])
        at = start + n_bytes
    _expect(at == len(view))


def _expect(is_so: bool) -> None:
    if not is_so:
        raise StateError("the stock cache's state is not laid out as this benchmark expects")
