"""`reasonalloc-run --samples`: several texts for one prompt, and what most of them answer."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..engine.errors import ConfigError
from ..output.console import EXIT_INTERRUPTED
from ..output.text import size

if TYPE_CHECKING:
    from ..eval.decode.answers import Judge
    from ..eval.decode.vote import Vote
    from ..run.options import RunOptions
    from ..run.samples import Sample

#: Options that are for one text.
_FOR_ONE = (
    "trace",
    "chat",
    "watch",
    "stop",
    "grammar",
    "json_schema",
    "save_state",
    "load_state",
)


def samples_options(function: Any) -> Any:
    """Add the options of several texts to a command."""
    function = click.option(
        "--vote",
        is_flag=True,
        help="With --samples: read the answers, as reasonalloc-eval does, and tell the majority's.",
    )(function)
    return click.option(
        "--samples",
        type=click.IntRange(1, 256),
        default=1,
        metavar="K",
        help="Decode K texts side by side in one context, with seeds from --seed on; the cache "
        "takes K times the memory.  [default: 1]",
    )(function)


def check_samples(arguments: dict[str, Any]) -> None:
    """Raise ConfigError if options exclude each other."""
    if arguments["samples"] == 1:
        if arguments["vote"]:
            raise ConfigError("--vote needs --samples K, at least 2")
        return
    for name in _FOR_ONE:
        if arguments.get(name):
            raise ConfigError(f"--samples and --{name.replace('_', '-')} exclude each other")


def run_samples(options: RunOptions, text: str, is_demo: bool, vote: bool, as_json: bool) -> int:
    """Decode the texts and print them; returns the exit code."""
    from ..engine.log import LogCapture
    from ..run import samples as room
    from ..session.generate import INTERRUPTED
    from .eval_progress import Meter

    judge = _judge(is_demo) if vote else None  # what it needs is missed now
    with Meter(options.n_samples, "decoding", "texts") as meter:

        def advance(sample: Sample) -> None:
            meter.advance(1, f"{sample.n_generated} tokens")

        with LogCapture(forward=options.verbose):
            samples, report = room.run_samples(options, text, advance)
    is_interrupted = any(sample.stop_reason == INTERRUPTED for sample in samples)
    found = None if judge is None else _vote(samples, judge)
    if as_json:
        _write(json.dumps(_fields(samples, report, found), ensure_ascii=False) + "\n")
    else:
        _write(_texts(samples, found))
        click.echo(_summary(options, report), err=True)
    return EXIT_INTERRUPTED if is_interrupted else 0


def _judge(is_demo: bool) -> Judge:
    from ..eval.cases.datasets import DEMO_DATASET
    from ..eval.decode.answers import judge_for

    return judge_for(DEMO_DATASET if is_demo else "")


def _vote(samples: list[Sample], judge: Judge) -> Vote:
    from ..eval.decode.vote import vote

    return vote([sample.text for sample in samples], judge)


def _fields(samples: list[Sample], report: dict[str, Any], found: Vote | None) -> dict[str, Any]:
    """Return what --json prints."""
    texts = [asdict(sample) for sample in samples]
    for sample in texts:
        sample["answer"] = None if found is None else found.answers[sample["index"]]
    majority = None if found is None else found.majority
    return {
        "texts": texts,
        "majority": majority,
        "majority_texts": found.groups[0] if found is not None and found.groups else [],
        **report,
    }


def _texts(samples: list[Sample], found: Vote | None) -> str:
    """Return what is printed: every text, and what was answered."""
    from ..run.report import STOPS

    n, lines = len(samples), []
    for sample in samples:
        lines.append(
            f"=== text {sample.index + 1} of {n}, seed {sample.seed}: {sample.n_generated} tokens; "
            f"end: {STOPS[sample.stop_reason]}"
        )
        lines.append(sample.text)
    if found is not None:
        lines.append("=== answers")
        for sample in samples:
            answer = found.answers[sample.index]
            lines.append(f"{sample.index + 1}: {'none' if answer is None else answer}")
        if found.majority is None:
            lines.append("majority: none")
        else:
            lines.append(f"majority: {found.majority} ({len(found.groups[0])} of {n})")
    return "\n".join(lines) + "\n"


def _summary(options: RunOptions, report: dict[str, Any]) -> str:
    """Return a few lines about all texts."""
    from ..run.report import split

    asked = options.profile if options.by_profile else None
    lines = [
        f"[{report['n_prompt']} prompt tokens read once in {report['prompt_seconds']:.2f} s, "
        f"{report['n_samples']} texts of {report['n_generated']} tokens in "
        f"{report['decode_seconds']:.2f} s ({report['tokens_per_second']:.1f} tokens/s together)]"
    ]
    kv = f"{size(report['kv_bytes'])} ({report['kv_bytes']} bytes)"
    if report["budget"] is None:
        return "\n".join([*lines, f"[cache: {kv} for {report['n_samples']} texts]"])
    lines.append(
        f"[cache: {kv} for {report['n_samples']} texts, {report['policy']} keeps "
        f"{report['budget']} tokens per head of each]"
    )
    lines.append(f"[{split(report, asked)}]")
    return "\n".join(lines)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
