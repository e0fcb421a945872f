"""What stands before the routes: the key, the limit on bodies, the count of requests."""

from __future__ import annotations

import hmac
import time
from typing import Any

from starlette.responses import JSONResponse

from .errors import ApiError, error_body
from .metrics import Metrics

#: Paths that are counted by name; everything else is "other".
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
#: Paths that need no key.
OPEN = ("/health",)


class _TooLarge(Exception):
    pass


class Outside:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    app : ASGI application
        What it protects.
    metrics : Metrics
        Where requests are counted.
    api_key : str or None
        What callers must bring; None: nothing.
    max_body : int
        Most bytes of a body.
    """

    def __init__(self, app: Any, metrics: Metrics, api_key: str | None, max_body: int) -> None:
        self._app, self._metrics, self._max_body = app, metrics, max_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._inside(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.count(path, status, time.monotonic() - began)

    async def _inside(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if not self._is_allowed(scope["path"], headers.get(b"authorization", b"")):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            body = error_body(message, "invalid_request_error", "invalid_api_key")
            answer = JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        n, has_begun = 0, False

        async def counting() -> Any:
            nonlocal n
            message = await receive()
            n += len(message.get("body", b""))
            if n > self._max_body:
                raise _TooLarge
            return message

        async def noting(message: Any) -> None:
            nonlocal has_begun
            if n > self._max_body and not has_begun:
                raise _TooLarge  # the framework has taken the first one for a broken body
            has_begun = True
            await send(message)

        try:
            if length.isdigit() and int(length) > self._max_body:
                raise _TooLarge
            await self._app(scope, counting, noting)
        except _TooLarge:
            if has_begun:
                return
            message = f"the body has more than {self._max_body} bytes"
            body = error_body(message, "invalid_request_error", "body_too_large")
            await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)

    def _is_allowed(self, path: str, given: bytes) -> bool:
        if self._key is None or path in OPEN:
            return True
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


def error_answer(error: ApiError) -> JSONResponse:
    """Return the HTTP answer of an error."""
    return JSONResponse(error.body, error.status, error.headers)
