"""Names of the methods that an evaluation compares, and the cache each of them stands for.

A method is written ``name[+key=value...][@budget]``: ``rkv``, ``rkv+lambda=0.5``,
``reasonalloc+policy=snapkv``, ``rkv+kv=q4_0@512``. The whole text before ``@`` is its label in
tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ...engine.errors import ConfigError
from ...profile.files import Profile, load_profile
from ...profile.lookup import shipped_profiles
from ...session.centres import needs_centres
from ...session.config import (
    OPTIONS,
    BudgetConfig,
    kv_type_id,
    policy_names,
    policy_summaries,
    read_option,
)
from ...session.profiled import PROFILED
from .rows import arm_label

#: More tokens than any cache holds; Python takes long for numbers of very many digits.
_MAX_DIGITS = 15

#: The stock cache.
FULL = "full"
#: Method -> fields of its `BudgetConfig`. Every policy name is a method, too: uniform budgets.
METHODS: dict[str, dict[str, str]] = {
    "pyramid-rkv": {"policy": "rkv", "layers": "pyramid"},
    "wave": {"policy": "rkv", "layers": "wave"},
    "adaptive": {"policy": "rkv", "heads": "adaptive"},
    "reasonalloc": {"policy": "rkv", "layers": "wave", "heads": "adaptive-literal"},
    "loss-error": {"policy": "loss", "layers": "error"},
}


def _profile(text: str) -> Profile:
    """Return a shipped profile by its name, or the one in a file."""
    shipped = {profile.name: profile for profile in shipped_profiles()}
    return shipped[text] if text in shipped else load_profile(text)


#: Options of a method besides those of `read_option`.
_MORE: dict[str, Callable[[str], tuple[str, Any]]] = {
    "policy": lambda text: ("policy", text),
    "layers": lambda text: ("layers", text),
    "heads": lambda text: ("heads", text),
    "profile": lambda text: ("profile", _profile(text)),
    "kv": lambda text: ("kv", text),
}


class Arm(NamedTuple):
    """One line of the final table.

    Attributes
    ----------
    method : str
        Label.
    budget : int
        Tokens per layer and KV head; 0: the full cache.
    """

    method: str
    budget: int

    def __str__(self) -> str:
        return arm_label(self.method, self.budget)


class Common(NamedTuple):
    """What all arms of a comparison share.

    Attributes
    ----------
    buffer, sinks, window : int
        See `BudgetConfig`; a method's own options win.
    n_protect : int
        Most prompt tokens that are protected: the same in every arm.
    kv_type : str
        Type of K and V; a method's own option wins.
    profile : Profile or None
        For methods that split the budget by a profile.
    """

    buffer: int
    sinks: int
    window: int
    n_protect: int
    kv_type: str
    profile: Profile | None


class Setup(NamedTuple):
    """The cache of an arm: its configuration (None: the stock cache) and the type of K and V."""

    config: BudgetConfig | None
    kv_type: str


def read_count(text: str) -> int | None:
    """Return a number written in the digits 0 to 9; None if the text is anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


def method_names() -> tuple[str, ...]:
    """Return all names, the full cache first."""
    return (FULL, *policy_names(), *METHODS)


def method_summaries() -> dict[str, str]:
    """Return method -> one line about it."""
    summaries = {FULL: "llama.cpp's own cache, which keeps everything"}
    summaries |= {name: f"{text}; uniform budgets" for name, text in policy_summaries().items()}
    for name, fields in METHODS.items():
        summaries[name] = ", ".join(f"{key} {value}" for key, value in fields.items())
    return summaries


def parse_arms(methods: Iterable[str], budgets: Iterable[int]) -> tuple[Arm, ...]:
    """Return the arms that methods and budgets make, in the order given: each budget in turn.

    Parameters
    ----------
    methods : iterable of str
        See the module. One with ``@budget`` makes one arm, ``full`` too.
    budgets : iterable of int
        Tokens per layer and KV head.

    Raises
    ------
    ConfigError
        Unknown method or option, a value that is none, a budget twice, or no budget at all.
    """
    methods, budgets = list(methods), list(budgets)
    if not methods:
        raise ConfigError("no method: pass --methods, e.g. full,rkv,reasonalloc")
    first: list[Arm] = []
    for text in methods:
        label, at, number = text.partition("@")
        name, options = _split(label)
        if name == FULL:
            if at:
                raise ConfigError(f"{text}: the full cache has no budget")
            first.append(Arm(label, 0))
        elif at:
            budget = read_count(number)
            if not budget:
                raise ConfigError(f"{text}: {number!r} is not a number of tokens")
            first.append(Arm(label, budget))
        elif not budgets:
            raise ConfigError(f"{text} needs a budget: pass --budgets, e.g. 128,256,512")
        else:
            continue
    plain = [m for m in methods if "@" not in m and _split(m)[0] != FULL]
    arms = first + [Arm(method, budget) for budget in budgets for method in plain]
    twice = {str(arm) for arm in arms if arms.count(arm) > 1}
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))}: given twice")
    return tuple(arms)


def _split(label: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a method and its options: fields of `BudgetConfig`, and kv."""
    name, *pairs = label.split("+")
    if name not in method_names():
        raise ConfigError(
            f"method = {name!r} is unknown: must be one of {', '.join(method_names())}"
        )
    options: dict[str, Any] = {}
    for pair in pairs:
        key, is_pair, value = pair.partition("=")
        if name == FULL and key != "kv":
            raise ConfigError(f"{label}: the full cache has no option but kv")
        if not is_pair or key not in (*OPTIONS, *_MORE):
            known = ", ".join((*_MORE, *OPTIONS))
            raise ConfigError(f"{label}: {pair!r} is no option: must be KEY=VALUE of {known}")
        try:
            field, found = _MORE[key](value) if key in _MORE else read_option(key, value)
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
        if field in options:
            raise ConfigError(f"{label}: {key} is given twice")
        options[field] = found
    return name, options


def setup_of(arm: Arm, common: Common) -> Setup:
    """Return the cache of an arm.

    Raises
    ------
    ConfigError
        The budget cannot hold what must stay, or an option is out of its range.
    """
    name, options = _split(arm.method)
    kv_type = str(options.pop("kv", common.kv_type))
    kv_type_id(kv_type)
    if name == FULL:
        return Setup(None, kv_type)
    fields: dict[str, Any] = {
        "budget": arm.budget,
        "policy": name,
        "buffer": common.buffer,
        "sinks": common.sinks,
        "window": common.window,
        "protect_prompt": common.n_protect if common.n_protect > 0 else "off",
    }
    fields |= METHODS.get(name, {}) | options
    asks = fields.get("layers") in PROFILED or needs_centres(fields["policy"])
    if asks and "profile" not in fields:
        if common.profile is None:
            raise ConfigError(
                f"{arm.method} needs a profile, and none fits the model: measure one with "
                "reasonalloc-profile MODEL --cache, or pass --profile FILE"
            )
        fields["profile"] = common.profile
    try:
        return Setup(BudgetConfig(**fields), kv_type)
    except ConfigError as error:
        raise ConfigError(f"{arm}: {error}") from None


def profile_of(method: str) -> str | None:
    """Return what a method calls its layer profile: a name or file, "" for the common one.

    None: it uses none. The label is not checked: it may be of a method that is not known here.
    """
    name, *pairs = method.split("+")
    options = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    fields = {"policy": name} | METHODS.get(name, {}) | options
    asks = fields.get("layers") in PROFILED or needs_centres(fields["policy"])
    return fields.get("profile", "") if asks else None


def layers_of(method: str) -> str | None:
    """Return how a method splits the budget over the layers; None: it does not say."""
    name, *pairs = method.split("+")
    options = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return options.get("layers", METHODS.get(name, {}).get("layers"))


def profile_digest(setup: Setup) -> str | None:
    """Return 16 hexadecimal digits that name the profile a cache works by; None: by none.

    Of what the cache depends on: the same curve measured again is the same profile.
    """
    config = setup.config
    if config is None or not isinstance(config.profile, Profile):
        return None
    profile = config.profile
    values: list[Any] = []
    if config.layers == "error" and profile.head_error is not None:
        values.append(profile.head_error.to_json())
    elif config.layers == "wave":
        values += [round(demand, 6) for demand in profile.demand]
        values += [profile.gamma, profile.clip_lo, profile.clip_hi]
    if needs_centres(config.policy):
        values.append(hashlib.sha256(profile.centres).hexdigest())
    if not values:
        return None
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
