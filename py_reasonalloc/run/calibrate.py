"""Measure a layer profile: how many tokens each layer attends to while the model reasons.

ReasonAlloc, arXiv 2606.11164: on a few probe prompts the model decodes its own chain of thought
with the full cache. The demand of a layer is the number of cached tokens that cover `rho` of the
attention mass, averaged over decode steps and query heads. The attention of one token is read while
the graph runs (llama.cpp's eval callback; flash attention off), counted and dropped: nothing of the
size of an attention matrix is ever kept.

With a horizon (ours, not the paper's) the attention is summed over that many steps before it is
counted, and only what an eviction could have taken counts: tokens of the chain that were there when
the horizon began, the observation window left out. A head that looks up one other token at each
step needs one per step, but many over a horizon; one that always rests on the same few needs few.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings

from .. import __version__
from ..engine import bindings as c
from ..engine import ggml
from ..engine.errors import ConfigError, ContextFullError, UnsupportedError, error_from_status
from ..engine.identity import ModelIdentity, read_identity
from ..engine.log import LogCapture
from ..engine.modelfile import open_vocabulary, trained_context
from ..engine.prompts import encode_prompt
from ..profile.files import Profile
from ..session.config import BudgetConfig, check_float, check_int, kv_type_id
from ..session.generate import Generation, Sampling
from ..session.reason_llama import ReasonLlama
from .probes import MAX_PROMPTS

_ATTENTION = re.compile(rb"^kq_soft_max-(\d+)$")


def tokens_for_mass(attention: npt.NDArray[np.floating[Any]], rho: float) -> npt.NDArray[np.intp]:
    """Count the tokens that cover a share of the attention.

    Parameters
    ----------
    attention : [n_head, n_kv]
        Not negative; rows need not sum to one.
    rho : float
        Share, 0 to 1.

    Returns
    -------
    counts : [n_head]
        The smallest number of tokens whose attention sums up to rho of their head's.
    """
    covered = np.cumsum(-np.sort(-attention, axis=1), axis=1, dtype=np.float64)
    return (covered < rho * covered[:, -1:]).sum(axis=1) + 1


class DemandMeter:
    """Sums up demands from the tensors of running graphs.

    Parameters
    ----------
    n_head_kv : [n_layer]
        KV heads of each layer.
    rho : float
        Share of the attention mass.
    horizon : int
        Steps over which the attention is summed before it is counted; 0: each step is counted.

    Attributes
    ----------
    callback
        For `cb_eval` of llama_context_params; keep the meter as long as the context.
    n_steps : [n_layer]
        Decode steps measured.
    """

    def __init__(self, n_head_kv: Sequence[int], rho: float, horizon: int = 0) -> None:
        self.rho, self.horizon = rho, horizon
        self._n_head_kv = list(n_head_kv)
        self.n_steps = np.zeros(len(n_head_kv), dtype=np.int64)
        self._n_counts = np.zeros(len(n_head_kv), dtype=np.int64)
        self._sum = np.zeros(len(n_head_kv), dtype=np.float64)
        self._horizons: list[_Horizon] = []
        self._error: Exception | None = None
        self.callback = bindings.ggml_backend_sched_eval_callback(self._receive)

    def start(self, n_prompt: int) -> None:
        """Begin with a prompt of so many tokens; the last one is complete."""
        self._end_horizons()
        self._horizons = [_Horizon(n_prompt) for _ in self._n_head_kv]

    def _receive(self, tensor: int, ask: bool, _: Any) -> bool:
        """Answer whether a tensor is wanted (`ask`), or take it. Must not raise."""
        try:
            match = _ATTENTION.match(ggml.tensor_name(tensor))
            if match is None or self._error is not None:
                return not ask
            if ask:
                return ggml.tensor_shape(tensor)[1] == 1  # one token: a decode step, no prompt
            self._add(int(match[1]), ggml.read_f32(tensor)[0, :, 0, :])
        except Exception as error:  # noqa: BLE001 - nothing may pass through C
            self._error = self._error or error
        return not ask

    def _add(self, il: int, attention: npt.NDArray[np.float32]) -> None:
        """Take the attention of one step, [n_head, n_kv]."""
        if il >= len(self._sum):
            raise UnsupportedError(f"layer {il} is beyond the {len(self._sum)} of the model's file")
        self.n_steps[il] += 1
        if self.horizon == 0:
            self._count(il, attention)
            return
        horizon = self._horizons[il]
        if horizon.n_seen >= self.horizon and horizon.n_seen % self.horizon == 0:
            self._end_horizon(il)
            horizon.begin(attention.shape[0])
        horizon.add(attention)

    def _count(self, il: int, attention: npt.NDArray[np.floating[Any]]) -> None:
        self._sum[il] += tokens_for_mass(attention, self.rho).mean()
        self._n_counts[il] += 1

    def _end_horizons(self) -> None:
        for il, horizon in enumerate(self._horizons):
            if 2 * horizon.n_added >= self.horizon:
                self._end_horizon(il)

    def _end_horizon(self, il: int) -> None:
        horizon = self._horizons[il]
        if horizon.n_added == 0:
            return
        by_head_kv = horizon.attention.reshape(self._n_head_kv[il], -1, horizon.attention.shape[1])
        self._count(il, by_head_kv.sum(axis=1))

    def raise_error(self) -> None:
        """Raise what went wrong inside the callback, if anything did."""
        if self._error is not None:
            raise self._error

    def demand(self) -> npt.NDArray[np.float64]:
        """Return the mean demand of each layer, tokens, [n_layer]; 0 where nothing was seen."""
        self._end_horizons()
        self._horizons = []
        return self._sum / np.maximum(self._n_counts, 1)


class _Horizon:
    """The attention of one layer since a horizon began, on tokens that could have been evicted."""

    def __init__(self, n_prompt: int) -> None:
        self._n_prompt = n_prompt
        self.n_seen = 0  # decode steps since the prompt
        self.n_added = 0  # of them, in this horizon
        self._n_old = 0
        self.attention = np.zeros((0, 0))

    def begin(self, n_head: int) -> None:
        """Forget what was added; from now on, tokens of the chain up to here count."""
        self._n_old = max(self.n_seen - BudgetConfig.window, 1)
        self.attention = np.zeros((n_head, self._n_old))
        self.n_added = 0

    def add(self, attention: npt.NDArray[np.float32]) -> None:
        """Add one step, [n_head, n_kv]; the first horizon after a prompt has nothing to look at."""
        self.n_seen += 1
        if self._n_old > 0:
            first = self._n_prompt
            self.attention += attention[:, first : first + self._n_old]
            self.n_added += 1


class _MeteredLlama(ReasonLlama):
    """A session with the stock cache that shows a meter its attention."""

    def __init__(self, path: str | os.PathLike[str], meter: DemandMeter, **kwargs: Any) -> None:
        self.meter = meter
        super().__init__(path, budget=None, flash_attn=False, **kwargs)

    @property
    def context_params(self) -> Any:
        """Parameters of the context, set by the base constructor."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        params.cb_eval = self.meter.callback
        self._context_params = params


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes
    ----------
    steps : int
        Most tokens to decode per prompt.
    rho : float
        Share of the attention mass to cover.
    horizon : int
        Steps over which the attention is summed first; 0: none, as in the paper.
    sampling : Sampling
        How tokens are drawn; prompt i is drawn with seed + i.
    kv_type : str
        Type of K and V.
    n_threads : int
        0: what llama_cpp chooses. Another number may round differently, and so draw other tokens.
    n_gpu_layers : int
        Layers on a GPU; -1: all.
    raw : bool
        Leave out the chat template.
    """

    steps: int = 512
    rho: float = 0.93
    horizon: int = 0
    sampling: Sampling = Sampling()
    kv_type: str = "f16"
    n_threads: int = 0
    n_gpu_layers: int = 0
    raw: bool = False

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1, 1 << 20)
        check_float("rho", self.rho, 1e-6, 1.0)
        check_int("horizon", self.horizon, 0, 1 << 20)
        if self.horizon > 0 and 2 * self.steps < 3 * self.horizon:
            raise ConfigError(
                f"steps = {self.steps} is too few for a horizon of {self.horizon}: the first one "
                "only fills the cache"
            )
        check_int("seed", self.sampling.seed, 0, 2**32 - 2 - MAX_PROMPTS)


def calibrate(
    model_path: str | os.PathLike[str],
    prompts: Sequence[str],
    settings: Settings | None = None,
    name: str = "",
    command: str = "py_reasonalloc.run.calibrate.calibrate()",
    progress: Callable[[int], None] = lambda n: None,
) -> Profile:
    """Measure the profile of a model.

    Parameters
    ----------
    prompts : sequence of str
        1 to `MAX_PROMPTS`.
    name : str
        Of the profile; default: the model's family.
    command : str
        What the profile says made it.
    progress : callable
        Gets the number of decode steps done since its last call; ``steps`` per prompt in all.

    Raises
    ------
    ConfigError
        No prompts or too many, or a value out of its range.
    ContextFullError
        A prompt does not fit into the model's context.
    UnsupportedError
        The model cannot have a budgeted cache, or shows no attention.
    ModelFileError
        The file is not a model that can be loaded.
    """
    settings = Settings() if settings is None else settings
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ConfigError(f"{len(prompts)} prompts: must be 1 to {MAX_PROMPTS}")
    identity = read_identity(model_path)
    with open_vocabulary(model_path) as model:
        texts = [encode_prompt(model, prompt, settings.raw) for prompt in prompts]
        n_trained = trained_context(model)
    n_longest = max(map(len, texts))
    if n_longest >= n_trained > 0:
        raise ContextFullError(
            f"a probe prompt has {n_longest} tokens, but the context ends at {n_trained}"
        )
    n_ctx = min(n_longest + settings.steps, n_trained or n_longest + settings.steps)
    heads = identity.n_head_kv
    per_layer = [heads] * identity.n_layer if isinstance(heads, int) else list(heads)
    meter = DemandMeter(per_layer, settings.rho, settings.horizon)
    arguments: dict[str, Any] = {
        "n_ctx": n_ctx,
        "type_k": settings.kv_type,
        # without flash attention V cannot be quantised
        "type_v": settings.kv_type if settings.kv_type in ("f32", "bf16") else "f16",
        "n_gpu_layers": settings.n_gpu_layers,
    }
    if settings.n_threads > 0:
        arguments["n_threads"] = arguments["n_threads_batch"] = settings.n_threads
    with _MeteredLlama(model_path, meter, **arguments) as llama:
        kind = kv_type_id(settings.kv_type)
        status = c.ra_model_supported(llama.model, kind, kind)
        if status != c.RA_STATUS_OK:
            raise error_from_status(status, f"{model_path}: {c.last_error()}")
        for i, tokens in enumerate(texts):
            _decode(llama, tokens, settings, i, progress)
    return _profile(identity, meter, settings, len(prompts), name, command)


def _decode(
    llama: _MeteredLlama,
    tokens: list[int],
    settings: Settings,
    i_prompt: int,
    progress: Callable[[int], None],
) -> None:
    """Decode the chain of thought of one prompt; the meter watches."""
    base = settings.sampling
    sampling = Sampling(base.temp, base.top_p, base.seed + i_prompt)
    # every prompt from an empty cache: a profile does not depend on what ran before
    llama.clear()
    llama.meter.start(len(tokens))
    generation = Generation(llama, tokens, settings.steps, sampling)
    n_done = 0
    for _ in generation:
        llama.meter.raise_error()
        progress(len(generation.tokens) - n_done)
        n_done = len(generation.tokens)
    llama.meter.raise_error()
    progress(settings.steps - n_done)


def _profile(
    identity: ModelIdentity,
    meter: DemandMeter,
    settings: Settings,
    n_prompts: int,
    name: str,
    command: str,
) -> Profile:
    demand = meter.demand()
    if demand.max(initial=0.0) == 0.0:
        raise UnsupportedError(
            "nothing was measured: the model ended every text at once (or before a horizon's end), "
            "or has no attention that can be seen"
        )
    heads = identity.n_head_kv
    family = identity.families[0]
    return Profile(
        name=name or family,
        family=family,
        architecture=identity.architecture,
        n_layer=identity.n_layer,
        n_head_kv=heads,
        head_dim=identity.head_dim,
        demand=tuple(round(float(d), 3) for d in demand),
        rho=float(settings.rho),
        horizon=settings.horizon,
        gamma=float(c.ra_config_default_params().gamma),
        clip_lo=float(c.ra_config_default_params().clip_lo),
        clip_hi=float(c.ra_config_default_params().clip_hi),
        n_prompts=n_prompts,
        n_steps=int(meter.n_steps.max()),
        seed=settings.sampling.seed,
        tool_version=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        fingerprint=identity.fingerprint,
        command=command,
    )


def measure(
    model: Path, prompts: Sequence[str], settings: Settings, name: str, command: str
) -> Profile:
    """Calibrate with a progress bar on standard error; see `calibrate`."""
    bar = click.progressbar(
        length=len(prompts) * settings.steps,
        label=f"measuring {len(prompts)} chains of thought",
        file=sys.stderr,
    )
    with LogCapture(forward=False), bar as progress:
        return calibrate(model, prompts, settings, name, command, progress.update)
