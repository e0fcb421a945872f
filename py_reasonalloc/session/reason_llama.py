"""`ReasonLlama`: `llama_cpp.Llama` with a budgeted KV cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from llama_cpp import _internals
from llama_cpp import llama_cpp as bindings

from ..engine import bindings as c
from ..engine.errors import (
    ComputeError,
    ConfigError,
    ContextFullError,
    UnsupportedError,
)
from ..engine.modelfile import check_model_file
from ..engine.stats import (
    KVStats,
    MemoryUse,
    read_memory_use,
    read_stats,
)
from ..profile.files import Profile
from .arguments import check_keywords, check_paths, check_threads, session_config
from .checkpoints import DEFAULT_BYTES
from .checks import check_int
from .config import BudgetConfig, kv_type_id
from .drafts import AllLogits, FittingDrafts, with_drafts
from .foreign import Tolerant
from .guard import guarded
from .opening import pending_budget
from .reading import PromptReader
from .rows import reserve_rows
from .several import Several
from .state import Restorable
from .steering import Steerable

#: Arguments that go with the stock cache only.
NEED_STOCK = {
    "embedding": "takes several sequences, which only the stock cache holds",
}

#: Length of a context that is made for its vocabulary alone; the default of `llama_cpp.Llama`.
VOCAB_N_CTX = 512


@guarded
class ReasonLlama(Restorable, Steerable, Several, Tolerant):
    """A `llama_cpp.Llama` whose KV cache never holds more than budget + buffer tokens per head.

    Everything that `llama_cpp.Llama` does works the same way. Differences: llama.cpp's log is
    silent by default (``verbose=False``), flash attention is on, and the context is as long as the
    model was trained for (``n_ctx=0``), which costs no cache memory with a budget. For several
    sequences (``embedding=True``) it needs the stock cache.

    A session may be used from several threads: calls take turns (`py_reasonalloc.session.turns`).
    In a forked process it raises ContextError, and so does every call once it is closed.

    Parameters
    ----------
    model_path : path-like
        GGUF file.
    budget : int, BudgetConfig or None
        Tokens kept per (layer, KV head); a `BudgetConfig` for everything that can be set; None for
        the stock cache (then pass `n_ctx`: a stock cache for the trained context is allocated
        whole).
    policy, buffer, sinks, window, protect_prompt, budget_swa
        See `BudgetConfig`. Not together with a `BudgetConfig`.
    profile : "auto", path, Profile or None
        Layer profile. "auto" takes the one that fits the model best, calibrated here or shipped, if
        there is any (see `py_reasonalloc.profile.lookup`). Not together with a `BudgetConfig`.
    layers, heads : optional
        See `BudgetConfig`. None: with a profile "error", or "wave" if it has no error curves; else
        "uniform". Heads of a layer are "uniform" unless told otherwise. So ``profile="auto"`` is
        what ``reasonalloc-run`` does: "error" with policy "loss" where a profile with error curves
        fits, else "uniform" with "rkv". Not together with a `BudgetConfig`.
    n_ctx : int
        Length of the context in tokens; 0: as trained.
    n_batch, n_ubatch : int
        As in the base class; with a budget n_ubatch is at most the buffer.
    n_seq_max : int
        Sequences of the context. The session itself uses the first one; for the others there is
        `py_reasonalloc.session.sequences`. With a budget each has the whole context, and the cache
        takes n_seq_max times the memory; sequences of the stock cache share the rows of one.
    flash_attn : bool
        Needed for quantised V.
    type_k, type_v : str or int
        Cache types: a name of `KV_TYPES`, f16 by default, or a number of enum ggml_type.
    checkpoints : int
        With a budget: bytes of RAM for snapshots, from which a changed prompt is gone on instead of
        being read anew, with the same text; 0: none. None are taken with ``logits_all=True``.
    verbose : bool
        Let llama.cpp log to stderr.
    **kwargs
        Of `llama_cpp.Llama`. With ``logits_all=True`` rows of logits are allocated as tokens come.

    Raises
    ------
    ModelFileError, ConfigError, BudgetError, NotFoundError, UnsupportedError, ContextError
        All of them are a `ValueError`.
    TypeError
        No argument has such a name.
    """

    config: BudgetConfig | None
    n_tokens: int
    _n_ctx: int
    _ctx: Any
    _logits_all: bool
    _batch: Any

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        budget: int | BudgetConfig | None = BudgetConfig.budget,
        policy: str = BudgetConfig.policy,
        *,
        buffer: int = BudgetConfig.buffer,
        sinks: int = BudgetConfig.sinks,
        window: int = BudgetConfig.window,
        protect_prompt: str | int = BudgetConfig.protect_prompt,
        budget_swa: int = BudgetConfig.budget_swa,
        layers: str | Sequence[int] | None = None,
        heads: str | None = None,
        profile: str | os.PathLike[str] | Profile | None = None,
        n_ctx: int = 0,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        flash_attn: bool = True,
        type_k: str | int | None = None,
        type_v: str | int | None = None,
        checkpoints: int = DEFAULT_BYTES,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._guard()
        check_int("checkpoints", checkpoints, 0, 2**62)
        check_keywords(ReasonLlama.__init__, kwargs)
        check_paths(kwargs)
        shared: dict[str, Any] = {
            "policy": policy,
            "buffer": buffer,
            "sinks": sinks,
            "window": window,
            "protect_prompt": protect_prompt,
            "budget_swa": budget_swa,
        }
        alloc = {"layers": layers, "heads": heads, "profile": profile}
        self.config = session_config(model_path, budget, shared, alloc)
        check_threads(kwargs)
        self._ask_sequences(n_seq_max, bool(kwargs.get("embedding")))
        self._asked_ubatch = n_ubatch
        if self.config is not None:
            n_ubatch = min(n_ubatch, self.config.buffer)
            for name, why in NEED_STOCK.items():
                if kwargs.get(name):
                    raise UnsupportedError(f"{name} {why}: pass budget=None")
            if kwargs.get("draft_model") is not None:
                self.config = with_drafts(self.config, kwargs["draft_model"])
                kwargs["draft_model"] = FittingDrafts(kwargs["draft_model"], self)
        self._n_protect = 0 if self.config is None else self.config.to_native().n_protect
        self._decode_error = ""
        if kwargs.get("vocab_only") and n_ctx == 0:
            n_ctx = VOCAB_N_CTX  # without its hyperparameters a model has no trained length
        logits_all = kwargs.pop("logits_all", False)
        self._reader = PromptReader(0 if logits_all else checkpoints)
        self._checkpoint_bytes = checkpoints
        kwargs.update(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            flash_attn=flash_attn,
            type_k=None if type_k is None else kv_type_id(type_k),
            type_v=None if type_v is None else kv_type_id(type_v),
            verbose=verbose,
        )
        self._open(check_model_file(model_path), kwargs)
        # The base class would allocate n_ctx rows.
        n_rows = 1
        if self.config is None or self.draft_model is None:
            self._logits_all = self._logits_all or logits_all
        else:
            self._logits_all = logits_all
            self._batch = AllLogits(self._batch)
            n_rows += self.config.n_draft  # the base class looks back into a draft
        self.scores = np.zeros((n_rows, self._n_vocab), dtype=np.single)
        # llama.cpp rounds the context up to a multiple of 256; the base class has room for n_ctx.
        self._n_ctx = min(self._n_ctx, len(self.input_ids))

    def _open(self, path: str, kwargs: dict[str, Any]) -> None:
        """Run the base constructor with the configuration pending for the context it makes."""
        with pending_budget(self, path, kwargs["verbose"], kwargs.get("vocab_only", False)):
            super().__init__(path, **kwargs)

    def reconfigure(
        self,
        budget: int | BudgetConfig | None,
        *,
        type_k: str | int | None = None,
        type_v: str | int | None = None,
    ) -> None:
        """Start over with another cache on the weights that are loaded; the session is then empty.

        Parameters
        ----------
        budget : int, BudgetConfig or None
            As in the constructor; an int stands for a `BudgetConfig` of that budget.
        type_k, type_v : str, int or None
            Cache types; None: as they are.

        Raises
        ------
        ConfigError, BudgetError, UnsupportedError, ContextError
            The session is closed if no context could be made.
        """
        config = BudgetConfig(budget=budget) if isinstance(budget, int) else budget
        types = {"type_k": type_k, "type_v": type_v}
        ids = {name: kv_type_id(kind) for name, kind in types.items() if kind is not None}
        if self.lora_path is not None:
            raise UnsupportedError("a session with a LoRA adapter cannot be reconfigured")
        if self.draft_model is not None and (config is None or self.config is None):
            raise UnsupportedError("a draft_model is for one kind of cache: open a session")
        if config is not None and self.draft_model is not None:
            config = with_drafts(config, self.draft_model.model)
        self.config = config
        self._n_protect = 0 if config is None else config.to_native().n_protect
        params = self.context_params
        params.n_ubatch = min(self.n_batch, self._asked_ubatch)
        if config is not None:
            params.n_ubatch = min(params.n_ubatch, config.buffer)
        for name, kind in ids.items():
            setattr(params, name, kind)
        self._ctx.close()
        self.n_tokens, self._requires_eval, self._sampler = 0, True, None
        self._reader = PromptReader(self._reader.store.limit)
        with pending_budget(self, self.model_path, self.verbose):
            self._ctx = self._stack.enter_context(
                contextlib.closing(
                    _internals.LlamaContext(model=self._model, params=params, verbose=True)
                )
            )

    # --- statistics ------------------------------------------------------------------------------

    def kv_stats(self) -> KVStats:
        """Return what the engine reports about the cache, as a snapshot.

        Raises
        ------
        NotFoundError
            The session has no budget.
        """
        return read_stats(self.ctx, bindings.llama_model_n_layer(self.model))

    def memory_use(self) -> MemoryUse:
        """Return the bytes of weights, cache and buffers, as the engine reports them."""
        return read_memory_use(self.ctx, self.config is not None)

    # --- decoding --------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens after those that the session holds.

        Raises
        ------
        ContextFullError
            They do not fit into the context; nothing was decoded.
        ComputeError
            The decode failed or was aborted. The session holds what was decoded before.
        """
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextFullError(
                f"{self.n_tokens} + {len(tokens)} tokens exceed the context of {self._n_ctx}"
            )
        if len(tokens) == 0:
            return
        if self.config is None:
            self._decode(tokens)
            return
        self._align_cache()
        start = self.n_tokens
        for end, is_checkpoint in self._reader.calls(self, len(tokens)):
            self._decode(tokens[self.n_tokens - start : end - start])
            if is_checkpoint:
                self._reader.keep(self)

    def _align_cache(self) -> None:
        """Make the cache hold exactly the session's tokens.

        It holds more after a cut of `n_tokens` or an interrupted decode. Where the surplus cannot
        be removed, because something before the cut was evicted, the tokens are read again.
        """
        if self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1) and self.n_cached() == self.n_tokens:
            return
        tokens = self.input_ids[: self.n_tokens].tolist()
        self.clear()
        if tokens:
            self._decode(tokens)

    def _decode(self, tokens: Sequence[int]) -> None:
        start, former_error = self.n_tokens, c.last_error()
        self._requires_eval = True
        if self._logits_all:
            reserve_rows(self, start + len(tokens))
        try:
            super().eval(tokens)
        except BaseException as error:
            # Count what the cache really holds: parts of a batch may have been decoded.
            self._requires_eval = True
            self.n_tokens = min(self.n_cached(), start + len(tokens))
            known = list(tokens[: max(self.n_tokens - start, 0)])
            self.input_ids[start : start + len(known)] = known
            if isinstance(error, RuntimeError) and "llama_decode returned" in str(error):
                # the thread's last error may be an old one about something else
                if c.last_error() != former_error:
                    self._decode_error = c.last_error()
                reason = self._decode_error if self._decode_error == c.last_error() else ""
                raise ComputeError(": ".join(filter(None, (str(error), reason)))) from None
            raise

    @property
    def n_protect(self) -> int:
        """Positions [0, n_protect) are never evicted."""
        return self._n_protect

    def n_cached(self) -> int:
        """Return the number of tokens that the cache stands for."""
        if self._ctx.memory is None:  # an embedding model of the base class
            return self.n_tokens
        return int(bindings.llama_memory_seq_pos_max(self._ctx.memory, 0)) + 1

    def clear(self) -> None:
        """Empty the session and its cache; what the engine counts per text starts anew."""
        self._ctx.kv_cache_clear()
        self.n_tokens = 0
        self._requires_eval = True

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Generate tokens after a prompt; see `llama_cpp.Llama.generate` for the parameters.

        Ends at the end of the context. The prompt is protected as configured. Tokens of earlier
        calls are reused where the cache or a checkpoint is what reading the whole prompt would have
        left, or where the prompt goes on after all that the session holds.

        Raises
        ------
        ContextFullError
            The prompt does not fit into the context.
        BudgetError
            The budget cannot hold the protected prompt.
        """
        tokens = list(tokens)
        reset = args[6] if len(args) > 6 else kwargs.get("reset", True)
        n_before = 0 if reset else self.n_tokens
        if n_before + len(tokens) == 0:
            raise ConfigError("the prompt is empty")
        if n_before + len(tokens) > self._n_ctx:
            raise ContextFullError(
                f"the prompt has {n_before + len(tokens)} tokens, more than the context of "
                f"{self._n_ctx}"
            )
        if reset and self.config is not None:
            self._reader.begin(self, tokens)
        stream = super().generate(list(tokens), *args, **kwargs)
        n_known, sent = n_before + len(tokens), None
        try:
            while True:
                token = stream.send(sent)
                sent = yield token
                n_known += 1 + len(sent or ())
        except (StopIteration, ContextFullError):
            return
        finally:
            stream.close()
            if self.n_tokens > n_known:  # drafts that were never verified
                self.n_tokens, self._requires_eval = n_known, True
                if self._ctx.ctx is not None:
                    self._ctx.kv_cache_seq_rm(-1, n_known, -1)

    # --- life time -------------------------------------------------------------------------------

    def __enter__(self) -> ReasonLlama:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
