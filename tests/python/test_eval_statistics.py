"""Intervals and tests against scipy, published examples, brute force and simulated truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.results.statistics import (
    Z95,
    paired_difference,
    pass_at_1,
    sign_flip_p,
    wilson,
)


@st.composite
def counts(draw, n_arms: int = 1, max_texts: int = 5) -> tuple[list[int], ...]:
    """Right texts of each arm, and all texts, of 1 to 40 problems."""
    texts = draw(st.lists(st.integers(1, max_texts), min_size=1, max_size=40))
    arms = ([draw(st.integers(0, m)) for m in texts] for _ in range(n_arms))
    return (*arms, texts)


def pairs(b: int, c: int, n: int) -> tuple[list[int], list[int], list[int]]:
    """One text for each of n problems; b are right in the first arm only, c in the second only."""
    return [1] * b + [0] * (n - b), [0] * b + [1] * c + [0] * (n - b - c), [1] * n


# --- one arm -------------------------------------------------------------------------------------


@given(n=st.integers(1, 2000), data=st.data())
def test_wilson_equals_scipys(n, data) -> None:
    k = data.draw(st.integers(0, n))
    expected = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    right = [1] * k + [0] * (n - k)
    assert pass_at_1(right, [1] * n) == pytest.approx((k / n, expected.low, expected.high))


@given(arm=counts())
def test_estimates_hold_their_value(arm) -> None:
    right, texts = arm
    share, low, high = pass_at_1(right, texts)
    assert share == pytest.approx(sum(right) / sum(texts))
    assert 0 <= low <= share <= high <= 1 and low < high
    # within those of texts that are independent, and of problems whose texts are all the same
    narrow = wilson(share, sum(texts))
    wide = wilson(share, sum(texts) ** 2 / sum(m * m for m in texts))
    assert wide[0] - 1e-9 <= low <= narrow[0] + 1e-9
    assert narrow[1] - 1e-9 <= high <= wide[1] + 1e-9
    order = sorted(range(len(texts)), key=lambda i: (right[i], texts[i]))
    shuffled = pass_at_1([right[i] for i in order], [texts[i] for i in order])
    assert shuffled == pytest.approx((share, low, high))
    flipped = pass_at_1([m - r for r, m in zip(right, texts)], texts)
    assert flipped == pytest.approx((1 - share, 1 - high, 1 - low))


def test_texts_that_are_all_the_same_count_once() -> None:
    once = pass_at_1([1] * 12 + [0] * 18, [1] * 30)
    assert pass_at_1([8] * 12 + [0] * 18, [8] * 30) == pytest.approx(once)


def test_texts_that_differ_as_if_independent_count_all() -> None:
    share, low, high = pass_at_1([3] * 30, [8] * 30)
    expected = scipy.stats.binomtest(90, 240).proportion_ci(0.95, method="wilson")
    assert (share, low, high) == pytest.approx((0.375, expected.low, expected.high))


def test_in_between_the_variance_is_that_of_problem_means() -> None:
    right = [0, 1, 4, 2, 4, 3, 0, 4, 1, 4, 2, 0]
    means = np.array(right) / 4
    share = means.mean()
    n_effective = share * (1 - share) / scipy.stats.sem(means) ** 2
    assert 12 < n_effective < 48
    assert pass_at_1(right, [4] * 12) == pytest.approx((share, *wilson(share, n_effective)))


# --- two arms ------------------------------------------------------------------------------------


@given(b=st.integers(0, 60), c=st.integers(0, 60), more=st.integers(1, 50))
def test_p_of_single_texts_is_exact_mcnemars(b, c, more) -> None:
    found = paired_difference(*pairs(b, c, b + c + more))
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)
    assert found.value == pytest.approx((b - c) / (b + c + more))
    assert found.n_problems == b + c + more


def test_p_far_out() -> None:
    assert sign_flip_p([1] * 500) == pytest.approx(2.0**-499)
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == sign_flip_p([8, -8]) == 1.0


@given(differences=st.lists(st.integers(-8, 8), max_size=9))
@settings(deadline=None)
def test_p_of_several_texts_is_that_of_all_signs(differences) -> None:
    d = np.array(differences, dtype=int)
    sums = [abs(int(np.dot(signs, d))) for signs in itertools.product((1, -1), repeat=len(d))]
    expected = np.mean([total >= abs(d.sum()) for total in sums])
    assert sign_flip_p(differences) == pytest.approx(expected, rel=1e-9)


def test_p_equals_scipys_permutation_test() -> None:
    right, other = [8, 7, 3, 8, 2, 5, 1, 4, 6, 0], [6, 7, 1, 5, 3, 1, 1, 2, 7, 0]
    expected = scipy.stats.permutation_test(
        (np.array(right) / 8, np.array(other) / 8),
        lambda x, y: np.mean(x) - np.mean(y),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    found = paired_difference(right, other, [8] * 10)
    assert found.value == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(
    ("b", "c", "n", "low", "high"),
    [
        # airway hyper-responsiveness, Bentur et al. 2009, as in Fagerland et al. 2014
        (1, 7, 21, -0.508, -0.013),
        # complete response, Cavo et al. 2012, as the R package contingencytables prints it
        (6, 16, 161, -0.1195, -0.0032),
    ],
)
def test_interval_of_published_examples(b, c, n, low, high) -> None:
    found = paired_difference(*pairs(b, c, n))
    digits = len(str(low).split(".")[1])
    assert (round(found.low, digits), round(found.high, digits)) == (low, high)


@given(arms=counts(n_arms=2))
def test_differences_hold_their_value(arms) -> None:
    first, second, texts = arms
    found = paired_difference(first, second, texts)
    assert found.value == pytest.approx((sum(first) - sum(second)) / sum(texts))
    assert -1 <= found.low <= found.value + 1e-12 and found.value <= found.high + 1e-12 <= 1 + 1e-9
    assert found.low < found.high
    assert 0 < found.p <= 1
    back = paired_difference(second, first, texts)
    assert back == pytest.approx((-found.value, -found.high, -found.low, found.p, len(texts)))


def test_many_problems_give_the_t_interval() -> None:
    rng = np.random.default_rng(0)
    hard = rng.beta(1, 1, 4000)
    first, second = rng.binomial(4, hard), rng.binomial(4, hard**1.3)
    found = paired_difference(first.tolist(), second.tolist(), [4] * 4000)
    expected = scipy.stats.ttest_rel(first / 4, second / 4)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=2e-4)
    assert (found.p < 0.001) == (expected.pvalue < 0.001)


def test_arms_that_never_disagree_have_an_interval_all_the_same() -> None:
    low, high = paired_difference(*pairs(0, 0, 98))[1:3]
    assert (low, high) == pytest.approx((-Z95 * math.sqrt(2) / 100, Z95 * math.sqrt(2) / 100))


@pytest.mark.parametrize(
    ("right", "texts"), [([], []), ([0], [0]), ([2], [1]), ([-1], [1]), ([1], [1, 1])]
)
def test_counts_that_cannot_be(right, texts) -> None:
    with pytest.raises(ConfigError):
        pass_at_1(right, texts)
    with pytest.raises(ConfigError):
        paired_difference(right, right, texts)


# --- how often intervals hold the truth ----------------------------------------------------------


@pytest.mark.parametrize(("n", "n_texts"), [(30, 1), (30, 8), (200, 1), (200, 4)])
@pytest.mark.parametrize("hardness", [(0.4, 0.4), (1, 3)])
def test_coverage(n, n_texts, hardness) -> None:
    """Of problems drawn from a beta distribution; the second arm loses a fifth of its chances."""
    rng = np.random.default_rng(n + n_texts)
    n_runs = 600
    truth = hardness[0] / sum(hardness)
    n_held = n_held_difference = n_found = 0
    for _ in range(n_runs):
        chances = rng.beta(*hardness, n)
        first, second, third = (
            rng.binomial(n_texts, p).tolist() for p in (chances, 0.8 * chances, chances)
        )
        texts = [n_texts] * n
        _, low, high = pass_at_1(first, texts)
        n_held += low <= truth <= high
        difference = paired_difference(first, second, texts)
        n_held_difference += difference.low <= 0.2 * truth <= difference.high
        n_found += paired_difference(first, third, texts).p <= 0.05
    # 3 standard errors of a share of 600 around 95% are 2.7 points
    assert 0.92 <= n_held / n_runs <= 0.985
    assert 0.92 <= n_held_difference / n_runs <= 0.99
    assert n_found / n_runs <= 0.077  # the test is exact: at most 5%
