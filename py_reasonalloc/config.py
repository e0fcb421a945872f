"""What a budgeted cache should keep: `BudgetConfig`, and the names of the cache types."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, NotFoundError

#: RA_MAX_TOKENS and RA_MAX_WINDOW of reasonalloc.h.
MAX_TOKENS = 1 << 24
MAX_WINDOW = 1024

#: Name of a cache type -> enum ggml_type.
KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}


def kv_type_id(name: str | int) -> int:
    """Return the ggml_type of a cache type given by name (or by number, which passes through).

    Raises
    ------
    ConfigError
        Unknown name.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        return name
    if name not in KV_TYPES:
        raise ConfigError(f"cache type = {name!r} is unknown: must be one of {', '.join(KV_TYPES)}")
    return KV_TYPES[name]


def policy_names() -> tuple[str, ...]:
    """Return the names of the policies that the library has."""
    return tuple(policy_summaries())


def policy_summaries() -> dict[str, str]:
    """Return name -> one line about it, for every policy that the library has."""
    from . import _bindings as c

    return {
        c.ra_policy_name(i).decode(): c.ra_policy_summary(i).decode()
        for i in range(c.ra_policy_count())
    }


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """Raise ConfigError unless `value` is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} = {value!r} must be a whole number, {low} to {high}")
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value} is out of range: must be {low} to {high}")


def check_float(name: str, value: Any, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is a number in [low, high] (NaN never is)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} = {value!r} must be a number, {low:g} to {high:g}")
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value:g} is out of range: must be {low:g} to {high:g}")


@dataclass(frozen=True)
class BudgetConfig:
    """Configuration of a budgeted cache, checked when it is made.

    Attributes
    ----------
    budget : int
        Tokens kept per (layer, KV head) after a compression; the mean where tables differ.
    policy : str
        Which tokens stay: a name from `policy_names()`.
    buffer : int
        Tokens decoded between compressions; also the longest piece of a prompt read at once.
    sinks : int
        First tokens of the sequence that are never evicted.
    window : int
        Newest tokens: never evicted, and their queries score the others. 1 to `MAX_WINDOW`.
    protect_prompt : "off", "all" or int
        Prompt tokens that are never evicted: none, all, or the first N. "all" is resolved at each
        generate call, when the length of the prompt is known.
    lambda_ : float
        R-KV: weight of importance against redundancy, 0 to 1.
    sim_threshold : float
        R-KV: cosine above which two keys count as alike, -1 to 1.
    pool_kernel : int
        Width of the max-pool over importance; odd, 1 to 255.
    policy_seed : int
        Of the random policy, 0 to 2**64 - 1.
    layer_budgets : sequence of int, optional
        Budget of each layer, tokens per KV head.
    head_budgets : sequence of int, optional
        Budget of each KV head, layer after layer; overrides `layer_budgets`.
    layer_alloc, head_alloc : str
        Registered allocators that split the budget over layers and over the heads of a layer.

    Raises
    ------
    ConfigError
        A value is out of its range (a `ValueError`).
    BudgetError
        The budget cannot hold sinks (or protected tokens) + window + 1.
    NotFoundError
        Unknown policy or allocator.
    """

    budget: int = 256
    policy: str = "rkv"
    buffer: int = 128
    sinks: int = 4
    window: int = 8
    protect_prompt: str | int = "off"
    lambda_: float = 0.1
    sim_threshold: float = 0.5
    pool_kernel: int = 7
    policy_seed: int = 0
    layer_budgets: Sequence[int] | None = None
    head_budgets: Sequence[int] | None = None
    layer_alloc: str = "uniform"
    head_alloc: str = "uniform"

    def __post_init__(self) -> None:
        check_int("budget", self.budget, 1, MAX_TOKENS)
        check_int("buffer", self.buffer, 1, MAX_TOKENS)
        check_int("sinks", self.sinks, 0, MAX_TOKENS)
        check_int("window", self.window, 1, MAX_WINDOW)
        check_int("pool_kernel", self.pool_kernel, 1, 255)
        check_int("policy_seed", self.policy_seed, 0, 2**64 - 1)
        check_float("lambda_", self.lambda_, 0.0, 1.0)
        check_float("sim_threshold", self.sim_threshold, -1.0, 1.0)
        if self.protect_prompt not in ("off", "all"):
            if isinstance(self.protect_prompt, str):
                raise ConfigError(
                    f"protect_prompt = {self.protect_prompt!r} must be 'off', 'all' or a number"
                )
            check_int("protect_prompt", self.protect_prompt, 0, MAX_TOKENS)
        for name in ("layer_budgets", "head_budgets"):
            table = getattr(self, name)
            if table is not None:
                table = tuple(table)
                for i, value in enumerate(table):
                    check_int(f"{name}[{i}]", value, 1, MAX_TOKENS)
                object.__setattr__(self, name, table)
        for name in ("policy", "layer_alloc", "head_alloc"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} = {getattr(self, name)!r} must be a name")
        self._check_native()

    def _check_native(self) -> None:
        """Let the library check what hangs together: names, budget against what must stay."""
        from . import _bindings as c

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
        return min(int(self.protect_prompt), n_prompt)

    def to_native(self) -> Any:
        """Return the ra_config; it keeps its tables alive.

        A fixed number of protected tokens is part of it, so that the library can refuse it at
        once; "all" is not known before the prompt is.
        """
        from . import _bindings as c

        native = c.ra_config_default_params()
        native.budget = self.budget
        native.buffer = self.buffer
        native.n_sink = self.sinks
        native.n_window = self.window
        native.n_protect = self.n_protect(MAX_TOKENS) if self.protect_prompt != "all" else 0
        native.policy = self.policy.encode()
        native.lambda_ = self.lambda_
        native.sim_threshold = self.sim_threshold
        native.pool_kernel = self.pool_kernel
        native.seed = self.policy_seed
        native.layer_alloc = self.layer_alloc.encode()
        native.head_alloc = self.head_alloc.encode()
        for name in ("layer_budgets", "head_budgets"):
            table = getattr(self, name)
            if table is not None:
                setattr(native, name, (ctypes.c_int32 * len(table))(*table))
                setattr(native, f"n_{name}", len(table))
        return native
