"""The report: Markdown for people, JSON for programs."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..output.text import size
from .jobs import BLOCK, N_BATCH
from .measure import PARALLEL, Row, Settings
from .parallel import summarize_parallel
from .parallel_table import parallel_table
from .scaling import scale
from .summary import summarize
from .tables import bytes_text, spread_text, table
from .turns import N_PAIRS, slice_tokens

FORMAT_VERSION = 1


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, system, versions."""
    from llama_cpp import llama_cpp as bindings

    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    except OSError:
        found = None
    names = getattr(os, "sysconf_names", {})
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else 0
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "n_processors": os.cpu_count(),
        "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE") if pages else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "reasonalloc": __version__,
        "features": _features(bindings.llama_print_system_info().decode()),
    }


def _features(text: str) -> str:
    """Return the instruction sets in llama.cpp's system info: "AVX AVX2 FMA"."""
    return " ".join(re.findall(r"(\w+) = 1\b", text))


def build(
    rows: Sequence[Row], settings: Settings, shape: str, weights: str | None, command: str
) -> dict[str, Any]:
    """Return the whole report; `json.dumps` makes lists of its spreads.

    Parameters
    ----------
    rows : sequence of dict
        What `measure` returned.
    shape, weights : str
        What the user asked for; weights None for a file.
    command : str
        Command line that measured it.
    """
    summary = summarize(rows, settings)
    summary["parallel"] = summarize_parallel(
        [row for row in rows if row["kind"] == PARALLEL and "error" not in row]
    )
    return {
        "format_version": FORMAT_VERSION,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "shape": shape,
        "weights": weights,
        "machine": machine(),
        "settings": {
            "n_threads": settings.n_threads,
            "n_gpu_layers": settings.n_gpu_layers,
            "repeat": 1 + max(row["repetition"] for row in rows),  # fewer if it was stopped
            "policy": settings.policy,
            "buffer": settings.buffer,
            "n_tokens_budget": settings.n_buffers * settings.buffer,
            "n_tokens_stock": settings.buffer,
            "is_decoded": settings.is_decoded,
            "reference": settings.reference,
        },
        "summary": summary,
        "scaling": scale(summary, settings),
        "rows": list(rows),
    }


# --- Markdown --------------------------------------------------------------------------------


def _decode_tables(report: dict[str, Any]) -> list[str]:
    lines = report["summary"]["decode"]
    reference = report["settings"]["reference"]
    speeds, compressions, memory = [], [], []
    for line in lines:
        name = [line["arm"], str(line["depth"])]
        speeds.append(
            [
                *name,
                spread_text(line["tokens_per_second"], 2),
                spread_text(line["over_reference"]),
                spread_text(line["over_first_depth"]),
                spread_text(line["over_reference_at_limit"]),
                spread_text(line["over_reference_at_0"]),
            ]
        )
        if line["limit_depth"] is not None:
            compressions.append(
                [
                    *name,
                    str(line["n_compressions"]),
                    spread_text(line["seconds_per_compression"], 2, 1e3),
                    spread_text(line["compress_share"], 2, 100.0),
                    f"{line['smallest_head_budget']} to {line['largest_head_budget']}",
                    str(line["peak_tokens"]),
                ]
            )
        names = ("cache", "cache_bytes_formula", "window", "scratch", "compute")
        keys = [n if n.endswith("formula") else f"{n}_bytes" for n in names]
        keys += ["rss_over_model_bytes", "rss_peak_bytes"]
        keys += ["reserved_bytes", "rss_full_batch_bytes"]
        memory.append([*name, *(bytes_text(line[key]) for key in keys)])
    parts = [
        "## Decoding",
        "Tokens/s, compressions included, and ratios of what was measured in the same repetition: "
        f"to {reference} at the same depth; to the arm itself at its first depth with a full "
        f"cache; to {reference} holding as many tokens as the budgeted cache at its fullest "
        "(budget + buffer); to it when empty.",
        table(
            [
                "cache",
                "depth",
                "tokens/s",
                "/ stock",
                "/ own first",
                "/ stock at limit",
                "/ stock at 0",
            ],
            speeds,
        ),
    ]
    if compressions:
        parts += [
            "Compressions in the timed tokens:",
            table(
                ["cache", "depth", "number", "ms each", "% of time", "head budgets", "most tokens"],
                compressions,
            ),
        ]
    parts += [
        "## Memory",
        f"Weights: {bytes_text(lines[0]['weights_bytes'])}. Sizes as the engine reports them; "
        '"formula" is (budget + buffer) x bytes of a token\'s rows, and of the caches of sliding '
        "windows, which both have; a stock cache is made for the "
        'depth and the timed tokens. "Used" is the peak of resident memory less what was resident '
        "once the weights were loaded. Decoding touches a part of the compute buffers only, which "
        "are reserved for a full batch with the logits of all its tokens: such a batch is decoded "
        'at the end, at the deepest depth. "Reserved" is cache, window, scratch, compute buffers, '
        'and a copy of these logits on the host; "used, full batch" is what was then really '
        "resident.",
        table(
            ["cache", "depth", "cache", "formula", "window", "scratch", "compute", "used", "peak"]
            + ["reserved", "used, full batch"],
            memory,
        ),
    ]
    return parts


def _turns_table(report: dict[str, Any]) -> list[str]:
    lines = report["summary"]["turns"]
    if not lines:
        return []
    rows = [
        [
            line["arm"],
            str(line["depth"]),
            line["against"],
            str(line["against_depth"]),
            spread_text(line["speed_ratio"]),
            str(len(line["ratios"])),
        ]
        for line in lines
    ]
    settings = report["settings"]
    buffer = settings["buffer"]
    is_counted = settings["n_threads"] == 1 and settings["n_gpu_layers"] == 0
    return [
        "## Decoding in turns",
        f"Contexts of one process that decode {slice_tokens(buffer)} tokens each in turn; a stock "
        "cache goes back to its depth after every turn. Ratios of tokens/s, compressions included, "
        f"one per buffer of {buffer} tokens: what else the machine does hits all alike. (An "
        f"unpatched build is in a process of its own, opened {N_PAIRS} times for a buffer each.)"
        + (" One thread: seconds are the processor's." if is_counted else ""),
        table(["cache", "depth", "against", "depth", "ratio", "buffers"], rows),
    ]


def _prompt_tables(report: dict[str, Any]) -> list[str]:
    lines = report["summary"]["prompt"]
    if not lines:
        return []
    rows = [
        [
            line["arm"],
            str(line["n_prompt"]),
            spread_text(line["tokens_per_second"], 2),
            spread_text(line["over_reference"]),
            spread_text(line["over_small_batches"]),
            spread_text(line["first_token_seconds"], 3),
            spread_text(line["first_token_over_reference"]),
            spread_text(line["compress_share"], 2, 100.0),
        ]
        for line in lines
    ]
    buffer = report["settings"]["buffer"]
    head = ["cache", "prompt", "tokens/s", "/ stock", f"/ stock in pieces of {buffer}"]
    head += ["first token, s", "/ stock", "% compressing"]
    return [
        "## Prompts",
        f"Into an empty cache, {N_BATCH} tokens per call. A budgeted cache computes at most a "
        f"buffer of {buffer} tokens at once; stock llama.cpp computes {N_BATCH}, and is shown with "
        f"{buffer}, too.",
        table(head, rows),
    ]


def _other_tables(report: dict[str, Any]) -> list[str]:
    summary = report["summary"]
    parts = []
    if summary["load"]:
        rows = [
            [
                line["arm"],
                spread_text(line["seconds"], 3),
                spread_text(line["base_seconds"], 3),
                spread_text(line["over_llama"]),
            ]
            for line in summary["load"]
        ]
        head = ["session", "seconds", "llama_cpp.Llama", "ratio of a pair"]
        parts += ["## Loading", "Made in turn in one process, one pair after another."]
        parts.append(table(head, rows))
    if summary["llama_bench"]:
        rows = [
            [
                line["what"],
                spread_text(line["tokens_per_second"], 2),
                spread_text(line["ours"], 2),
                spread_text(line["ours_over_llama_bench"]),
            ]
            for line in summary["llama_bench"]
        ]
        parts += [
            "## Against llama-bench",
            f"{report['settings']['reference']}, the same file, threads and batch sizes.",
            table(["", "llama-bench, tokens/s", "this benchmark", "ratio"], rows),
        ]
    if summary["errors"]:
        parts.append("## Failed")
        parts += [
            f"- {line['kind']}, {line['arm']}"
            + ("" if line["depth"] is None else f", depth {line['depth']}")
            + f": {line['error']}"
            for line in summary["errors"]
        ]
    return parts


def _line(line: dict[str, float]) -> str:
    return f"{line['a']:.2f} ms + {1e3 * line['b']:.3f} us per cached token"


def _scaling_table(report: dict[str, Any]) -> list[str]:
    found = report["scaling"]
    if found is None:
        return []
    arms = [budget["arm"] for budget in found["machines"][0]["budgets"]]
    rows = []
    for line in found["machines"]:
        cells = [f"{line['gigabytes']} GB", f"{line['stock_tokens']:,}"]
        cells.append(f"{line['stock_tokens_per_second']:.2f}" if line["stock_tokens"] else "")
        for budget in line["budgets"]:
            text = f"{budget['tokens_per_second']:.2f}" if budget["fits"] else "does not fit"
            if budget["fits"] and line["stock_tokens"]:
                text += f" ({budget['over_stock']:.1f} x)"
            cells.append(text)
        rows.append(cells)
    reference = report["settings"]["reference"]
    return [
        "## On paper",
        f"A step with {reference} takes {_line(found['stock'])} (least squares)"
        + (f", over budgets {_line(found['budgets'])}" if found["budgets"] else "")
        + f". A token's rows take {size(round(found['row_bytes']))}. With "
        f"{100 * found['usable_share']:.0f}% of the memory for the model: the longest chain that "
        "the stock cache holds and its speed at the end of it, on this machine's processor; and "
        "the speed of a budgeted cache, at any length, with the speed-up there.",
        table(["memory", "stock: tokens", "tokens/s at the end", *arms], rows),
    ]


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    facts, settings = report["machine"], report["settings"]
    kind = f", weights {report['weights']} (random)" if report["weights"] else ""
    reach = (
        "decode every token up to the depth"
        if settings["is_decoded"]
        else "start at a late position and decode until their cache is full and was compressed"
    )
    memory = "" if facts["memory_bytes"] is None else f", {size(facts['memory_bytes'])}"
    load = facts["load_average"]
    parts = [
        f"# {report['shape']}{kind}",
        f"`{report['command']}`",
        f"{report['date']}; {facts['processor']}, {facts['n_processors']} processors{memory}, "
        f"{facts['system']}, {facts['features']}; ReasonAlloc {facts['reasonalloc']}, "
        f"Python {facts['python']}; {settings['n_threads']} thread(s), {settings['n_gpu_layers']} "
        "layers on a GPU"
        + ("" if load is None else f"; load average at the end {load:.1f}")
        + f". Medians of {settings['repeat']} repetitions, range in brackets; arms in turn, each "
        "measurement in its own process.",
        f"To reach a depth, stock caches get repeated rows of {BLOCK} random tokens that "
        f"were decoded before; budgeted caches (policy {settings['policy']}) {reach}. Timed: "
        f"{settings['n_tokens_stock']} tokens in a stock cache, {settings['n_tokens_budget']} "
        "(whole buffers) in a budgeted one, one llama_decode each, random tokens, nothing sampled.",
        *(_decode_tables(report) if report["summary"]["decode"] else []),
        *_turns_table(report),
        *parallel_table(report),
        *_prompt_tables(report),
        *_other_tables(report),
        *_scaling_table(report),
    ]
    return "\n\n".join(parts) + "\n"
