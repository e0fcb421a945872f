"""The demo reasoner's evidence, from one command: ``python -m py_reasonalloc.demo.evidence``.

Comparisons on fresh problems, each a results file of `reasonalloc-eval`, a table (Markdown and CSV)
and a plot: the methods at every budget; what each part of the method gives; the methods with a
wider window; without prompt protection; cache types at equal bytes. A run that was stopped goes on
with the same command.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..eval.cli import main as evaluate
from ..eval.report import make_report
from ..eval.report_cli import report_command
from ..eval.results import read_results
from ..profiles import profiles_folder

BUDGETS = (96, 128, 160, 200, 256, 320)
METHODS = (
    "full",
    "streaming",
    "random",
    "snapkv",
    "h2o",
    "rkv",
    "pyramid-rkv",
    "wave",
    "adaptive",
    "reasonalloc",
)
#: Where parts are taken apart: a budget at which most fail, and one at which most work.
PART_BUDGETS = (160, 200)
#: The same model's profile with a horizon of 128 steps.
HORIZON = "profile=demo-reasoner-horizon"
PARTS = (
    "rkv",
    "rkv+lambda=0.5",
    "rkv+lambda=0.9",
    "rkv-ema",
    "rkv+value_guard=2",
    "rkv+window=16",
    "rkv+window=24",
    "rkv+lambda=0.5+window=16",
    "rkv+buffer=32",
    "random",
    "wave",
    f"wave+{HORIZON}",
    "adaptive",
    "reasonalloc",
    f"reasonalloc+{HORIZON}",
    "adaptive+lambda=0.5",
    "wave+lambda=0.5",
    f"wave+{HORIZON}+lambda=0.5",
    f"reasonalloc+{HORIZON}+lambda=0.5",
    f"reasonalloc+{HORIZON}+lambda=0.5+window=16",
)
#: With the window that keeps the line in progress.
WIDE = "window=16"
WIDE_BUDGETS = (128, 160, 200)
WIDE_METHODS = (
    f"random+{WIDE}",
    f"snapkv+{WIDE}",
    f"rkv+{WIDE}",
    f"pyramid-rkv+{WIDE}",
    f"wave+{WIDE}",
    f"wave+{HORIZON}+{WIDE}",
    f"adaptive+{WIDE}",
    f"reasonalloc+{WIDE}",
    f"reasonalloc+{HORIZON}+{WIDE}",
    f"reasonalloc+{HORIZON}+{WIDE}+lambda=0.5",
)
UNPROTECTED = ("random", "rkv", "snapkv", "reasonalloc")
#: Cache type -> bytes of one element, block scales included.
ELEMENT_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
#: f16 budgets whose bytes the quantised caches get.
BYTE_BUDGETS = (96, 128, 160)
BUFFER = 16


def equal_bytes(budgets: Sequence[int], method: str = "rkv") -> list[str]:
    """Return arms of all cache types whose segments (budget + buffer) have the same bytes."""
    arms = []
    for budget in budgets:
        for kind, size in ELEMENT_BYTES.items():
            n_tokens = int((budget + BUFFER) * ELEMENT_BYTES["f16"] / size) - BUFFER
            arms.append(f"{method}+kv={kind}@{n_tokens}")
    return arms


class Comparison(NamedTuple):
    """One results file.

    Attributes
    ----------
    limit : int
        Problems.
    methods, options
        Of `reasonalloc-eval`.
    baseline : str or None
        What differences are to; None: uniform R-KV.
    """

    limit: int
    methods: Sequence[str]
    options: Sequence[str]
    baseline: str | None = None


def comparisons(n_problems: int, n_parts: int) -> dict[str, Comparison]:
    """Return all comparisons: `n_problems` problems in the first, `n_parts` in the others."""
    budgets = ["--budgets", ",".join(map(str, BUDGETS))]
    some = ["--budgets", ",".join(map(str, PART_BUDGETS))]
    wide = ["--budgets", ",".join(map(str, WIDE_BUDGETS))]
    types = ["full", "full+kv=q8_0", "full+kv=q4_0", *equal_bytes(BYTE_BUDGETS)]
    return {
        "methods": Comparison(n_problems, METHODS, budgets),
        "parts": Comparison(n_parts, PARTS, some),
        "window": Comparison(n_parts, WIDE_METHODS, wide, f"rkv+{WIDE}"),
        "unprotected": Comparison(n_parts, UNPROTECTED, [*some, "--protect-prompt", "off"]),
        "types": Comparison(n_parts, types, []),
    }


def matrix(results: Path, baseline: str | None = None) -> str:
    """Return accuracies in percent as Markdown, a row per method, a column per budget.

    A star: the paired difference to the baseline at the same budget has p < 0.05.
    """
    report = make_report([read_results(results)], baseline)
    budgets = sorted({arm.budget for arm in report.arms})
    cells: dict[str, dict[int, str]] = {}
    for arm in report.arms:
        star = " *" if arm.difference is not None and arm.difference.p < 0.05 else ""
        cells.setdefault(arm.method, {})[arm.budget] = f"{100 * arm.accuracy.value:.1f}{star}"
    lines = ["| method | " + " | ".join(str(b) if b else "full cache" for b in budgets) + " |"]
    lines.append("|---|" + "---:|" * len(budgets))
    for method, row in cells.items():
        lines.append(f"| `{method}` | " + " | ".join(row.get(b, "") for b in budgets) + " |")
    return "\n".join(lines) + "\n"


def run(folder: Path, plan: Mapping[str, Comparison], n_jobs: int) -> None:
    """Run comparisons in `n_jobs` processes; write NAME.jsonl, NAME.md, NAME.csv and NAME.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, comparison in plan.items():
        start = time.monotonic()
        results = str(folder / f"{name}.jsonl")
        arguments = ["demo", "-o", results, "--methods", ",".join(comparison.methods)]
        arguments += [*comparison.options, "--limit", str(comparison.limit)]
        arguments += ["--buffer", str(BUFFER), "--jobs", str(n_jobs), "--threads", "1"]
        arguments += ["--profile", str(profiles_folder() / "demo-reasoner.json")]
        evaluate.main(arguments, standalone_mode=False)
        outputs = [results]
        for kind, suffix in (("markdown", "md"), ("csv", "csv"), ("plot", "svg")):
            outputs += [f"--{kind}", str(folder / f"{name}.{suffix}")]
        if comparison.baseline is not None:
            outputs += ["--baseline", comparison.baseline]
        report_command.main(outputs, standalone_mode=False)
        text = matrix(Path(results), comparison.baseline)
        (folder / f"{name}-matrix.md").write_text(text, encoding="utf-8")
        print(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--problems", type=int, default=500, help="problems of the main table")
    parser.add_argument("--part-problems", type=int, default=100, help="problems of the others")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the comparisons")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    plan = comparisons(args.problems, args.part_problems)
    unknown = set(args.only or ()) - set(plan)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: must be of {', '.join(plan)}")
    run(args.out, {name: plan[name] for name in args.only or plan}, args.jobs)


if __name__ == "__main__":
    main()
