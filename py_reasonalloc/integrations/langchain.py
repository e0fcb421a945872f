"""LangChain's llama.cpp models over a session that you open: `ReasonLLM` and `ChatReason`.

LangChain opens a `llama_cpp.Llama` from its own list of options, where a budget has no place. Here
the session comes first, with all it can be given, and the framework's class goes around it.
"""

from __future__ import annotations

from typing import Any

from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.llms import LlamaCpp
from langchain_core.utils import pre_init
from llama_cpp import LlamaGrammar
from pydantic import model_validator

from ..session.reason_llama import ReasonLlama


def _check_client(client: Any) -> ReasonLlama:
    if not isinstance(client, ReasonLlama):
        raise ValueError("client must be a ReasonLlama: pass client=ReasonLlama(path, budget=...)")
    return client


def _grammar(grammar: Any, path: Any) -> Any:
    if grammar and path:
        raise ValueError("grammar and grammar_path exclude each other")
    if path:
        return LlamaGrammar.from_file(path)
    return LlamaGrammar.from_string(grammar) if isinstance(grammar, str) else grammar


class ReasonLLM(LlamaCpp):
    """`langchain_community.llms.LlamaCpp` around an open `ReasonLlama`.

    Parameters
    ----------
    client : ReasonLlama
        The session; it stays yours to close. Options that describe how to open a model are its own
        and have no effect here.
    **kwargs
        Of `LlamaCpp`: temperature, max_tokens, stop, grammar, streaming, ...
    """

    model_path: str = ""

    @pre_init
    def validate_environment(cls, values: dict[str, Any]) -> dict[str, Any]:  # noqa: N805
        """Take the session instead of opening a model."""
        client = _check_client(values["client"])
        values["model_path"], values["n_ctx"] = client.model_path, client.n_ctx()
        values["grammar"] = _grammar(values["grammar"], values["grammar_path"])
        return values


class ChatReason(ChatLlamaCpp):
    """`langchain_community.chat_models.ChatLlamaCpp` around an open `ReasonLlama`.

    Parameters
    ----------
    client, **kwargs
        As in `ReasonLLM`; the model's own chat template is used.
    """

    model_path: str = ""
    grammar: Any = None

    @model_validator(mode="after")
    def validate_environment(self) -> ChatReason:
        """Take the session instead of opening a model."""
        client = _check_client(self.client)
        self.model_path, self.n_ctx = client.model_path, client.n_ctx()
        self.grammar = _grammar(self.grammar, self.grammar_path)
        return self
