"""Reading every text with every cache: rows as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import __version__
from ..engine import bindings as c
from ..engine.errors import ConfigError, error_from_status
from ..eval.cases.methods import Arm, Setup, profile_digest
from ..eval.decode.worker import measure_cache
from ..session.config import kv_type_id
from ..session.generate import Generation, Sampling
from ..session.reason_llama import ReasonLlama
from .metrics import Reference, Scores, log_softmax, next_nll
from .plan import MIN_SCORED, REFERENCE, Plan
from .probes import Probe
from .rows import BLOCK, COPY, OWN, RECALL, WRITTEN, Row, RowKey
from .stream import N_ROWS, Stream
from .texts import Text

#: Whose rows say what the full cache wrote, recalled and found easy.
REFERENCE_ARM = Arm("reference", 0)

_Done = Mapping[RowKey, Row]
_Advance = Callable[[int, str], None]


def own_text(plan: Plan, i: int, tokens: Sequence[int]) -> Text:
    """Return the text that the model wrote on a prompt."""
    return Text(OWN, f"own {i + 1}", tuple(tokens), len(plan.prompts[i]))


def _written_key(i: int) -> RowKey:
    return RowKey(WRITTEN, *REFERENCE_ARM, f"own {i + 1}")


def n_left(plan: Plan, done: _Done) -> int:
    """Return how many tokens are left to read, those of unwritten texts at their longest."""
    n = 0
    texts = list(plan.texts)
    for i, prompt in enumerate(plan.prompts):
        row = done.get(_written_key(i))
        if row is None:
            n += plan.own_tokens
            texts.append(own_text(plan, i, (*prompt, *[0] * plan.own_tokens)))
        else:
            texts.append(own_text(plan, i, [int(token) for token in row.values["tokens"]]))
    for text in texts:
        n_arms = len(_arms_left(plan, text, done))
        n += len(text.tokens) * (n_arms + (n_arms > 0))
    for kind, probes in ((RECALL, plan.facts), (COPY, plan.passages)):
        for distance, some in probes.items():
            n += sum(len(probe.tokens) for probe in some) * len(
                _probe_arms_left(plan, kind, distance, done)
            )
    return n


def measure(plan: Plan, done: _Done, advance: _Advance = lambda n, text: None) -> Iterator[Row]:
    """Yield the rows that are left, text by text, in each arm after arm.

    Parameters
    ----------
    plan : Plan
        What to read.
    done : mapping
        Rows that there are already; nothing is loaded if these are all. What is yielded belongs
        into it.
    advance : callable
        Gets the tokens read since its last call, and a word about them.

    Raises
    ------
    ReasonAllocError
        The model cannot be loaded, cannot have a budgeted cache, or a decode failed.
    """
    if n_left(plan, done) == 0:
        return
    with (
        ReasonLlama(
            plan.model,
            None,
            n_ctx=plan.n_ctx,
            n_batch=N_ROWS,
            type_k=REFERENCE.kv_type,
            type_v=REFERENCE.kv_type,
            n_threads=plan.n_threads,
            n_threads_batch=plan.n_threads,
            n_gpu_layers=plan.n_gpu_layers,
        ) as llama,
        Stream(llama, REFERENCE) as stream,
    ):
        _check_support(plan, llama)
        for text in plan.texts:
            yield from _score_text(plan, stream, text, done, advance)
        for i, prompt in enumerate(plan.prompts):
            written = done.get(_written_key(i))
            is_new = written is None
            if written is None:
                written = _write(plan, stream, i, prompt)
                yield written
                advance(plan.own_tokens, written.item)
            text = own_text(plan, i, [int(token) for token in written.values["tokens"]])
            yield from _score_text(plan, stream, text, done, advance)
            if is_new:  # it was counted at its longest
                n_missing = plan.own_tokens + len(prompt) - len(text.tokens)
                advance(n_missing * (len(plan.arms) + 1), text.name)
        for kind, probes in ((RECALL, plan.facts), (COPY, plan.passages)):
            for distance, some in probes.items():
                yield from _ask(plan, stream, kind, distance, some, done, advance)


def _check_support(plan: Plan, llama: ReasonLlama) -> None:
    for setup in plan.setups.values():
        if setup.config is not None:
            kind = kv_type_id(setup.kv_type)
            status = c.ra_model_supported(llama.model, kind, kind)
            if status != c.RA_STATUS_OK:
                raise error_from_status(status, f"{plan.model}: {c.last_error()}")


# --- texts ---------------------------------------------------------------------------------------


def first_scored(text: Text, start: int) -> int:
    """Return the first position of a text that is scored: never one inside its prompt."""
    return max(start, text.n_prompt - 1)


def _arms_left(plan: Plan, text: Text, done: _Done) -> list[Arm]:
    """Return the arms that a text is long enough for and has no row of."""
    return [
        arm
        for arm in plan.arms
        if len(text.tokens) - 1 - first_scored(text, plan.starts[arm.budget]) >= MIN_SCORED
        and RowKey(text.kind, arm.method, arm.budget, text.name) not in done
    ]


def _write(plan: Plan, stream: Stream, i: int, prompt: Sequence[int]) -> Row:
    """Let the model write a text with the full cache."""
    began = time.monotonic()
    stream.open(REFERENCE)
    base = plan.sampling
    generation = Generation(
        stream.llama, prompt, plan.own_tokens, Sampling(base.temp, base.top_p, base.seed + i)
    )
    for _ in generation:
        pass
    tokens: list[float] = [*prompt, *generation.tokens]
    return Row(
        kind=WRITTEN,
        method=REFERENCE_ARM.method,
        budget=0,
        item=f"own {i + 1}",
        n_tokens=len(tokens),
        start=0,
        n_prompt=len(prompt),
        n_never=0,
        seconds=time.monotonic() - began,
        values={"tokens": tokens},
        **_cache_fields(stream, REFERENCE),
    )


def _score_text(
    plan: Plan, stream: Stream, text: Text, done: _Done, advance: _Advance
) -> Iterator[Row]:
    """Read one text with the full cache, then with every arm that is left."""
    arms = _arms_left(plan, text, done)
    if not arms:
        return
    tokens = np.asarray(text.tokens)
    end = len(tokens) - 1
    start = min(first_scored(text, plan.starts[arm.budget]) for arm in arms)
    with Reference(start) as reference:
        stream.open(REFERENCE, text.n_prompt)
        for pos, logits in stream.read(text.tokens, [range(start, end)]):
            reference.add(logits, tokens[pos + 1 : pos + 1 + len(logits)])
        advance(len(tokens), f"{text.name}: full cache")
        for arm in arms:
            row = _score_arm(plan, stream, text, arm, reference)
            yield row
            kl = sum(row.values["kl"]) / sum(row.values["n"])
            advance(len(tokens), f"{text.name}: {arm} KL {kl:.3f}")


def _score_arm(plan: Plan, stream: Stream, text: Text, arm: Arm, reference: Reference) -> Row:
    began = time.monotonic()
    setup, tokens = plan.setups[arm], np.asarray(text.tokens)
    start = first_scored(text, plan.starts[arm.budget])
    stream.open(setup, text.n_prompt)
    parts = [
        reference.compare(pos, logits, tokens[pos + 1 : pos + 1 + len(logits)])
        for pos, logits in stream.read(text.tokens, [range(start, len(tokens) - 1)])
    ]
    scores = Scores(*(np.concatenate(part) for part in zip(*parts)))
    fields = _cache_fields(stream, setup)
    return Row(
        kind=text.kind,
        method=arm.method,
        budget=arm.budget,
        item=text.name,
        n_tokens=len(tokens),
        start=start,
        n_prompt=text.n_prompt,
        n_never=int(setup.config is not None and fields["n_evicted"] == 0),
        seconds=time.monotonic() - began,
        values=block_sums(scores),
        **fields,
    )


def block_sums(scores: Scores) -> dict[str, list[float]]:
    """Return the sums over blocks of `BLOCK` positions; see `Row.values`."""
    edges = np.arange(0, len(scores.kl), BLOCK)
    values: dict[str, list[float]] = {
        "n": np.diff([*edges, len(scores.kl)]).tolist(),
        "agree": np.add.reduceat(scores.agree.astype(np.int64), edges).tolist(),
    }
    for name in ("kl", "nll", "nll_full"):
        sums = np.add.reduceat(getattr(scores, name), edges)
        values[name] = [round(float(number), 9) for number in sums]
    return values


def _cache_fields(stream: Stream, setup: Setup) -> dict[str, Any]:
    """Return what the engine counts, as fields of a row."""
    fields = measure_cache(stream.llama)
    del fields["compress_seconds"]
    return {**fields, "profile": profile_digest(setup), "version": __version__}


# --- facts and passages --------------------------------------------------------------------------


def _probe_arms_left(plan: Plan, kind: str, distance: int, done: _Done) -> list[Arm]:
    """Return the arms that have no row at a distance, the reference first."""
    arms = [arm for arm in plan.arms if plan.distances.get(arm.budget, distance) == distance]
    arms.insert(0, REFERENCE_ARM)
    return [arm for arm in arms if RowKey(kind, arm.method, arm.budget, str(distance)) not in done]


def _ask(
    plan: Plan,
    stream: Stream,
    kind: str,
    distance: int,
    probes: Sequence[Probe],
    done: _Done,
    advance: _Advance,
) -> Iterator[Row]:
    """Read all facts, or all passages, of one distance with every arm that is left."""
    for arm in _probe_arms_left(plan, kind, distance, done):
        setup = REFERENCE if arm == REFERENCE_ARM else plan.setups[arm]
        began = time.monotonic()
        values: dict[str, list[float]] = {}
        counts, n_never = [], 0
        for probe in probes:
            stream.open(setup)
            found = _recalled(stream, probe) if kind == RECALL else _copied(stream, probe)
            for name, number in found.items():
                values.setdefault(name, []).append(number)
            counts.append(_cache_fields(stream, setup))
            n_never += setup.config is not None and counts[-1]["n_evicted"] == 0
            what = "facts" if kind == RECALL else "passages"
            advance(len(probe.tokens), f"{what} over {distance} tokens: {arm}")
        fields = dict(counts[0])
        for name, total in (("n_evicted", sum), ("n_compressions", sum), ("kv_bytes", max)):
            fields[name] = total([count[name] for count in counts])
        fields["peak_tokens"] = max(count["peak_tokens"] for count in counts)
        yield Row(
            kind=kind,
            method=arm.method,
            budget=arm.budget,
            item=str(distance),
            n_tokens=sum(len(probe.tokens) for probe in probes),
            start=distance,
            n_prompt=0,
            n_never=n_never,
            seconds=time.monotonic() - began,
            values=values,
            **fields,
        )


def _recalled(stream: Stream, probe: Probe) -> dict[str, float]:
    """Return whether all tokens of a fact's value are the likeliest ones."""
    tokens, (value,) = np.asarray(probe.tokens), probe.spans
    is_right = True
    for pos, logits in stream.read(probe.tokens[:-1], [range(value.start - 1, value.stop - 1)]):
        wanted = tokens[pos + 1 : pos + 1 + len(logits)]
        is_right = is_right and bool((logits.argmax(axis=1) == wanted).all())
    return {"right": int(is_right)}


def _copied(stream: Stream, probe: Probe) -> dict[str, float]:
    """Return the tokens of a passage, and the nats of its copies."""
    tokens, (first, second) = np.asarray(probe.tokens), probe.spans
    spans = [range(span.start - 1, span.stop - 1) for span in probe.spans]
    nll = {"nll_first": 0.0, "nll": 0.0}
    for pos, logits in stream.read(probe.tokens[:-1], spans):
        sums = next_nll(log_softmax(logits), tokens[pos + 1 : pos + 1 + len(logits)]).sum()
        nll["nll" if pos >= second.start - 1 else "nll_first"] += round(float(sums), 9)
    # the first token of a text without a token for its beginning has no likelihood: means differ
    return {"n": len(second), **nll, "nll_first": nll["nll_first"] * len(second) / len(first)}


def check_written(plan: Plan, rows: _Done) -> None:
    """Raise ConfigError if the model's own texts are all too short for every budget."""
    if plan.texts or not plan.prompts:
        return
    if not any(key.kind == OWN for key in rows):
        longest = max(row.n_tokens for key, row in rows.items() if key.kind == WRITTEN)
        least = min(plan.starts.values()) + MIN_SCORED + 1
        raise ConfigError(
            f"the longest text that the model wrote has {longest} tokens with its prompt, scoring "
            f"needs {least}: pass lower --budgets, a higher --own-tokens, or other --prompts"
        )
