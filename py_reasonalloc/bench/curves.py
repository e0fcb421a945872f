"""How cost grows: steps and compressions measured over depth, budget, buffer, layers and heads.

``python -m py_reasonalloc.bench.curves`` writes small random models, varies one thing at a time
around a base, fits two formulas to all points together, and prints every point beside what the
formulas say. With n = budget + buffer, the rows of a full segment:

    step (no compression in it)  = s0 + n_layer * (s1 + s2 * n_head_kv * (budget + buffer / 2))
    compression                  = c0 + n_layer * (c1 + n_head_kv * n * (c2 + c3 * buffer))

Depth is in neither of them: that is the point of a fixed cache. A compression compares the buffer's
new keys with all others: n * buffer. The stock cache is shown beside it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from ..engine.log import LogCapture
from ..output.console import run_command
from .engine import Engine
from .fill import skip
from .jobs import BLOCK, N_WARM, Arm, Job
from .shapes import ModelShape
from .weights import write_model

#: Query heads per KV head, values per row; all else is small, so that the cache's part shows.
N_GROUP, HEAD_DIM = 2, 64
N_BUFFERS = 3


@dataclass(frozen=True)
class Point:
    """Where something is measured: tokens, layers, KV heads. budget None: the stock cache."""

    curve: str
    depth: int = 4096
    budget: int | None = 256
    buffer: int = 128
    n_layer: int = 8
    n_head_kv: int = 4


CURVES: dict[str, Sequence[int]] = {
    "depth": (1024, 4096, 16384, 32768),
    "budget": (64, 128, 256, 512, 1024),
    "buffer": (32, 64, 128, 256),
    "n_layer": (2, 4, 8, 16),
    "n_head_kv": (1, 2, 4, 8),
}
STOCK_DEPTHS = (384, 1024, 4096, 16384)


def points(quick: bool = False) -> list[Point]:
    """Return all points; with `quick` the ends of each curve only."""
    found = []
    for name, values in CURVES.items():
        for value in (values[0], values[-1]) if quick else values:
            if name == "budget":
                found.append(Point(name, budget=value))
            else:
                found.append(replace(Point(name), **{name: value}))  # type: ignore[arg-type]
    depths = STOCK_DEPTHS[:2] if quick else STOCK_DEPTHS
    return found + [Point("stock", depth=depth, budget=None) for depth in depths]


def shape_of(point: Point) -> ModelShape:
    """Return the model that a point is measured on."""
    return ModelShape(
        arch="llama",
        n_layer=point.n_layer,
        n_embd=512,
        n_ff=1024,
        n_vocab=512,
        n_head=N_GROUP * point.n_head_kv,
        n_head_kv=point.n_head_kv,
        head_dim=HEAD_DIM,
        n_ctx_train=65536,
        rope_base=1e4,
        norm_eps=1e-6,
        is_tied=True,
    )


def measure(point: Point, model: Path, n_threads: int, folder: str) -> dict[str, float]:
    """Return "step_us", the median of steps without a compression, and "compress_us" of one."""
    n_tokens = N_BUFFERS * point.buffer
    arm = Arm("", budget=point.budget, buffer=point.buffer, n_ubatch=min(point.buffer, 512))
    depth = max(point.depth, arm.n_fill()) if point.budget is not None else point.depth
    job = Job("decode", arm, str(model), n_threads, depth=depth, n_tokens=n_tokens, folder=folder)
    with Engine(job) as engine:
        engine.open_context(max(512, depth + N_WARM + n_tokens))
        start = skip(engine)
        engine.read(depth - start, start, BLOCK)
        engine.step(N_WARM, depth)
        before = engine.stats()
        seconds = engine.step(n_tokens, depth + N_WARM)
        after = engine.stats()
    # a compression is in one step of each buffer: the median does not see it
    found = {"step_us": 1e6 * median(seconds)}
    if after is not None:
        n = after.n_compressions - before.n_compressions
        found["compress_us"] = (after.compress_us - before.compress_us) / n
    return found


def terms_of_step(point: Point) -> list[float]:
    """Return what s0, s1 and s2 are multiplied with."""
    assert point.budget is not None
    rows = point.n_head_kv * (point.budget + point.buffer / 2)
    return [1.0, point.n_layer, point.n_layer * rows]


def terms_of_compression(point: Point) -> list[float]:
    """Return what c0 to c3 are multiplied with."""
    assert point.budget is not None
    n = point.budget + point.buffer
    heads = point.n_layer * point.n_head_kv
    return [1.0, point.n_layer, heads * n, heads * n * point.buffer]


def fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Return non-negative coefficients with the least squared relative errors.

    A coefficient that would come out negative is left out (0) and the rest is fitted again.
    """
    a = np.array(terms, dtype=float) / np.array(values, dtype=float)[:, None]
    used = list(range(a.shape[1]))
    while used:
        solution, *_ = np.linalg.lstsq(a[:, used], np.ones(len(a)), rcond=None)
        if solution.min() >= 0:
            break
        used.pop(int(np.argmin(solution)))
    coefficients = [0.0] * a.shape[1]
    for i, value in zip(used, solution if used else ()):
        coefficients[i] = float(value)
    return coefficients


def predict(coefficients: Sequence[float], terms: Sequence[float]) -> float:
    """Return what a formula says, microseconds."""
    return sum(c * t for c, t in zip(coefficients, terms))


def run(
    chosen: Sequence[Point], n_threads: int, repeat: int, advance: Callable[[int], object]
) -> dict[str, Any]:
    """Measure points in turn, `repeat` times, and fit the formulas to the medians."""
    samples: list[list[dict[str, float]]] = [[] for _ in chosen]
    with tempfile.TemporaryDirectory() as folder, LogCapture(forward=False):
        models: dict[ModelShape, Path] = {}
        for i_repeat in range(repeat):
            order = range(len(chosen))
            for i in order if i_repeat % 2 == 0 else reversed(order):
                shape = shape_of(chosen[i])
                if shape not in models:
                    models[shape] = Path(folder) / f"{len(models)}.gguf"
                    write_model(models[shape], "curves", shape, "q4_0")
                samples[i].append(measure(chosen[i], models[shape], n_threads, folder))
                advance(1)
    rows = []
    for point, found in zip(chosen, samples):
        figures = {key: median(sample[key] for sample in found) for key in found[0]}
        rows.append({**asdict(point), **figures})
    ours = [(point, row) for point, row in zip(chosen, rows) if point.budget is not None]
    report: dict[str, Any] = {"n_threads": n_threads, "repeat": repeat, "points": rows}
    for key, terms in (("step_us", terms_of_step), ("compress_us", terms_of_compression)):
        coefficients = fit([terms(point) for point, _ in ours], [row[key] for _, row in ours])
        report[f"{key}_coefficients"] = coefficients
        for point, row in ours:
            row[f"{key}_fitted"] = predict(coefficients, terms(point))
    return report


def markdown(report: dict[str, Any]) -> str:
    """Return the points beside the formulas, as Markdown."""
    s, c = report["step_us_coefficients"], report["compress_us_coefficients"]
    lines = [
        f"Microseconds, medians of {report['repeat']} repetitions, {report['n_threads']} "
        "thread(s).",
        "",
        f"    step        = {s[0]:.0f} + n_layer * ({s[1]:.1f} + {s[2]:.5f} * n_head_kv * "
        "(budget + buffer / 2))",
        f"    compression = {c[0]:.0f} + n_layer * ({c[1]:.1f} + n_head_kv * n * "
        f"({c[2]:.4f} + {c[3]:.7f} * buffer)),  n = budget + buffer",
        "",
        "| varied | depth | budget | buffer | layers | KV heads | step | formula | compression "
        "| formula |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["points"]:
        cells = [row["curve"], str(row["depth"]), str(row["budget"] or "stock")]
        cells += [str(row["buffer"] if row["budget"] else ""), str(row["n_layer"])]
        cells += [str(row["n_head_kv"]), f"{row['step_us']:.0f}"]
        for key in ("step_us_fitted", "compress_us", "compress_us_fitted"):
            cells.append(f"{row[key]:.0f}" if key in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--quick", is_flag=True, help="The ends of each curve only.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write all as JSON.")
@click.option("--plot", metavar="FILE", help="Draw the curves: .png, .svg or .pdf.")
def main(threads: int, repeat: int, quick: bool, json_file: str | None, plot: str | None) -> int:
    """Measure how steps and compressions grow, on small random models."""
    import sys

    from ..output.picture import check_picture
    from .plot import save_curves

    if plot is not None:
        check_picture(plot)
    chosen = points(quick)
    bar = click.progressbar(length=repeat * len(chosen), label="measuring", file=sys.stderr)
    with bar as progress:
        report = run(chosen, threads, repeat, progress.update)
    click.echo(markdown(report), nl=False)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        save_curves(report["points"], plot)
    return 0


if __name__ == "__main__":
    run_command(main, "python -m py_reasonalloc.bench.curves", None)
