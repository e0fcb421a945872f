"""Ctrl-C while a text is made."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class Interrupts:
    """Ctrl-C inside a ``with`` block: `stop` is called once; a second one always raises.

    While `is_raising`, the first one raises KeyboardInterrupt too (a prompt is being read, and
    there is no next token to wait for). A process that was started with Ctrl-C ignored ignores it.
    """

    def __init__(self) -> None:
        self.is_raising = False
        self.is_set = False
        self.stop: Callable[[], None] = lambda: None

    def __enter__(self) -> Interrupts:
        self._former = signal.getsignal(signal.SIGINT)
        if self._former != signal.SIG_IGN:  # a shell's way to keep Ctrl-C from background jobs
            signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_set or self.is_raising:
            self.is_set = True
            raise KeyboardInterrupt
        self.is_set = True
        self.stop()
