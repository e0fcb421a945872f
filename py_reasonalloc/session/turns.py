"""Who may use a session now: one thread at a time, one text at a time.

A llama_context is for one thread at a time, and the text that a generator of `llama_cpp.Llama` is
in the middle of is spoilt when something else moves the context between two of its pieces. `Turns`
gives each session a lock, and notices the second. The rules:

- Calls take turns: a call from another thread waits until the one that runs has returned.
- A text that is handed out piece by piece keeps the session between its pieces. Another thread's
  call waits for its end: that it is exhausted, closed, or dropped.
- Waiting would never end where the text and the call are in one thread, or where nobody asks for
  the text any more (`PATIENCE`). Then the call goes ahead, and the text raises ContextError when
  its next piece is asked for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from ..engine.errors import ContextError

#: Seconds without a question for its next piece, after which other threads take a text as given up.
PATIENCE = 10.0


class Turns:
    """The lock of one session.

    Its methods get `require_open`, which raises if the session cannot be used, at every call: held
    here it would keep a dropped session, and its memory, until the garbage collector comes by.
    """

    def __init__(self) -> None:
        self._free = threading.Condition(threading.RLock())
        self._depth = 0  # calls that move the context, one inside the other
        self._text: object | None = None  # the one in the making
        self._thread = 0  # that asked for its last piece, and when
        self._asked = 0.0

    @contextlib.contextmanager
    def look(self, require_open: Callable[[], None]) -> Iterator[None]:
        """Hold the session for a call that leaves texts in the making as they are."""
        with self._free:
            require_open()
            yield

    @contextlib.contextmanager
    def move(self, require_open: Callable[[], None]) -> Iterator[None]:
        """Hold the session for a call after which a text in the making cannot go on."""
        with self._free:
            self._enter(require_open)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def _enter(self, require_open: Callable[[], None]) -> None:
        if self._depth == 0:
            me = threading.get_ident()
            while self._text is not None and self._thread != me:
                left = self._asked + PATIENCE - time.monotonic()
                if left <= 0:
                    break
                self._free.wait(left)
            self._text = None
        require_open()

    def text(
        self, pieces: Generator[Any, Any, None], require_open: Callable[[], None]
    ) -> Generator[Any, Any, None]:
        """Yield from a generator that moves the context, holding the session as said above."""
        me, is_first, sent = object(), True, None
        try:
            while True:
                with self._free:
                    is_outermost = self._depth == 0
                    if is_first:
                        self._enter(require_open)
                    require_open()
                    if is_outermost and is_first:
                        self._text = me
                    elif is_outermost and self._text is not me:
                        raise ContextError(
                            "the session was used for something else since this text's last piece: "
                            "finish or close a text first, or use one session for each"
                        )
                    is_first = False
                    self._depth += 1
                    try:
                        piece = pieces.send(sent)
                    except StopIteration:
                        return
                    finally:
                        self._depth -= 1
                        self._thread, self._asked = threading.get_ident(), time.monotonic()
                sent = yield piece
        finally:
            pieces.close()
            if self._text is me:
                with self._free:
                    if self._text is me:
                        self._text = None
                    self._free.notify_all()
