"""What a request is refused with: OpenAI's error form, and never a path of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is refused or failed.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        One line for the caller.
    kind : str
        OpenAI's error type.
    code : str, optional
        OpenAI's error code.
    param : str, optional
        The field that is wrong.
    headers : mapping, optional
        Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = error_body(message, kind, code, param)


def error_body(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_value(message: str, param: str | None = None) -> ApiError:
    """Return the error for a field whose value cannot be."""
    return ApiError(400, message, param=param)


def too_long(n_prompt: int, n_ctx: int) -> ApiError:
    """Return the error for a prompt that does not fit into a sequence."""
    return ApiError(
        400,
        f"this model's context is {n_ctx} tokens, and the prompt has {n_prompt}: shorten it",
        code="context_length_exceeded",
        param="prompt",
    )


def busy(seconds: int) -> ApiError:
    """Return the error for a full queue."""
    return ApiError(
        429,
        f"the queue is full: try again in {seconds} s",
        "rate_limit_error",
        "queue_full",
        headers={"Retry-After": str(seconds)},
    )


def closing() -> ApiError:
    """Return the error for a request that the end of the server cuts off or meets."""
    return ApiError(
        503, "the server is shutting down", "server_error", headers={"Retry-After": "10"}
    )
