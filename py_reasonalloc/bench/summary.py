"""From rows to medians and ratios.

Every ratio is formed within a repetition, from measurements that ran close to each other; what is
reported is the median of these ratios and their range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from . import llama_bench
from .measure import Row, Settings

#: Figures of one measurement by repetition.
Series = dict[int, float]


class Spread(NamedTuple):
    """Median and range of a few figures."""

    median: float
    smallest: float
    largest: float


def spread(values: Iterable[float]) -> Spread | None:
    """Return the spread of some figures; None of none."""
    listed = sorted(values)
    return Spread(median(listed), listed[0], listed[-1]) if listed else None


def ratio(above: Series, below: Series) -> Spread | None:
    """Return the spread of the ratios of the repetitions that both have."""
    return spread(above[i] / below[i] for i in above if below.get(i))


class Table:
    """Rows of one kind, found by arm and depth (or length of the prompt)."""

    def __init__(self, rows: Sequence[Row], key: str) -> None:
        self.rows: dict[tuple[str, int], list[Row]] = {}
        for row in rows:
            self.rows.setdefault((row["arm"], row.get(key, 0)), []).append(row)

    def series(self, arm: str, key: int, figure: Callable[[Row], float]) -> Series:
        """Return a figure of every repetition; empty if it was not measured."""
        return {row["repetition"]: figure(row) for row in self.rows.get((arm, key), [])}


def _speed(row: Row) -> float:
    return float(row["n_tokens"] / row["seconds"])


def _prompt_speed(row: Row) -> float:
    return float(row["n_prompt"] / row["seconds"])


def _is_steady(row: Row) -> bool:
    """Whether compressions ran (always true of a stock cache)."""
    return row["budget"] is None or row["n_compressions"] > 0


def summarize(rows: Sequence[Row], settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of the report.

    Returns
    -------
    dict
        "decode", "turns", "prompt", "load" and "llama_bench": one dict per line of the tables;
        "errors": what failed. Speeds in tokens/s, sizes in bytes, times in seconds; null where
        there is no such thing.
    """
    good = [row for row in rows if "error" not in row]
    prompts = [
        {**row, **prompt} for row in good if row["kind"] == "prompt" for prompt in row["prompts"]
    ]
    errors = dict.fromkeys(
        (row["kind"], row["arm"], row.get("depth"), row["error"]) for row in rows if "error" in row
    )
    return {
        "decode": _decode([row for row in good if row["kind"] == "decode"], settings),
        "turns": _turns([row for row in good if row["kind"] == "turns"]),
        "prompt": _prompt(prompts, settings),
        "load": _load([row for row in good if row["kind"] == "load"]),
        "llama_bench": _llama_bench(good, prompts, settings),
        "errors": [
            {"kind": kind, "arm": arm, "depth": depth, "error": error}
            for kind, arm, depth, error in errors
        ],
    }


def _decode(rows: Sequence[Row], settings: Settings) -> list[dict[str, Any]]:
    table = Table(rows, "depth")
    first_steady: dict[str, int] = {}
    for (arm, depth), found in sorted(table.rows.items(), key=lambda item: item[0][1]):
        if depth in settings.depths and _is_steady(found[0]):
            first_steady.setdefault(arm, depth)
    lines = []
    for (arm, depth), found in table.rows.items():
        row = found[0]
        speed = table.series(arm, depth, _speed)
        budget = row["budget"]
        limit = 0 if budget is None else budget + row["buffer"]

        def against(other: str, at: int, speed: Series = speed) -> Spread | None:
            return ratio(speed, table.series(other, at, _speed))

        is_ours = budget is not None
        lines.append(
            {
                "arm": arm,
                "depth": depth,
                "tokens_per_second": spread(speed.values()),
                "is_steady": _is_steady(row),
                "is_even": row["is_even"],
                "over_reference": against(settings.reference, depth),
                "over_first_depth": against(arm, first_steady[arm])
                if arm in first_steady
                else None,
                "first_depth": first_steady.get(arm),
                "over_reference_at_limit": against(settings.reference, limit) if is_ours else None,
                "limit_depth": limit if is_ours else None,
                "over_reference_at_0": against(settings.reference, 0) if is_ours else None,
                **(_compressions(found) if is_ours else {}),
                **_memory(found),
            }
        )
    order = {arm: i for i, arm in enumerate(dict.fromkeys(row["arm"] for row in rows))}
    return sorted(lines, key=lambda line: (line["depth"], order[line["arm"]]))


def _compressions(rows: Sequence[Row]) -> dict[str, Any]:
    counts = [row["n_compressions"] for row in rows]
    return {
        "n_compressions": counts[0],
        "compress_share": spread(row["compress_seconds"] / row["seconds"] for row in rows),
        "seconds_per_compression": spread(
            row["compress_seconds"] / row["n_compressions"] for row in rows if min(counts) > 0
        ),
        "smallest_head_budget": min(row["smallest_head_budget"] for row in rows),
        "largest_head_budget": max(row["largest_head_budget"] for row in rows),
        "peak_tokens": max(row["peak_tokens"] for row in rows),
    }


def _memory(rows: Sequence[Row]) -> dict[str, Any]:
    row = rows[0]
    names = ("weights", "cache", "window", "scratch", "compute")
    memory: dict[str, Any] = {f"{name}_bytes": row[f"{name}_bytes"] for name in names}
    n_slots = 0 if row["budget"] is None else row["budget"] + row["buffer"]
    memory["swa_bytes"] = row.get("swa_bytes")
    memory["cache_bytes_formula"] = (
        n_slots * row["row_bytes"] + (row.get("swa_bytes") or 0) if n_slots else None
    )
    told = [r for r in rows if r["rss_peak_bytes"] is not None]
    memory["rss_peak_bytes"] = max((r["rss_peak_bytes"] for r in told), default=None)
    for name, key in (("over_model", "rss_peak_bytes"), ("full_batch", "rss_full_batch_bytes")):
        used = [r[key] - r["rss_loaded_bytes"] for r in told if key in r]
        memory[f"rss_{name}_bytes"] = max(used, default=None)
    parts = [row.get(f"{name}_bytes") for name in (*names[1:], "logits")]
    memory["reserved_bytes"] = None if None in parts else sum(parts)
    return memory


def _prompt(rows: Sequence[Row], settings: Settings) -> list[dict[str, Any]]:
    table, speed = Table(rows, "n_prompt"), _prompt_speed

    def first_token(row: Row) -> float:
        return float(row["first_token_seconds"])

    lines = []
    for (arm, n), found in table.rows.items():
        own = table.series(arm, n, speed)
        shares = [r["compress_seconds"] / r["seconds"] for r in found if r["budget"] is not None]
        lines.append(
            {
                "arm": arm,
                "n_prompt": n,
                "tokens_per_second": spread(own.values()),
                "over_reference": ratio(own, table.series(settings.reference, n, speed)),
                "over_small_batches": ratio(own, table.series(settings.small_batches, n, speed)),
                "first_token_seconds": spread(map(first_token, found)),
                "first_token_over_reference": ratio(
                    table.series(arm, n, first_token),
                    table.series(settings.reference, n, first_token),
                ),
                "compress_share": spread(shares),
            }
        )
    return sorted(lines, key=lambda line: line["n_prompt"])


def _load(rows: Sequence[Row]) -> list[dict[str, Any]]:
    lines = []
    for (arm, _), found in Table(rows, "").rows.items():
        loads = [load for row in found for load in row["loads"]]
        lines.append(
            {
                "arm": arm,
                "seconds": spread(load["seconds"] for load in loads),
                "base_seconds": spread(load["base_seconds"] for load in loads),
                "over_llama": spread(load["seconds"] / load["base_seconds"] for load in loads),
            }
        )
    return lines


def _turns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Hold the first of each group against the others, buffer by buffer."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["group"], row["repetition"]), []).append(row)
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for (_, _), (own, *others) in groups.items():
        for i, other in enumerate(others):
            line = lines.setdefault(
                (own["group"], i),
                {
                    "arm": own["arm"],
                    "depth": own["depth"],
                    "against": other["arm"],
                    "against_depth": other["depth"],
                    "ratios": [],
                },
            )
            line["ratios"] += [b / a for a, b in zip(own["seconds"], other["seconds"])]
    return [{**line, "speed_ratio": spread(line["ratios"])} for line in lines.values()]


def _llama_bench(
    rows: Sequence[Row], prompts: Sequence[Row], settings: Settings
) -> list[dict[str, Any]]:
    """Pair llama-bench's figures with ours of the reference."""
    theirs = [row for row in rows if row["kind"] == llama_bench.NAME]
    decode = Table([row for row in rows if row["kind"] == "decode"], "depth")
    prompt = Table(prompts, "n_prompt")
    pairs: dict[str, tuple[Series, Series]] = {}
    for row in theirs:
        if row["arm"] == "decode":
            what = f"decode at depth {row['depth']}"
            ours = decode.series(settings.reference, row["depth"], _speed)
        else:
            what = f"prompt of {row['n_prompt']}"
            ours = prompt.series(settings.reference, row["n_prompt"], _prompt_speed)
        pairs.setdefault(what, ({}, ours))[0][row["repetition"]] = row["tokens_per_second"]
    return [
        {
            "what": what,
            "tokens_per_second": spread(bench.values()),
            "ours": spread(ours.values()),
            "ours_over_llama_bench": ratio(ours, bench),
        }
        for what, (bench, ours) in pairs.items()
    ]
