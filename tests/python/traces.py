"""What the tests of traces share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from py_reasonalloc.trace.format import Compression, Header, LayerCompression, positions_of, runs_of
from py_reasonalloc.trace.write import TraceWriter


def as_lists(held) -> list[list[list[int]]]:
    return [[positions_of(runs).tolist() for runs in layer] for layer in held]


def small_trace(path: Path, model: str = "tiny", n_prompt: int | None = 2) -> Path:
    """Write a trace by hand: 2 layers of 2 and 1 heads, 12 tokens, 2 compressions."""
    header = Header(model, (2, 1), 4, 4, 1, 2, "rkv", "uniform", "adaptive", n_prompt,
                    ((4, 4), (4,)))  # fmt: skip
    writer = TraceWriter(path)
    writer.header(header)
    kept = [
        runs_of(np.array(p, dtype=np.int32)) for p in ([0, 1, 2, 6, 7], [0, 6, 7], [0, 5, 6, 7])
    ]
    layers = (LayerCompression(0, (5, 3), tuple(kept[:2])), LayerCompression(1, (4,), (kept[2],)))
    writer.compression(Compression(0, 8, layers))
    last = runs_of(np.array([0, 1, 8, 9, 10], dtype=np.int32))
    writer.compression(Compression(1, 11, (LayerCompression(0, (5, 3), (last, kept[1])),)))
    held = ((runs_of(np.array([0, 1, 8, 9, 10, 11])), runs_of(np.array([0, 6, 7, 11]))),
            (runs_of(np.array([0, 5, *range(6, 12)])),))  # fmt: skip
    writer.end(range(12), ["<s>", *"ab\nde", "f\x1b[31m", "\u202eg", *"hijk"], held)
    writer.close()
    return path
