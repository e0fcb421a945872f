"""Write demo_steps.jsonl: the next number in a chain of the demo's own problems, out of four."""

from __future__ import annotations

import json
import random
from pathlib import Path

from py_reasonalloc.task.problems import NUMBERS, generate_problem

N_PROBLEMS = 20


def main() -> None:
    """Write the file beside this one."""
    rng = random.Random(0)
    rows = []
    for index in range(N_PROBLEMS):
        problem = generate_problem(seed=5, index=index, level=1)
        cuts = [i for i in range(len(problem.chain)) if problem.chain.startswith(" makes ", i)]
        at = cuts[len(cuts) // 2 & ~1] + len(" makes")  # a sum, not its check
        right = problem.chain[at:].split()[0].rstrip(".,")
        others = rng.sample([word for word in NUMBERS if word != right], 3)
        choices = sorted([right, *others])
        context = f"<|user|>{problem.prompt}<|assistant|>{problem.chain[:at]}"
        gold = choices.index(right)
        words = [f" {word}" for word in choices]
        rows.append(json.dumps({"context": context, "choices": words, "gold": gold}))
    target = Path(__file__).with_name("demo_steps.jsonl")
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
