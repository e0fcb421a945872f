"""Blocks of quantised weights drawn at random: quants are random bits, and scales give the values
the standard deviation that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

_N_QUANTILES = 256  # one random byte each


def _random(rng: np.random.Generator, *shape: int) -> Bytes:
    return np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)


def _half(values: Floats) -> Bytes:
    return values.astype("<f2")[:, None].view(np.uint8)


def _q4_0(rng: np.random.Generator, std: Floats) -> Bytes:
    """Value d (q - 8), q uniform in 0..15: standard deviation 4.61 d."""
    return np.hstack([_half(std / 4.61), _random(rng, len(std), 16)])


def _q8_0(rng: np.random.Generator, std: Floats) -> Bytes:
    """Value d q, q uniform in -128..127: standard deviation 73.9 d."""
    return np.hstack([_half(std / 73.9), _random(rng, len(std), 32)])


def _q4_k(rng: np.random.Generator, std: Floats) -> Bytes:
    """Value d s q - m t, s and t uniform in 0..63, q in 0..15; with m = 7.5 d the mean is 0."""
    d = std / 256.1
    return np.hstack([_half(d), _half(7.5 * d), _random(rng, len(std), 12 + 128)])


def _q6_k(rng: np.random.Generator, std: Floats) -> Bytes:
    """Value d s (q - 32), s uniform in -128..127, q in 0..63: standard deviation 1366 d."""
    return np.hstack([_random(rng, len(std), 128 + 64 + 16), _half(std / 1366.0)])


def _mxfp4(rng: np.random.Generator, std: Floats) -> Bytes:
    """Value d v, v uniform in 0, 1, 2, 3, 4, 6, 8, 12 and their negatives: deviation 5.852 d.

    d is a power of two: of the two around the wanted one, either is drawn so often that the
    variance comes out right.
    """
    wanted = std / 5.852
    low = np.floor(np.log2(wanted))
    is_high = rng.random(len(std)) < ((wanted / 2.0**low) ** 2 - 1.0) / 3.0
    exponents = (low + is_high + 128).astype(np.uint8)[:, None]
    return np.hstack([exponents, _random(rng, len(std), 16)])


def _bell(rng: np.random.Generator, std: Floats) -> Floats:
    """Quantiles of a bell curve (the logistic one), drawn uniformly; blocks of one value."""
    ranks = (np.arange(_N_QUANTILES) + 0.5) / _N_QUANTILES
    quantiles = np.log(ranks / (1.0 - ranks))
    values: Floats = (quantiles / quantiles.std())[_random(rng, len(std))] * std
    return values


def _f16(rng: np.random.Generator, std: Floats) -> Bytes:
    return _half(_bell(rng, std))


def _f32(rng: np.random.Generator, std: Floats) -> Bytes:
    return _bell(rng, std).astype("<f4")[:, None].view(np.uint8)


#: Each fills [n_blocks, block bytes] from random bits; std: [n_blocks], of the values.
FILL: dict[Kind, Callable[[np.random.Generator, Floats], Bytes]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q6_K: _q6_k,
    Kind.MXFP4: _mxfp4,
    Kind.F16: _f16,
    Kind.F32: _f32,
}
