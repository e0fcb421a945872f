"""`bench.curves`: points around a base, formulas fitted to them, the command on real contexts."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from py_reasonalloc.bench import curves
from py_reasonalloc.bench.curves import Point, fit, points, predict, run, shape_of


def test_one_thing_is_varied_at_a_time() -> None:
    base = {field: getattr(Point(""), field) for field in Point.__dataclass_fields__}
    for point in points():
        differs = {name for name, value in base.items() if getattr(point, name) != value}
        assert (
            differs <= {"curve", "depth", "budget"}
            if point.budget is None
            else {"curve"}.union({point.curve})
        )
    assert {point.curve for point in points()} == {*curves.CURVES, "stock"}
    assert len(points(quick=True)) == 2 * len(curves.CURVES) + 2


def test_formulas_are_found_again() -> None:
    ours = [point for point in points() if point.budget is not None]
    for terms, true in (
        (curves.terms_of_step, [100.0, 20.0, 0.05]),
        (curves.terms_of_compression, [30.0, 5.0, 0.1, 0.002]),
    ):
        listed = [terms(point) for point in ours]
        values = [predict(true, t) for t in listed]
        assert fit(listed, values) == pytest.approx(true, rel=1e-6)


def test_no_coefficient_is_negative() -> None:
    found = fit([[1.0, n] for n in (1, 2, 3)], [3.0, 2.0, 1.5])
    assert found[1] == 0.0
    assert 1.5 <= found[0] <= 3.0
    assert fit([[-1.0]], [1.0]) == [0.0]


def test_real_points(tmp_path) -> None:
    small = {"buffer": 8, "n_layer": 2, "n_head_kv": 2}
    chosen = [
        Point("depth", depth=100, budget=32, **small),
        Point("budget", depth=100, budget=64, **small),
        Point("stock", depth=100, budget=None, **small),
    ]
    steps = []
    report = run(chosen, n_threads=1, repeat=1, advance=steps.append)
    assert len(steps) == 3
    for row in report["points"]:
        assert row["step_us"] > 0
        assert ("compress_us" in row) == (row["budget"] is not None)
        assert row.get("compress_us", 1) > 0
    assert len(report["step_us_coefficients"]) == 3
    text = curves.markdown(report)
    assert text.count("\n| ") == 1 + len(chosen)
    assert "| stock | 100 | stock |" in text


def test_the_command(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(
        curves, "points", lambda quick: [Point("depth", 50, 32, buffer=8, n_layer=1, n_head_kv=1)]
    )
    done = CliRunner().invoke(
        curves.main,
        ["--repeat", "1", "--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.svg")],
    )
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert "<svg" in (tmp_path / "c.svg").read_text()
    assert "step        =" in done.output
    assert json.loads((tmp_path / "c.json").read_text())["repeat"] == 1


def test_query_heads_follow_kv_heads() -> None:
    shape = shape_of(Point("", n_head_kv=8))
    assert (shape.n_head, shape.n_head_kv, shape.head_dim) == (16, 8, 64)
    assert shape.n_head * shape.head_dim != shape.n_embd
