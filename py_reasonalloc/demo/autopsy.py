"""Where chains of the demo reasoner go wrong, and what was evicted then.

``python -m py_reasonalloc.demo.autopsy rkv@160 random@160`` decodes fresh problems greedily until
the chain first differs from the gold chain, and tells which kind of token was wrong. For a value
that has to be looked up in the chain it also notes in how many KV heads of each layer its last
statement was still cached: when the lookup went right, and when it went wrong.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import click
import numpy as np
import numpy.typing as npt

from ..engine.errors import ConfigError
from ..eval.cases.datasets import DEMO_LEVEL, DEMO_SEED
from ..eval.cases.methods import Arm, Common, Setup, parse_arms, setup_of
from ..eval.decode.worker import text_seed
from ..output.console import run_command
from ..profile.files import load_profile, profiles_folder
from ..session.generate import Generation, Sampling
from ..session.reason_llama import ReasonLlama
from ..task.problems import LEVEL_STEPS, Problem, generate_problem
from ..task.shipped import DEMO_DEFAULTS, DEMO_MODEL
from ..task.vocab import BOS_ID, decode, encode

#: Of all evidence: tokens decoded between compressions.
BUFFER = cast(int, DEMO_DEFAULTS["buffer"])
#: A value that is looked up in an earlier line: all other kinds are of the line in progress.
FAR_VALUE = "value found before"
#: Kind of token -> what stands before it in the gold chain; the first that fits counts.
KINDS = {
    FAR_VALUE: r"(?: and|, and a recap up to [A-Z]:[^\n]*) ([A-Z]) is$",
    "value just found": r"\nHere ([A-Z]) is$",
    "sum": r" makes$",
    "sign": r"\n(?:Next: [A-Z]|So [a-z]+|Check: [a-z]+)$",
    "name of the result": r"(?: gives|good\.\nSo)$",
    "name of an operand": r"\n(?:Next:|Here|Here [A-Z] is [a-z]+, and)$",
}
_OTHER = "other"
_ENDED = "ended too early"


class Place(NamedTuple):
    """A token of a gold chain.

    Attributes
    ----------
    kind : str
        Of `KINDS`, or "other".
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
        for name, pattern in KINDS.items():
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
            if place.kind == FAR_VALUE and place.source >= 0:
                self.held[is_right].append(_shares(llama, len(prompt) + place.source))
            if not is_right:
                self.wrong[place.kind] += 1
                return
        if len(generation.tokens) < len(gold):
            self.wrong[_ENDED] += 1
        else:
            self.n_exact += 1

    def to_json(self) -> dict[str, Any]:
        """Return the findings as plain values; `held` as the mean over the lookups."""
        lookups = {"right": self.held[True], "wrong": self.held[False]}
        means = {k: np.mean(v, axis=0).round(4).tolist() if v else [] for k, v in lookups.items()}
        return {
            "n_problems": self.n_exact + self.wrong.total(),
            "n_exact": self.n_exact,
            "wrong": dict(self.wrong.most_common()),
            "n_lookups": {key: len(shares) for key, shares in lookups.items()},
            "held": means,
        }


def text_of(arm: str, found: dict[str, Any]) -> str:
    """Return what was found (see `Autopsy.to_json`) in words."""
    lines = [
        f"{arm}: {found['n_exact']} of {found['n_problems']} chains as they should be; "
        "first wrong token:"
    ]
    lines += [f"  {count:4}  {kind}" for kind, count in found["wrong"].items()]
    lines.append("value still cached, share of KV heads, layer by layer:")
    for key, shares in found["held"].items():
        line = " ".join(f"{share:4.0%}" for share in shares)
        lines.append(f"  lookup {key} ({found['n_lookups'][key]:4}): {line}")
    return "\n".join(lines)


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

    Raises
    ------
    ConfigError
        An arm is none, has no budget of its own, or cannot hold the prompt.
    """
    for text in texts:
        if "@" not in text:
            raise ConfigError(f"{text}: must be METHOD@BUDGET, e.g. rkv@160")
    profile = load_profile(profiles_folder() / "demo-reasoner.json")
    common = Common(BUFFER, 4, 8, n_protect, "f16", profile)
    return {arm: setup_of(arm, common) for arm in parse_arms(texts, [])}


def dissect(
    texts: Sequence[str], n_problems: int, level: int = DEMO_LEVEL
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each arm with what was found in the first problems of the demo's data set.

    Parameters
    ----------
    texts : sequence of str
        ``METHOD@BUDGET`` each; all are checked before the first is worked on.
    n_problems : int
        At least 1.
    level : int
        A key of `LEVEL_STEPS`.

    Yields
    ------
    str
        The arm.
    dict
        See `Autopsy.to_json`; and ``seconds``.
    """
    problems = [generate_problem(DEMO_SEED, i, level) for i in range(n_problems)]
    n_protect = max(1 + len(encode(problem.chat_prompt)) for problem in problems)
    for arm, (config, kv_type) in setups_of(texts, n_protect).items():
        autopsy, start = Autopsy(), time.monotonic()
        with ReasonLlama(DEMO_MODEL, config, n_threads=1) as llama:
            for i, problem in enumerate(problems):
                assert config is not None
                config = replace(config, policy_seed=text_seed(0, f"demo-{level}-{i}", 0))
                llama.reconfigure(config, type_k=kv_type, type_v=kv_type)
                autopsy.examine(llama, problem)
        yield str(arm), {**autopsy.to_json(), "seconds": round(time.monotonic() - start, 1)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("arms", nargs=-1, required=True, metavar="METHOD@BUDGET...")
@click.option(
    "--level",
    type=click.IntRange(min(LEVEL_STEPS), max(LEVEL_STEPS)),
    default=DEMO_LEVEL,
    show_default=True,
    help="Of the problems.",
)
@click.option(
    "--problems", type=click.IntRange(min=1), default=100, show_default=True, help="How many."
)
def main(arms: tuple[str, ...], level: int, problems: int) -> None:
    """Tell where chains of the demo reasoner go wrong, and what was evicted then."""
    for arm, found in dissect(arms, problems, level):
        click.echo(text_of(arm, found) + "\n")


if __name__ == "__main__":
    run_command(main, "demo.autopsy")
