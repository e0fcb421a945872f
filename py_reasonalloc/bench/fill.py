"""Bring a cache to a depth cheaply.

Budgeted cache: it is full after budget + buffer tokens, so what lies before does not matter: the
sequence starts at a late position, and only as many tokens are decoded as bring it into its steady
state.

Stock cache: `BLOCK` random tokens are decoded and saved with llama.cpp's own sequence state; a
state whose cells repeat these rows up to the depth is put together from them and loaded. The last
`BLOCK` tokens before the depth are decoded, so compute buffers are used as they would be. A cache
of sliding windows, whose state comes behind, gets as many of the latest rows as it holds. (A stock
cache attends over all its cells whatever is in them, so repeated rows cost what others cost;
llama-bench decodes random tokens instead, which at a depth of 32k takes many minutes on a CPU.)
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

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


class _Piece(NamedTuple):
    """What precedes the rows of a tensor in a state, and these rows."""

    head: bytes
    rows: bytes


class _Cache(NamedTuple):
    """Number of cells, and what comes behind them in a state."""

    n_cells: int
    pieces: list[_Piece]


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
                # a cache of windows holds a micro-batch beside the window
                n_window = bindings.llama_model_n_swa(engine.model) + engine.job.arm.n_ubatch
                job = engine.job
                repeat_state(block.read_bytes(), n_block, n_cells, stream, job.n_seq, n_window)
            engine.clear()
            n_read = ctypes.c_size_t()
            if not bindings.llama_state_seq_load_file(
                ctx, os.fsencode(whole), 0, no_tokens, 1, ctypes.byref(n_read)
            ):
                raise StateError("the stock cache's rows could not be loaded")
    except OSError as error:
        raise StateError(f"{folder}: rows cannot be written: {error.strerror}") from None


def repeat_state(
    block: bytes,
    n_block: int,
    n_cells: int,
    out: BinaryIO,
    n_stream: int = 1,
    n_window: int = 0,
) -> None:
    """Write a sequence state of `n_cells` cells that repeats the `n_block` cells of another.

    Parameters
    ----------
    n_stream : int
        Sequences of the cache, each with rows of its own.
    n_window : int
        Latest cells to write of the layers with a sliding window, if there are any.

    Raises
    ------
    StateError
        `block` is not the state of the first sequence at positions [0, n_block) in a plain cache,
        or in one of windows behind it.
    """
    try:
        caches = _caches(block, n_block, n_stream)
    except struct.error:
        raise StateError("the stock cache's state ends too early") from None
    out.write(block[: _HEAD.size])
    for i, (n_own, pieces) in enumerate(caches):
        n = min(n_cells, n_window) if i > 0 else n_cells
        out.write(_PAIR.pack(n_stream, n))
        for pos in range(n_cells - n, n_cells):
            out.write(_CELL.pack(pos, 1, 0))
        for head, rows in pieces:
            out.write(head)
            n_whole, n_rest = divmod(n, n_own)
            for _ in range(n_whole if rows else 0):
                out.write(rows)
            out.write(rows[: len(rows) // n_own * n_rest])
        out.write(bytes(4 * (n_stream - 1)))  # no cells in the rows of the others


def _caches(block: bytes, n_block: int, n_stream: int = 1) -> list[_Cache]:
    """Return the caches of a state: the one that grows, and one of windows if there is any."""
    view = memoryview(block)
    _expect(_HEAD.unpack_from(view)[2] == 0)
    caches: list[_Cache] = []
    at = _HEAD.size
    while at < len(view) or not caches:
        _expect(len(caches) < 2)
        n_streams, n = _PAIR.unpack_from(view, at)
        # a window may have lost the first cells
        _expect(n_streams == n_stream and (n == n_block or (0 < n < n_block and bool(caches))))
        at += _PAIR.size
        for pos in range(n_block - n, n_block):
            _expect(_CELL.unpack_from(view, at) == (pos, 1, 0))
            at += _CELL.size
        at, pieces = _pieces(view, at, n)
        _expect(view[at : at + 4 * (n_stream - 1)] == bytes(4 * (n_stream - 1)))
        at += 4 * (n_stream - 1)
        caches.append(_Cache(n, pieces))
    return caches


def _pieces(view: memoryview, at: int, n_cells: int) -> tuple[int, list[_Piece]]:
    """Return where the rows of `n_cells` cells end, and the pieces up to there."""
    is_transposed, n_layer = _PAIR.unpack_from(view, at)
    _expect(is_transposed == 0 and n_layer > 0)
    pieces = [_Piece(bytes(view[at : at + _PAIR.size]), b"")]
    at += _PAIR.size
    for _ in range(2 * n_layer):  # K of all layers, then V
        n_bytes = _ROWS.unpack_from(view, at)[1] * n_cells
        start = at + _ROWS.size
        _expect(start + n_bytes <= len(view))
        pieces.append(_Piece(bytes(view[at:start]), bytes(view[start : start + n_bytes])))
        at = start + n_bytes
    return at, pieces


def _expect(is_so: bool) -> None:
    if not is_so:
        raise StateError("the stock cache's state is not laid out as this benchmark expects")
