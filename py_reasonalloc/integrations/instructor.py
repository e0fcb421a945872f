"""instructor over a session: answers that are instances of a pydantic model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import instructor

from ..session.reason_llama import ReasonLlama


def create_function(llama: ReasonLlama) -> Callable[..., Any]:
    """Return instructor's ``create`` for a session.

    It takes the arguments of ``ReasonLlama.create_chat_completion`` and instructor's own:
    response_model, max_retries, ... The JSON schema of the response model becomes a grammar, so
    every answer that ends within max_tokens is valid.

    Parameters
    ----------
    llama : ReasonLlama
        The session; it stays yours to close.
    """

    def create(*args: Any, response_format: Any = None, **kwargs: Any) -> Any:
        # instructor speaks OpenAI's form, the bindings have one of their own and ignore this one
        if response_format and response_format.get("type") == "json_schema":
            schema = response_format["json_schema"]["schema"]
            response_format = {"type": "json_object", "schema": schema}
        return llama.create_chat_completion_openai_v1(
            *args, response_format=response_format, **kwargs
        )

    return instructor.patch(create=create, mode=instructor.Mode.JSON_SCHEMA)
