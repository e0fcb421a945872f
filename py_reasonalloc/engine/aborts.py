"""Aborts inside llama.cpp: one line and an exit code, where ggml would write a backtrace.

An abort cannot be survived: ggml's callback may say something, then the process ends. What is
known to end so is checked before (threads, a file without a tokenizer); what is left is mostly
memory that could not be had.
"""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

from .ggml import load_ggml

EXIT_FAILURE = 1

# "/path/of/the/build/ggml.c:1533: GGML_ASSERT(ctx->mem_buffer != NULL) failed"
_PLACE = re.compile(r"^.*[/\\]([^/\\:]+:\d+: )")
_SIGNS_OF_MEMORY = ("mem_buffer", "alloc", "out of memory", "buffer != NULL")

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_installed: list[Any] = []  # what C has the address of must not be collected


def end_on_abort(name: str) -> None:
    """From now on an abort of ggml ends the process: a line on standard error, exit code 1.

    For commands, not for a library's callers: they may have more to save than we know of.

    Parameters
    ----------
    name : str
        What the line starts with.
    """

    def receive(message: bytes | None) -> None:
        os.write(2, f"{name}: {abort_reason(message or b'')}\n".encode(errors="replace"))
        os._exit(EXIT_FAILURE)

    callback = _CALLBACK(receive)
    set_callback = load_ggml()["ggml_set_abort_callback"]
    set_callback.argtypes, set_callback.restype = [_CALLBACK], ctypes.c_void_p
    set_callback(callback)
    _installed[:] = [callback]


def abort_reason(message: bytes) -> str:
    """Return what an abort is about, on one line, without the folders of the build."""
    text = " ".join(_PLACE.sub(r"\1", message.decode("utf-8", errors="replace")).split())
    if any(sign in text for sign in _SIGNS_OF_MEMORY):
        return f"not enough memory: llama.cpp gave up ({text})"
    return f"llama.cpp gave up: {text}"
