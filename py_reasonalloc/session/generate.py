"""The decode loop: one prompt in, text piece by piece out."""

from __future__ import annotations

import codecs
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from llama_cpp import LlamaGrammar
from llama_cpp import llama_cpp as bindings

from .marks import StopStrings
from .reason_llama import ReasonLlama
from .steering import Sampling
from .thinking import Thinking, ThinkLimit

#: The model ended its text, max_tokens were reached, the context is full, the user stopped it.
STOP, LENGTH, CONTEXT, INTERRUPTED = "stop", "length", "context", "interrupted"
#: The text came to one of the strings that end it.
STOP_STRING = "stop_string"


@dataclass(frozen=True)
class Timing:
    """Time that the engine spent (llama_perf_context), seconds.

    Attributes
    ----------
    prompt_seconds : float
        Reading the prompt.
    decode_seconds : float
        Decoding the generated tokens, compressions included.
    n_decoded : int
        Tokens decoded in `decode_seconds`: the last generated one never is.
    """

    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    n_decoded: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second; 0 if none was."""
        return self.n_decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0


class Generation:
    """One text in the making. Iterate over it once for its pieces.

    Parameters
    ----------
    llama : ReasonLlama
        An open session.
    prompt : sequence of int
        Tokens of the prompt, at least one.
    max_tokens : int
        Most tokens to generate; 0: as many as the context holds.
    sampling : Sampling
        How tokens are drawn.
    think : ThinkLimit, optional
        How long the model may think.
    n_before : int
        Tokens at the end of the prompt that are this text's: it is continued.
    keeps_rest : bool
        Leave a character that is not complete to whoever continues the text.
    stop : sequence of str
        Texts that end this one; they are left out of it.
    grammar : str, optional
        GBNF that the text is held to.
    spelled : set of int
        Control tokens that are part of the text all the same: those of the tags of thinking.

    Attributes
    ----------
    thinking : Thinking or None
        What is known about its thinking, if that is limited.
    tokens : list of int
        Generated so far, without the token that ends the text.
    stop_reason : str or None
        One of "stop", "stop_string", "length", "context", "interrupted"; None while it goes on.
    first_token_seconds : float or None
        From the call to the first token, by the clock; None before.
    """

    def __init__(
        self,
        llama: ReasonLlama,
        prompt: Sequence[int],
        max_tokens: int = 0,
        sampling: Sampling | None = None,
        think: ThinkLimit | None = None,
        n_before: int = 0,
        keeps_rest: bool = False,
        stop: Sequence[str] = (),
        grammar: str | None = None,
        spelled: Collection[int] = (),
    ) -> None:
        self.llama = llama
        self.prompt = list(prompt)
        self.max_tokens = max_tokens
        self.sampling = Sampling() if sampling is None else sampling
        n_prompt = len(self.prompt) - n_before
        self._before, self._keeps_rest = self.prompt[n_prompt:], keeps_rest
        self.thinking = None
        if think is not None:
            self.thinking = Thinking(llama, think, self.prompt[:n_prompt])
        self.tokens: list[int] = []
        self.stop_reason: str | None = None
        self.first_token_seconds: float | None = None
        self._stop, self._grammar, self._spelled = StopStrings(stop), grammar, spelled
        self._prompt_ms: float | None = None
        self._n_read = 0

    def interrupt(self) -> None:
        """Stop after the token that is in the making; before the first one, without any."""
        self.stop_reason = self.stop_reason or INTERRUPTED

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text as they come; incomplete UTF-8 is held back until it is complete."""
        if self.stop_reason is not None:
            return
        llama, sampling, began = self.llama, self.sampling, time.perf_counter()
        bindings.llama_perf_context_reset(llama.ctx)
        llama.set_seed(sampling.seed)
        llama.steer(sampling, self._before)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces, special = llama.pieces(), llama.pieces(special=True)
        stream = llama.generate(
            self.prompt,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            top_p=sampling.top_p,
            temp=sampling.temp,
            repeat_penalty=sampling.repeat_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            grammar=None if self._grammar is None else LlamaGrammar.from_string(self._grammar),
        )
        self._limit_thinking()
        for token in self._before:
            decoder.decode(pieces[token])
            self._limit_thinking(token, is_whole=decoder.getstate()[0] == b"")
        if self._before and self.thinking is not None:
            llama.force(self.thinking.still_forced)
        try:
            for token in stream:
                if self._prompt_ms is None:
                    self._prompt_ms = self._engine_ms()
                    self._n_read = llama.n_tokens
                    self.first_token_seconds = time.perf_counter() - began
                if self.stop_reason is not None:
                    break
                if bindings.llama_vocab_is_eog(llama._model.vocab, token):
                    self.stop_reason = STOP
                    break
                self.tokens.append(token)
                piece = decoder.decode((special if token in self._spelled else pieces)[token])
                self._limit_thinking(token, is_whole=decoder.getstate()[0] == b"")
                piece = self._stop.feed(piece)
                if self._stop.is_met:
                    self.stop_reason = self.stop_reason or STOP_STRING
                if piece:
                    yield piece
                if len(self.tokens) == self.max_tokens:
                    self.stop_reason = self.stop_reason or LENGTH
                if self.stop_reason is not None:
                    break
        finally:
            llama.steer(None)
        self.stop_reason = self.stop_reason or CONTEXT
        rest = decoder.decode(b"", final=True)
        if self._keeps_rest and self.stop_reason != STOP:
            rest = ""
        rest = self._stop.feed(rest) + self._stop.rest()
        if rest:
            yield rest

    def _limit_thinking(self, token: int | None = None, is_whole: bool = True) -> None:
        """Take the newest token, and let the end of thinking come next if it is due."""
        if self.thinking is None:
            return
        if token is not None:
            self.thinking.add(token)
        if self.thinking.is_due(is_whole):
            self.llama.force(self.thinking.forced)

    def _engine_ms(self) -> float:
        perf = bindings.llama_perf_context(self.llama.ctx)
        return float(perf.t_p_eval_ms + perf.t_eval_ms)

    def timing(self) -> Timing:
        """Return the engine's times up to now."""
        total_ms = self._engine_ms()
        if self._prompt_ms is None:
            return Timing(prompt_seconds=total_ms / 1e3)
        return Timing(
            prompt_seconds=self._prompt_ms / 1e3,
            decode_seconds=(total_ms - self._prompt_ms) / 1e3,
            n_decoded=self.llama.n_tokens - self._n_read,
        )
