"""When a text goes round in circles.

Small budgets make models repeat themselves to the end of the context; decoding such a text to its
limit costs most of the time of an evaluation and tells nothing. A text that has really begun to
cycle, token by token, is told from honest repetition (a recap, a table of zeros, a sentence said
three times) by length: both the number of repeats and the number of tokens must be large. With the
defaults an honest table of several hundred equal cells would be taken for a loop; nothing in 530
gold solutions of MATH-500 and AIME 2024 is.
"""

from __future__ import annotations

import numpy as np

from ...engine.errors import ConfigError

#: Longest period that is looked for, in tokens.
MAX_PERIOD = 512
#: The repetition covers at least this many tokens ...
MIN_TOKENS = 512
#: ... and at least this many repeats.
MIN_REPEATS = 4

_NO_TOKEN = np.iinfo(np.int64).min


class LoopDetector:
    """Tells, token by token, whether the end of a text is a loop.

    The text ``t[0], ..., t[n-1]`` ends in a loop if there is a period p, 1 <= p <= `max_period`,
    such that its last ``L = max(min_tokens, min_repeats * p)`` tokens repeat every p tokens:
    n >= L, and ``t[i] == t[i - p]`` for all i with n - L + p <= i < n.

    So the tokens must be the same in every round. A near-loop, in which a counter or a name changes
    each time, is not found; nor is a period longer than `max_period`.

    Parameters
    ----------
    max_period : int
        In tokens, at least 1. The time per token and the memory grow with it.
    min_tokens : int
        At least 1.
    min_repeats : int
        At least 2; the first occurrence counts.

    Raises
    ------
    ConfigError
        An argument is out of its range.
    """

    def __init__(
        self,
        max_period: int = MAX_PERIOD,
        min_tokens: int = MIN_TOKENS,
        min_repeats: int = MIN_REPEATS,
    ) -> None:
        for name, value, least in (
            ("max_period", max_period, 1),
            ("min_tokens", min_tokens, 1),
            ("min_repeats", min_repeats, 2),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        periods = np.arange(1, max_period + 1)
        # all [max_period] i64; entry p - 1 belongs to period p
        self._latest = np.full(max_period, _NO_TOKEN)  # the token p steps back, seen from the next
        self._n_same = np.zeros(max_period, np.int64)  # latest tokens in a row with t[i] == t[i-p]
        self._n_needed = np.maximum(min_tokens, min_repeats * periods) - periods

    def update(self, token: int) -> bool:
        """Append a token (an id, not negative) and tell whether the text now ends in a loop."""
        self._n_same += 1
        self._n_same *= self._latest == token
        self._latest[1:] = self._latest[:-1]
        self._latest[0] = token
        return bool((self._n_same >= self._n_needed).any())
