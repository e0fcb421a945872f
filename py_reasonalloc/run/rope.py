"""Rotary positions stretched over a longer context than a model was trained for: `Rope`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..engine.errors import ConfigError
from ..engine.modelfile import MAX_CONTEXT, metadata_value
from ..session.config import check_float, check_int

#: Name of a kind of scaling -> enum llama_rope_scaling_type.
SCALINGS = {"none": 0, "linear": 1, "yarn": 2}
_STRETCHING = ("linear", "yarn")


@dataclass(frozen=True)
class Rope:
    """How positions are scaled; the fields are arguments of `llama_cpp.Llama`.

    Attributes
    ----------
    rope_scaling : str or None
        "none", "linear" or "yarn"; None: as the model's file says.
    rope_freq_base : float
        0: as the file says.
    rope_freq_scale : float
        New positions are this times the old ones, so 0.25 stretches fourfold; 0: as the file says,
        or with "linear" and "yarn" as much as the context asks for.
    yarn_orig_ctx : int
        Context that the model was trained for, tokens; 0: as the file says.
    yarn_ext_factor : float
        Negative: as the file says.
    yarn_attn_factor, yarn_beta_fast, yarn_beta_slow : float
        See YaRN, arXiv 2309.00071.

    Raises
    ------
    ConfigError
        A value is out of its range.
    """

    rope_scaling: str | None = None
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_orig_ctx: int = 0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_scaling not in (None, *SCALINGS):
            raise ConfigError(
                f"rope_scaling = {self.rope_scaling!r} is unknown: must be one of "
                f"{', '.join(SCALINGS)}"
            )
        check_float("rope_freq_base", self.rope_freq_base, 0.0, 1e12)
        check_float("rope_freq_scale", self.rope_freq_scale, 0.0, 1e3)
        check_int("yarn_orig_ctx", self.yarn_orig_ctx, 0, MAX_CONTEXT)
        check_float("yarn_ext_factor", self.yarn_ext_factor, -1.0, 1e3)
        check_float("yarn_attn_factor", self.yarn_attn_factor, 0.0, 1e3)
        check_float("yarn_beta_fast", self.yarn_beta_fast, 0.0, 1e6)
        check_float("yarn_beta_slow", self.yarn_beta_slow, 0.0, 1e6)
        if self.rope_scaling != "yarn":
            for name in ("orig_ctx", "ext_factor", "attn_factor", "beta_fast", "beta_slow"):
                if getattr(self, f"yarn_{name}") != getattr(Rope, f"yarn_{name}"):
                    raise ConfigError(f"yarn_{name} needs rope_scaling = 'yarn'")

    @property
    def stretches(self) -> bool:
        """Whether positions beyond the trained context are asked for in any way."""
        is_set = self.rope_freq_base > 0 or self.rope_freq_scale > 0
        return is_set or self.rope_scaling in _STRETCHING

    def arguments(self, model: Any, n_trained: int, n_ctx: int) -> dict[str, Any]:
        """Return the arguments of `llama_cpp.Llama`, without those that are as in the file.

        Parameters
        ----------
        model : llama_cpp._internals.LlamaModel
            With its metadata loaded.
        n_trained, n_ctx : int
            Context of the file and of the session, tokens.
        """
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        given = {name: value for name, value in given.items() if value != getattr(Rope, name)}
        if self.rope_scaling is not None:
            given["rope_scaling_type"] = SCALINGS[given.pop("rope_scaling")]
        if self.rope_scaling in _STRETCHING and self.rope_freq_scale == 0 and n_trained > 0:
            stretch = max(n_ctx / n_trained, 1.0) * _factor_in_file(model)
            given["rope_freq_scale"] = 1.0 / stretch
        return given


def _factor_in_file(model: Any) -> float:
    """Return the stretch that n_trained of a model's file already stands for."""
    architecture = (metadata_value(model, "general.architecture") or b"").decode(errors="replace")
    value = metadata_value(model, f"{architecture}.rope.scaling.factor")
    try:
        return max(float(value or 1.0), 1.0)
    except ValueError:
        return 1.0
