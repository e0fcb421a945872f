"""Layer profiles: the "Reasoning Wave" of a model family (ReasonAlloc, arXiv 2606.11164).

A profile is a JSON file that says how many cached tokens each layer needs. Its format is
``profiles/schema/profile.schema.json``. Files are untrusted: limited in size, checked against the
schema, and against what a schema cannot say; every complaint names its field.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import functools
import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import ProfileError
from ..engine.tempfiles import write_whole
from .head_error import HeadError, contradictions

FORMAT_VERSION = 2
MAX_FILE_BYTES = 1 << 25
_MAX_COMPLAINTS = 3
_NUMBERS = re.compile(r"\[\n[-+.eE\d,\s]*\]")  # no string of JSON has a line end in it


class Recommendation(NamedTuple):
    """The smallest cache that keeps a model's own text close to what the full cache makes of it.

    Attributes
    ----------
    target_kl : float
        What `kl_high` had to stay below, nats.
    method : str
        As `py_reasonalloc.eval.cases.methods` names it.
    budget, buffer, sinks, window : int
        See `BudgetConfig`.
    kv_type : str
        Type of K and V.
    kl, kl_high : float
        Mean KL divergence of the next token from the full cache, and the upper end of its 95%
        interval.
    n_tokens : int
        Positions it was measured on.
    tool_version, command : str
        What measured it.
    """

    target_kl: float
    method: str
    budget: int
    buffer: int
    sinks: int
    window: int
    kv_type: str
    kl: float
    kl_high: float
    n_tokens: int
    tool_version: str
    command: str


@dataclass(frozen=True)
class Profile:
    """What `profiles/schema/profile.schema.json` describes, checked.

    Attributes
    ----------
    name, family, architecture : str
        What reports call it; which models it is for.
    n_layer, head_dim : int
        Of the model that was measured.
    n_head_kv : int or tuple of int
        KV heads of every layer, or of each; 0 for a layer without a budget.
    demand : tuple of float
        [n_layer] tokens that cover `rho` of the attention mass, mean over decode steps and query
        heads (with a horizon: over horizons and KV heads); 0 for a layer without a budget.
    rho : float
        Share of the attention mass, 0 to 1.
    gamma, clip_lo, clip_hi : float
        How the demand becomes budgets; see `BudgetConfig`.
    n_prompts, n_steps : int
        Probe prompts; decode steps measured, all prompts together.
    seed : int
        Of the sampling (and of the demo model's probes).
    tool_version, date, fingerprint, command : str
        What measured it, when, of which model file (see `py_reasonalloc.engine.identity`), and how.
    horizon : int
        Decode steps over which the attention was summed before it was counted; 0: none.
    recommendation : Recommendation or None
        Which cache is enough for the model; None: nobody measured it.
    head_error : HeadError or None
        Error curves of the KV heads, for ``layers = "error"``; None: not measured.
    centres : bytes
        Where the queries of every head lie, for the policy "triattention": ra_config.centres of
        reasonalloc.h in float32, little endian. Empty: not measured.
    source : str
        Where it was read from: not part of the file, and not compared.
    """

    name: str
    family: str
    architecture: str
    n_layer: int
    n_head_kv: int | tuple[int, ...]
    head_dim: int
    demand: tuple[float, ...]
    rho: float
    gamma: float
    clip_lo: float
    clip_hi: float
    n_prompts: int
    n_steps: int
    seed: int
    tool_version: str
    date: str
    fingerprint: str
    command: str
    horizon: int = 0
    recommendation: Recommendation | None = None
    head_error: HeadError | None = None
    centres: bytes = field(default=b"", repr=False)
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check(self.to_json(), self.source or "profile")

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "source"}
        if self.recommendation is None:
            del values["recommendation"]
        else:
            values["recommendation"] = self.recommendation._asdict()
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
        if self.horizon == 0:
            del values["horizon"]
        if self.head_error is None:
            del values["head_error"]
        else:
            values["head_error"] = self.head_error.to_json()
        values["centres"] = base64.b64encode(self.centres).decode()
        if not self.centres:
            del values["centres"]
        return {"format_version": FORMAT_VERSION, **values}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, all of it or nothing.

        Raises
        ------
        ProfileError
            It cannot be written.
        """
        target = Path(path)
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        text = _NUMBERS.sub(lambda match: " ".join(match[0].split()), text)  # one line each
        try:
            write_whole(target, text.encode())
        except OSError as error:
            raise ProfileError(f"{target}: cannot be written: {error.strerror}") from None


def profiles_folder() -> Path:
    """Folder of the shipped profiles: inside the package, or beside it in a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def load_profile(path: str | os.PathLike[str], source: str = "") -> Profile:
    """Read and check a profile.

    Parameters
    ----------
    source : str
        What reports call the place it is from; default: the path.

    Raises
    ------
    ProfileError
        The file cannot be read or is not a valid profile. One line, naming every bad field.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"{file}: not a profile: larger than {MAX_FILE_BYTES} bytes")
    return profile_from_json(_parse(data, str(file)), source or str(file))


def profile_from_json(value: Any, source: str) -> Profile:
    """Return the profile that `Profile.to_json` made `value` of.

    Raises
    ------
    ProfileError
        It is none. One line, naming every bad field.
    """
    _check(value, source)
    value = dict(value)
    del value["format_version"]
    value.setdefault("horizon", 0)
    value["centres"] = base64.b64decode(value.get("centres", ""))
    for name in ("n_layer", "head_dim", "n_prompts", "n_steps", "seed", "horizon"):
        value[name] = int(value[name])  # JSON knows 8.0
    for name in ("rho", "gamma", "clip_lo", "clip_hi"):
        value[name] = float(value[name])
    heads = value["n_head_kv"]
    value["n_head_kv"] = tuple(map(int, heads)) if isinstance(heads, list) else int(heads)
    value["demand"] = tuple(map(float, value["demand"]))
    if "recommendation" in value:
        recommended = dict(value["recommendation"])
        for name in ("budget", "buffer", "sinks", "window", "n_tokens"):
            recommended[name] = int(recommended[name])
        for name in ("target_kl", "kl", "kl_high"):
            recommended[name] = float(recommended[name])
        value["recommendation"] = Recommendation(**recommended)
    if "head_error" in value:
        value["head_error"] = HeadError.from_json(value["head_error"])
    return Profile(**value, source=source)


def _parse(data: bytes, source: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number that a profile may hold")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise ProfileError(f"{source}: not a profile: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ProfileError(f"{source}: truncated or not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ProfileError(f"{source}: not a profile: nested too deeply") from None
    except ValueError as error:
        raise ProfileError(f"{source}: {error}") from None


@functools.cache
def _validator() -> Any:
    import jsonschema

    schema = profiles_folder() / "schema" / "profile.schema.json"
    return jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))


def _check(value: Any, source: str) -> None:
    """Raise ProfileError unless `value` is what a profile's file may hold."""
    version = value.get("format_version") if isinstance(value, dict) else None
    if version is not None and version not in range(1, FORMAT_VERSION + 1):
        raise ProfileError(
            f"{source}: format_version: {_short(version)} is unknown, this ReasonAlloc reads "
            f"1 to {FORMAT_VERSION}"
        )
    complaints = [
        f"{_place(error.absolute_path)}{_short(error.message)}"
        for error in _validator().iter_errors(value)
    ]
    if not complaints:
        complaints = _contradictions(value)
    if complaints:
        shown = "; ".join(complaints[:_MAX_COMPLAINTS])
        n_more = len(complaints) - _MAX_COMPLAINTS
        raise ProfileError(f"{source}: {shown}" + (f"; and {n_more} more" if n_more > 0 else ""))


def _place(path: Any) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return f"{text}: " if text else ""


def _short(value: Any) -> str:
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= 160 else text[:100] + " ... " + text[-50:]


def _contradictions(value: dict[str, Any]) -> list[str]:
    """Return what a schema cannot say, one line per field."""
    found = []
    for name in ("demand", "n_head_kv"):
        if isinstance(value[name], list) and len(value[name]) != value["n_layer"]:
            found.append(f"{name}: {len(value[name])} entries, but n_layer is {value['n_layer']}")
    if not max(value["demand"]) > 0.0:  # NaN, in a profile made by a program
        found.append("demand: no layer has any")
    found += [f"demand[{i}]: {d} is no number" for i, d in enumerate(value["demand"]) if d != d]
    found += [
        f"{name}: {value[name]} is no number"
        for name in ("rho", "gamma", "clip_lo", "clip_hi")
        if not math.isfinite(value[name])
    ]
    if "head_error" in value:
        heads = value["n_head_kv"]
        n_heads = sum(heads) if isinstance(heads, list) else heads * value["n_layer"]
        found += contradictions(value["head_error"], int(n_heads))
        if value["format_version"] < 2:
            found.append("head_error: format version 1 has none")
    try:
        centres = np.frombuffer(base64.b64decode(value.get("centres", ""), validate=True), "<f4")
        if not np.isfinite(centres).all():
            found.append("centres: not all are finite numbers")
    except (binascii.Error, ValueError):
        found.append("centres: no base64 of float32 numbers")
    try:
        datetime.date.fromisoformat(value["date"])
    except ValueError:
        found.append(f"date: {value['date']} is no day of the calendar")
    return found


@dataclass(frozen=True)
class Likeness:
    """How alike two demand curves are.

    Attributes
    ----------
    rank_correlation : float
        Spearman's, -1 to 1; NaN where a curve is flat.
    l1 : float
        Sum over the layers of the difference between their shares of the demand: 0 (the same
        shape) to 2 (disjoint).
    """

    rank_correlation: float
    l1: float


def compare(a: Profile, b: Profile) -> Likeness:
    """Compare the shapes of two profiles.

    Raises
    ------
    ProfileError
        They have different numbers of layers.
    """
    if a.n_layer != b.n_layer:
        raise ProfileError(
            f"profiles of {a.n_layer} and {b.n_layer} layers ({a.name}, {b.name}) have no layers "
            "to compare one by one"
        )
    x, y = np.asarray(a.demand), np.asarray(b.demand)
    u, v = _ranks(x), _ranks(y)
    u, v = u - u.mean(), v - v.mean()
    norm = math.sqrt(float(u @ u) * float(v @ v))
    correlation = float(u @ v) / norm if norm > 0.0 else math.nan
    return Likeness(correlation, float(np.abs(x / x.sum() - y / y.sum()).sum()))


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ranks from 1; equal values share their mean rank."""
    smaller = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    ranks: npt.NDArray[np.float64] = smaller + (equal + 1) / 2.0
    return ranks
