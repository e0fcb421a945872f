"""A model and a context through the low-level bindings: the same loop for every cache.

Also runs with a llama.cpp that is not ours (`Arm.library`), so nothing here needs our functions
unless a budget is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as bindings

from ..engine.batch import fill_batch, new_batch
from ..engine.errors import ComputeError, ContextError, ReasonAllocError
from ..engine.log import LogCapture
from ..engine.modelfile import check_model_file, load_failure
from ..session.config import kv_type_id
from .jobs import N_BATCH, Job


class Engine:
    """A loaded model, and one context at a time.

    Parameters
    ----------
    job : Job
        Says which model, cache and threads.
    owner : Engine or None
        Another engine on the same model file, whose weights are used; it must outlive this one.

    Raises
    ------
    ModelFileError
        llama.cpp cannot load the model.
    """

    def __init__(self, job: Job, owner: Engine | None = None) -> None:
        self.job = job
        self.ctx: Any = None
        self._owns_model = owner is None
        self.model: Any = self._load() if owner is None else owner.model
        self._batch = new_batch(N_BATCH)
        self.n_vocab = bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(self.model))
        self._random = random.Random(0)

    def _load(self) -> Any:
        job = self.job
        path = check_model_file(job.model)
        bindings.llama_backend_init()
        params = bindings.llama_model_default_params()
        params.n_gpu_layers = job.n_gpu_layers if job.n_gpu_layers >= 0 else 0x7FFFFFFF
        # read, not mapped: the resident memory of the weights is then what it is from the start
        params.load_mode = bindings.LLAMA_LOAD_MODE_NONE
        with LogCapture(forward=False) as log:
            model = bindings.llama_model_load_from_file(path.encode(), params)
            if not model:
                raise load_failure(path, log)
        return model

    def open_context(self, n_ctx: int) -> None:
        """Make the context, with the cache of the job.

        Parameters
        ----------
        n_ctx : int
            Of each sequence, tokens.

        Raises
        ------
        ContextError
            It cannot be made.
        """
        job = self.job
        params = bindings.llama_context_default_params()
        params.n_seq_max = job.n_seq
        # a stock cache as llama.cpp makes it by default: rows of its own for each sequence; of a
        # budgeted one, each has rows of its own whatever the context's length
        params.kv_unified = job.arm.budget is not None
        params.n_ctx = n_ctx * (1 if params.kv_unified else job.n_seq)
        params.n_batch = N_BATCH
        params.n_ubatch = job.arm.n_ubatch
        params.n_threads = params.n_threads_batch = job.n_threads
        params.flash_attn_type = bindings.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = kv_type_id(job.arm.kv_type)
        # as in llama.cpp's programs; llama.h's own default keeps windows as long as the context
        params.swa_full = False
        config = job.arm.config()
        with LogCapture(forward=False) as log:
            if config is not None:
                from ..engine import bindings as c

                c.check(c.ra_configure_next(ctypes.byref(config.to_native())))
            self.ctx = bindings.llama_init_from_model(self.model, params)
            if not self.ctx:
                raise ContextError(f"no context could be made: {log.reason()}")
        self.memory = bindings.llama_get_memory(self.ctx)

    def tokens(self, n: int) -> list[int]:
        """Return random tokens; the same ones in every process."""
        return [self._random.randrange(2, self.n_vocab) for _ in range(n)]

    def clear(self) -> None:
        """Forget all tokens."""
        bindings.llama_memory_clear(self.memory, False)

    def take_back(self, pos: int) -> None:
        """Forget the tokens from position `pos` on (stock cache only)."""
        for seq_id in range(self.job.n_seq):
            bindings.llama_memory_seq_rm(self.memory, seq_id, pos, -1)

    def share(self) -> None:
        """Copy the first sequence to all others."""
        for seq_id in range(1, self.job.n_seq):
            bindings.llama_memory_seq_cp(self.memory, 0, seq_id, -1, -1)

    def read(self, n: int, pos: int, n_batch: int = N_BATCH, all_logits: bool = False) -> None:
        """Decode `n` random tokens from position `pos` on, `n_batch` at a time.

        Parameters
        ----------
        all_logits : bool
            Compute the logits of every token, not only of the last one of a batch.

        Raises
        ------
        ComputeError
            llama.cpp refused.
        """
        tokens = self.tokens(n)
        for first in range(0, n, n_batch):
            self._decode(tokens[first : first + n_batch], pos + first, all_logits)
        bindings.llama_synchronize(self.ctx)

    def _decode(self, tokens: list[int], pos: int, all_logits: bool) -> None:
        fill_batch(self._batch, tokens, pos, all_logits)
        self._check(bindings.llama_decode(self.ctx, self._batch))

    def _check(self, status: int) -> None:
        if status != 0:
            raise ComputeError(f"llama_decode returned {status}")

    def step(self, n: int, pos: int) -> tuple[float, ...]:
        """Decode random tokens one by one, as llama-bench does: nothing is sampled.

        A step decodes as many of each sequence as the job says, all of them from position `pos` on.

        Returns
        -------
        tuple of float
            Seconds of each of `n` steps.
        """
        batch, ctx, n_each = self._batch, self.ctx, self.job.n_at_once
        batch.n_tokens = self.job.n_seq * n_each
        for i in range(batch.n_tokens):
            batch.logits[i] = 1
            batch.seq_id[i][0] = i // n_each
        decode, wait, clock = bindings.llama_decode, bindings.llama_synchronize, self._clock()
        tokens = self.tokens(n * batch.n_tokens)
        stamps = [clock()]
        for i_step in range(n):
            for i in range(batch.n_tokens):
                batch.token[i] = tokens[i_step * batch.n_tokens + i]
                batch.pos[i] = pos + i_step * n_each + i % n_each
            self._check(decode(ctx, batch))
            wait(ctx)
            stamps.append(clock())
        for i in range(batch.n_tokens):
            batch.seq_id[i][0] = 0
        return tuple(after - before for before, after in zip(stamps, stamps[1:]))

    def _clock(self) -> Callable[[], float]:
        """Return the processor's clock where a job may count by it: in turns, on one thread."""
        job = self.job
        is_in_turns = job.kind in ("turns", "parallel")
        is_alone = is_in_turns and job.n_threads == 1 and job.n_gpu_layers == 0
        return time.process_time if is_alone else time.perf_counter

    def best_token(self) -> int:
        """Return the most likely next token, as greedy decoding picks it."""
        logits = bindings.llama_get_logits_ith(self.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.n_vocab,))))

    def stats(self) -> Any:
        """Return the ra_stats of all sequences of a budgeted cache; None for the stock cache."""
        if self.job.arm.budget is None:
            return None
        from ..engine.stats import engine_stats

        return engine_stats(self.ctx, -1)

    def sizes(self) -> dict[str, int | None]:
        """Return bytes as the engine reports them; None where it cannot tell."""
        names = ("weights", "cache", "swa", "window", "scratch", "compute", "row")
        sizes: dict[str, int | None] = {f"{name}_bytes": None for name in names}
        if self.job.arm.library is not None:
            return sizes
        from ..engine import bindings as c
        from ..engine.stats import read_memory_use

        stats = self.stats()
        use = read_memory_use(self.ctx, stats is not None)
        sizes.update(weights_bytes=use.model_bytes, compute_bytes=use.compute_bytes)
        if stats is None:
            sizes.update(cache_bytes=use.context_bytes, window_bytes=0, scratch_bytes=0)
            return sizes
        sizes.update(
            cache_bytes=stats.kv_bytes + stats.stock_bytes,
            swa_bytes=stats.stock_bytes,
            window_bytes=stats.window_bytes,
            scratch_bytes=use.scratch_bytes,
            row_bytes=c.ra_row_bytes(self.ctx),
        )
        return sizes

    def close(self) -> None:
        """Free the context, and the model if it is ours."""
        bindings.llama_batch_free(self._batch)
        if self.ctx:
            bindings.llama_free(self.ctx)
        if self._owns_model:
            bindings.llama_model_free(self.model)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ReasonAllocError):
            self.close()
