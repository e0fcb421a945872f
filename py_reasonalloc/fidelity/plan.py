"""From the command line's arguments to what is read, and what a results file must match."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..engine.errors import ConfigError, ContextFullError
from ..engine.identity import read_identity
from ..engine.modelfile import open_vocabulary, trained_context
from ..engine.prompts import encode_prompt
from ..engine.usertext import path_text
from ..eval.cases.methods import (
    Arm,
    Common,
    Setup,
    parse_arms,
    profile_digest,
    profile_of,
    setup_of,
)
from ..eval.decode.plan import protected_tokens, read_budgets, split_list
from ..eval.results.lines import Results
from ..profile.lookup import resolve_profile
from ..run.probes import default_prompts, read_prompts
from ..session.generate import Sampling
from ..task.shipped import DEMO, DEMO_DEFAULTS, model_path
from .probes import (
    LEAD,
    MAX_FACTS,
    PASSAGE,
    Filler,
    Probe,
    fact_sequences,
    make_facts,
    passage_sequences,
)
from .rows import BLOCK, OWN, TEXT
from .texts import Text, digest, encode_text, text_files

#: What all arms are held against.
REFERENCE = Setup(None, "f16")
#: Fewest positions of a text that are worth scoring.
MIN_SCORED = BLOCK


@dataclass(frozen=True)
class Plan:
    """A measurement that has been checked.

    Attributes
    ----------
    model : Path
        GGUF file.
    arms : tuple of Arm
        In the order of the table.
    setups : mapping
        Arm -> its cache.
    starts : mapping
        Budget -> first position that is scored, the same for all its arms: where the first
        compression of all of them has happened. Budget 0: full caches of another type.
    texts : tuple of Text
        Files.
    prompts : tuple of (int, ...)
        Tokens of the prompts on which the model writes its own texts.
    own_tokens : int
        Most tokens of each, prompt not counted.
    sampling : Sampling
        How they are drawn.
    facts, passages : mapping
        Distance -> sequences; see `py_reasonalloc.fidelity.probes`.
    distances : mapping
        Budget -> tokens between a fact and its question.
    n_ctx : int
        Context, tokens.
    n_threads, n_gpu_layers : int
        See `ReasonLlama`.
    settings : dict
        What a results file must have been made with.
    profiles : dict
        Layer profiles of the arms; see `py_reasonalloc.eval.results.agreement.profiles_of`.
    notes : tuple of str
        What was left out, and why.
    """

    model: Path
    arms: tuple[Arm, ...]
    setups: Mapping[Arm, Setup]
    starts: Mapping[int, int]
    texts: tuple[Text, ...]
    prompts: tuple[tuple[int, ...], ...]
    own_tokens: int
    sampling: Sampling
    facts: Mapping[int, Sequence[Probe]]
    passages: Mapping[int, Sequence[Probe]]
    distances: Mapping[int, int]
    n_ctx: int
    n_threads: int
    n_gpu_layers: int
    settings: dict[str, Any]
    profiles: dict[str, str]
    notes: tuple[str, ...]


def make_plan(arguments: dict[str, Any], there: Results | None = None) -> Plan:
    """Check everything that can be checked before weights are loaded.

    Parameters
    ----------
    arguments : dict
        Of the command `reasonalloc-eval fidelity`, by the names of its options.
    there : Results, optional
        The results file that the run will go on in.

    Raises
    ------
    ConfigError
        An argument, a text or a method is not right, or a text is too short.
    ReasonAllocError
        The model file, or its profile.
    """
    chosen = dict(arguments)
    if chosen["buffer"] is None:
        chosen["buffer"] = DEMO_DEFAULTS["buffer"] if chosen["model"] == DEMO else 128
    model = model_path(chosen["model"])
    arms = parse_arms(split_list(chosen["methods"]), read_budgets(chosen["budgets"] or ""))
    files = text_files(chosen["text"])
    if not files and not chosen["own"]:
        raise ConfigError("nothing to read: pass --text FILES, --own, or both")
    sampling = Sampling(chosen["temp"], chosen["top_p"], chosen["seed"])
    with open_vocabulary(model) as vocabulary:
        texts = tuple(encode_text(vocabulary, file, chosen["max_tokens"]) for file in files)
        prompts = _prompts(vocabulary, model, chosen) if chosen["own"] else ()
        n_trained = trained_context(vocabulary)
        facts, passages, distances, notes = _probes(vocabulary, texts, arms, chosen)
    longest = max(map(len, prompts), default=0)
    n_protect = protected_tokens(chosen, arms, longest, there)
    common = Common(
        buffer=chosen["buffer"],
        sinks=chosen["sinks"],
        window=chosen["window"],
        n_protect=n_protect or 0,
        kv_type=chosen["kv_type"],
        profile=resolve_profile(model, chosen["profile"]),
    )
    setups = {arm: setup_of(arm, common) for arm in arms}
    starts = _starts(setups, chosen["buffer"], there)
    _check_lengths(files, texts, starts)
    lengths = [len(text.tokens) for text in texts]
    lengths += [len(prompt) + chosen["own_tokens"] for prompt in prompts]
    probes = [probe for found in (facts, passages) for some in found.values() for probe in some]
    lengths += [len(probe.tokens) for probe in probes]
    if max(lengths) > n_trained > 0:
        raise ContextFullError(
            f"the longest sequence has {max(lengths)} tokens, but the model was trained for "
            f"{n_trained}: lower --max-tokens, --own-tokens or --recall-distance"
        )
    profiles = {
        called: found
        for arm, setup in setups.items()
        if (called := profile_of(arm.method)) is not None
        and (found := profile_digest(setup)) is not None
    }
    return Plan(
        model=model,
        arms=arms,
        setups=setups,
        starts=starts,
        texts=texts,
        prompts=prompts,
        own_tokens=chosen["own_tokens"],
        sampling=sampling,
        facts=facts,
        passages=passages,
        distances=distances,
        n_ctx=max(lengths),
        n_threads=chosen["threads"] or os.cpu_count() or 1,
        n_gpu_layers=chosen["gpu_layers"],
        settings=_settings(chosen, model, texts, prompts)
        | {
            "protect_prompt": n_protect,
            "profile": None
            if common.profile is None
            else [round(demand, 6) for demand in common.profile.demand],
        },
        profiles=profiles,
        notes=tuple(notes),
    )


def _prompts(vocabulary: Any, model: Path, chosen: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    if chosen["prompts"] is None:
        texts = default_prompts(read_identity(model), chosen["seed"])
    else:
        texts = read_prompts(chosen["prompts"])
    texts = texts[: chosen["own_limit"]]
    return tuple(tuple(encode_prompt(vocabulary, text, chosen["raw"])) for text in texts)


def _probes(
    vocabulary: Any, texts: Sequence[Text], arms: Sequence[Arm], chosen: dict[str, Any]
) -> tuple[dict[int, Any], dict[int, Any], dict[int, int], list[str]]:
    """Return facts and passages by distance, the distance of each budget, and notes."""
    budgets = sorted({arm.budget for arm in arms if arm.budget > 0})
    distances = {
        budget: chosen["recall_distance"] or budget + chosen["buffer"] for budget in budgets
    }
    facts: dict[int, Any] = {}
    passages: dict[int, Any] = {}
    if not texts or not budgets:
        return facts, passages, distances, []
    if chosen["facts"] > MAX_FACTS:
        raise ConfigError(f"facts = {chosen['facts']} is out of range: must be 0 to {MAX_FACTS}")
    bos = vocabulary.tokenize(b"", add_bos=True, special=False)
    filler = Filler([text.tokens[len(bos) :] for text in texts])
    n_needed = max(distances.values()) + LEAD + 2 * PASSAGE
    if len(filler) < n_needed:
        note = (
            f"no facts, no passages: they need {n_needed} tokens of text in between, the texts "
            f"have {len(filler)}"
        )
        return facts, passages, distances, [note] if chosen["facts"] + chosen["passages"] else []

    def tokenize(text: str) -> list[int]:
        return list(vocabulary.tokenize(text.encode("utf-8"), add_bos=False, special=False))

    for distance in sorted(set(distances.values())):
        if chosen["facts"]:
            stated = make_facts(chosen["facts"], chosen["seed"])
            facts[distance] = fact_sequences(stated, distance, filler, tokenize, bos)
        if chosen["passages"]:
            passages[distance] = passage_sequences(chosen["passages"], distance, filler, bos)
    return facts, passages, distances, []


def _starts(setups: Mapping[Arm, Setup], buffer: int, there: Results | None) -> dict[int, int]:
    """Return the first scored position of each budget.

    A budget that the file has already keeps its own, if all arms can be compressed until then.
    """
    starts: dict[int, int] = {}
    for arm, setup in setups.items():
        if setup.config is not None:
            first = arm.budget + max(setup.config.buffer, buffer)
            starts[arm.budget] = max(starts.get(arm.budget, 0), first)
    scored = [row for row in there.rows if row.kind in (TEXT, OWN)] if there is not None else []
    for row in scored:
        if there is not None and row.budget in starts:
            if starts[row.budget] > row.start:
                raise ConfigError(
                    f"{there.path}: at budget {row.budget} positions from {row.start} on were "
                    f"scored there, but a longer buffer needs {starts[row.budget]}: pass another "
                    "results file"
                )
            starts[row.budget] = row.start
    if any(setup.config is None for setup in setups.values()):
        known = [row.start for row in scored if row.budget == 0]
        starts[0] = known[0] if known else min(starts.values(), default=buffer)
    return starts


def _check_lengths(files: Sequence[Path], texts: Sequence[Text], starts: Mapping[int, int]) -> None:
    """Raise ConfigError for a text in which a budget has too little to score."""
    budget = max(starts, key=lambda budget: starts[budget])
    n_needed = starts[budget] + MIN_SCORED + 1
    for file, text in zip(files, texts):
        if len(text.tokens) < n_needed:
            raise ConfigError(
                f"{file}: the text has {len(text.tokens)} tokens, but at budget {budget} scoring "
                f"needs {n_needed} (budget + buffer, and {MIN_SCORED} to score): pass a longer "
                "text, a higher --max-tokens or lower budgets"
            )


def _settings(
    chosen: dict[str, Any],
    model: Path,
    texts: Sequence[Text],
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    names = ["buffer", "sinks", "window", "kv_type", "seed"]
    settings = {name: chosen[name] for name in names}
    if texts:
        settings["texts"] = [f"{text.name}:{digest(text.tokens)}" for text in texts]
        settings |= {name: chosen[name] for name in ("facts", "passages", "recall_distance")}
    if prompts:
        settings["prompts"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
        settings |= {name: chosen[name] for name in ("own_tokens", "temp")}
        if chosen["temp"] > 0:
            settings["top_p"] = chosen["top_p"]
    return {
        "version": __version__,
        "model": path_text(model.name),
        "model_fingerprint": read_identity(model).fingerprint,
        **settings,
    }
