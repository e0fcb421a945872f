"""The C allocators against NumPy: exact totals, floors, caps, ties, and the whole head pipeline."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import reference
import reference_alloc as ref
from hypothesis import given, settings
from hypothesis import strategies as st

from py_reasonalloc.engine import bindings as c


def int32s(values) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*[int(v) for v in values])


def robustify(demand, total, floor=0, gamma=0.5, lo=0.25, hi=2.0):
    """Status and budgets of ra_robustify."""
    params = c.ra_robustify_params(gamma, lo, hi)
    values = (ctypes.c_double * len(demand))(*demand)
    out = int32s([-1] * len(demand))
    status = c.ra_robustify(ctypes.byref(params), len(demand), values, total, floor, out)
    return status, np.array(out[:])


demands = st.lists(
    st.one_of(st.just(0.0), st.integers(0, 5).map(float), st.floats(0, 1e9)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(
    demand=demands,
    total=st.integers(0, 5000),
    floor=st.integers(0, 60),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    lo=st.sampled_from([0.0, 0.25, 1.0]),
    hi=st.sampled_from([1.0, 1.3, 2.0, 100.0]),
)
def test_robustify(demand, total, floor, gamma, lo, hi) -> None:
    status, budgets = robustify(demand, total, floor, gamma, lo, hi)
    if len(demand) * floor > total:
        assert status == 4
        assert "floor" in c.last_error()
        assert (budgets == -1).all()
        return
    assert status == 0
    x, cap = ref.shares(np.array(demand), total, floor, gamma, lo, hi)
    ref.check_rounding(budgets, x, total, floor, cap)
    assert robustify(demand, total, floor, gamma, lo, hi)[1].tolist() == budgets.tolist()
    for value in set(demand):  # equal demands: equal but for one token, the lower index first
        same = budgets[np.array(demand) == value]
        assert same.max() - same.min() <= 1
        assert (np.diff(same) <= 0).all()


@pytest.mark.parametrize(
    "demand", [[1.0, float("nan")], [1.0, -1.0], [float("inf"), 1.0], [-0.5]], ids=str
)
def test_robustify_refuses_bad_demands(demand) -> None:
    assert robustify(demand, 100)[0] == 1
    assert "must be finite and not negative" in c.last_error()


def test_robustify_of_one() -> None:
    assert robustify([3.0], 1)[1].tolist() == [1]
    assert robustify([3.0, 1.0], 1)[1].tolist() == [1, 0]
    assert robustify([0.0], 0)[1].tolist() == [0]


def config(**fields) -> c.ra_config:
    made = c.ra_config_default_params()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@settings(max_examples=100, deadline=None)
@given(n_layer=st.integers(1, 64), budget=st.integers(13, 600), beta=st.floats(1, 50))
def test_pyramid(n_layer, budget, beta) -> None:
    cfg = config(budget=budget, layer_alloc=b"pyramid", pyramid_beta=beta)
    out = int32s([0] * n_layer)
    assert c.ra_alloc_layers_run(ctypes.byref(cfg), n_layer, out) == 0
    budgets = np.array(out[:])
    assert budgets.sum() == n_layer * budget
    assert (np.diff(budgets) <= 0).all()
    assert budgets.min() >= 13
    line = ref.pyramid_line(budget, n_layer, beta, base=12)
    if line.min() >= 13:  # nothing raised to the floor
        assert np.abs(budgets - line).max() < 1.0 + 1e-6


@settings(max_examples=100, deadline=None)
@given(demand=demands, budget=st.integers(13, 600))
def test_wave(demand, budget) -> None:
    values = (ctypes.c_double * len(demand))(*demand)
    cfg = config(budget=budget, layer_alloc=b"wave")
    cfg.layer_demand, cfg.n_layer_demand = values, len(demand)
    out = int32s([0] * len(demand))
    assert c.ra_alloc_layers_run(ctypes.byref(cfg), len(demand), out) == 0
    total = budget * len(demand)
    x, cap = ref.over_base(np.array(demand), total, 12)
    ref.check_rounding(np.array(out[:]), x, total, 13, cap)
    assert c.ra_alloc_layers_run(ctypes.byref(cfg), len(demand) + 1, out) == 1
    assert "calibrate a profile" in c.last_error()


@st.composite
def layers_of_scores(draw):
    """Scores of a layer's heads, some tied, some forced; and the budgets it was made with."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_head = draw(st.integers(1, 8))
    coarse = draw(st.booleans())
    scores = []
    for _ in range(n_head):
        s = rng.standard_normal(int(rng.integers(13, 120))) * rng.choice([0.1, 1.0, 10.0])
        s = np.round(s) if coarse else s
        s[:4] = np.inf
        s[-8:] = np.inf
        scores.append(s.astype(np.float32))
    initial = rng.integers(13, 80, n_head)
    return scores, initial


@settings(max_examples=200, deadline=None)
@given(
    layer=layers_of_scores(),
    mu=st.sampled_from([0.0, 0.25, 1.0]),
    policy=st.sampled_from(["rkv", "snapkv"]),
    alloc=st.sampled_from(["adaptive", "adaptive-literal", "error"]),
)
def test_head_budgets_and_kept_sets(layer, mu, policy, alloc) -> None:
    """Scores -> tau -> demand -> robustify -> kept sets; and the split of least error."""
    scores, initial = layer
    total = int(initial.sum())
    cfg = config(budget=64, head_alloc=alloc.encode(), policy=policy.encode(), mu=mu)
    flat = np.concatenate(scores)
    out = int32s([0] * len(scores))
    status = c.ra_alloc_heads_run(
        ctypes.byref(cfg),
        len(scores),
        int32s([len(s) for s in scores]),
        flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        int32s(initial),
        out,
    )
    assert status == 0
    budgets = np.array(out[:])
    rest = total - 12 * len(scores)
    least = max(int(mu * rest / len(scores)), 1)
    is_scaled = policy == "rkv" and alloc != "adaptive-literal"
    pooled = ref.comparable(scores) if is_scaled else scores
    if alloc == "error":
        assert budgets.tolist() == ref.least_error(pooled, total, 12, least)[0].tolist()
    else:
        x, cap = ref.over_base(ref.head_demand(pooled, rest), total, 12, least)
        ref.check_rounding(budgets, x, total, 12 + least, cap)
    for s, budget in zip(scores, budgets):
        keep = (ctypes.c_uint8 * len(s))()
        pointer = s.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert c.ra_select_keep(len(s), pointer, int(budget), keep) == 0
        assert np.array_equal(np.array(keep[:], bool), reference.select_keep(s, int(budget)))
