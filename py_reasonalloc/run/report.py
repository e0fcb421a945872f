"""Text for people: the summary after a run, and the table of a dry run."""

from __future__ import annotations

from typing import Any

from ..output.text import size
from .allocation import allocation
from .dryrun import DryRun
from .options import RunOptions

#: Why a text ended, for people.
STOPS = {
    "stop": "the model ended its text",
    "stop_string": "a text of --stop",
    "length": "the number of tokens asked for",
    "context": "the end of the context",
    "interrupted": "stopped by Ctrl-C",
}


def split(report: dict[str, Any], asked: str | None) -> str:
    """Return how the budget was split, and by which profile.

    Parameters
    ----------
    report : dict
        With the keys of `allocation.allocation`.
    asked : str or None
        Profile that was asked for: ``RunOptions.profile``.
    """
    layers = report["layers"]
    if report["profile"] is not None:
        layers += f" by profile {report['profile']}"
    elif asked is not None:
        layers += ", for no profile fits this model (reasonalloc-profile measures one)"
    elif isinstance(layers, list):
        layers = "as given"
    return f"layers: {layers}; heads: {report['heads']}"


def _read(report: dict[str, Any]) -> str:
    if report["n_before"] == 0:
        return f"{report['n_prompt']} prompt tokens"
    return f"continued after {report['n_prompt']} prompt tokens and {report['n_before']} of text"


def summary(report: dict[str, Any], asked: str | None = None) -> str:
    """Return a few lines about a finished run; `asked`: see `split`."""
    lines = [
        f"[{_read(report)} in {report['prompt_seconds']:.2f} s, "
        f"{report['n_generated']} generated in {report['decode_seconds']:.2f} s "
        f"({report['tokens_per_second']:.1f} tokens/s); end: {STOPS[report['stop_reason']]}"
        f"{_drawn(report)}]"
    ]
    kv, full = report["kv_bytes"], report["kv_bytes_full"]
    if report["budget"] is None:
        lines.append(
            f"[cache: {size(kv)} ({kv} bytes), {size(full)} of it in use; nothing is evicted]"
        )
        return "\n".join(lines)
    lines.append(
        f"[cache: {size(kv)} ({kv} bytes), {report['policy']} keeps {report['budget']} tokens per "
        f"head, at most {report['peak_tokens']} were held; the full cache of "
        f"{report['n_pos']} tokens takes {size(full)}]"
    )
    lines.append(
        f"[{report['n_compressions']} compressions in {report['compression_seconds']:.3f} s "
        f"evicted {report['n_evicted']} entries (token x layer x head)]"
    )
    lines.append(f"[{split(report, asked)}]")
    if report["recommended_by"] is not None:
        lines.append(
            f"[method, budget and cache type as recommended by {report['recommended_by']}]"
        )
    if report["trace"] is not None:
        lines.append(f"[trace: {report['trace']}, for reasonalloc-inspect]")
    return "\n".join(lines)


def _drawn(report: dict[str, Any]) -> str:
    """Return what is to be said about the draw, and about thinking if it was limited."""
    text = f"; seed {report['seed']}" if report["temp"] > 0 else ""
    if report["n_thought"] is not None:
        cut = ", then cut short" if report["is_thought_cut"] else ""
        text += f"; {report['n_thought']} tokens of thinking{cut}"
    return text


def dry_run_table(result: DryRun, options: RunOptions, asked: str | None = None) -> str:
    """Return the table that ``--dry-run`` prints; `asked`: see `split`."""
    config = options.config
    name = "stock cache" if config is None else f"cache, budget {config.budget} + {config.buffer}"
    name += f", windows {config.budget_swa}" if config is not None and config.budget_swa else ""
    times = f"{result.n_samples} x " if result.n_samples > 1 else ""
    rows = [
        ("weights", result.weights_bytes),
        (f"{times}{name} ({options.kv_type})", result.kv_bytes),
        ("observation window", result.window_bytes),
        *([("windows and recurrent states", result.stock_bytes)] if result.stock_bytes else []),
        ("scratch of compressions", result.scratch_bytes),
        ("compute buffers", result.compute_bytes),
        ("total", result.total_bytes),
    ]
    out = [f"{options.model}: {result.n_prompt} prompt tokens, at most {result.n_tokens} in all"]
    if config is not None:
        out.append(split(allocation(config), asked))
    if options.recommended_by is not None:
        out.append(f"method, budget and cache type as recommended by {options.recommended_by}")
    out += [_row(label, n_bytes) for label, n_bytes in rows]
    if result.layer_bytes:
        out.append("cache by layer (tokens that each KV head can hold)")
        for il, (n_bytes, heads) in enumerate(zip(result.layer_bytes, result.layer_capacity)):
            out.append(_row(f"  layer {il}", n_bytes) + "  " + _capacities(heads))
    full = _row(f"full cache for {times}{result.n_tokens} tokens", result.full_kv_bytes)
    if result.short_kv_bytes == result.full_kv_bytes:
        out.append(full)
    else:  # llama.h's default keeps windows as long as the context, llama.cpp's programs do not
        out.append(full + "  swa_full=True, the default of llama_cpp.Llama")
        short = _row("  with windows as long as needed", result.short_kv_bytes)
        out.append(short + "  swa_full=False, the default of llama-cli")
    out.append(_row("  its compute buffers", result.full_compute_bytes))
    return "\n".join(out)


def _row(label: str, n_bytes: int) -> str:
    return f"{label:<34} {n_bytes:>16} bytes  {size(n_bytes):>10}"


def _capacities(heads: tuple[int, ...]) -> str:
    if heads and len(set(heads)) == 1:
        return f"{len(heads)} x {heads[0]}"
    return " ".join(map(str, heads)) or "no budget"
