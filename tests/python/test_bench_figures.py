"""From rows to figures, and figures on paper: arithmetic with known answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from py_reasonalloc.bench.jobs import N_WARM, Arm, Job
from py_reasonalloc.bench.measure import Settings, budget_arms, plan, plan_turns, wave_layers
from py_reasonalloc.bench.rival_openvino import eviction, run_rival, table
from py_reasonalloc.bench.scaling import fit, longest_chain, n_cells, scale
from py_reasonalloc.bench.summary import summarize
from py_reasonalloc.bench.turns import slice_tokens

SETTINGS = Settings(Path("m.gguf"), depths=(512, 2048), budgets=(256,), stock_types=("f16", "q8_0"))


def decode_row(arm: str, depth: int, repetition: int, ms: float, **more) -> dict:
    """Row of a decode measurement whose steps take `ms`."""
    is_ours = arm.startswith("budget")
    n_tokens = 384 if is_ours else 128
    row = {
        "kind": "decode",
        "arm": arm,
        "depth": depth,
        "repetition": repetition,
        "budget": 256 if is_ours else None,
        "buffer": 128 if is_ours else None,
        "is_even": True,
        "n_tokens": n_tokens,
        "seconds": n_tokens * ms / 1e3,
        "weights_bytes": 1000,
        "cache_bytes": 384 * 10 if is_ours else n_cells(depth, n_tokens) * 10,
        "window_bytes": 1,
        "scratch_bytes": 2,
        "compute_bytes": 500,
        "row_bytes": 10 if is_ours else None,
        "rss_loaded_bytes": 2000,
        "rss_peak_bytes": 2000 + depth,
        "rss_full_batch_bytes": 2500 + depth,
        "logits_bytes": 400,
    }
    if is_ours:
        row |= {
            "n_compressions": 3,
            "compress_seconds": 0.01 * row["seconds"],
            "peak_tokens": 384,
            "smallest_head_budget": 256,
            "largest_head_budget": 256,
        }
    return row | more


def line_of(summary: dict, arm: str, depth: int) -> dict:
    found = [x for x in summary["decode"] if (x["arm"], x["depth"]) == (arm, depth)]
    assert len(found) == 1
    return found[0]


def stock_ms(depth: int) -> float:
    return 10.0 + 0.01 * (depth + N_WARM + 64)


@pytest.fixture
def rows() -> list[dict]:
    """Three repetitions on a machine that gets slower: ratios within each are the same."""
    rows = []
    for repetition, slowness in enumerate((1.0, 1.5, 2.0)):
        for depth in (0, 384, 512, 2048):
            rows.append(decode_row("stock f16", depth, repetition, slowness * stock_ms(depth)))
        rows += [
            decode_row("budget 256", depth, repetition, slowness * 12.0) for depth in (512, 2048)
        ]
    return rows


def test_ratios_are_formed_within_repetitions(rows) -> None:
    summary = summarize(rows, SETTINGS)
    ours = line_of(summary, "budget 256", 2048)
    assert ours["tokens_per_second"] == pytest.approx((1e3 / 18, 1e3 / 24, 1e3 / 12))
    for key, depth in (
        ("over_reference", 2048),
        ("over_reference_at_limit", 384),
        ("over_reference_at_0", 0),
    ):
        assert ours[key] == pytest.approx((stock_ms(depth) / 12.0,) * 3)
    assert ours["over_first_depth"] == pytest.approx((1.0, 1.0, 1.0))
    assert ours["first_depth"] == 512
    assert ours["compress_share"] == pytest.approx((0.01,) * 3)
    assert ours["cache_bytes"] == ours["cache_bytes_formula"] == 3840
    assert ours["rss_over_model_bytes"] == 2048
    assert ours["rss_full_batch_bytes"] == 2548
    assert ours["reserved_bytes"] == 3840 + 1 + 2 + 500 + 400
    assert line_of(summary, "stock f16", 512)["over_reference"] == (1.0, 1.0, 1.0)


def test_a_cache_that_is_not_full_is_no_base_of_flatness(rows) -> None:
    for row in rows:
        if row["arm"] == "budget 256" and row["depth"] == 512:
            row |= {"n_compressions": 0, "compress_seconds": 0.0}
    summary = summarize(rows, SETTINGS)
    assert not line_of(summary, "budget 256", 512)["is_steady"]
    assert line_of(summary, "budget 256", 2048)["first_depth"] == 2048


def test_what_failed_is_listed_and_left_out(rows) -> None:
    for i, row in enumerate(rows):
        if row["arm"] == "budget 256":
            keys = ("kind", "arm", "depth", "repetition", "budget")
            rows[i] = {**{key: row[key] for key in keys}, "error": "no room"}
    summary = summarize(rows, SETTINGS)
    assert {line["arm"] for line in summary["decode"]} == {"stock f16"}
    assert [(e["depth"], e["error"]) for e in summary["errors"]] == [
        (512, "no room"),
        (2048, "no room"),
    ]


def test_prompts_and_llama_bench_are_paired() -> None:
    rows = [
        {
            "kind": "prompt",
            "arm": arm,
            "repetition": 0,
            "budget": budget,
            "prompts": [
                {
                    "n_prompt": 100,
                    "seconds": seconds,
                    "first_token_seconds": 2 * seconds,
                    "compress_seconds": None if budget is None else seconds / 4,
                }
            ],
        }
        for arm, budget, seconds in (
            ("stock f16", None, 1.0),
            (SETTINGS.small_batches, None, 2.0),
            ("budget 256", 256, 1.25),
        )
    ]
    rows.append(
        {
            "kind": "llama-bench",
            "arm": "prompt",
            "n_prompt": 100,
            "tokens_per_second": 50.0,
            "repetition": 0,
            "budget": None,
        }
    )
    summary = summarize(rows, SETTINGS)
    ours = summary["prompt"][2]
    assert ours["tokens_per_second"] == (80.0, 80.0, 80.0)
    assert ours["over_reference"].median == pytest.approx(0.8)
    assert ours["over_small_batches"].median == pytest.approx(1.6)
    assert ours["first_token_over_reference"].median == pytest.approx(1.25)
    assert ours["compress_share"].median == pytest.approx(0.25)
    (pair,) = summary["llama_bench"]
    assert pair["what"] == "prompt of 100"
    assert pair["ours_over_llama_bench"].median == pytest.approx(2.0)


def test_turns_are_held_against_each_other_buffer_by_buffer() -> None:
    rows = [
        {
            "kind": "turns",
            "group": "budget 256",
            "arm": arm,
            "depth": depth,
            "budget": budget,
            "repetition": repetition,
            "seconds": [slowness * second for second in seconds],
            "compress_seconds": 0.0,
        }
        # a machine that gets slower between repetitions
        for repetition, slowness in enumerate((1.0, 3.0))
        for arm, depth, budget, seconds in (
            ("budget 256", 2048, 256, [2.0, 4.0]),
            ("budget 256", 512, 256, [2.0, 4.0]),
            ("stock f16", 384, None, [1.0, 6.0]),
        )
    ]
    own, stock = summarize(rows, SETTINGS)["turns"]
    assert (own["arm"], own["depth"], own["against_depth"]) == ("budget 256", 2048, 512)
    assert own["ratios"] == [1.0] * 4
    assert (stock["against"], stock["against_depth"]) == ("stock f16", 384)
    assert stock["ratios"] == [0.5, 1.5] * 2
    assert stock["speed_ratio"] == (1.0, 0.5, 1.5)


def test_loads_are_paired() -> None:
    loads = [{"base_seconds": 2.0, "seconds": 2.0}, {"base_seconds": 4.0, "seconds": 5.0}]
    row = {"kind": "load", "arm": "session", "repetition": 0, "budget": None, "loads": loads}
    (line,) = summarize([row], SETTINGS)["load"]
    assert line["over_llama"] == (1.125, 1.0, 1.25)
    assert line["base_seconds"] == (3.0, 2.0, 4.0)


def test_a_line_is_found() -> None:
    line = fit([(x, 3.0 + 0.5 * x) for x in (0, 10, 100)])
    assert line == pytest.approx((3.0, 0.5))
    assert line is not None
    assert line.at(4) == pytest.approx(5.0)
    assert fit([(1, 2), (1, 3)]) is None


def test_the_longest_chain_leaves_room_for_all_else() -> None:
    assert longest_chain(1000, 100, 9) == 100
    assert longest_chain(100, 100, 9) == longest_chain(50, 100, 9) == 0


def test_scaling_on_paper(rows) -> None:
    found = scale(summarize(rows, SETTINGS), SETTINGS)
    assert found is not None
    # medians: 1.5 times the line of the first repetition
    assert (found["stock"]["a"], found["stock"]["b"]) == pytest.approx((15.0, 0.015))
    assert found["row_bytes"] == 10
    assert found["budgets"] is None  # one budget is no line
    machine = found["machines"][0]
    assert machine["gigabytes"] == 8
    assert machine["stock_tokens"] == (6_000_000_000 - 1500) // 10
    own = machine["budgets"][0]
    assert own["fits"]
    speed = 1e3 / (15.0 + 0.015 * machine["stock_tokens"])
    assert own["over_stock"] == pytest.approx(own["tokens_per_second"] / speed)


def test_scaling_needs_a_rising_line(rows) -> None:
    flat = [r | {"seconds": 1.0} for r in rows]
    assert scale(summarize(flat, SETTINGS), SETTINGS) is None


# --- plans -----------------------------------------------------------------------------------


def test_wave_layers_keep_the_total() -> None:
    layers = wave_layers(28, 256)
    assert sum(layers) == 28 * 256
    assert layers[0] > layers[10] < layers[22]
    assert min(layers) >= 64


def test_a_plan_measures_what_is_compared(make_gguf) -> None:
    settings = Settings(
        make_gguf(),
        depths=(512, 2048),
        budgets=(64, 256),
        stock_types=("f16", "q4_0"),
        splits=("even", "uneven"),
        unpatched=Path("elsewhere"),
    )
    jobs = plan(settings)
    decodes = {(job.arm.name, job.depth) for job in jobs if job.kind == "decode"}
    ours = {arm.name for arm in budget_arms(settings)}
    assert ours == {"budget 64", "budget 64 uneven", "budget 256", "budget 256 uneven"}
    every = {"stock f16", "stock q4_0", *ours}
    assert decodes == {
        *((arm, depth) for arm in every for depth in (512, 2048)),
        *(("stock f16", depth) for depth in (0, 64 + 128, 256 + 128)),
        (settings.small_batches, 0),
        ("unpatched", 512),
    }
    assert all(job.n_tokens % 128 == 0 for job in jobs if job.kind == "decode")
    assert {job.n_threads for job in jobs} == {1}
    assert Job.from_json(jobs[-1].to_json()) == jobs[-1]
    uneven = next(job for job in jobs if job.arm.name == "budget 64 uneven")
    assert Job.from_json(uneven.to_json()) == uneven
    groups = {
        group.name: [(job.arm.name, job.depth) for job in group.jobs]
        for group in plan_turns(settings)
    }
    assert set(groups) == {*ours, "unpatched"}
    assert groups["budget 64"] == [
        ("budget 64", 2048),
        ("budget 64", 512),
        ("stock f16", 2048),
        ("stock f16", 64 + 128),
        ("stock f16", 0),
    ]
    # adaptive heads may hold twice the largest layer's budget: not full at 512
    assert [depth for _, depth in groups["budget 256 uneven"]] == [2048, 2048, 384, 0]
    assert groups["unpatched"] == [("stock f16", 512), ("unpatched", 512)]
    only = replace(settings, parts=("turns",))
    assert plan(only) == [] and len(plan_turns(only)) == len(groups)
    assert plan_turns(replace(settings, parts=("decode",))) == []


@pytest.mark.parametrize(("buffer", "n"), [(128, 16), (16, 16), (8, 8), (17, 1), (24, 12)])
def test_a_turn_divides_the_buffer(buffer, n) -> None:
    assert slice_tokens(buffer) == n


# --- OpenVINO --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_max", [10, 128, 384, 1000])
def test_eviction_settings_are_whole_blocks(n_max) -> None:
    wanted = eviction(n_max, "SUM")
    sizes = [wanted[key] for key in ("start", "recent", "max")]
    assert all(size > 0 and size % 32 == 0 for size in sizes)
    assert sizes[0] + sizes[1] < sizes[2] <= max(n_max, 128)


def fake_python(folder: Path, script: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\ncat > {folder}/job\n{script}\n")
    path.chmod(0o755)
    return path


def test_figures_of_the_rival(tmp_path) -> None:
    answer = (
        '{"token_seconds": [1.0, 2.0, 2.5, 3.0, 3.5], "cache_bytes": 4096,'
        ' "cache_usage_percent": 50, "version": "1",'
        ' "rss_loaded_bytes": 1000, "rss_peak_bytes": 3048}'
    )
    python = fake_python(tmp_path, f"echo noise\necho '{answer}'")
    row = run_rival(python, {"model": "m"}, 3)
    assert row["tokens_per_second"] == pytest.approx(2.0)
    assert row["first_token_seconds"] == 1.0
    text = table({"rival": [row, row]})
    assert "| rival | 2.00 (2.00 to 2.00) | 1.000 | 4 KiB | 2 KiB | 2.977 KiB |" in text
    assert '"model"' in (tmp_path / "job").read_text()


def test_a_rival_that_does_not_run_says_why(tmp_path) -> None:
    python = fake_python(tmp_path, "echo Traceback >&2; echo 'RuntimeError: no reader' >&2; exit 1")
    row = run_rival(python, {}, 3)
    assert row == {"error": "RuntimeError: no reader"}
    assert "does not run: RuntimeError: no reader" in table({"rival": [row]})


def test_steady_state_needs_no_more_than_the_buffers() -> None:
    assert Arm("a", budget=100, buffer=16).n_fill() == 132
    assert Arm("a", budget=100, buffer=16, heads="adaptive", layers=(50, 150)).n_fill() == 332
