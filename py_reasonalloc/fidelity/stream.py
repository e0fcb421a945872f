"""Teacher-forced reading: given tokens through one cache after the other, on weights loaded once.

Several positions are decoded at once, but never across a compression: a piece ends where the cache
is full, so that every compression happens at the position, and with the content, that it has when
tokens come one by one. Pieces are short: from 64 tokens on, llama.cpp's attention on the CPU takes
another path, which rounds differently (0.003 nats of KL on SmolLM2, as much as a method may gain);
shorter pieces give, bit for bit, what a generated text gets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as bindings

from ..engine import bindings as c
from ..engine.batch import fill_batch, new_batch
from ..engine.errors import ComputeError, ContextFullError
from ..eval.cases.methods import Setup
from ..session.protection import protect
from ..session.reason_llama import ReasonLlama
from .metrics import Floats

#: Most positions that are decoded at once.
N_ROWS = 32


class Stream:
    """A loaded model that reads token sequences.

    Parameters
    ----------
    llama : ReasonLlama
        Any cache; `open` makes others.
    setup : Setup
        What the cache is.
    is_stopped : callable
        Asked between pieces; KeyboardInterrupt then.
    """

    def __init__(
        self, llama: ReasonLlama, setup: Setup, is_stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self.llama = llama
        self._setup = setup
        self._is_stopped = is_stopped
        self.n_vocab = int(llama.n_vocab())
        self._n_layer = bindings.llama_model_n_layer(llama.model)
        self._batch = new_batch(N_ROWS)

    def open(self, setup: Setup, n_prompt: int = 0) -> None:
        """Make the cache of an arm, empty.

        Parameters
        ----------
        n_prompt : int
            Tokens of the prompt that the sequence begins with: protected as the arm says.
        """
        if setup != self._setup:
            self.llama.reconfigure(setup.config, type_k=setup.kv_type, type_v=setup.kv_type)
            self._setup = setup
        self.llama.clear()
        if setup.config is not None:
            protect(self.llama, setup.config.n_protect(n_prompt))

    def read(
        self, tokens: Sequence[int], spans: Sequence[range], n_at_once: int = N_ROWS
    ) -> Iterator[tuple[int, Floats]]:
        """Decode tokens; yield logits where they are wanted.

        Parameters
        ----------
        tokens : sequence of int
            From position 0 on; the cache is empty.
        spans : sequence of range
            Positions whose logits are wanted, ascending, steps of 1.
        n_at_once : int
            Most tokens to decode at once, 1 to `N_ROWS`.

        Yields
        ------
        int
            Position of the first row.
        array of float32
            [n, n_vocab], valid until the next piece is asked for.

        Raises
        ------
        ComputeError
            A decode failed.
        ContextFullError
            The sequence does not fit into the context.
        """
        if len(tokens) > self.llama.n_ctx():
            raise ContextFullError(
                f"{len(tokens)} tokens exceed the context of {self.llama.n_ctx()}"
            )
        edges = sorted({edge for span in spans for edge in (span.start, span.stop)})
        pos = 0
        while pos < len(tokens):
            if self._is_stopped():
                raise KeyboardInterrupt
            end = min(pos + min(n_at_once, self._room()), len(tokens))
            end = next((edge for edge in edges if pos < edge < end), end)
            is_wanted = any(pos in span for span in spans)
            self._decode(tokens[pos:end], pos, is_wanted)
            if is_wanted:
                pointer = bindings.llama_get_logits(self.llama.ctx)
                yield pos, np.ctypeslib.as_array(pointer, shape=(end - pos, self.n_vocab))
            pos = end

    def _decode(self, tokens: Sequence[int], pos: int, is_wanted: bool) -> None:
        fill_batch(self._batch, tokens, pos, is_wanted)
        status = bindings.llama_decode(self.llama.ctx, self._batch)
        if status != 0:
            reason = f": {c.last_error()}" if c.last_error() else ""
            raise ComputeError(f"llama_decode returned {status} at position {pos}{reason}")
        bindings.llama_synchronize(self.llama.ctx)

    def _room(self) -> int:
        """Return how many tokens the cache takes before it is compressed; 1 if that is due."""
        config = self._setup.config
        if config is None:
            return N_ROWS
        ctx, head = self.llama.ctx, c.ra_head_stats(size=ctypes.sizeof(c.ra_head_stats))
        room = N_ROWS
        for il in range(self._n_layer):
            for ih in range(c.ra_n_head_kv(ctx, il)):
                c.check(c.ra_head_stats_get(ctx, 0, il, ih, ctypes.byref(head)))
                room = min(room, head.budget + config.buffer - head.used)
        return max(room, 1)

    def close(self) -> None:
        """Free the batch; the session is the caller's."""
        bindings.llama_batch_free(self._batch)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
