"""The library's policies and selection against their NumPy definitions in reference.py."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from py_reasonalloc.engine import bindings as c

# The library works in float32: logits up to LOGIT_MAX carry a relative error of 2**-24, which the
# exponential turns into an error of the softmax of LOGIT_MAX * 2**-24 = 2e-6, relative; differences
# of importance and redundancy lose that of numbers up to 1.
LOGIT_MAX = 32.0
RELATIVE = 1e-5
ABSOLUTE = 3e-7

# Two roundings of one cosine may fall on either side of the threshold: none is put this near to it.
COSINE_MARGIN = 1e-4

REGISTERED = [c.ra_policy_name(i).decode() for i in range(c.ra_policy_count())]

# The same examples in every run: what fails once must fail again.
examples = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass
class Case:
    """One head and a configuration."""

    head: reference.Head
    n_window: int
    n_sink: int
    n_protect: int

    @property
    def forced(self) -> dict[str, int]:
        return {
            "n_sink": self.n_sink,
            "n_window": self.n_window,
            "n_protect": self.n_protect,
        }


def as_array(values: np.ndarray, kind: type) -> object:
    """C array of `kind` with the same values."""
    flat = np.ascontiguousarray(values).ravel()
    return (kind * max(flat.size, 1))(*flat.tolist())


def head_arrays(head: reference.Head) -> c.ra_head_arrays:
    """What the C interface takes of a head."""
    n_obs, n_group, head_dim = head.q.shape
    return c.ra_head_arrays(
        size=ctypes.sizeof(c.ra_head_arrays),
        il=head.il,
        ih=head.ih,
        n_kv=head.n_kv,
        n_group=n_group,
        n_obs=n_obs,
        head_dim_k=head_dim,
        head_dim_v=head.v.shape[1],
        kq_scale=head.kq_scale,
        k=as_array(head.k, c.c_float),
        v=as_array(head.v, c.c_float),
        q=as_array(head.q, c.c_float),
        pos=as_array(head.pos, c.c_int32),
        bias=as_array(head.bias, c.c_float),
        state=as_array(head.state, c.c_float),
        **centre_arrays(head),
    )


def centre_arrays(head: reference.Head) -> dict[str, object]:
    """The rotation of keys and the query centres, where the head has them."""
    if head.rope is None:
        return {}
    freq = as_array(head.rope.freq, c.c_float)
    rope = c.ra_rope(head.rope.n_rot, head.rope.offset, head.rope.is_neox, freq)
    centres = as_array(head.centres, c.c_float)
    return {"rope": ctypes.pointer(rope), "centres": centres, "n_centres": head.centres.size}


def library_scores(policy: str, case: Case) -> np.ndarray:
    """Scores by ra_policy_score()."""
    return library_scores_and_state(policy, case)[0]


def library_scores_and_state(policy: str, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, state and masses."""
    head = case.head
    cfg = c.ra_config_default_params()
    cfg.policy = policy.encode()
    cfg.budget = c_max_budget(case)
    cfg.n_sink, cfg.n_window, cfg.n_protect = case.n_sink, case.n_window, case.n_protect
    cfg.lambda_, cfg.sim_threshold = head.lambda_, head.sim_threshold
    cfg.pool_kernel, cfg.seed, cfg.ema = head.pool_kernel, head.seed, head.ema
    cfg.decay = head.decay
    score = (c.c_float * head.n_kv)()
    state_out = (c.c_float * head.state.size)()
    mass = (c.c_float * head.n_kv)()
    status = c.ra_policy_score(cfg, head_arrays(head), score, state_out, mass)
    assert status == c.RA_STATUS_OK, c.last_error()
    state = np.array(state_out, dtype=np.float64).reshape(head.state.shape)
    return np.array(score, dtype=np.float64), state, np.array(mass, dtype=np.float64)


def c_max_budget(case: Case) -> int:
    """A budget that the library accepts; scores do not depend on it."""
    return max(case.n_sink, case.n_protect) + case.n_window + 1


def library_keep(scores: np.ndarray, budget: int) -> tuple[int, np.ndarray]:
    """Status and choice of ra_select_keep()."""
    keep = (c.c_uint8 * len(scores))(*[7] * len(scores))
    status = c.ra_select_keep(len(scores), as_array(scores, c.c_float), budget, keep)
    return status, np.array(keep)


def make_keys(rng: np.random.Generator, kind: str, n_kv: int, head_dim: int) -> np.ndarray:
    """Keys as they occur, and as they hurt: [n_kv, head_dim] of float32 values."""
    k = rng.standard_normal((n_kv, head_dim))
    if kind == "duplicates":
        k = k[rng.integers(0, max(n_kv // 4, 1), n_kv)]
    elif kind == "look-alikes":
        centres = k[rng.integers(0, max(n_kv // 5, 1), n_kv)]
        k = centres + 0.05 * k
    elif kind == "one direction":
        k = k[:1] * rng.uniform(0.1, 10.0, (n_kv, 1))
    elif kind == "zeros":
        k[rng.random(n_kv) < 0.4] = 0.0
    elif kind == "outliers":
        k *= np.exp(rng.uniform(-6.0, 4.0, (n_kv, 1)))
    return k.astype(np.float32).astype(np.float64)


def clear_threshold(k: np.ndarray, wanted: float) -> float:
    """The threshold nearest to `wanted` that no cosine of two keys comes close to."""
    unit = reference.unit_keys(k)
    cosines = (unit @ unit.T)[~np.eye(len(k), dtype=bool)]
    candidates = np.linspace(-1.0, 1.0, 1025)  # exact in float32
    gaps = np.sort(cosines)
    right = np.searchsorted(gaps, candidates)
    padded = np.concatenate([[-np.inf], gaps, [np.inf]])
    distance = np.minimum(candidates - padded[right], padded[right + 1] - candidates)
    clear = candidates[distance > COSINE_MARGIN]
    assume(clear.size > 0)
    return float(clear[np.argmin(np.abs(clear - wanted))])


KEY_KINDS = ["plain", "duplicates", "look-alikes", "one direction", "zeros", "outliers"]


def make_state(rng: np.random.Generator, policy: str, n_kv: int, n_new: int) -> np.ndarray:
    """Numbers left by a compression before; none for the newest tokens, nor for some older."""
    state = rng.standard_normal(n_kv)
    if policy in reference.N_STATE:  # a sum, and the sum of its weights
        state = rng.random((n_kv, 2)) * [1.0, 3.0]
    state = state.astype(np.float32).astype(np.float64)
    state[rng.random(n_kv) < 0.2] = np.nan
    state[n_kv - n_new :] = np.nan
    return state


def add_centres(draw: st.DrawFn, rng: np.random.Generator, head: reference.Head) -> None:
    """RoPE of any kind, partial and scaled, and centres from sharp to none."""
    n_group, head_dim = head.q.shape[1:]
    n_rot = 2 * draw(st.integers(0, head_dim // 2))
    freq = 10000.0 ** (-np.arange(n_rot // 2) / max(n_rot // 2, 1))
    if draw(st.booleans()):  # factors of llama 3 or longrope, the ramp of YaRN: any numbers
        freq = freq * rng.uniform(0.02, 1.0, len(freq))
    head.rope = reference.Rope(
        n_rot,
        offset=draw(st.sampled_from([0, head_dim - n_rot])),
        is_neox=draw(st.booleans()),
        freq=freq.astype(np.float32).astype(np.float64),
    )
    mean = rng.standard_normal((n_group, head_dim)) * draw(st.sampled_from([0.0, 1.0, 5.0]))
    real, imag = head.rope.pairs
    moduli = np.zeros((n_group, head_dim // 2))
    moduli[:, : len(freq)] = np.hypot(mean[:, real], mean[:, imag])
    moduli[:, : len(freq)] += draw(st.sampled_from([0.0, 2.0])) * rng.random((n_group, len(freq)))
    centres = np.concatenate([mean, moduli], axis=1)
    head.centres = centres.astype(np.float32).astype(np.float64)


@st.composite
def cases(draw: st.DrawFn, policy: str = "rkv") -> Case:
    """Heads of all shapes; the numbers come from a drawn seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_window = draw(st.sampled_from([1, 2, 3, 8, 13]))
    n_kv = draw(st.one_of(st.integers(1, n_window + 2), st.integers(1, 120)))
    head_dim = draw(st.sampled_from([1, 2, 3, 16, 64, 128]))
    n_obs = draw(st.integers(0, n_kv if policy in reference.ALL_QUERIES else min(n_window, n_kv)))
    n_group = draw(st.sampled_from([1, 2, 4, 7]))
    k = make_keys(rng, draw(st.sampled_from(KEY_KINDS)), n_kv, head_dim)
    q = rng.standard_normal((n_obs, n_group, head_dim)).astype(np.float32).astype(np.float64)
    kq_scale = head_dim**-0.5 * draw(st.sampled_from([0.0, 1.0, 4.0]))
    largest = np.abs(np.einsum("ogd,jd->ogj", q, k)).max(initial=1e-3)
    kq_scale = float(np.float32(min(kq_scale, LOGIT_MAX / largest)))
    gaps = rng.integers(1, draw(st.sampled_from([2, 40])), n_kv)
    head = reference.Head(
        k=k,
        q=q,
        kq_scale=kq_scale,
        pos=np.cumsum(gaps) - draw(st.integers(0, 1)),
        n_window=n_window,
        il=draw(st.integers(0, 100)),
        ih=draw(st.integers(0, 40)),
        lambda_=draw(st.sampled_from([0.0, 0.125, 0.5, 1.0])),
        sim_threshold=clear_threshold(k, draw(st.floats(-1.0, 1.0))),
        pool_kernel=draw(st.sampled_from([1, 3, 7, 31, 255])),
        ema=draw(st.sampled_from([0.0, 0.25, 0.875])),
        decay=draw(st.sampled_from([0.0, 0.75, 0.9375])),
        v=make_keys(rng, "plain", n_kv, draw(st.sampled_from([1, 8, 96]))),
        bias=rng.choice([0.0, 0.5, 3.25], n_kv, p=[0.6, 0.2, 0.2]),
        state=make_state(rng, policy, n_kv, draw(st.integers(0, n_kv))),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    head.n_sink = draw(st.integers(0, 6))
    if policy == "triattention":
        add_centres(draw, rng, head)
    return Case(
        head,
        n_window,
        n_sink=head.n_sink,
        n_protect=draw(st.sampled_from([0, 0, 3, 25, 400])),
    )


def expected_scores(policy: str, case: Case) -> np.ndarray:
    scores = reference.POLICIES[policy](case.head)
    return reference.forced_scores(scores, case.head.pos, **case.forced)


def tolerance(policy: str, case: Case, scores: np.ndarray) -> np.ndarray:
    """What the library's scores may differ by; ranks and draws must be exact."""
    if policy in ("streaming", "random"):
        return np.zeros_like(scores)
    absolute = ABSOLUTE
    if policy == "h2o":  # a sum over queries, beside a number of up to 5 from before
        absolute *= 5 + len(case.head.q)
    if policy in ("mass", "loss"):  # times a distance of up to 20, and up to 2
        absolute *= 40
    if policy == "triattention":  # differences in units that may be small beside the numbers
        numbers, terms = reference.trig_scores(case.head)
        deviation = numbers.std(axis=1)
        ratio = deviation / np.maximum(np.abs(numbers.mean(axis=1)), 1e-30)
        assume(not ((ratio > 1e-6) & (ratio < 1e-4)).any())
        largest = terms.max(axis=1)[deviation > 0]
        absolute += 2e-6 * (largest / deviation[deviation > 0]).max(initial=0.0)
        return np.full_like(scores, absolute) + 2 * absolute * np.abs(
            np.where(np.isfinite(scores), scores, 0.0)
        )
    if policy == "keydiff":  # divided by the norm of a mean that may nearly cancel
        mean = reference.unit_keys(case.head.k).mean(axis=0)
        absolute /= max(np.linalg.norm(mean), reference.MIN_MEAN_NORM) ** 2
    return absolute + RELATIVE * np.abs(np.where(np.isfinite(scores), scores, 0.0))


def test_every_registered_policy_has_a_definition() -> None:
    assert len(set(REGISTERED)) == len(REGISTERED)
    assert set(REGISTERED) == set(reference.POLICIES)


@pytest.mark.parametrize("policy", REGISTERED)
@given(data=st.data())
@examples
def test_scores(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy))
    expected = expected_scores(policy, case)
    got, state, mass = library_scores_and_state(policy, case)
    forced = np.isposinf(expected)
    assert np.array_equal(np.isposinf(got), forced)
    assert forced[-case.n_window :].all()
    error = np.abs(got[~forced] - expected[~forced])
    assert (error <= tolerance(policy, case, expected[~forced])).all(), error.max()

    scores = reference.POLICIES[policy](case.head)
    want = reference.policy_state(policy, case.head, scores)
    assert np.array_equal(np.isnan(state), np.isnan(want))
    error = np.abs(np.nan_to_num(state - want))
    assert (error <= tolerance(policy, case, want)).all(), error.max()
    error = np.abs(mass - reference.mass_of(policy, case.head))
    assert (error <= 2 * ABSOLUTE + RELATIVE * mass).all(), error.max()


@pytest.mark.parametrize("policy", REGISTERED)
@given(data=st.data())
@examples
def test_kept_sets(policy: str, data: st.DataObject) -> None:
    """Scores and choice of the library together; they may differ where scores nearly tie."""
    case = data.draw(cases(policy))
    expected = expected_scores(policy, case)
    n_forced = int(np.isposinf(expected).sum())
    budget = data.draw(st.integers(n_forced, case.head.n_kv + 1))
    want = reference.select_keep(expected, budget)
    status, got = library_keep(library_scores(policy, case), budget)
    assert status == c.RA_STATUS_OK, c.last_error()
    assert got.sum() == want.sum() == min(budget, case.head.n_kv)
    differ = want != got.astype(bool)
    if differ.any():
        worst_kept = expected[want].min()
        gap = np.abs(expected[differ] - worst_kept)
        assert (gap <= 2 * tolerance(policy, case, expected[differ])).all(), gap.max()


@given(
    scores=st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, 2.0, np.nan, np.inf, -np.inf]),
            st.floats(width=32),
        ),
        min_size=1,
        max_size=60,
    ),
    budget=st.integers(0, 70),
)
@settings(examples, max_examples=500)
def test_selection(scores: list[float], budget: int) -> None:
    """Ties, NaN and infinite scores: the choice is exact."""
    array = np.array(scores)
    status, got = library_keep(array, budget)
    try:
        want = reference.select_keep(array, budget)
    except ValueError:
        assert c.ra_status_name(status) == b"RA_STATUS_BUDGET"
        assert "cannot hold" in c.last_error()
        assert (got == 7).all()  # untouched
    else:
        assert status == c.RA_STATUS_OK
        assert np.array_equal(got, want)


@pytest.mark.parametrize("policy", REGISTERED)
@given(data=st.data())
@settings(examples, max_examples=40)
def test_few_tokens(policy: str, data: st.DataObject) -> None:
    """Not more tokens than the window: all of them stay."""
    case = data.draw(cases(policy))
    case.n_window = case.head.n_window = case.head.n_kv + data.draw(st.integers(0, 3))
    assert np.isposinf(library_scores(policy, case)).all()
    assert np.isposinf(expected_scores(policy, case)).all()


@given(data=st.data())
@settings(examples, max_examples=300)
def test_merging(data: st.DataObject) -> None:
    """Targets, biases and values of ra_merge_head(); a near tie of cosines may go either way."""
    case = data.draw(cases("mass"))
    head, rng = case.head, np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    keep = rng.random(head.n_kv) < data.draw(st.sampled_from([0.2, 0.6, 1.0]))
    can_take = keep & (rng.random(head.n_kv) < data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    masses = rng.random(head.n_kv) * (rng.random(head.n_kv) < 0.8)
    masses = masses.astype(np.float32).astype(np.float64)
    cfg = c.ra_config_default_params()
    target = (c.c_int32 * head.n_kv)()
    bias, values = (c.c_float * head.n_kv)(), (c.c_float * head.v.size)()
    status = c.ra_merge_head(
        cfg,
        head_arrays(head),
        as_array(keep, c.c_uint8),
        as_array(can_take, c.c_uint8),
        as_array(masses, c.c_float),
        target,
        bias,
        values,
    )
    assert status == c.RA_STATUS_OK, c.last_error()
    want, _, want_bias, want_values = reference.merge(head, keep, can_take, masses)
    got = np.array(target[:])
    differ = np.flatnonzero(got != want)
    unit = reference.unit_keys(head.k)
    for j in differ:
        assert abs(unit[j] @ unit[got[j]] - unit[j] @ unit[want[j]]) < 1e-6
    if len(differ) == 0:
        assert np.abs(np.array(bias[:]) - want_bias)[keep].max(initial=0.0) < 1e-4
        error = np.abs(np.array(values[:]).reshape(head.v.shape) - want_values)
        assert error[keep].max(initial=0.0) < 1e-4


@given(case=cases())
@settings(examples, max_examples=40)
def test_the_newest_of_look_alikes_survives(case: Case) -> None:
    """R-KV without attention: of identical keys the newest scores best."""
    head = case.head
    n_group = 4
    head.k = np.repeat(np.eye(8), n_group, axis=0)
    head.k = head.k[np.random.default_rng(head.seed).permutation(len(head.k))]
    head.pos = np.arange(len(head.k)) + 10
    head.q, head.state = np.zeros((0, 1, 8)), np.full(len(head.k), np.nan)
    head.v, head.bias = np.zeros((len(head.k), 1)), np.zeros(len(head.k))
    head.lambda_, head.sim_threshold = 0.0, 0.5
    case.n_window = head.n_window = 1
    case.n_sink = case.n_protect = 0
    for scores in (library_scores("rkv", case), expected_scores("rkv", case)):
        for axis in range(8):
            group = np.flatnonzero(head.k[:, axis])
            assert scores[group[-1]] > scores[group[:-1]].max()


def test_definitions_by_hand() -> None:
    """The oracle itself, on numbers from outside: published outputs, and a worked example."""
    assert reference.splitmix64(np.array([0]))[0] == 0xE220A8397B1DCDAF
    assert reference.splitmix64(np.array([0x9E3779B97F4A7C15]))[0] == 0x6E789E6AA1B965F4
    assert reference.max_pool(np.array([1.0, 5.0, 2.0, 0.0]), 3).tolist() == [5.0, 5.0, 5.0, 2.0]

    # keys 0 and 2 at 0 degrees, key 1 at 60: cosines 1/2 and 1; row 0 and 2 spare one another
    k = np.array([[1.0, 0.0], [0.5, 0.75**0.5], [2.0, 0.0]])
    thinned = reference.thinned_cosines(k, 0.6)
    assert np.allclose(thinned, [[0.0, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.0]])
    assert np.allclose(reference.thinned_cosines(k, 0.4)[1], [0.5, 0.0, 0.0])

    # one query, group of two: maxima of the logits are log 2 and 0, so softmax gives 2/3 and 1/3
    head = reference.Head(
        k=np.array([[np.log(2.0)], [0.0], [9.0]]),
        q=np.array([[[1.0], [-1.0]]]),
        kq_scale=1.0,
        pos=np.array([0, 1, 2]),
        n_window=1,
        pool_kernel=1,
    )
    assert np.allclose(reference.snapkv(head), [2 / 3, 1 / 3, 0.0])
    scores = reference.forced_scores(np.array([1.0, np.nan, 2.0]), head.pos, 1, 1, 0)
    assert scores[0] == scores[2] == np.inf and scores[1] < -3e38
    kept = reference.select_keep(np.array([1.0, 2.0, 1.0, np.nan]), 2)
    assert kept.tolist() == [False, True, True, False]
