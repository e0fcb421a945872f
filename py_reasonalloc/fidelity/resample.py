"""Bootstrap intervals for means over positions, and for their differences between arms.

Neighbouring positions are alike, so what is drawn again is whole texts where there are at least
`MANY_TEXTS`. Fewer say too little about how texts differ: then blocks of `BLOCK` positions are
drawn, with replacement, within every text, and the interval is for texts such as these, not for
others (H. R. Künsch, Ann. Stat. 17 (1989) 1217-1241: blocks; B. Efron and R. J. Tibshirani, An
Introduction to the Bootstrap, 1993: percentile intervals and strata). Arms that are compared are
drawn alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..eval.results.statistics import Estimate

#: Texts from which on whole texts are drawn.
MANY_TEXTS = 20
N_DRAWS = 2000


def draw_blocks(
    n_blocks: Sequence[int], seed: int, n_draws: int = N_DRAWS
) -> npt.NDArray[np.int64]:
    """Return how often each block is drawn, [n_draws, sum of n_blocks].

    Parameters
    ----------
    n_blocks : sequence of int
        [n_texts] blocks of each text, at least one.
    seed : int
        The same seed and blocks give the same draws.
    """
    rng = np.random.default_rng(seed)
    if len(n_blocks) >= MANY_TEXTS:
        texts = rng.multinomial(len(n_blocks), [1 / len(n_blocks)] * len(n_blocks), n_draws)
        return np.repeat(texts, n_blocks, axis=1)
    return np.concatenate([rng.multinomial(n, [1 / n] * n, n_draws) for n in n_blocks], axis=1)


def ratio_interval(
    sums: npt.ArrayLike, counts: npt.ArrayLike, draws: npt.NDArray[np.int64]
) -> Estimate:
    """Return sum(sums) / sum(counts) with its 95% percentile interval.

    Parameters
    ----------
    sums, counts : [n_blocks]
        Of the positions of each block.
    draws : [n_draws, n_blocks]
        See `draw_blocks`.
    """
    totals, numbers = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    means = (draws @ totals) / (draws @ numbers)
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(totals.sum() / numbers.sum())
    return Estimate(value, min(float(low), value), max(float(high), value))
