"""llama.cpp's log, for as long as something of ours runs.

llama.cpp has one log callback per process, and sessions are made in several threads at once. So
`LogCapture` shares one callback of its own, that is in place while any block runs: the first block
puts it there, the last one puts the former callback back. A message goes to the blocks of the
thread that it comes from, innermost first. Nothing is installed at import, and no file descriptor
is redirected: a redirection holds for all threads, and two that overlap can leave standard output
closed for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

_LEVEL_ERROR = 4  # enum ggml_log_level
_LEVEL_CONT = 5

# "llama_model_load: error loading model: llama_model_loader: what is wrong"
_PREFIX = re.compile(r"^(?:\w+: |error loading model: |failed to initialize the context: )+")


class LogCapture:
    """Keep error lines, and pass everything on only if asked to.

    Parameters
    ----------
    forward : bool
        Pass every message to the callback that was there before; else llama.cpp is silent.
    all_threads : bool
        Also take messages of threads that have no block of their own; else they go where they went
        before.
    """

    def __init__(self, forward: bool, all_threads: bool = False) -> None:
        self.forward = forward
        self.all_threads = all_threads
        self.errors: list[str] = []
        self._last_level = 0

    def __enter__(self) -> LogCapture:
        _relay.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _relay.remove(self)

    def receive(self, level: int, text: bytes) -> bool:
        """Take a message; return whether it is to be passed on."""
        if level == _LEVEL_ERROR:
            self.errors.append(text.decode("utf-8", errors="replace"))
        elif level == _LEVEL_CONT and self._last_level == _LEVEL_ERROR:
            self.errors[-1] += text.decode("utf-8", errors="replace")
        if level != _LEVEL_CONT:
            self._last_level = level
        return self.forward

    def reason(self) -> str:
        """Return what the first error says, on one line without function names; "" if none."""
        if not self.errors:
            return ""
        return _PREFIX.sub("", " ".join(self.errors[0].split()))


class _Relay:
    """The one callback, and the blocks that it serves."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._captures: list[tuple[int, LogCapture]] = []  # (thread, block), as they were entered
        self._callback: Any = None  # made once and never freed: any thread may be inside it
        self._former: Any = None
        self._former_data: Any = None

    def add(self, capture: LogCapture) -> None:
        with self._lock:
            if not self._captures:
                self._install()
            self._captures = [*self._captures, (threading.get_ident(), capture)]

    def remove(self, capture: LogCapture) -> None:
        with self._lock:
            self._captures = [pair for pair in self._captures if pair[1] is not capture]
            if not self._captures:
                self._restore()

    def _install(self) -> None:
        from llama_cpp import llama_cpp as bindings

        if self._callback is None:
            self._callback = bindings.llama_log_callback(self._receive)
        self._former, self._former_data = self._current()
        bindings.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _restore(self) -> None:
        from llama_cpp import llama_cpp as bindings

        if _address(self._current()[0]) == _address(
            self._callback
        ):  # else it is someone else's now
            bindings.llama_log_set(self._former, self._former_data)

    @staticmethod
    def _current() -> tuple[Any, Any]:
        from llama_cpp import llama_cpp as bindings

        callback, data = bindings.llama_log_callback(), ctypes.c_void_p()
        bindings.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
        return callback, data

    def _receive(self, level: int, text: bytes, _: Any) -> None:
        captures, thread = (
            self._captures,
            threading.get_ident(),
        )  # the list is replaced, not changed
        mine = [capture for owner, capture in captures if owner == thread]
        mine = mine or [capture for _, capture in captures if capture.all_threads]
        if all(capture.receive(level, text) for capture in reversed(mine)) and self._former:
            # the bindings' callback takes nothing but UTF-8, and metadata may be anything
            shown = text.decode("utf-8", errors="replace").encode("utf-8")
            self._former(level, shown, self._former_data)


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


_relay = _Relay()


# --- the bindings' own silencing -----------------------------------------------------------------

_here = threading.local()
_patch_lock = threading.Lock()


@contextlib.contextmanager
def keep_descriptors() -> Iterator[None]:
    """Keep `llama_cpp`, in this thread and block, from redirecting standard output and error.

    With ``verbose=False`` it points the descriptors of the process at the null device while it
    loads a model. Its classes are the same for everyone else.
    """
    _patch_bindings()
    former = getattr(_here, "keeps", False)
    _here.keeps = True
    try:
        yield
    finally:
        _here.keeps = former


def _patch_bindings() -> None:
    from llama_cpp import _internals, llama

    with _patch_lock:
        original = _internals.suppress_stdout_stderr
        if hasattr(original, "keeps_descriptors"):
            return

        class Suppress(original):  # type: ignore[misc, valid-type]
            keeps_descriptors = True

            def __init__(self, disable: bool = True) -> None:
                super().__init__(disable or getattr(_here, "keeps", False))

        _internals.suppress_stdout_stderr = llama.suppress_stdout_stderr = Suppress
