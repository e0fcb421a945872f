"""How the next token is drawn: `Sampling`, and `Steerable`, the part of a session that obeys it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
from llama_cpp import _internals
from llama_cpp import llama_cpp as bindings

from ..engine.errors import ConfigError
from ..engine.grammar import check_grammar
from .config import MAX_TOKENS, check_float, check_int

#: A repetition does not reach across these: what llama.cpp's own programs have.
DRY_BREAKERS = ("\n", ":", '"', "*")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; penalties look at generated tokens, not at the prompt.

    Attributes
    ----------
    temp : float
        Temperature; 0: always the likeliest token.
    top_p : float
        Draw from the smallest set of tokens with this much probability.
    seed : int
        Of the draw, 0 to 2**32 - 2.
    repeat_penalty, presence_penalty, frequency_penalty : float
        As in `llama_cpp.Llama`, over the last `repeat_last_n` tokens; 1, 0 and 0: off.
    repeat_last_n : int
        Tokens; -1: as many as the context holds.
    dry_multiplier : float
        DRY (https://github.com/oobabooga/text-generation-webui/pull/5677): a token that would make
        a repetition longer than `dry_allowed_length` loses
        dry_multiplier * dry_base ** (length - dry_allowed_length); 0: off.
    dry_base : float
        See there.
    dry_allowed_length : int
        See there.
    dry_last_n : int
        Tokens in which repetitions are looked for; -1: as many as the context holds.
    xtc_probability : float
        XTC (https://github.com/oobabooga/text-generation-webui/pull/6335): with this probability,
        of the tokens above `xtc_threshold` only the least likely stays; 0: off.
    xtc_threshold : float
        See there; above 0.5 there is never more than one.
    top_k : int
        Draw from so many of the likeliest tokens; 0: from all.
    min_p : float
        Draw from tokens with at least this share of the likeliest one's probability; 0: from all.

    Raises
    ------
    ConfigError
        A value is out of its range, or XTC is asked for without a temperature.
    """

    temp: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_float("temp", self.temp, 0.0, 1e6)
        check_float("top_p", self.top_p, 0.0, 1.0)
        check_int("seed", self.seed, 0, 2**32 - 2)
        check_float("repeat_penalty", self.repeat_penalty, 1e-3, 1e3)
        check_float("presence_penalty", self.presence_penalty, -100.0, 100.0)
        check_float("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        check_int("repeat_last_n", self.repeat_last_n, -1, MAX_TOKENS)
        check_float("dry_multiplier", self.dry_multiplier, 0.0, 100.0)
        check_float("dry_base", self.dry_base, 1.0, 100.0)
        check_int("dry_allowed_length", self.dry_allowed_length, 1, MAX_TOKENS)
        check_int("dry_last_n", self.dry_last_n, -1, MAX_TOKENS)
        check_float("xtc_probability", self.xtc_probability, 0.0, 1.0)
        check_float("xtc_threshold", self.xtc_threshold, 0.0, 1.0)
        check_int("top_k", self.top_k, 0, MAX_TOKENS)
        check_float("min_p", self.min_p, 0.0, 1.0)
        if self.xtc_probability > 0 and self.temp == 0:
            raise ConfigError("xtc_probability needs a temperature: temp = 0 draws nothing")


class Steerable(llama_cpp.Llama):
    """A session that can be told how to draw what its base class cannot, and what comes next."""

    last_n_tokens_size: int
    _steered: Sampling | None = None
    _forced: deque[int] = deque()
    _continued: tuple[int, ...] = ()
    #: Tokens decoded since the session was opened, those that were read again included.
    n_evaluated: int = 0

    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens, and count them."""
        super().eval(tokens)
        self.n_evaluated += len(tokens)

    def steer(self, sampling: Sampling | None, text: Sequence[int] = ()) -> None:
        """Let the next `generate` also do what only `Sampling` has; None: nothing of it.

        Parameters
        ----------
        text : sequence of int
            Tokens at the end of the prompt that count as generated: of a text that is continued.
        """
        self._steered, self._forced, self._continued = sampling, deque(), tuple(text)

    def force(self, tokens: Iterable[int]) -> None:
        """Let `generate` yield these tokens next, whatever would have been drawn."""
        self._forced = deque(tokens)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Return the next token, as the base class does, or one that is forced."""
        if not self._forced:
            return int(super().sample(*args, **kwargs))
        token = self._forced.popleft()
        if self._sampler is not None:
            self._sampler.accept(token)  # penalties count it
        return token

    def _n_back(self, n: int) -> int:
        return self._n_ctx if n < 0 else n

    def _init_sampler(self, *args: Any, **kwargs: Any) -> _internals.LlamaSampler:
        """Return the chain that draws tokens; it has seen those of a text that is continued."""
        sampler = self._make_sampler(*args, **kwargs)
        for token in self._continued:
            sampler.accept(token)
        return sampler

    def _make_sampler(self, *args: Any, **kwargs: Any) -> _internals.LlamaSampler:
        """Return the base class's chain, with DRY and XTC where llama.cpp's own chain has them."""
        if kwargs.get("grammar") is not None:  # the base class would go on with a null pointer
            check_grammar(self._model, kwargs["grammar"]._grammar)
        steered, n_last = self._steered, self.last_n_tokens_size
        if steered is None:
            return super()._init_sampler(*args, **kwargs)
        self.last_n_tokens_size = self._n_back(steered.repeat_last_n)
        sampler = super()._init_sampler(*args, **kwargs)
        self.last_n_tokens_size = n_last
        chain = sampler.sampler
        if steered.dry_multiplier == steered.xtc_probability == 0:
            return sampler
        n = bindings.llama_sampler_chain_n(chain)
        for part in [bindings.llama_sampler_chain_remove(chain, 0) for _ in range(n)]:
            name = bindings.llama_sampler_name(part).lstrip(b"?+-")  # off, on or off the device
            if name == b"temp" and steered.xtc_probability > 0:
                sampler.add_xtc(steered.xtc_probability, steered.xtc_threshold, 1, steered.seed)
            bindings.llama_sampler_chain_add(chain, part)
            if name == b"penalties" and steered.dry_multiplier > 0:
                sampler.add_dry(
                    self._model,
                    steered.dry_multiplier,
                    steered.dry_base,
                    steered.dry_allowed_length,
                    self._n_back(steered.dry_last_n),
                    list(DRY_BREAKERS),
                )
        return sampler
