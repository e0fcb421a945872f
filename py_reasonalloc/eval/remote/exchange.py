"""One server of an evaluation, and the conversation with it over HTTP."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from ... import __version__
from ...engine.errors import ReasonAllocError
from ...engine.identity import read_identity
from ...task.problems import THINK_CLOSE
from ..cases import rows
from ..cases.methods import Arm
from ..decode.worker import Job, Task, request_of
from .wire import CHAT_PATH, FIELD, MEASURED, MODELS_PATH, setup_to_json

#: Limits for connecting; for what is answered at once; and for a text, slow machines included.
CONNECT_SECONDS, ANSWER_SECONDS, TEXT_SECONDS, TOKEN_SECONDS = 10.0, 60.0, 600.0, 4.0
#: HTTP statuses below 500 that pass: timeout, too early, too many requests.
_PASSING = (408, 425, 429)
_COMPLETIONS_PATH = "/v1/completions"
_STOPS = {"stop": rows.END, "length": rows.LENGTH}

#: A text, and the fields of its row that are known.
Written = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Server:
    """One line of a server file.

    Attributes
    ----------
    url : str
        Without ``/v1`` and what follows it.
    arm : Arm or None
        What its own cache stands for; None: a server of ours, for all arms.
    """

    url: str
    arm: Arm | None = None

    def __str__(self) -> str:
        """Return the URL without a password that may be in it."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class PassingError(Exception):
    """What a server may recover from."""


class UnreachableError(PassingError):
    """There is nothing that could be spoken to."""


class Exchange:
    """The conversation with one server.

    Parameters
    ----------
    server : Server
        See there.
    client : httpx.AsyncClient
        Shared by all servers.
    httpx : module
        An optional dependency.
    job : Job
        What the tasks belong to.

    Attributes
    ----------
    has_answered : bool
        The server was there at least once.
    """

    def __init__(self, server: Server, client: Any, httpx: ModuleType, job: Job) -> None:
        self.server, self._client, self._httpx, self._job = server, client, httpx, job
        self.has_answered = False
        self._model: str | None = None  # what the server calls it; None: ask first

    async def write(self, task: Task) -> Written:
        """Let the server write a text.

        Raises
        ------
        PassingError
            It did not work, and might later.
        ReasonAllocError
            It never will.
        """
        try:
            if self._model is None:
                self._model = await (self._meet() if self.server.arm is None else self._ask_name())
            return await self._write(task, self._model)
        except PassingError:
            self._model = None  # it may come back with another
            raise

    async def _write(self, task: Task, model: str) -> Written:
        request = request_of(self._job, task)
        body = {
            "model": model,
            "temperature": request.sampling.temp,
            "top_p": request.sampling.top_p,
            "seed": request.sampling.seed,
            "max_tokens": request.max_tokens,
        }
        message = {"messages": [{"role": "user", "content": request.prompt}]}
        if self.server.arm is None:
            ours = {
                "version": __version__,
                "fingerprint": _fingerprint(self._job.model),
                "n_ctx": self._job.n_ctx,
                "raw": request.raw,
                **setup_to_json(request.setup),
            }
            return self._measured_text(
                await self._post(CHAT_PATH, {**body, **message, FIELD: ours})
            )
        if request.sampling.temp > 0:  # llama-server would cut off more than top_p does
            body |= {"top_k": -1, "min_p": 0.0}
        if request.raw:
            body["prompt"] = request.prompt
            return self._plain_text(await self._post(_COMPLETIONS_PATH, body))
        return self._plain_text(await self._post(CHAT_PATH, {**body, **message}))

    # --- HTTP ------------------------------------------------------------------------------------

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        seconds = TEXT_SECONDS + TOKEN_SECONDS * body["max_tokens"]
        return self._checked(await self._send("POST", path, seconds, json=body))

    async def _send(self, method: str, path: str, seconds: float, **content: Any) -> Any:
        timeout = self._httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)
        try:
            response = await self._client.request(
                method, self.server.url + path, timeout=timeout, **content
            )
        except self._httpx.RequestError as error:
            text = _line(f"{type(error).__name__}: {error}".rstrip(": "))
            if isinstance(error, (self._httpx.ConnectError, self._httpx.ConnectTimeout)):
                raise UnreachableError(f"cannot be reached: {text}") from None
            raise PassingError(text) from None
        self.has_answered = True
        return response

    def _checked(self, response: Any) -> Any:
        """Return the answer's JSON."""
        code = response.status_code
        if code >= 500 or code in _PASSING:
            raise PassingError(f"HTTP {code}: {_message(response)}")
        if code != 200:
            raise ReasonAllocError(f"{self.server}: HTTP {code}: {_message(response)}")
        try:
            return response.json()
        except ValueError:
            raise self._not_understood("no JSON") from None

    def _not_understood(self, what: str) -> ReasonAllocError:
        return ReasonAllocError(f"{self.server}: its answer cannot be understood: {what}")

    # --- the model -------------------------------------------------------------------------------

    async def _meet(self) -> str:
        """Make sure that this is a server of ours with the right model; return the model's name."""
        listing = self._checked(await self._send("GET", MODELS_PATH, ANSWER_SECONDS))
        try:
            model = listing["data"][0]
            name, version, fingerprint = (
                str(model["id"]),
                model[FIELD]["version"],
                model[FIELD]["fingerprint"],
            )
        except (LookupError, TypeError):
            raise ReasonAllocError(
                f"{self.server} is not a reasonalloc-eval serve: write behind its URL which arm "
                "its cache stands for"
            ) from None
        if version != __version__:
            raise ReasonAllocError(f"{self.server} is reasonalloc {version}, this is {__version__}")
        if fingerprint != _fingerprint(self._job.model):
            raise ReasonAllocError(
                f"{self.server} has another model: {name}, {fingerprint}; here it is "
                f"{self._job.model.name}, {_fingerprint(self._job.model)}"
            )
        return name

    async def _ask_name(self) -> str:
        """Return what the server calls its model."""
        response = await self._send("GET", MODELS_PATH, ANSWER_SECONDS)
        if response.status_code in (404, 405, 501):
            return self._job.model.stem
        listing = self._checked(response)
        try:
            names = [str(model["id"]) for model in listing["data"]]
        except (LookupError, TypeError):
            names = []
        ours = [name for name in names if name in (self._job.model.name, self._job.model.stem)]
        if len(names) > 1 and not ours:
            raise ReasonAllocError(
                f"{self.server} has several models ({', '.join(names)}), none of them called "
                f"{self._job.model.stem}"
            )
        return (ours or names or [self._job.model.stem])[0]

    # --- answers ---------------------------------------------------------------------------------

    def _measured_text(self, answer: Any) -> Written:
        try:
            text, measured = answer["choices"][0]["message"]["content"], answer[FIELD]
            fields = {name: measured[name] for name in MEASURED}
        except (LookupError, TypeError) as error:
            raise self._not_understood(f"{error} is missing") from None
        numbers = {name: value for name, value in fields.items() if name != "stop"}
        if (
            not isinstance(text, str)
            or fields["stop"] not in (rows.END, rows.LENGTH, rows.LOOP)
            or not all(value is None or _is_number(value) for value in numbers.values())
        ):
            raise self._not_understood("a value has the wrong type")
        return text, fields

    def _plain_text(self, answer: Any) -> Written:
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            counts = {
                "n_prompt": usage["prompt_tokens"],
                "n_generated": usage["completion_tokens"],
            }
            text = choice["text"] if "text" in choice else _message_text(choice["message"])
            finish = choice["finish_reason"]
        except (LookupError, TypeError) as error:
            raise self._not_understood(f"{error} is missing") from None
        if not isinstance(text, str) or not all(map(_is_number, counts.values())):
            raise self._not_understood("a value has the wrong type")
        if finish not in _STOPS:
            raise PassingError(f"a text ended early: finish_reason = {finish!r}")
        return text, {**counts, "stop": _STOPS[finish]}


def _message_text(message: dict[str, Any]) -> Any:
    """Return the whole text, where a server has cut the thought off from the answer."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(thought, str):
        return message["content"]
    answer = message.get("content")
    return f"{thought}{THINK_CLOSE}{answer}" if answer else thought


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _message(response: Any) -> str:
    """Return what an error says, on one line."""
    try:
        answer = response.json()
        error = answer.get("error", answer)
        return _line(str(error["message"] if isinstance(error, dict) else error))
    except (ValueError, LookupError, TypeError, AttributeError):
        return _line(response.text) or response.reason_phrase


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


@functools.lru_cache(maxsize=1)
def _fingerprint(model: Path) -> str:
    return read_identity(model).fingerprint
