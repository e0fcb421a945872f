"""From a user's text to the model's tokens: its chat template, and where a BOS comes from.

As llama.cpp's own programs do it (common/chat.cpp, tools/server of the pinned tree): the template
is rendered, a BOS at its start is taken off, and the tokenizer puts one there if the model's file
says so (tokenizer.ggml.add_bos_token). So there is one where it is wanted, whether the template has
it or not, and never two. `llama_cpp.Llama` and transformers leave all of that to the template.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConfigError

#: Names that a template gets anyhow.
RESERVED = frozenset(
    "messages eos_token bos_token raise_exception add_generation_prompt functions function_call "
    "tools tool_choice strftime_now".split()
)
_TEMPLATE = "the model's chat template (tokenizer.chat_template)"


def encode_prompt(
    model: Any,
    text: str,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> list[int]:
    """Turn a user's text into tokens.

    Parameters
    ----------
    model : llama_cpp._internals.LlamaModel
        With its vocabulary loaded.
    text : str
        What the user wrote.
    raw : bool
        Leave out the model's chat template. A model without one is always raw.
    variables : mapping, optional
        What the template gets beside the message, such as ``enable_thinking``.
    system : str, optional
        A system message before it.

    Raises
    ------
    ConfigError
        The text is empty, or the chat template cannot be applied to it, or there is none for the
        variables or the system message.
    """
    if not text.strip():
        raise ConfigError("the prompt is empty")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    tokens = tokenize(model, render(model, messages, raw, variables), add_special=True)
    if not tokens:
        raise ConfigError("the prompt has no tokens in this model's vocabulary")
    return tokens


def render(
    model: Any,
    messages: Sequence[Mapping[str, str]],
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the text that a model gets for a conversation, without a BOS that its file asks for.

    Parameters
    ----------
    messages : sequence of mapping
        role and content of each.
    raw : bool
        Leave out the model's chat template: the messages are joined as they are. A model without
        one is always raw.
    variables : mapping, optional
        What the template gets beside the messages.

    Raises
    ------
    ConfigError
        The chat template cannot be applied, or there is none for the variables or a system message.
    """
    template = None if raw else chat_template(model)
    if template is not None:
        try:
            rendered = _apply_template(model, template, messages, dict(variables or {}))
        except ConfigError as error:
            raise ConfigError(f"{error}: pass --raw to go without it") from None
        for message in messages:
            if message["role"] == "system" and message["content"].strip().encode() not in rendered:
                raise ConfigError(f"{_TEMPLATE} takes no system message")
        return rendered
    only = next(iter(variables), None) if variables else None
    if any(message["role"] == "system" for message in messages):
        only = "system"
    if only is not None:
        missing = "--raw leaves the chat template out" if raw else "the model has none"
        raise ConfigError(f"{only} is for a chat template, but {missing}")
    return "".join(message["content"] for message in messages).encode("utf-8")


def chat_template(model: Any) -> str | None:
    """Return a model's chat template, foreign bytes as lone surrogates; None: it has none."""
    from llama_cpp import llama_cpp as bindings

    template: bytes | None = bindings.llama_model_chat_template(model.model, None)
    return None if template is None else template.decode("utf-8", errors="surrogateescape")


def tokenize(model: Any, text: bytes, add_special: bool) -> list[int]:
    """Return the tokens of a text; control tokens that it spells out are taken as such.

    Parameters
    ----------
    add_special : bool
        Add BOS and EOS where the model's file says so.
    """
    from llama_cpp import llama_cpp as bindings

    n_max = len(text) + 2
    while True:
        tokens = (ctypes.c_int32 * n_max)()
        n = bindings.llama_tokenize(model.vocab, text, len(text), tokens, n_max, add_special, True)
        if n >= 0:
            return tokens[:n]
        n_max = -n


def read_variable(text: str) -> tuple[str, Any]:
    """Return name and value of a template variable that is written as ``NAME=VALUE``.

    The value is JSON, or else the text as it stands.

    Raises
    ------
    ConfigError
        No name, or one that templates get anyhow.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"{text!r} is not NAME=VALUE, such as enable_thinking=false")
    if name in RESERVED:
        raise ConfigError(f"{name!r} is what the chat template gets anyhow: choose another name")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


@functools.lru_cache(maxsize=8)
def _formatter(template: str, eos_token: str, bos_token: str) -> Any:
    """Return the compiled template: an evaluation uses it for hundreds of prompts."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(template=template, eos_token=eos_token, bos_token=bos_token)


def render_chat(model: Any, messages: Sequence[Any], variables: Mapping[str, Any]) -> bytes:
    """Return what the model's chat template makes of messages; to be tokenized with add_special.

    Parameters
    ----------
    messages : sequence of mapping
        As templates take them: role, content and what goes with them.
    variables : mapping
        What the template gets beside them.

    Raises
    ------
    ConfigError
        There is no template, or it fails or makes nothing of the messages.
    """
    template = chat_template(model)
    if template is None:
        raise ConfigError("the model's file has no chat template (tokenizer.chat_template)")
    return _apply_template(model, template, messages, variables)


def _apply_template(
    model: Any, template: str, messages: Sequence[Any], variables: Mapping[str, Any]
) -> bytes:
    """Return what the template makes of messages, its own bytes as they are in the file."""
    from llama_cpp import llama_cpp as bindings

    def symbol(token: int) -> str:
        if token < 0:
            return ""
        spelled: bytes = bindings.llama_vocab_get_text(model.vocab, token)
        return spelled.decode("utf-8", errors="surrogateescape")

    bos = symbol(model.token_bos())
    try:
        formatter = _formatter(template, symbol(model.token_eos()), bos)
        rendered = str(formatter(messages=[dict(m) for m in messages], **variables).prompt)
    except Exception as error:  # noqa: BLE001 - a template is a program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{_TEMPLATE} failed ({reason})") from None
    if not rendered.strip():
        raise ConfigError(f"{_TEMPLATE} makes nothing of the prompt")
    if bos and bindings.llama_vocab_get_add_bos(model.vocab) and rendered.startswith(bos):
        rendered = rendered[len(bos) :]
    return rendered.encode("utf-8", errors="surrogateescape")
