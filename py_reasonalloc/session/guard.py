"""Every public method of a session, guarded: it is open, of this process, in use by one thread."""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from collections.abc import Callable
from typing import Any

import llama_cpp

from ..engine.errors import ContextError
from .turns import Turns

#: Ends a session, or is how one is left.
_FREE = {"close"}

#: Move the context: a text in the making cannot go on after them.
_MOVES = {
    "clear",
    "create_embedding",
    "embed",
    "eval",
    "load_sequence",
    "load_state",
    "reconfigure",
    "reset",
}

#: Generators that move it with every piece.
_TEXTS = {"generate", "_create_completion"}

#: Are made of the others, or only note something.
_PLAIN = {
    "__call__",
    "create_chat_completion",
    "create_chat_completion_openai_v1",
    "create_completion",
    "set_cache",
    "set_seed",
    "trace",
    "trace_to",
}


class Guarded(llama_cpp.Llama):
    """A session that says so when it cannot be used."""

    _ctx: Any
    _turns: Turns
    _is_left_behind = False

    def _guard(self) -> None:
        """Begin: before the base class makes model and context."""
        self._turns = Turns()
        _sessions.add(self)

    def _require_open(self) -> None:
        if self._is_left_behind:
            raise ContextError(
                "the session belongs to the process that this one was forked from: open one here"
            )
        if getattr(self, "_ctx", None) is None or self._ctx.ctx is None:
            raise ContextError("the session is closed")

    def _leave_behind(self) -> None:
        """In a forked process: let go of what the threads of the other one work for.

        Its memory is a copy, freed with the process; to free it here could wait for those threads.
        """
        self._is_left_behind = True
        self._turns = Turns()
        for part in (self, getattr(self, "_ctx", None), getattr(self, "_model", None)):
            for name in ("_stack", "_exit_stack"):
                stack = getattr(part, name, None)
                if stack is not None:
                    stack.pop_all()

    def close(self) -> None:
        """Free model and context; may be called twice."""
        if getattr(self, "_stack", None) is None or self._is_left_behind:
            return
        if getattr(self, "_ctx", None) is None or self._ctx.ctx is None:
            super().close()
            return
        with self._turns.move(self._require_open):
            super().close()


_sessions: weakref.WeakSet[Guarded] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_sessions):
        session._leave_behind()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def guarded(cls: type) -> type:
    """Guard the public methods that a session class has, its own and inherited ones."""
    names = {name for name in dir(cls) if not name.startswith("_")} | {"__call__"} | _TEXTS
    for name in sorted(names - _FREE):
        method = inspect.getattr_static(cls, name)
        if inspect.isfunction(method):
            setattr(cls, name, _wrapped(name, method))
    return cls


def _wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._require_open()
        return method(self, *args, **kwargs)

    @functools.wraps(method)
    def look(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turns.look(self._require_open):
            return method(self, *args, **kwargs)

    @functools.wraps(method)
    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turns.move(self._require_open):
            return method(self, *args, **kwargs)

    @functools.wraps(method)
    def text(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._require_open()
        return self._turns.text(method(self, *args, **kwargs), self._require_open)

    if name in _TEXTS:
        return text
    if name in _MOVES:
        return move
    return plain if name in _PLAIN else look
