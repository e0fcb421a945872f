"""The rows of a fidelity run: what one arm made of one text, of all facts, or of all passages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from ..eval.cases.rows import arm_label
from ..eval.results.lines import MAX_COUNT, BadLineError, RowFormat, shown

#: Kinds of rows: a text that the model wrote itself with the full cache (its tokens); a text that
#: was scored, such a text or a file; facts that were asked for; passages that were read twice.
WRITTEN, OWN, TEXT, RECALL, COPY = "written", "own", "text", "recall", "copy"
KINDS = (WRITTEN, OWN, TEXT, RECALL, COPY)
#: Tokens of a block: what is resampled.
BLOCK = 64

_MAX_VALUES = 1 << 20
#: Kind -> the lists that its rows have in `Row.values`, all of one length.
VALUES = {
    WRITTEN: ("tokens",),
    OWN: ("n", "kl", "agree", "nll", "nll_full"),
    TEXT: ("n", "kl", "agree", "nll", "nll_full"),
    RECALL: ("right",),
    COPY: ("n", "nll", "nll_first"),
}


class RowKey(NamedTuple):
    """What names a row."""

    kind: str
    method: str
    budget: int
    item: str


@dataclass(frozen=True)
class Row:
    """Figures of one arm. Sizes are the engine's own.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    method, budget : str, int
        Of the arm; budget 0 is the full cache.
    item : str
        Name of the text; of facts and passages the tokens in between, as text.
    n_tokens : int
        Tokens read; facts and passages: of all their sequences.
    start : int
        First position scored; facts and passages: tokens in between.
    n_prompt : int
        Tokens of the prompt that the text begins with, 0 without one.
    n_protect : int or None
        Prompt tokens that could not be evicted; None: full cache.
    peak_tokens, kv_bytes : int
        Most tokens that any head held; bytes of K and V: all that a budgeted cache has allocated,
        the rows in use of a full one.
    n_evicted, n_compressions : int
        (token, head) entries evicted, compressions; facts and passages: of all their sequences.
    n_never : int
        Sequences in which a budget evicted nothing.
    seconds : float
        Wall clock.
    profile, version : str or None
        See `py_reasonalloc.eval.cases.rows.Row`.
    values : mapping
        See `VALUES`. Texts: sums over blocks of `BLOCK` positions, "n" positions each; "agree"
        counts those with the same likeliest token, the rest are nats. Facts: 1 for each that came
        out right. Passages: tokens and nats of each, of the second copy ("nll") and of the first.
    """

    kind: str
    method: str
    budget: int
    item: str
    n_tokens: int
    start: int
    n_prompt: int
    peak_tokens: int
    kv_bytes: int
    n_evicted: int
    n_compressions: int
    n_never: int
    seconds: float
    n_protect: int | None = None
    profile: str | None = None
    version: str | None = None
    values: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def key(self) -> RowKey:
        """What names the row."""
        return RowKey(self.kind, self.method, self.budget, self.item)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def without_text(self) -> Row:
        """Return the row: nothing in it is large."""
        return self


def show_key(key: RowKey) -> str:
    """Return a key as text."""
    return f"{key.kind} of {arm_label(key.method, key.budget)}, {shown(key.item)}"


# --- reading -------------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()


_COUNTS = (
    "budget n_tokens start n_prompt peak_tokens kv_bytes n_evicted n_compressions n_never".split()
)


def read_row(values: dict[str, Any]) -> Row:
    """Return a row for a line's values, which may be anything.

    Raises
    ------
    BadLineError
        A field is missing, unknown, or out of its range.
    """
    names = {f.name for f in fields(Row)}
    for name in values:
        if name not in names:
            raise BadLineError(f"a row has no field {shown(name)}")
    kind = values.get("kind")
    if kind not in KINDS:
        raise BadLineError(f"kind must be one of {', '.join(KINDS)}, not {shown(kind)}")
    for name in ("method", "item"):
        _require(_is_name(values.get(name)), name, "1 to 500 printable characters", values)
    for name in _COUNTS:
        _require(_is_count(values.get(name)), name, f"a whole number, 0 to {MAX_COUNT}", values)
    seconds = values.get("seconds")
    _require(_is_seconds(seconds), "seconds", "a number of seconds, at least 0", values)
    protect = values.get("n_protect")
    _require(protect is None or _is_count(protect), "n_protect", "a whole number or null", values)
    for name in ("profile", "version"):
        value = values.get(name)
        _require(value is None or _is_name(value), name, "a text or null", values)
    _check_lists(kind, values.get("values"))
    return Row(**values)


def _require(is_right: bool, name: str, what: str, values: dict[str, Any]) -> None:
    if not is_right:
        raise BadLineError(f"{name} must be {what}, not {shown(values.get(name))}")


def _check_lists(kind: str, lists: Any) -> None:
    wanted = VALUES[kind]
    if not isinstance(lists, dict) or set(lists) != set(wanted):
        raise BadLineError(f"values must have {', '.join(wanted)}")
    lengths = set()
    for name, numbers in lists.items():
        if not isinstance(numbers, list) or not 0 < len(numbers) <= _MAX_VALUES:
            raise BadLineError(f"values: {name} must be a list of 1 to {_MAX_VALUES} numbers")
        if not all(map(_is_number, numbers)):
            raise BadLineError(f"values: {name} must hold numbers")
        if name in ("n", "right", "agree", "tokens") and not all(map(_is_count, numbers)):
            raise BadLineError(f"values: {name} must hold whole numbers, at least 0")
        lengths.add(len(numbers))
    if len(lengths) != 1 or 0 in lists.get("n", [1]):
        raise BadLineError("values must be lists of one length, with at least one token each")


#: What `reasonalloc-eval fidelity` writes.
FIDELITY = RowFormat("reasonalloc_fidelity", 1, read_row, show_key)
