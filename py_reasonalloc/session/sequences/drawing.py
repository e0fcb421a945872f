"""How a chain draws its tokens: `Drawer`, a sampler chain of llama.cpp of its own."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings

from ...engine.errors import ComputeError, ConfigError
from .request import DRAW, Request

_ENTRY = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def check_grammar(llama: Any, grammar: Any) -> None:
    """Raise ConfigError if llama.cpp cannot read a grammar; None: there is none."""
    if grammar is not None:
        bindings.llama_sampler_free(_grammar_sampler(llama, grammar))


def _grammar_sampler(llama: Any, grammar: Any) -> Any:
    text, root = grammar._grammar.encode(), grammar._root.encode()
    sampler = bindings.llama_sampler_init_grammar(llama._model.vocab, text, root)
    if not sampler:
        raise ConfigError("the grammar cannot be read: see llama.cpp's grammars/README.md")
    return sampler


class Drawer:
    """Draws tokens as `ReasonLlama.generate` does with the same options and seed.

    A grammar is asked first, on its own: where it admits no token of the vocabulary, llama.cpp's
    chain would end the process.

    Parameters
    ----------
    llama : ReasonLlama
        An open session.
    request : Request
        What it asks for.

    Raises
    ------
    ConfigError
        The grammar cannot be read.
    """

    def __init__(self, llama: Any, request: Request) -> None:
        self._grammar: Any = None
        self._sampler = _sampler(llama, request)
        if request.grammar is not None:
            self._grammar = _grammar_sampler(llama, request.grammar)

    def draw(self, ctx: Any, row: int, n_vocab: int) -> int:
        """Draw from the logits of one token of the last batch.

        Raises
        ------
        ComputeError
            The grammar admits nothing that the vocabulary has.
        """
        if self._grammar is None:
            return int(bindings.llama_sampler_sample(self._sampler.sampler, ctx, row))
        entries = np.zeros(n_vocab, _ENTRY)
        entries["id"] = np.arange(n_vocab)
        entries["logit"] = logits_row(ctx, row, n_vocab)
        pointer = entries.ctypes.data_as(bindings.llama_token_data_p)
        array = bindings.llama_token_data_array(data=pointer, size=n_vocab, selected=-1)
        bindings.llama_sampler_apply(self._grammar, ctypes.byref(array))
        if not np.isfinite(entries["logit"]).any():
            raise ComputeError("the grammar admits no token of the model's vocabulary here")
        bindings.llama_sampler_apply(self._sampler.sampler, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Take a token that was not drawn here, so that penalties count it."""
        if self._grammar is not None:
            bindings.llama_sampler_accept(self._grammar, token)
        self._sampler.accept(token)

    def clone(self) -> Drawer:
        """Return one that goes on as this one would."""
        twin: Drawer = Drawer.__new__(Drawer)
        twin._grammar = None
        twin._sampler = self._sampler.clone()
        if self._grammar is not None:
            twin._grammar = bindings.llama_sampler_clone(self._grammar)
        return twin

    def close(self) -> None:
        """Free it; may be called twice."""
        if self._grammar is not None:
            bindings.llama_sampler_free(self._grammar)
            self._grammar = None
        self._sampler.close()


def _sampler(llama: Any, request: Request) -> Any:
    """Return the base class's chain with the request's options; the session stays as it was."""
    sampling, seed = request.sampling, llama._seed
    llama.steer(sampling)
    llama._seed = sampling.seed
    try:
        sampler = llama._init_sampler(
            **{**DRAW, **request.draw},
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            temp=sampling.temp,
            repeat_penalty=sampling.repeat_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
        )
    finally:
        llama.steer(None)
        llama._seed = seed
    if request.logit_bias:
        chain = sampler.sampler
        n = bindings.llama_sampler_chain_n(chain)
        parts = [bindings.llama_sampler_chain_remove(chain, 0) for _ in range(n)]
        sampler.add_logit_bias(llama.n_vocab(), dict(request.logit_bias))
        for part in parts:
            bindings.llama_sampler_chain_add(chain, part)
    return sampler


def logits_row(ctx: Any, row: int, n_vocab: int) -> npt.NDArray[np.float32]:
    """Return a view of the logits of one token of the last batch, [n_vocab].

    Raises
    ------
    ComputeError
        They were not computed.
    """
    pointer = bindings.llama_get_logits_ith(ctx, row)
    if not pointer:
        raise ComputeError(f"the batch has no logits in row {row}")
    return np.ctypeslib.as_array(pointer, (n_vocab,))
