"""What is measured: arms (a cache and its settings) and jobs (one measurement of one arm).

A job runs in a process of its own (`py_reasonalloc.bench.child`) and travels there as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

#: Largest batch that is decoded at once while a prompt is read, tokens; the same for all arms.
N_BATCH = 512
#: Tokens decoded at once to bring a cache to a depth; rows of a stock cache repeat such a block.
BLOCK = 128
#: Tokens decoded one by one before the clock starts.
N_WARM = 8
#: Times that a session is made, each after one of the base class.
N_LOADS = 5


@dataclass(frozen=True)
class Arm:
    """A cache under measurement.

    Attributes
    ----------
    name : str
        What the report calls it.
    kv_type : str
        Type of K and V.
    budget : int or None
        Tokens per KV head; None: the stock cache.
    buffer : int
        Tokens between compressions.
    policy, heads, attention : str
        See `BudgetConfig`.
    layers : str or tuple of int
        See `BudgetConfig`.
    n_ubatch : int
        Tokens computed at once; with a budget at most the buffer.
    library : str or None
        Folder of another build of llama.cpp (only without a budget); None: ours.
    """

    name: str
    kv_type: str = "f16"
    budget: int | None = None
    buffer: int = 128
    policy: str = "rkv"
    layers: str | tuple[int, ...] = "uniform"
    heads: str = "uniform"
    attention: str = "auto"
    n_ubatch: int = N_BATCH
    library: str | None = None

    def config(self) -> Any:
        """Return the `BudgetConfig`, or None for the stock cache.

        Raises
        ------
        ConfigError
            A value is out of its range.
        """
        if self.budget is None:
            return None
        from ..session.config import BudgetConfig

        return BudgetConfig(
            budget=self.budget,
            buffer=self.buffer,
            policy=self.policy,
            layers=self.layers,
            heads=self.heads,
            attention=self.attention,
        )

    def n_fill(self) -> int:
        """Return how many tokens certainly bring a budgeted cache into its steady state.

        Then every head is full, and a compression ran. Adaptive heads may hold twice their layer's
        mean.
        """
        assert self.budget is not None
        largest = self.budget if isinstance(self.layers, str) else max(self.layers)
        return (2 if self.heads == "adaptive" else 1) * largest + 2 * self.buffer


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes
    ----------
    kind : {"decode", "prompt", "load", "turns", "parallel"}
        Decode tokens one by one at a depth; read prompts; make a session; decode in turns; many
        sequences in turns.
    arm : Arm
        The cache.
    model : str
        GGUF file.
    n_threads, n_gpu_layers : int
        CPU threads, for prompts and decoding alike; layers on a GPU.
    depth : int
        "decode": tokens before the first one that is decoded.
    n_tokens : int
        "decode": tokens to time.
    is_decoded : bool
        "decode" with a budget: decode all tokens up to the depth, instead of starting at a late
        position.
    is_batch_filled : bool
        "decode": at the end also decode a full batch with all its logits, and tell the memory.
    prompts : tuple of int
        "prompt": lengths in tokens.
    folder : str
        "decode": where a temporary file may be written.
    n_seq : int
        "parallel": sequences of the context, each of which has the depth; a step decodes a token of
        each.
    n_at_once : int
        "parallel": tokens of each sequence in a step.
    """

    kind: str
    arm: Arm
    model: str
    n_threads: int
    n_gpu_layers: int = 0
    depth: int = 0
    n_tokens: int = 0
    is_decoded: bool = False
    is_batch_filled: bool = False
    prompts: tuple[int, ...] = ()
    folder: str = ""
    n_seq: int = 1
    n_at_once: int = 1

    def to_json(self) -> str:
        """Return the job as text."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """Return the job of a text that `to_json` made."""
        values = json.loads(text)
        layers = values["arm"]["layers"]
        if not isinstance(layers, str):
            values["arm"]["layers"] = tuple(layers)
        values["arm"] = Arm(**values["arm"])
        values["prompts"] = tuple(values["prompts"])
        return Job(**values)
