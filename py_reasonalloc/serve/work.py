"""From the body of a request to what is to be decoded: `Work`."""

from __future__ import annotations

import ctypes
import json
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine import bindings as c
from ..engine.errors import ConfigError, ReasonAllocError
from ..engine.prompts import RESERVED, chat_template, render_chat, tokenize
from ..session.config import BudgetConfig
from ..session.sequences.request import Request
from ..session.steering import Sampling
from ..session.thinking import known_tags
from .errors import ApiError, bad_value, too_long
from .grammar import asked_grammar
from .schema import ChatBody, CompletionBody, Tool
from .text import Writer

#: Most choices of a request.
MAX_CHOICES = 128


@dataclass
class Choice:
    """One text of a request, and how it is put together."""

    request: Request
    writer: Writer
    i_prompt: int


@dataclass
class Work:
    """A request, ready to be decoded.

    Attributes
    ----------
    id : str
        Of the answer.
    created : int
        Seconds since 1970.
    model : str
        Name that the answer gives.
    is_chat : bool
        Asked by /v1/chat/completions.
    choices : list of Choice
        Those of one prompt follow one another.
    prompts : list of str
        Text of each prompt, for `echo`.
    stream, include_usage, echo : bool
        As asked for.
    n_top : int or None
        Log-probabilities to report.
    tool : str or None
        Function whose arguments the text is.
    n_prompt : int
        Tokens of all prompts.
    n_added : int
        Tokens before each prompt's text that are no part of it: a BOS.
    """

    id: str
    created: int
    model: str
    is_chat: bool
    choices: list[Choice]
    prompts: list[str]
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    n_top: int | None = None
    tool: str | None = None
    n_prompt: int = 0
    n_added: list[int] = field(default_factory=list)


class Planner:
    """Turns bodies into work.

    Parameters
    ----------
    llama : ReasonLlama
        The session that is served; only its vocabulary is used here, from any thread.
    name : str
        Name of the model.
    n_ctx : int
        Most tokens of a text with its prompt.
    """

    def __init__(self, llama: Any, name: str, n_ctx: int) -> None:
        self.name, self.n_ctx = name, n_ctx
        self._model, self._config = llama._model, llama.config
        self._n_vocab: int = llama.n_vocab()
        self._pieces, self._special = llama.pieces(), llama.pieces(special=True)
        self._tags = known_tags(llama._model)

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self._n_vocab

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token, control tokens spelled out."""
        return self._special[token]

    # --- prompts ---------------------------------------------------------------------------------

    def tokens_of(self, text: str, add_special: bool = True) -> list[int]:
        """Return the tokens of a text; control tokens that it spells out are taken as such."""
        return tokenize(self._model, text.encode("utf-8", errors="replace"), add_special)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, control tokens spelled out.

        Raises
        ------
        ApiError
            There is no such token.
        """
        self._check_tokens(tokens)
        return b"".join(map(self.piece, tokens)).decode("utf-8", errors="replace")

    def tokenizer_info(self) -> dict[str, str | None]:
        """Return the tokens at which texts begin and end, and the chat template."""
        ends = {"bos_token": self._model.token_bos(), "eos_token": self._model.token_eos()}
        spelled = {name: self.text_of([t]) if t >= 0 else None for name, t in ends.items()}
        template = chat_template(self._model)
        if template is not None:
            template = template.encode("utf-8", errors="replace").decode("utf-8")
        return {**spelled, "pad_token": None, "chat_template": template}

    def completion(self, body: CompletionBody) -> Work:
        """Return the work of /v1/completions.

        Raises
        ------
        ApiError
            It cannot be done.
        """
        self._check_model(body.model)
        prompts, texts, added = [], [], []
        for given in self._prompts(body.prompt):
            if isinstance(given, str):
                tokens = self.tokens_of(given)
                bos = self._model.token_bos()
                added.append(int(tokens[:1] == [bos] and not given.startswith(self._symbol(bos))))
                texts.append(given)
            else:
                tokens = list(given)
                added.append(0)
                texts.append(self.text_of(tokens))
            prompts.append(self._fitting(tokens, body.max_tokens))
        asks_prompt = body.echo and body.logprobs is not None
        work = self._work(body, prompts, body.max_tokens, body.logprobs, asks_prompt, None)
        work.prompts, work.n_added, work.echo = texts, added, body.echo
        return work

    def _prompts(self, prompt: Any) -> list[Any]:
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise bad_value("the prompt is empty", "prompt")
        return [prompt] if isinstance(prompt[0], int) else list(prompt)

    def _symbol(self, token: int) -> str:
        return "\0" if token < 0 else self.piece(token).decode("utf-8", errors="replace") or "\0"

    def chat(self, body: ChatBody) -> Work:
        """Return the work of /v1/chat/completions.

        Raises
        ------
        ApiError
            It cannot be done.
        """
        self._check_model(body.model)
        chosen = self._chosen(body)
        variables = dict(body.chat_template_kwargs)
        for name in variables:
            if name in RESERVED:
                raise bad_value(
                    f"{name!r} is what the template gets anyhow", "chat_template_kwargs"
                )
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        if body.tools and body.tool_choice != "none":
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
        messages = [_message(message) for message in body.messages]
        try:
            rendered = render_chat(self._model, messages, variables)
        except ConfigError as error:
            raise bad_value(str(error), "messages") from None
        limit = body.max_completion_tokens or body.max_tokens
        prompt = self._fitting(tokenize(self._model, rendered, True), limit)
        n_top = (body.top_logprobs or 0) if body.logprobs else None
        work = self._work(body, [prompt], limit, n_top, False, chosen)
        work.is_chat, work.tool = True, None if chosen is None else chosen.function.name
        work.id = work.id.replace("cmpl-", "chatcmpl-")
        return work

    def _chosen(self, body: ChatBody) -> Tool | None:
        """Return the tool that is to be called, if one is."""
        tools, choice = body.tools or [], body.tool_choice
        if choice in (None, "none", "auto"):
            return None
        if choice == "required":
            if len(tools) > 1:
                message = "tool_choice = required takes one tool: name the function to be called"
                raise bad_value(message, "tool_choice")
            return tools[0]
        name = choice.function.name  # type: ignore[union-attr]
        for tool in tools:
            if tool.function.name == name:
                return tool
        raise bad_value(f"tool_choice: there is no tool {name!r}", "tool_choice")

    # --- checks ----------------------------------------------------------------------------------

    def _check_model(self, name: str | None) -> None:
        if name and name != self.name:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here, but {self.name!r}",
                code="model_not_found",
                param="model",
            )

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not 0 <= token < self._n_vocab:
                raise bad_value(f"the prompt: there is no token {token}", "prompt")

    def _fitting(self, tokens: Sequence[int], max_tokens: int | None) -> tuple[int, ...]:
        if not tokens:
            raise bad_value("the prompt is empty", "prompt")
        if len(tokens) > self.n_ctx - (max_tokens != 0):
            raise too_long(len(tokens), self.n_ctx)
        if self._config is not None:
            try:
                _check_protect(self._config, self._config.n_protect(len(tokens)))
            except ReasonAllocError as error:
                raise bad_value(f"the prompt has {len(tokens)} tokens: {error}", "prompt") from None
        return tuple(tokens)

    # --- choices ---------------------------------------------------------------------------------

    def _work(
        self,
        body: Any,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int | None,
        n_top: int | None,
        asks_prompt: bool,
        tool: Tool | None,
    ) -> Work:
        n = body.n or 1
        if n * len(prompts) > MAX_CHOICES:
            raise bad_value(f"n: a request has at most {MAX_CHOICES} choices", "n")
        sampling, grammar = _sampling(body), asked_grammar(body, tool)
        bias = self._bias(body.logit_bias)
        is_chat = isinstance(body, ChatBody)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        tags = self._tags if is_chat and grammar is None else None
        choices: list[Choice] = []
        for i, prompt in enumerate(prompts):
            for k in range(n):
                seed = (sampling.seed + k) % (2**32 - 1)
                try:
                    request = Request(
                        prompt,
                        max_tokens,
                        Sampling(**{**vars(sampling), "seed": seed}),
                        _draw(body),
                        grammar,
                        bias,
                        n_top=n_top,
                        prompt_logprobs=asks_prompt,
                    )
                except ConfigError as error:
                    raise bad_value(str(error)) from None
                writer = Writer(
                    len(choices), self._pieces, self._special, stops, tags, self._opens(prompt)
                )
                choices.append(Choice(request, writer, i))
        return Work(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.name,
            is_chat=False,
            choices=choices,
            prompts=[],
            stream=bool(body.stream),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            n_top=n_top,
            n_prompt=sum(map(len, prompts)),
        )

    def _opens(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt ends with the tag that opens thinking."""
        if self._tags is None or not self._tags[0]:
            return False
        tail = b"".join(map(self.piece, prompt[-64:])).rstrip()
        return tail.endswith(self._tags[0].encode())

    def _bias(self, given: Mapping[str, float] | None) -> dict[int, float]:
        bias = {}
        for text, value in (given or {}).items():
            if not text.isdecimal() or int(text) >= self._n_vocab:
                raise bad_value(f"logit_bias: there is no token {text[:40]!r}", "logit_bias")
            if not -100.0 <= value <= 100.0:
                raise bad_value(f"logit_bias[{text}] must be -100 to 100", "logit_bias")
            bias[int(text)] = value
        return bias


def _check_protect(config: BudgetConfig, n_protect: int) -> None:
    """Raise BudgetError if a budget cannot hold so many protected tokens."""
    native = config.to_native()
    native.n_protect = n_protect
    c.check(c.ra_config_check(ctypes.byref(native)))


def _message(message: Any) -> dict[str, Any]:
    """Return a message as templates take it: its content as text."""
    found: dict[str, Any] = message.model_dump(exclude_unset=True)
    parts = found.get("content")
    if isinstance(parts, list):
        texts = []
        for part in parts:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = str(part.get("type"))[:40]
                raise bad_value(f"content parts must be text: {kind!r} is not", "messages")
            texts.append(part["text"])
        found["content"] = "".join(texts)
    if found["role"] == "developer":
        found["role"] = "system"
    for call in found.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:  # templates want an object
                function["arguments"] = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                raise bad_value("a tool call's arguments are no JSON", "messages") from None
    found.setdefault("content", "")
    return found


def _sampling(body: Any) -> Sampling:
    seed = random.randrange(2**32 - 1) if body.seed is None else body.seed
    if seed < 0:
        raise bad_value("seed must be 0 or more", "seed")
    try:
        return Sampling(
            temp=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            seed=seed % (2**32 - 1),
            repeat_penalty=body.repeat_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
        )
    except ConfigError as error:
        raise bad_value(str(error)) from None


def _draw(body: Any) -> dict[str, Any]:
    names = ("mirostat_mode", "mirostat_tau", "mirostat_eta")
    return {name: getattr(body, name) for name in names}
