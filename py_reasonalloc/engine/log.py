"""llama.cpp's log, for as long as something of ours runs.

llama.cpp has one log callback per process. `LogCapture` replaces it inside a ``with`` block and
puts the former one back; nothing is installed at import.
"""

from __future__ import annotations

import ctypes
import re
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
    """

    def __init__(self, forward: bool) -> None:
        self.forward = forward
        self.errors: list[str] = []
        self._last_level = 0

    def __enter__(self) -> LogCapture:
        from llama_cpp import llama_cpp as bindings

        self._bindings = bindings
        self._former = bindings.llama_log_callback()
        self._former_data = ctypes.c_void_p()
        bindings.llama_log_get(ctypes.byref(self._former), ctypes.byref(self._former_data))
        self._callback = bindings.llama_log_callback(self._receive)
        bindings.llama_log_set(self._callback, ctypes.c_void_p(0))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bindings.llama_log_set(self._former, self._former_data)

    def _receive(self, level: int, text: bytes, _: Any) -> None:
        if level == _LEVEL_ERROR:
            self.errors.append(text.decode("utf-8", errors="replace"))
        elif level == _LEVEL_CONT and self._last_level == _LEVEL_ERROR:
            self.errors[-1] += text.decode("utf-8", errors="replace")
        if level != _LEVEL_CONT:
            self._last_level = level
        if self.forward and self._former:
            # the bindings' callback takes nothing but UTF-8, and metadata may be anything
            shown = text.decode("utf-8", errors="replace").encode("utf-8")
            self._former(level, shown, self._former_data)

    def reason(self) -> str:
        """Return what the first error says, on one line without function names; "" if none."""
        if not self.errors:
            return ""
        return _PREFIX.sub("", " ".join(self.errors[0].split()))
