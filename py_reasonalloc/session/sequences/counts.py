"""What `scheduler.Sequences` did: `Counts`."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Counts:
    """What `Sequences` did since it was made.

    Attributes
    ----------
    n_steps : int
        Calls of llama_decode that worked.
    n_prompt_tokens, n_tokens : int
        Read, and generated.
    n_reused : int
        Tokens of prompts that were copied and not read.
    n_added, n_ended, n_cancelled, n_failed : int
        Chains; `n_ended` counts all that are over.
    n_evicted, n_compressions : int
        Of the sequences that are freed; 0 for the stock cache.
    """

    n_steps: int = 0
    n_prompt_tokens: int = 0
    n_tokens: int = 0
    n_reused: int = 0
    n_added: int = 0
    n_ended: int = 0
    n_cancelled: int = 0
    n_failed: int = 0
    n_evicted: int = 0
    n_compressions: int = 0

    def add_cache(self, stats: Any) -> None:
        """Count what was done to a sequence that is freed, by its ra_stats."""
        self.n_evicted += stats.n_evicted
        self.n_compressions += stats.n_compressions
