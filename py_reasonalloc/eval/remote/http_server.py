"""A model behind HTTP, for evaluations that run on another machine.

One text is written at a time, under the cache that the request asks for (see `wire`). Who can reach
the server can make it work and read what its model says: there are no passwords, so keep it within
a network that is trusted.
"""

from __future__ import annotations

import json
import re
import secrets
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ... import __version__
from ...engine.errors import ConfigError, ContextFullError, ReasonAllocError, UnsupportedError
from ...engine.identity import read_identity
from ...engine.modelfile import open_vocabulary, trained_context
from ...engine.usertext import path_text
from ..cases import rows
from ..decode.worker import Decoder
from .wire import CHAT_PATH, FIELD, MODELS_PATH, Served, parse_request

#: Longest body of a request.
MAX_BODY_BYTES = 8 << 20
#: A client that sends nothing for so long is cut off.
TIMEOUT_SECONDS = 60.0
_MAX_MESSAGE = 500
_MAX_CTX = 1 << 20  # where a model's file does not say what it was trained for


class ModelServer(ThreadingHTTPServer):
    """Answers over HTTP with a model that stays loaded. Listens as soon as it is made.

    Parameters
    ----------
    host, port
        Where to listen; port 0: any that is free.
    model : Path
        GGUF file.
    n_threads, n_gpu_layers : int
        See `ReasonLlama`.
    plain_ctx : int
        Context of requests that ask for none, tokens; at most as trained.

    Raises
    ------
    ConfigError
        It cannot listen there.
    ModelFileError
        Not a model that can be loaded.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        host: str,
        port: int,
        model: Path,
        n_threads: int,
        n_gpu_layers: int,
        plain_ctx: int = 4096,
    ) -> None:
        with open_vocabulary(model) as vocabulary:
            max_ctx = trained_context(vocabulary) or _MAX_CTX
        self.served = Served(
            name=path_text(model.name),
            fingerprint=read_identity(model).fingerprint,
            max_ctx=max_ctx,
            plain_ctx=min(max_ctx, plain_ctx),
        )
        self._decoder_arguments = (n_threads, n_gpu_layers)
        self._model = model
        self._decoder: Decoder | None = None
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot listen at {host}, port {port}: {reason}") from None

    def server_bind(self) -> None:
        """Bind, without the look-up of a name that the base class makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def url(self) -> str:
        """What belongs into the file of `--server`."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def models(self) -> dict[str, Any]:
        """Return the list of models."""
        ours = {"version": __version__, "fingerprint": self.served.fingerprint}
        model = {"id": self.served.name, "object": "model", "created": 0, "owned_by": FIELD}
        return {"object": "list", "data": [{**model, FIELD: ours}]}

    def complete(self, body: bytes, is_gone: Callable[[], bool]) -> dict[str, Any]:
        """Return the answer to a chat completion, when all earlier ones are done.

        Raises
        ------
        ReasonAllocError
            The request is not right, or the model failed.
        KeyboardInterrupt
            Nobody waits any more.
        """
        wanted = parse_request(body, self.served)

        def is_stopped() -> bool:
            return self._is_stopping.is_set() or is_gone()

        with self._lock:
            if is_stopped():
                raise KeyboardInterrupt
            text, measured = self._decoder_for(wanted.n_ctx).decode(wanted.request, is_stopped)
        finish = "stop" if measured["stop"] == rows.END else "length"
        n_prompt, n_generated = measured["n_prompt"], measured["n_generated"]
        answer = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.served.name,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": finish,
                    "logprobs": None,
                }
            ],
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_generated,
                "total_tokens": n_prompt + n_generated,
            },
        }
        return answer | ({FIELD: measured} if wanted.is_measured else {})

    def _decoder_for(self, n_ctx: int) -> Decoder:
        """Return the model, loaded anew if the context is to have another length."""
        if self._decoder is None or self._decoder.n_ctx != n_ctx:
            if self._decoder is not None:
                self._decoder.close()
            self._decoder = Decoder(self._model, n_ctx, *self._decoder_arguments)
        return self._decoder

    def server_close(self) -> None:
        """Stop listening, give up the text under way, free the model."""
        super().server_close()
        self._is_stopping.set()
        with self._lock:
            if self._decoder is not None:
                self._decoder.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about clients that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ModelServer
    protocol_version = "HTTP/1.1"
    server_version = f"reasonalloc/{__version__}"
    timeout = TIMEOUT_SECONDS

    def do_GET(self) -> None:  # noqa: N802
        """Answer with the list of models."""
        if self._path() == MODELS_PATH:
            self._send(200, self.server.models())
        else:
            self.send_error(404)

    def do_POST(self) -> None:  # noqa: N802
        """Answer with a chat completion."""
        if self._path() != CHAT_PATH:
            self.send_error(404)
            return
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,15}", length):
            self.send_error(411, "the request needs a Content-Length")
            return
        if int(length) > MAX_BODY_BYTES:
            self.send_error(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
            return
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return
        try:
            self._send(200, self.server.complete(body, self._is_gone))
        except KeyboardInterrupt:
            self.close_connection = True
        except (ConfigError, ContextFullError, UnsupportedError) as error:
            self._send(400, _error(400, str(error)))
        except (ReasonAllocError, MemoryError) as error:
            self._send(500, _error(500, str(error) or "out of memory"))
        except OSError:
            raise
        except Exception as error:
            traceback.print_exc()
            self._send(500, _error(500, f"internal error: {type(error).__name__}"))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error as OpenAI has it; what is left of the request is not read."""
        self.close_connection = True
        if code == 404:
            message = f"there are only GET {MODELS_PATH} and POST {CHAT_PATH} here"
        self._send(code, _error(code, message or self.responses.get(code, ("error", ""))[0]))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep no log of requests."""

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _send(self, code: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode("ascii")
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _is_gone(self) -> bool:
        """Tell whether the client has closed the connection."""
        try:
            if not select.select([self.connection], [], [], 0)[0]:
                return False
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True


def _error(code: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if code < 500 else "server_error"
    line = " ".join(message.split())
    short = line if len(line) <= _MAX_MESSAGE else f"{line[:_MAX_MESSAGE]}..."
    return {"error": {"message": short, "type": kind, "param": None, "code": None}}
