"""Measure a layer profile: how many tokens each layer attends to while the model reasons.

ReasonAlloc, arXiv 2606.11164: on a few probe prompts the model decodes its own chain of thought
with the full cache. The demand of a layer is the number of cached tokens that cover `rho` of the
attention mass, averaged over decode steps and query heads (`demand`).

With a horizon (ours, not the paper's) the attention is summed over that many steps before it is
counted, and only what an eviction could have taken counts: tokens of the chain that were there when
the horizon began, the observation window left out. A head that looks up one other token at each
step needs one per step, but many over a horizon; one that always rests on the same few needs few.

The same decode records what attention works on, and the error curves of the KV heads are measured
from it (`curves`).
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..engine import bindings as c
from ..engine.errors import ConfigError, ContextFullError, UnsupportedError, error_from_status
from ..engine.identity import ModelIdentity, read_identity
from ..engine.log import LogCapture
from ..engine.modelfile import open_vocabulary, trained_context
from ..engine.prompts import encode_prompt
from ..profile.files import Profile
from ..session.config import check_float, check_int, kv_type_id
from ..session.generate import Generation, Sampling
from ..session.reason_llama import ReasonLlama
from .centres import CentreMeter
from .curves import CurveMeter, replay_config
from .demand import DemandMeter
from .dryrun import EmptyLlama
from .probes import MAX_PROMPTS
from .streams import StreamRecorder

#: Most tokens of a text that are read.
TEXT_TOKENS = 2048


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
    curves : bool
        Measure error curves, too.
    buffer : int
        Tokens between the compressions of error curves.
    """

    steps: int = 512
    rho: float = 0.93
    horizon: int = 0
    sampling: Sampling = Sampling()
    kv_type: str = "f16"
    n_threads: int = 0
    n_gpu_layers: int = 0
    raw: bool = False
    curves: bool = True
    buffer: int = 128

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1, 1 << 20)
        check_float("rho", self.rho, 1e-6, 1.0)
        check_int("horizon", self.horizon, 0, 1 << 20)
        if self.steps < self.least_tokens():
            raise ConfigError(
                f"steps = {self.steps} is too few for a horizon of {self.horizon}: the first one "
                "only fills the cache"
            )
        check_int("seed", self.sampling.seed, 0, 2**32 - 2 - MAX_PROMPTS)
        check_int("buffer", self.buffer, 1, 4096)

    def least_tokens(self) -> int:
        """Return the tokens that a text must have: the first horizon only fills the cache, half of
        a second one counts, and the last token is not decoded.
        """
        return self.horizon + -(-self.horizon // 2) + 1

    def work(self, n_prompts: int, n_texts: int = 0) -> int:
        """Return what `calibrate` reports to its `progress` in all."""
        return self.steps * ((2 * n_prompts + n_texts) if self.curves else n_prompts)


def calibrate(
    model_path: str | os.PathLike[str],
    prompts: Sequence[str],
    settings: Settings | None = None,
    name: str = "",
    command: str = "py_reasonalloc.run.calibrate.calibrate()",
    progress: Callable[[int], None] = lambda n: None,
    texts: Sequence[str] = (),
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
        Gets the work done since its last call, of ``settings.work()`` in all: decode steps, and
        about as much again for error curves.
    texts : sequence of str
        Read for error curves besides the chains of thought, up to `TEXT_TOKENS` tokens each.

    Raises
    ------
    ConfigError
        No prompts or too many, or a value out of its range.
    ContextFullError
        A prompt does not fit into the model's context.
    UnsupportedError
        The model cannot have a budgeted cache, shows no attention, or ends every text too early.
    ModelFileError
        The file is not a model that can be loaded.
    """
    settings = Settings() if settings is None else settings
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ConfigError(f"{len(prompts)} prompts: must be 1 to {MAX_PROMPTS}")
    identity = read_identity(model_path)
    with open_vocabulary(model_path) as model:
        encoded = [encode_prompt(model, prompt, settings.raw) for prompt in prompts]
        pieces = [encode_prompt(model, text, raw=True) for text in texts]
        n_trained = trained_context(model)
    pieces = [piece[: min(TEXT_TOKENS, n_trained or TEXT_TOKENS)] for piece in pieces]
    n_longest = max(map(len, encoded))
    if n_longest >= n_trained > 0:
        raise ContextFullError(
            f"a probe prompt has {n_longest} tokens, but the context ends at {n_trained}"
        )
    n_ctx = min(n_longest + settings.steps, n_trained or n_longest + settings.steps)
    n_room = n_ctx - min(map(len, encoded))
    if n_room < settings.least_tokens():
        raise ContextFullError(
            f"a horizon of {settings.horizon} needs a text of {settings.least_tokens()} tokens, "
            f"but the context ends at {n_trained}, {n_room} after the shortest prompt"
        )
    per_layer = budgeted_heads(model_path, identity.n_layer)
    recorder = StreamRecorder(per_layer) if settings.curves else None
    centres = CentreMeter(per_layer, identity.head_dim)
    meter = DemandMeter(per_layer, settings.rho, settings.horizon, recorder, centres)
    curves = CurveMeter(per_layer, replay_config(settings.buffer), settings.n_threads)
    arguments: dict[str, Any] = {
        "n_ctx": max([n_ctx, *map(len, pieces)]),
        "type_k": settings.kv_type,
        # without flash attention V cannot be quantised
        "type_v": settings.kv_type if settings.kv_type in ("f32", "bf16") else "f16",
        "n_gpu_layers": settings.n_gpu_layers,
    }
    if settings.n_threads > 0:
        arguments["n_threads"] = arguments["n_threads_batch"] = settings.n_threads

    def replay(session: _MeteredLlama) -> None:
        if recorder is not None:
            session.meter.raise_error()
            curves.add(recorder.streams(), _share(progress, settings.steps, sum(per_layer)))

    with _MeteredLlama(model_path, meter, **arguments) as llama:
        kind = kv_type_id(settings.kv_type)
        status = c.ra_model_supported(llama.model, kind, kind)
        if status != c.RA_STATUS_OK:
            raise error_from_status(status, f"{model_path}: {c.last_error()}")
        n_most = 0  # steps of the longest text
        for i, tokens in enumerate(encoded):
            n_before = meter.n_steps.copy()
            _decode(llama, tokens, settings, i, progress)
            n_most = max(n_most, int((meter.n_steps - n_before).max()))
            replay(llama)
        for tokens in pieces if settings.curves else []:
            llama.clear()
            meter.start(len(tokens), is_counted=False)
            llama.eval(tokens)
            replay(llama)
    _check_measured(meter, settings, n_most)
    profile = _profile(identity, per_layer, meter, settings, len(prompts), name, command)
    if recorder is None:
        return profile
    return dataclasses.replace(profile, head_error=curves.head_error(recorder.norms()))


def budgeted_heads(path: str | os.PathLike[str], n_layer: int) -> list[int]:
    """Return the KV heads of each layer that have a budget, as the library splits one, [n_layer].

    0 for a layer whose cache is llama.cpp's own: a window, a recurrent state, no attention.

    Raises
    ------
    UnsupportedError
        The model cannot have a budgeted cache.
    """
    with EmptyLlama(path, n_ctx=1, use_mmap=False) as llama:
        return [max(c.ra_n_head_kv(llama.ctx, il), 0) for il in range(n_layer)]


def _share(progress: Callable[[int], None], n_total: int, n_parts: int) -> Callable[[int], None]:
    """Return a function that takes parts done and reports their share of a total."""
    n_done = 0

    def report(n: int) -> None:
        nonlocal n_done
        before, n_done = n_total * n_done // n_parts, n_done + n
        progress(n_total * n_done // n_parts - before)

    return report


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


def _check_measured(meter: DemandMeter, settings: Settings, n_most: int) -> None:
    """Raise UnsupportedError if nothing was; `n_most`: decode steps of the longest text."""
    if meter.demand().max(initial=0.0) > 0.0:
        return
    if 0 < n_most + 1 < settings.least_tokens():
        raise UnsupportedError(
            f"nothing was measured: a horizon of {settings.horizon} needs a text of "
            f"{settings.least_tokens()} tokens, and the longest ended after {n_most + 1} "
            f"(--horizon {2 * n_most // 3} would do)"
        )
    raise UnsupportedError(
        "nothing was measured: the model ended every text at once, or has no attention that can "
        "be seen"
    )


def _profile(
    identity: ModelIdentity,
    per_layer: list[int],
    meter: DemandMeter,
    settings: Settings,
    n_prompts: int,
    name: str,
    command: str,
) -> Profile:
    demand = meter.demand()
    family = identity.families[0]
    return Profile(
        name=name or family,
        family=family,
        architecture=identity.architecture,
        n_layer=identity.n_layer,
        n_head_kv=per_layer[0] if len(set(per_layer)) == 1 else tuple(per_layer),
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
        centres=meter.centres.centres() if meter.centres is not None else b"",
    )


def measure(
    model: Path,
    prompts: Sequence[str],
    settings: Settings,
    name: str,
    command: str,
    texts: Sequence[str] = (),
) -> Profile:
    """Calibrate with a progress bar on standard error; see `calibrate`."""
    bar = click.progressbar(
        length=settings.work(len(prompts), len(texts)),
        label=f"measuring {len(prompts)} chains of thought",
        file=sys.stderr,
    )
    with LogCapture(forward=False), bar as progress:
        return calibrate(model, prompts, settings, name, command, progress.update, texts)
