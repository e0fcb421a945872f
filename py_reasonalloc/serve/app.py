"""The routes: a FastAPI application around an engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from .. import __version__
from .answers import Answer
from .engine import Engine, Job
from .errors import ApiError, error_body
from .metrics import Metrics
from .outside import Outside, error_answer
from .schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from .text import Delta
from .work import Planner, Work

#: Seconds of silence after which a stream says that it is alive.
KEEP_ALIVE = 15.0
#: Bodies may have so many bytes unless told otherwise.
MAX_BODY = 4 << 20


class _Client:
    """A job and the queue that its deltas come in, on the event loop's side."""

    def __init__(self, engine: Engine, work: Work) -> None:
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def deliver(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(self._queue.put_nowait, item)

        self.job = Job(work, deliver)
        engine.submit(self.job)

    async def next(self) -> list[Delta]:
        """Return what comes next; raises the ApiError that ends it."""
        item = await self._queue.get()
        if isinstance(item, ApiError):
            raise item
        deltas: list[Delta] = item
        return deltas


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, waiting: Any) -> Any:
    """Return what is waited for; None if the client goes first."""
    task, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _answer(engine: Engine, planner: Planner, work: Work, request: Request) -> Response:
    client = _Client(engine, work)
    answer = Answer(planner, client.job)
    try:
        if work.stream:
            first = await _unless_gone(request, client.next())
            if first is not None:
                return StreamingResponse(_stream(client, answer, first), media_type=EVENTS)
        else:
            deltas = await _unless_gone(request, _collect(client, answer))
            if deltas is not None:
                return JSONResponse(answer.whole(deltas))
    except BaseException:
        client.job.cancel()
        raise
    client.job.cancel()
    return Response(status_code=499)  # nobody reads it


EVENTS = "text/event-stream"


async def _collect(client: _Client, answer: Answer) -> list[Delta]:
    found: list[Delta] = []
    n_left = len(answer.work.choices)
    while n_left > 0:
        for delta in await client.next():
            found.append(delta)
            n_left -= delta.finish is not None
    return found


async def _stream(client: _Client, answer: Answer, deltas: list[Delta]) -> AsyncIterator[bytes]:
    try:
        while True:
            for delta in deltas:
                for chunk in answer.chunks(delta):
                    yield _event(chunk)
            if answer.is_whole:
                break
            deltas = []
            try:
                deltas = await asyncio.wait_for(client.next(), KEEP_ALIVE)
            except asyncio.TimeoutError:
                yield b": still here\n\n"
        if answer.work.include_usage:
            yield _event(answer.usage_chunk())
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    finally:
        client.job.cancel()


def _event(body: Any) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode("utf-8", errors="replace")


def make_app(
    engine: Engine, planner: Planner, api_key: str | None = None, max_body: int = MAX_BODY
) -> Any:
    """Return the ASGI application.

    Parameters
    ----------
    engine : Engine
        Started by the caller.
    planner : Planner
        For the model of that engine.
    api_key : str, optional
        What callers must bring.
    max_body : int
        Most bytes of a body.
    """
    app = FastAPI(title="reasonalloc-serve", version=__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(engine)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        work = await run_in_threadpool(planner.completion, body)
        return await _answer(engine, planner, work, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        work = await run_in_threadpool(planner.chat, body)
        return await _answer(engine, planner, work, request)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(planner, engine)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Any:
        if name != planner.name:
            message = f"there is no model {name[:200]!r} here, but {planner.name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return _model(planner, engine)

    @app.get("/health")
    async def health() -> Response:
        if engine.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine does not run"}, 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    _add_tokenizer(app, planner, engine.n_ctx)
    _add_errors(app)
    return Outside(app, metrics, api_key, max_body)


def _add_tokenizer(app: FastAPI, planner: Planner, n_ctx: int) -> None:
    """Add what lm-eval-harness takes for a tokenizer: the paths and fields are vLLM's."""

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Any:
        return planner.tokenizer_info()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Any:
        tokens = await run_in_threadpool(planner.tokens_of, body.prompt, body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": n_ctx}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Any:
        return {"prompt": planner.text_of(body.tokens)}


def _model(planner: Planner, engine: Engine) -> dict[str, Any]:
    return {
        "id": planner.name,
        "object": "model",
        "created": 0,
        "owned_by": "reasonalloc",
        "meta": {"n_ctx": engine.n_ctx, "n_vocab": planner.n_vocab, "n_seq": engine.n_parallel},
    }


def _add_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_answer(error)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_answer(_invalid(error))

    async def by_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = error_body(str(error.detail), "invalid_request_error")
        return JSONResponse(body, error.status_code, error.headers)

    async def unexpected(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body("an internal error", "server_error"), 500)

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, by_http)
    app.add_exception_handler(Exception, unexpected)


def _invalid(error: RequestValidationError) -> ApiError:
    """Return the first thing that is wrong with a body, in a line."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", "")).strip()
        return ApiError(400, f"the body is no JSON: {reason}", code="invalid_json")
    place = [str(part) for part in first["loc"][1:]]
    name = ".".join(place)
    reason = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "there is no such field, or it is not supported"
    if not name and first["type"] != "value_error":
        reason = "the body must be a JSON object, sent as Content-Type: application/json"
    message = f"{name}: {reason}" if name else reason
    return ApiError(400, message[:500], param=place[0] if place else None)
