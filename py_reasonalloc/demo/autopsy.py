"""Where chains of the demo reasoner go wrong, and what was evicted then.

``python -m py_reasonalloc.demo.autopsy rkv@160 random@160`` decodes fresh problems greedily until
the chain first differs from the gold chain, and tells which kind of token was wrong. For a value
that has to be looked up in the chain it also notes in how many KV heads of each layer its last
statement was still cached: when the lookup went right, and when it went wrong.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..cli import DEMO_MODEL
from ..eval.datasets import DEMO_SEED
from ..eval.methods import Arm, Common, Setup, parse_arms, setup_of
from ..generate import Generation, Sampling
from ..profiles import load_profile, profiles_folder
from ..session import ReasonLlama
from .problems import LEVEL_STEPS, Problem, generate_problem
from .vocab import BOS_ID, decode, encode

#: Kind of token -> what stands before it in the gold chain; the first that fits counts.
_KINDS = {
    "value found before": r"(?: and|, and a recap up to [A-Z]:[^\n]*) ([A-Z]) is$",
    "value just found": r"\nHere ([A-Z]) is$",
    "sum": r" makes$",
    "sign": r"\n(?:Next: [A-Z]|So [a-z]+|Check: [a-z]+)$",
    "name of the result": r"(?: gives|good\.\nSo)$",
    "name of an operand": r"\n(?:Next:|Here|Here [A-Z] is [a-z]+, and)$",
}
_OTHER = "other"


class Place(NamedTuple):
    """A token of a gold chain.

    Attributes
    ----------
    kind : str
        Of `_KINDS`, or "other".
    source : int
        For a value to look up: index in the chain where it was last stated; -1 otherwise, and where
        only the prompt states it.
    """

    kind: str
    source: int


def places(chain: str) -> Iterator[Place]:
    """Yield the place of every token of a gold chain."""
    stated: dict[str, int] = {}
    text = ""
    for index, token in enumerate(encode(chain)):
        kind, source = _OTHER, -1
        for name, pattern in _KINDS.items():
            match = re.search(pattern, text)
            if match:
                kind = name
                if match.groups():
                    source = stated.get(match[1], -1)
                break
        yield Place(kind, source)
        statement = re.search(r" ([A-Z]) is$", text)
        if statement:
            stated[statement[1]] = index
        text += decode([token])


class Autopsy:
    """What was seen over many problems.

    Attributes
    ----------
    n_exact : int
        Chains without a difference.
    wrong : Counter
        Kind of the first wrong token -> chains.
    held : dict
        Whether the lookup was right -> [n_lookup] share of KV heads per layer, [n_layer] each,
        that held the value.
    """

    def __init__(self) -> None:
        self.n_exact = 0
        self.wrong: Counter[str] = Counter()
        self.held: dict[bool, list[npt.NDArray[np.float64]]] = {True: [], False: []}

    def examine(self, llama: ReasonLlama, problem: Problem) -> None:
        """Decode one problem up to its first difference from the gold chain."""
        prompt = [BOS_ID, *encode(problem.chat_prompt)]
        gold = encode(problem.chain)
        where = list(places(problem.chain))
        llama.clear()
        generation = Generation(llama, prompt, len(gold), Sampling(temp=0.0))
        for _ in generation:
            index = len(generation.tokens) - 1
            place, is_right = where[index], generation.tokens[index] == gold[index]
            if place.kind == "value found before" and place.source >= 0:
                self.held[is_right].append(_shares(llama, len(prompt) + place.source))
            if not is_right:
                self.wrong[place.kind] += 1
                return
        if len(generation.tokens) < len(gold):
            self.wrong["ended too early"] += 1
        else:
            self.n_exact += 1

    def show(self, arm: Arm) -> None:
        """Print the findings."""
        n = self.n_exact + self.wrong.total()
        print(f"\n{arm}: {self.n_exact} of {n} chains as they should be; first wrong token:")
        for kind, count in self.wrong.most_common():
            print(f"  {count:4}  {kind}")
        print("value still cached, share of KV heads, layer by layer:")
        for is_right, shares in self.held.items():
            mean = np.mean(shares, axis=0) if shares else []
            line = " ".join(f"{share:4.0%}" for share in mean)
            print(f"  lookup {'right' if is_right else 'wrong'} ({len(shares):4}): {line}")


def _shares(llama: ReasonLlama, position: int) -> npt.NDArray[np.float64]:
    """Return the share of KV heads that hold a position, [n_layer]."""
    stats = llama.kv_stats()
    return np.array(
        [
            np.mean([position in stats.kept_positions(il, ih) for ih in range(len(layer))])
            for il, layer in enumerate(stats.layers)
        ]
    )


def setups_of(texts: Sequence[str], n_protect: int) -> dict[Arm, Setup]:
    """Return the caches of arms; a wave is by the paper's measure unless an arm names another.

    Looked up, the profile would be that with a horizon.
    """
    profile = load_profile(profiles_folder() / "demo-reasoner.json")
    common = Common(16, 4, 8, n_protect, "f16", profile)
    return {arm: setup_of(arm, common) for arm in parse_arms(texts, [])}


def main() -> None:
    """Parse the command line and examine each arm."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("arms", nargs="+", metavar="METHOD@BUDGET")
    parser.add_argument("--level", type=int, default=2, choices=LEVEL_STEPS)
    parser.add_argument("--problems", type=int, default=100)
    args = parser.parse_args()
    problems = [generate_problem(DEMO_SEED, i, args.level) for i in range(args.problems)]
    n_protect = max(1 + len(encode(problem.chat_prompt)) for problem in problems)
    for arm, (config, _) in setups_of(args.arms, n_protect).items():
        autopsy = Autopsy()
        with ReasonLlama(DEMO_MODEL, config, n_threads=1) as llama:
            for i, problem in enumerate(problems):
                if config is not None:
                    llama.reconfigure(replace(config, policy_seed=i))
                autopsy.examine(llama, problem)
        autopsy.show(arm)


if __name__ == "__main__":
    main()
