"""OpenVINO GenAI with its cache eviction, beside ours: the same file, threads and tokens.

``python -m py_reasonalloc.bench.rival_openvino --shape r1-qwen-1.5b`` makes a throw-away virtual
environment, installs ``openvino-genai`` in it from the package index (about 300 MB on disk), and
decodes with it: full cache, and with eviction in each mode; in turn with stock llama.cpp and ours.
What does not run is reported with the reason.

What OpenVINO evicts: whole blocks of 32 tokens (CPU), the same number in every layer, for all heads
of a layer together; each layer picks its own, by attention summed over its heads. The first and the
most recent tokens stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click

from ..engine.errors import ComputeError, ConfigError
from ..engine.tempfiles import scratch_folder
from ..output.console import run_command
from ..output.text import size
from .guard import guarded
from .jobs import Arm, Job
from .measure import run_job
from .models import bench_folder, make_bench_folder, open_model
from .shapes import SHAPES
from .weights import WEIGHTS

PACKAGE = "openvino-genai"
MODES = ("NORM_SUM", "SUM", "ADAPTIVE_RKV")
#: Tokens per block of OpenVINO's CPU cache; sizes must be multiples of it.
BLOCK = 32

Row = dict[str, Any]


def make_environment(folder: Path, version: str | None) -> Path:
    """Make a virtual environment with the package; returns its Python.

    Raises
    ------
    ComputeError
        pip could not install it.
    """
    venv.create(folder, with_pip=True)
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    python = folder / scripts / "python"
    wanted = PACKAGE if version is None else f"{PACKAGE}=={version}"
    command = [str(python), "-m", "pip", "install", "--quiet", wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise ComputeError(f"pip install {wanted}: {lines[-1] if lines else 'failed'}")
    return python


def eviction(n_max: int, mode: str) -> dict[str, Any]:
    """Return OpenVINO's eviction settings for a cache of `n_max` tokens at most."""
    n_max = max(n_max // BLOCK, 4) * BLOCK
    recent = max(min(128, n_max // 3) // BLOCK, 1) * BLOCK
    return {"start": BLOCK, "recent": recent, "max": n_max, "mode": mode}


def run_rival(python: Path, job: dict[str, Any], n_timed: int) -> Row:
    """Run one generation in OpenVINO.

    Returns
    -------
    dict
        tokens_per_second over the last `n_timed` tokens, first_token_seconds, bytes; or "error".
    """
    worker = Path(__file__).with_name("rival_openvino_worker.py")
    done = subprocess.run(
        # isolated: modules beside the worker must not hide others of the same name
        guarded([str(python), "-I", str(worker)]),
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    times = found.pop("token_seconds")
    if len(times) <= n_timed:
        return {"error": f"only {len(times)} tokens came"}
    return {
        "tokens_per_second": n_timed / (times[-1] - times[-1 - n_timed]),
        "first_token_seconds": times[0],
        "cache_bytes": found["cache_bytes"],
        **_resident(found),
        "cache_usage_percent": found["cache_usage_percent"],
        "version": found["version"],
    }


def _resident(found: Row) -> Row:
    """Return the peak of resident memory, and how much came after loading (None: unknown)."""
    peak, loaded = found["rss_peak_bytes"], found["rss_loaded_bytes"]
    beyond = None if None in (peak, loaded) else peak - loaded
    return {"rss_over_model_bytes": beyond, "rss_peak_bytes": peak}


def run_ours(job: Job) -> Row:
    """Run one measurement of ours, with the figures that `run_rival` gives."""
    found = run_job(job)
    if "error" in found:
        return found
    prompt = run_job(
        Job("prompt", job.arm, job.model, job.n_threads, prompts=job.prompts, folder=job.folder)
    )
    if "error" in prompt:
        return prompt
    return {
        "tokens_per_second": found["n_tokens"] / found["seconds"],
        "first_token_seconds": prompt["prompts"][0]["first_token_seconds"],
        "cache_bytes": found["cache_bytes"],
        **_resident(found),
    }


def table(rows: dict[str, list[Row]]) -> str:
    """Return the figures as Markdown: medians over repetitions, or why there are none."""
    head = [
        "",
        "tokens/s",
        "first token, s",
        "cache made",
        "used beyond the weights",
        "peak memory",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, found in rows.items():
        errors = [row["error"] for row in found if "error" in row]
        if errors:
            lines.append([name, f"does not run: {errors[0]}", "", "", "", ""])
            continue

        speeds = sorted(row["tokens_per_second"] for row in found)
        first = median(row["first_token_seconds"] for row in found)
        sizes = [
            "" if found[0][key] is None else size(round(median(row[key] for row in found)))
            for key in ("cache_bytes", "rss_over_model_bytes", "rss_peak_bytes")
        ]
        lines.append(
            [
                name,
                f"{median(speeds):.2f} ({speeds[0]:.2f} to {speeds[-1]:.2f})",
                f"{first:.3f}",
                *sizes,
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--shape", required=True, metavar="NAME|FILE", help=f"{', '.join(SHAPES)}, or a file."
)
@click.option("--weights", type=click.Choice(WEIGHTS), help="Of a named shape.  [default: q4_0]")
@click.option("--prompt", type=click.IntRange(1, 1 << 16), default=512, show_default=True)
@click.option("--tokens", type=click.IntRange(8, 1 << 17), default=1536, show_default=True)
@click.option("--budget", type=int, default=256, show_default=True)
@click.option("--buffer", type=int, default=128, show_default=True)
@click.option("--modes", default="NORM_SUM,ADAPTIVE_RKV", show_default=True)
@click.option("--kv-type", type=click.Choice(["f16", "u8"]), default="f16", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--version", "wanted", metavar="X.Y", help=f"Of {PACKAGE}.  [default: newest]")
@click.option("--python", "python_file", help="A Python that has the package: install nothing.")
@click.option("--json", "json_file", metavar="FILE", help="Write the rows as JSON.")
def main(**arguments: Any) -> int:
    """Compare with OpenVINO GenAI on one model: speed, memory, eviction."""
    from ..engine.library import load_library

    load_library()  # before anything else needs llama_cpp: its errors say what to do
    modes = tuple(arguments["modes"].split(","))
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes {mode!r} is unknown: must be one of {', '.join(MODES)}")
    ours = Arm(
        f"ReasonAlloc, budget {arguments['budget']} + {arguments['buffer']}",
        budget=arguments["budget"],
        buffer=arguments["buffer"],
        n_ubatch=min(arguments["buffer"], Arm.n_ubatch),
    )
    ours.config()  # a value out of range shows before anything is installed
    model = open_model(arguments["shape"], arguments["weights"])
    make_bench_folder()
    with scratch_folder(bench_folder(), "openvino") as folder:
        if arguments["python_file"] is None:
            click.echo(f"installing {PACKAGE} into a throw-away environment", err=True)
            python = make_environment(folder, arguments["wanted"])
        else:
            python = Path(arguments["python_file"])
        rows = _compare(arguments, model, python, ours, modes)
    click.echo(table(rows))
    if arguments["json_file"] is not None:
        Path(arguments["json_file"]).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _compare(
    arguments: dict[str, Any], model: Path, python: Path, ours: Arm, modes: tuple[str, ...]
) -> dict[str, list[Row]]:
    n_prompt, n_tokens, n_threads = (arguments[key] for key in ("prompt", "tokens", "threads"))
    n_timed = min(3 * arguments["buffer"], n_tokens // 2)
    n_max = arguments["budget"] + arguments["buffer"]

    def rival(wanted: dict[str, Any] | None) -> Callable[[], Row]:
        job = {
            "model": str(model),
            "n_threads": n_threads,
            "n_prompt": n_prompt,
            "n_tokens": n_tokens,
            "kv_type": arguments["kv_type"],
            "eviction": wanted,
        }
        return lambda: run_rival(python, job, n_timed)

    def own(arm: Arm) -> Callable[[], Row]:
        depth = n_prompt + n_tokens - n_timed
        job = Job(
            "decode",
            arm,
            str(model),
            n_threads,
            depth=depth,
            n_tokens=n_timed,
            prompts=(n_prompt,),
            folder=str(bench_folder()),
        )
        return lambda: run_ours(job)

    runs = {"stock llama.cpp, f16": own(Arm("stock")), ours.name: own(ours)}
    runs["OpenVINO, full cache"] = rival(None)
    for mode in modes:
        wanted = eviction(n_max, mode)
        runs[f"OpenVINO, {mode}, at most {wanted['max']} tokens"] = rival(wanted)
    rows: dict[str, list[Row]] = {name: [] for name in runs}
    with click.progressbar(
        length=len(runs) * arguments["repeat"], label="measuring", file=sys.stderr
    ) as progress:
        for _ in range(arguments["repeat"]):
            for name, run in runs.items():
                rows[name].append(run())
                progress.update(1)
    return rows


def run(arguments: list[str] | None = None) -> None:
    """Run the command: never returns, shows no traceback for bad input."""
    run_command(main, "rival_openvino", arguments)


if __name__ == "__main__":
    run()
