"""What is asked for: `Request`; and log-probabilities, if they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...engine.errors import ConfigError
from ..config import MAX_TOKENS, check_float, check_int
from ..steering import Sampling
from ..thinking import ThinkLimit

#: Arguments of `llama_cpp.Llama.generate` that `Request.draw` takes: what `Sampling` has not.
DRAW: dict[str, float] = {
    "typical_p": 1.0,
    "mirostat_mode": 0,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
}


@dataclass(frozen=True)
class Request:
    """One text that is asked for.

    Attributes
    ----------
    prompt : tuple of int
        Its tokens, at least one.
    max_tokens : int or None
        Most tokens to generate; 0: only read the prompt; None: as many as the context holds.
    sampling : Sampling
        How tokens are drawn, seed included.
    draw : mapping
        What `llama_cpp.Llama.generate` has beside; see `DRAW`.
    grammar : llama_cpp.LlamaGrammar or None
        What the text must follow.
    logit_bias : mapping of int to float
        Token -> what is added to its logit.
    stop_tokens : frozenset of int
        End the text, as those that the model's file names do.
    n_top : int or None
        Report log-probabilities, with those of so many of the likeliest tokens; None: do not.
    prompt_logprobs : bool
        Report them for the prompt, too.
    think : ThinkLimit or None
        How long the model may think.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    draw: Mapping[str, Any] = field(default_factory=dict)
    grammar: Any = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_tokens: frozenset[int] = frozenset()
    n_top: int | None = None
    prompt_logprobs: bool = False
    think: ThinkLimit | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        if not self.prompt:
            raise ConfigError("the prompt is empty")
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        if self.n_top is not None:
            check_int("n_top", self.n_top, 0, MAX_TOKENS)
        for name in self.draw:
            if name not in DRAW:
                raise ConfigError(f"a request has no {name!r}: there are {', '.join(DRAW)}")
        for token, bias in self.logit_bias.items():
            check_float(f"logit_bias[{token}]", bias, -1e6, 1e6)
        if self.prompt_logprobs and self.n_top is None:
            raise ConfigError("prompt_logprobs needs n_top: how many of the likeliest to report")
        if self.grammar is not None and self.think is not None:
            raise ConfigError("a grammar does not know of a forced end of thinking: leave out one")

    def check_tokens(self, n_vocab: int) -> None:
        """Raise ConfigError if a token is none of a vocabulary of `n_vocab`."""
        for name in ("prompt", "logit_bias", "stop_tokens"):
            for token in getattr(self, name):
                if not 0 <= token < n_vocab:
                    raise ConfigError(f"{name}: there is no token {token}: must be below {n_vocab}")


class TokenLogprob(NamedTuple):
    """A token's log-probability before any sampling option, and the likeliest tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprob(logits: npt.NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    """Return the log-probability of a token, and of the `n_top` likeliest.

    Parameters
    ----------
    logits : array, [n_vocab]
        Of its position.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    n_top = min(n_top, len(values))
    best = np.argpartition(-values, n_top - 1)[:n_top] if n_top else np.empty(0, np.intp)
    best = best[np.lexsort((best, -values[best]))]
    return TokenLogprob(
        token, float(values[token]), tuple((int(i), float(values[i])) for i in best)
    )
