"""The report's part about many sequences in one context."""

from __future__ import annotations

from typing import Any

from .parallel import N_STEADY
from .tables import bytes_text, spread_text, table
from .turns import slice_tokens


def parallel_table(report: dict[str, Any]) -> list[str]:
    """Return title, words and table; [] if nothing of it was measured."""
    lines = report["summary"]["parallel"]
    if not lines:
        return []
    rows = [
        [
            line["arm"],
            str(line["n_seq"]),
            spread_text(line["tokens_per_second"], 2),
            spread_text(line["over_one"], 2),
            spread_text(line["products_tokens_per_second"], 2),
            spread_text(line["most"], 2),
            spread_text(line["of_most"], 2),
            bytes_text(line["cache_bytes"]),
            bytes_text(line["cache_bytes_formula"]),
            "" if line["stock_depth"] is None else str(line["stock_depth"]),
            spread_text(line["stock_tokens_per_second"], 2),
            spread_text(line["over_stock"], 2),
            bytes_text(line["stock_cache_bytes"]),
        ]
        for line in lines
    ]
    head = ["cache", "sequences", "tokens/s", "/ one", "products alone: tokens/s", "/ one"]
    head += ["share of that", "cache, bytes", "formula", "stock: depth of each", "tokens/s"]
    head += ["ours / stock", "its cache"]
    settings = report["settings"]
    is_counted = settings["n_threads"] == 1 and settings["n_gpu_layers"] == 0
    return [
        "## Side by side",
        "Sequences of one context, a token of each in every llama_decode; tokens/s of all "
        "together, compressions included. Contexts of one process take turns of "
        f"{slice_tokens(settings['buffer'])} steps, those without compressions of {N_STEADY}; "
        f"ratios are formed per buffer of {settings['buffer']} tokens. Every sequence of a "
        'budgeted cache is full; "formula" is sequences x (budget + buffer) x bytes of a '
        'token\'s rows. "Products alone": an empty stock cache reads as many tokens of one text at '
        "once, which is the products with the weights and little else: no cache can gain more from "
        f"sharing the weights. Stock: {settings['reference']}, rows of its own for each sequence."
        + (" One thread: seconds are the processor's." if is_counted else ""),
        table(head, rows),
    ]
