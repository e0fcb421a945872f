"""The bodies of requests: those of the llama_cpp bindings, made strict."""

# pydantic reads the annotations, on Python 3.9 too
# ruff: noqa: UP006, UP007, UP035, UP045

from __future__ import annotations

from typing import Any, Dict, List, Literal, Optional, Union

from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from pydantic import BaseModel, ConfigDict, Field, model_validator

_STRICT = ConfigDict(extra="forbid", json_schema_extra=None)

#: Roles that a message may have.
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = _STRICT
    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionBody(CreateCompletionRequest):  # type: ignore[misc, unused-ignore]
    """Body of /v1/completions. Defaults are the bindings' own, but for no repeat penalty."""

    model_config = _STRICT
    prompt: Union[str, List[int], List[str], List[List[int]]] = ""
    max_tokens: Optional[int] = Field(default=16, ge=0)
    min_tokens: Literal[0] = 0
    temperature: float = Field(default=0.8, ge=0.0, le=100.0)
    logprobs: Optional[int] = Field(default=None, ge=0, le=20)
    n: Optional[int] = Field(default=1, ge=1, le=128)
    best_of: Optional[int] = Field(default=None, ge=1)
    suffix: None = None
    repeat_penalty: float = Field(default=1.0, gt=0.0, le=1000.0)
    logit_bias: Optional[Dict[str, float]] = None
    logit_bias_type: Optional[Literal["input_ids"]] = None
    stream_options: Optional[StreamOptions] = None
    response_format: Optional[Dict[str, Any]] = None
    metadata: Optional[Dict[str, str]] = None

    @model_validator(mode="after")
    def _check(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported")
        return _check_stop(self)


class Function(BaseModel):
    """A function that a model may be told of."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: Optional[str] = None
    parameters: Dict[str, Any] = Field(default_factory=dict)
    strict: Optional[bool] = None


class Tool(BaseModel):
    """A tool: functions are all that there are."""

    model_config = _STRICT
    type: Literal["function"]
    function: Function


class ChosenName(BaseModel):
    """The function that is to be called."""

    name: str


class Chosen(BaseModel):
    """A tool that is to be called."""

    model_config = _STRICT
    type: Literal["function"]
    function: ChosenName


class Message(BaseModel):
    """One message of a chat; what else it holds goes to the chat template as it is."""

    model_config = ConfigDict(extra="allow")
    role: Role
    content: Union[str, List[Dict[str, Any]], None] = None


class ChatBody(CreateChatCompletionRequest):  # type: ignore[misc, unused-ignore]
    """Body of /v1/chat/completions. Defaults are the bindings' own, but for no repeat penalty."""

    model_config = _STRICT
    messages: List[Message] = Field(min_length=1)
    max_tokens: Optional[int] = Field(default=None, ge=1)
    max_completion_tokens: Optional[int] = Field(default=None, ge=1)
    min_tokens: Literal[0] = 0
    temperature: float = Field(default=0.8, ge=0.0, le=100.0)
    top_logprobs: Optional[int] = Field(default=None, ge=0, le=20)
    n: Optional[int] = Field(default=1, ge=1, le=128)
    repeat_penalty: float = Field(default=1.0, gt=0.0, le=1000.0)
    logit_bias: Optional[Dict[str, float]] = None
    logit_bias_type: Optional[Literal["input_ids"]] = None
    stream_options: Optional[StreamOptions] = None
    response_format: Optional[Dict[str, Any]] = None
    tools: Optional[List[Tool]] = None
    tool_choice: Union[Literal["none", "auto", "required"], Chosen, None] = None
    functions: None = None
    function_call: None = None
    parallel_tool_calls: Optional[bool] = None
    reasoning_effort: Optional[str] = None
    chat_template_kwargs: Dict[str, Any] = Field(default_factory=dict)
    metadata: Optional[Dict[str, str]] = None

    @model_validator(mode="after")
    def _check(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return _check_stop(self)


def _check_stop(body: Any) -> Any:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > 16 or any(not 0 < len(stop) <= 1000 for stop in stops):
        raise ValueError("stop takes up to 16 strings of 1 to 1000 characters")
    return body


class TokenizeBody(BaseModel):
    """Body of /tokenize."""

    model_config = _STRICT
    model: Optional[str] = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """Body of /detokenize."""

    model_config = _STRICT
    model: Optional[str] = None
    tokens: List[int]
