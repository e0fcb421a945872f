"""What a budgeted cache should keep: `BudgetConfig`, and the names of the cache types."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.errors import ConfigError, NotFoundError
from ..profile.files import Profile, load_profile
from .centres import centre_table, check_centres, needs_centres
from .checks import MAX_TOKENS, check_float, check_int, check_table
from .profiled import AUTO_POLICY, PROFILED, check_profile, default_policy, profile_tables

#: RA_MAX_WINDOW of reasonalloc.h.
MAX_WINDOW = 1024

#: Name of a cache type -> enum ggml_type.
KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_nl": 20,
}


#: Parameter of an allocator -> its range; as ra_config_check() has them.
ALLOCATOR_RANGES = {
    "gamma": (0.0, 16.0),
    "clip_lo": (0.0, 1.0),
    "clip_hi": (1.0, 1e6),
    "mu": (0.0, 1.0),
    "pyramid_beta": (1.0, 1e6),
}


#: Option as text, e.g. ``lambda=0.5`` -> field of `BudgetConfig` and its type.
OPTIONS: dict[str, tuple[str, type]] = {
    "lambda": ("lambda_", float),
    "sim_threshold": ("sim_threshold", float),
    "pool_kernel": ("pool_kernel", int),
    "ema": ("ema", float),
    "decay": ("decay", float),
    "n_query": ("n_query", int),
    "merge": ("merge", int),
    "bias_max": ("bias_max", float),
    "value_guard": ("value_guard", float),
    "n_guard": ("n_guard", int),
    "gamma": ("gamma", float),
    "clip_lo": ("clip_lo", float),
    "clip_hi": ("clip_hi", float),
    "mu": ("mu", float),
    "pyramid_beta": ("pyramid_beta", float),
    "window": ("window", int),
    "sinks": ("sinks", int),
    "buffer": ("buffer", int),
    "budget_swa": ("budget_swa", int),
    "attention": ("attention", str),
}

#: How heads of different lengths are attended; as ra_config_check() has them.
ATTENTION = ("auto", "head", "layer")


def read_option(key: str, text: str) -> tuple[str, float | str]:
    """Return the field of `BudgetConfig` that an option sets, and its value.

    Raises
    ------
    ConfigError
        No such option, or its value is not a number where it must be one. Its range is checked by
        `BudgetConfig`.
    """
    if key not in OPTIONS:
        raise ConfigError(f"option = {key!r} is unknown: must be one of {', '.join(OPTIONS)}")
    name, kind = OPTIONS[key]
    try:
        return name, kind(text)
    except ValueError:
        raise ConfigError(f"{key} = {text!r} is not a number") from None


def kv_type_id(name: str | int) -> int:
    """Return the ggml_type of a cache type, given by name in upper or lower case, or as that.

    Raises
    ------
    ConfigError
        Unknown name.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        return name
    if str(name).lower() not in KV_TYPES:
        raise ConfigError(f"cache type = {name!r} is unknown: must be one of {', '.join(KV_TYPES)}")
    return KV_TYPES[str(name).lower()]


def policy_names() -> tuple[str, ...]:
    """Return the names of the policies that the library has."""
    return tuple(policy_summaries())


def policy_summaries() -> dict[str, str]:
    """Return name -> one line about it, for every policy that the library has."""
    from ..engine import bindings as c

    return {
        c.ra_policy_name(i).decode(): c.ra_policy_summary(i).decode()
        for i in range(c.ra_policy_count())
    }


def allocator_names(kind: int) -> tuple[str, ...]:
    """Return the names of the library's allocators: over layers (0), over heads (1)."""
    from ..engine import bindings as c

    return tuple(c.ra_alloc_name(kind, i).decode() for i in range(c.ra_alloc_count(kind)))


@dataclass(frozen=True)
class BudgetConfig:
    """Configuration of a budgeted cache, checked when it is made.

    Attributes
    ----------
    budget : int
        Tokens kept per (layer, KV head) after a compression; the mean where tables differ.
    policy : str
        Which tokens stay: a name from `policy_names()`, or "auto", which becomes "loss" where
        layers is "error", "rkv" elsewhere.
    buffer : int
        Tokens decoded between compressions; also the longest piece of a prompt read at once.
    sinks : int
        First tokens of the sequence that are never evicted.
    window : int
        Newest tokens: never evicted, and their queries score the others. 1 to `MAX_WINDOW`.
    budget_swa : int
        Tokens kept per KV head in layers with a sliding window, at most the window (what is out of
        it goes first; no prompt is protected, nothing merged); 0: they stay in llama.cpp's cache.
    n_draft : int
        Longest draft of speculative decoding: as many more queries are kept, so that a rejected one
        loses none of the window. 0 to `MAX_WINDOW`; a session with a `draft_model` sets it.
    protect_prompt : "off", "all", "auto" or int
        How many of the prompt's tokens are never evicted: none, all, as many as leave half of the
        budget to the chain of thought, or the first so many. They count towards the budget. A later
        turn of a conversation may protect more than the first one could: with "all" what was
        evicted is read again for that, else what is still there is protected.
    lambda_ : float
        R-KV: weight of importance against redundancy, 0 to 1.
    sim_threshold : float
        R-KV: cosine above which two keys count as alike, -1 to 1.
    pool_kernel : int
        Width of the max-pool over importance; odd, 1 to 255.
    ema : float
        rkv-ema: weight of a token's score at earlier compressions, 0 to below 1.
    decay : float
        mass, loss: weight of the attention at earlier compressions, per compression, 0 to below 1.
    n_query : int
        loss: most queries since the last compression that are weighed (less time, worse); 0: all.
    merge : bool, optional
        The value of an evicted token goes, weighted by the attention it received, into the kept
        token of its head that is most like it, whose logits get a bias for it (ToMe,
        arXiv:2210.09461, with attention in the place of counts). False: evicted tokens are dropped.
        None: True with policy loss, False with others.
    bias_max : float
        Largest such bias, in logits, 0 to 10.
    value_guard : float
        With any policy: tokens whose value norm lies more than this many standard deviations above
        the head's mean are never evicted, at most `n_guard` per head; 0: off.
    n_guard : int
        0 to 1024.
    policy_seed : int
        Of the random policy, 0 to 2**64 - 1.
    layers : str or sequence of int
        How n_layer x budget tokens are split over the layers: "uniform", "pyramid" (decreasing with
        depth), "wave" (by a profile), "error" (over all KV heads of all layers, by a profile's
        error curves), or the budget of each layer, tokens per KV head (`budget` is then not used).
    heads : str
        How a layer's tokens are split over its KV heads, at every compression: "uniform",
        "adaptive" (by the pooled scores, made comparable between heads), "adaptive-literal" (as
        the paper pools them) or "error" (who loses least by giving a token gives it).
    head_budgets : sequence of int, optional
        First budget of each KV head, layer after layer; overrides `layers`.
    profile : Profile or path, optional
        Layer profile; "wave" and "error" need one, and the policy "triattention" one with query
        centres. The others do not look at it.
    gamma : float, optional
        Exponent that flattens a demand (of layers, "wave", and of heads, "adaptive"), 0 to 16.
        None, here and below: what the profile says; without one, the paper's value, here 0.5.
    clip_lo, clip_hi : float, optional
        Least and largest share of a layer or head, times the mean: 0 to 1 (paper: 0.25), 1 to 1e6
        (paper: 2).
    mu : float
        "adaptive", "error": least share of a head, times its layer's mean, 0 to 1.
    pyramid_beta : float
        "pyramid": `budget` over the last layer's, 1 to 1e6.
    attention : "auto", "head" or "layer"
        How a decoded token attends to a layer whose heads differ in length, with flash attention:
        one operation per KV head, or one masked operation over the layer. "auto" is what was
        measured to be faster on the layer's device: so far "head" everywhere. Results are the same
        but for rounding.

    Raises
    ------
    ConfigError
        A value is out of its range (a `ValueError`).
    BudgetError
        The budget cannot hold sinks (or protected tokens) + window + 1.
    NotFoundError
        Unknown policy, allocator or attention.
    """

    budget: int = 256
    policy: str = AUTO_POLICY
    buffer: int = 128
    sinks: int = 4
    window: int = 8
    protect_prompt: str | int = "off"
    lambda_: float = 0.1
    sim_threshold: float = 0.5
    pool_kernel: int = 7
    ema: float = 0.5
    decay: float = 0.5
    n_query: int = 0
    merge: bool | None = None
    bias_max: float = 8.0
    value_guard: float = 0.0
    n_guard: int = 4
    policy_seed: int = 0
    layers: str | Sequence[int] = "uniform"
    heads: str = "uniform"
    head_budgets: Sequence[int] | None = None
    profile: Profile | str | os.PathLike[str] | None = None
    gamma: float | None = None
    clip_lo: float | None = None
    clip_hi: float | None = None
    mu: float = 0.25
    pyramid_beta: float = 20.0
    attention: str = "auto"
    n_draft: int = 0
    budget_swa: int = 0

    def __post_init__(self) -> None:
        check_int("budget", self.budget, 1, MAX_TOKENS)
        check_int("buffer", self.buffer, 1, MAX_TOKENS)
        check_int("sinks", self.sinks, 0, MAX_TOKENS)
        check_int("window", self.window, 1, MAX_WINDOW)
        check_int("n_draft", self.n_draft, 0, MAX_WINDOW)
        check_int("budget_swa", self.budget_swa, 0, MAX_TOKENS)
        check_int("n_query", self.n_query, 0, MAX_TOKENS)
        check_int("pool_kernel", self.pool_kernel, 1, 255)
        check_int("policy_seed", self.policy_seed, 0, 2**64 - 1)
        check_float("lambda_", self.lambda_, 0.0, 1.0)
        check_float("sim_threshold", self.sim_threshold, -1.0, 1.0)
        check_float("ema", self.ema, 0.0, 0.999999)
        check_float("decay", self.decay, 0.0, 0.999999)
        if self.merge not in (None, False, True):
            raise ConfigError(f"merge = {self.merge!r} must be 0 or 1")
        if self.policy == AUTO_POLICY:
            object.__setattr__(self, "policy", default_policy(self.layers))
        merge = self.policy == "loss" if self.merge is None else bool(self.merge)
        object.__setattr__(self, "merge", merge)
        check_float("bias_max", self.bias_max, 0.0, 10.0)
        check_float("value_guard", self.value_guard, 0.0, 1e6)
        check_int("n_guard", self.n_guard, 0, 1024)
        if self.protect_prompt not in ("off", "all", "auto"):
            if isinstance(self.protect_prompt, str):
                raise ConfigError(
                    f"protect_prompt = {self.protect_prompt!r} must be 'off', 'all', 'auto' or a "
                    "number"
                )
            check_int("protect_prompt", self.protect_prompt, 0, MAX_TOKENS)
        for name in ("layers", "head_budgets"):
            table = getattr(self, name)
            if table is not None and not isinstance(table, str):
                object.__setattr__(self, name, check_table(name, table))
        for name in ("policy", "heads", "attention"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} = {getattr(self, name)!r} must be a name")
        if self.attention not in ATTENTION:
            raise NotFoundError(
                f"attention = {self.attention!r} is unknown: must be one of {', '.join(ATTENTION)}"
            )
        self._check_allocators()
        self._check_native()

    def _check_allocators(self) -> None:
        for name in ("gamma", "clip_lo", "clip_hi", "mu", "pyramid_beta"):
            low, high = ALLOCATOR_RANGES[name]
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), low, high)
        known = {"layers": allocator_names(0), "heads": allocator_names(1)}
        for name, names in known.items():
            value = getattr(self, name)
            if isinstance(value, str) and value not in names:
                raise NotFoundError(
                    f"{name} = {value!r} is unknown: must be one of {', '.join(names)}"
                )
        if isinstance(self.profile, (str, os.PathLike)):
            object.__setattr__(self, "profile", load_profile(self.profile))
        check_profile(self.layers, self.profile)
        check_centres(self.policy, self.profile)

    def _check_native(self) -> None:
        """Let the library check what hangs together: names, budget against what must stay."""
        from ..engine import bindings as c

        try:
            c.check(c.ra_config_check(ctypes.byref(self.to_native())))
        except NotFoundError as error:
            if self.policy not in policy_names():
                known = ", ".join(policy_names())
                raise NotFoundError(
                    f"policy = {self.policy!r} is unknown: must be one of {known}"
                ) from None
            raise error

    def n_protect(self, n_prompt: int) -> int:
        """Return how many of the first `n_prompt` tokens, the prompt, are protected."""
        if self.protect_prompt == "off":
            return 0
        if self.protect_prompt == "all":
            return n_prompt
        if self.protect_prompt == "auto":
            smallest = self.budget if isinstance(self.layers, str) else min(self.layers)
            return min(n_prompt, max(smallest - self.sinks - self.window, 0) // 2)
        return min(int(self.protect_prompt), n_prompt)

    def to_native(self) -> Any:
        """Return the ra_config; it keeps its tables alive.

        A fixed number of protected tokens is part of it, so that the library can refuse it at
        once; "all" and "auto" are not known before the prompt is.
        """
        from ..engine import bindings as c

        native = c.ra_config_default_params()
        native.budget = self.budget
        native.buffer = self.buffer
        native.n_sink = self.sinks
        native.n_window = self.window
        is_fixed = self.protect_prompt not in ("all", "auto")
        native.n_protect = self.n_protect(MAX_TOKENS) if is_fixed else 0
        native.policy = self.policy.encode()
        native.lambda_ = self.lambda_
        same = (
            "sim_threshold",
            "pool_kernel",
            "ema",
            "decay",
            "n_query",
            "bias_max",
            "value_guard",
            "n_guard",
            "n_draft",
            "budget_swa",
        )
        for name in same:
            setattr(native, name, getattr(self, name))
        native.merge = int(bool(self.merge))
        native.seed = self.policy_seed
        native.attention = self.attention.encode()
        self._set_allocators(native)
        return native

    def _set_allocators(self, native: Any) -> None:
        """Fill in the allocators of a ra_config, their parameters and tables."""
        tables: dict[str, Any] = {"head_budgets": (ctypes.c_int32, self.head_budgets)}
        native.head_alloc = self.heads.encode()
        native.mu = self.mu
        native.pyramid_beta = self.pyramid_beta
        profile = self.profile if self.layers in PROFILED else None
        for name in ("gamma", "clip_lo", "clip_hi"):
            value = getattr(self, name)
            if value is None and profile is not None:
                value = getattr(profile, name)
            if value is not None:
                setattr(native, name, value)
        if isinstance(self.layers, str):
            native.layer_alloc = self.layers.encode()
        else:
            tables["layer_budgets"] = (ctypes.c_int32, self.layers)
        if isinstance(profile, Profile):
            tables |= profile_tables(self.layers, profile)
            if self.layers == "error" and profile.head_error is not None:
                native.error_base = profile.head_error.base
        if isinstance(self.profile, Profile) and needs_centres(self.policy):
            tables["centres"] = (ctypes.c_float, centre_table(self.profile))
        for name, (kind, table) in tables.items():
            if table is not None:
                setattr(native, name, (kind * len(table))(*table))
                setattr(native, f"n_{name}", len(table))
