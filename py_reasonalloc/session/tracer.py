"""Watch the compressions of a session: `Traceable`, the part of `ReasonLlama` that does it."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ..engine import bindings as c
from ..engine.errors import ConfigError
from ..engine.stats import engine_stats
from ..trace.format import Compression, Header, Held, LayerCompression, State, runs_of
from ..trace.write import TraceWriter
from .guard import Guarded


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Deliver a Ctrl-C of the block at its end.

    Python would raise it inside the engine's callback, which cannot pass it on, or in the middle of
    a line that is being written.
    """
    former = signal.getsignal(signal.SIGINT)
    if former is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)

    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if received:
            signal.raise_signal(signal.SIGINT)


class Tracer:
    """Collects what the engine reports and hands it on between two decodes.

    Parameters
    ----------
    session : ReasonLlama
        An open session with a budget.
    on_compression : callable
        Gets every `Compression` that was carried out.
    on_state : callable, optional
        Gets a `State` whenever the cache is not what the compressions before would leave.

    Raises
    ------
    NotFoundError
        The session has no budget.
    """

    def __init__(
        self,
        session: Any,
        on_compression: Callable[[Compression], None],
        on_state: Callable[[State], None] | None = None,
    ) -> None:
        self.is_stale = False
        self._session = session
        self._on_compression = on_compression
        self._on_state = on_state
        self._tokens = np.empty(0, dtype=np.intc)
        self._error: BaseException | None = None
        self._pending: list[tuple[int, int, list[LayerCompression]]] = []
        self._callback: Any = c.ra_trace_cb(self._receive)
        c.check(c.ra_set_trace(session.ctx, self._callback, None))

    def _receive(self, user: Any, pointer: Any) -> None:
        """ra_trace_cb: may neither raise nor call into the context."""
        try:
            event = pointer.contents
            ends = np.cumsum(event.n_kv[: event.n_head_kv])
            n = int(ends[-1])
            positions = np.frombuffer(ctypes.string_at(event.pos, 4 * n), dtype=np.int32)
            kept = np.frombuffer(ctypes.string_at(event.keep, n), dtype=np.bool_)
            heads = zip(np.split(positions, ends[:-1]), np.split(kept, ends[:-1]))
            runs = tuple(runs_of(head[mask]) for head, mask in heads)
            layer = LayerCompression(event.il, tuple(event.budgets[: event.n_head_kv]), runs)
            if self._pending and self._pending[-1][0] == event.i_compression:
                if self._pending[-1][2][-1].il < event.il:
                    self._pending[-1][2].append(layer)
                    return
                self._pending.pop()  # it was given up half-way, and tried again
            self._pending.append((event.i_compression, event.n_pos, [layer]))
        except BaseException as error:
            self._error = self._error or error

    def sync(self) -> None:
        """Before a decode: tell if the cache was cut, emptied or loaded since the last one."""
        if self._on_state is None:
            return
        n_pos, known = self._session.n_cached(), self._tokens
        tokens = self._session.input_ids[:n_pos]
        n = min(n_pos, len(known))
        differs = np.flatnonzero(tokens[:n] != known[:n])
        n_same = int(differs[0]) if len(differs) else n
        if self.is_stale or n_same < len(known):
            self._on_state(State(n_pos, n_same, self.held()))
            self._tokens = tokens.copy()
        self.is_stale = False

    def settle(self) -> None:
        """After a decode, failed or not: hand on the compressions that were carried out."""
        pending, self._pending = self._pending, []
        error, self._error = self._error, None
        if error is not None:
            raise error
        if pending:
            n_done = engine_stats(self._session.ctx).n_compressions
            for step, n_pos, layers in pending:
                if step < n_done:
                    self._on_compression(Compression(step, n_pos, tuple(layers)))
        if self._on_state is not None:
            n_pos = min(self._session.n_tokens, self._session.n_cached())
            self._tokens = self._session.input_ids[:n_pos].copy()

    def held(self) -> Held:
        """Return the positions of every head, read from the engine."""
        stats = self._session.kv_stats()
        return tuple(
            tuple(runs_of(stats.kept_positions(il, ih)) for ih in range(len(layer)))
            for il, layer in enumerate(stats.layers)
        )

    def close(self) -> None:
        """Stop watching; the session may be closed already."""
        context = getattr(self._session, "_ctx", None)
        if context is not None and context.ctx is not None:
            c.check(c.ra_set_trace(context.ctx, c.ra_trace_cb(), None))
        self._callback = None  # it refers to self: without it the session is freed at once


class Traceable(Guarded):
    """A session whose compressions can be watched. Costs nothing while they are not."""

    _tracer: Tracer | None = None

    @property
    def is_traced(self) -> bool:
        """A trace is running: it is to see every compression."""
        return self._tracer is not None

    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens; while a trace is running, with its bookkeeping between batches."""
        tracer = self._tracer
        if tracer is None:
            super().eval(tokens)
            return
        for i in range(0, len(tokens), self.n_batch):
            with hold_interrupts():
                if i == 0:
                    tracer.sync()
                try:
                    super().eval(tokens[i : i + self.n_batch])
                finally:
                    tracer.settle()

    @contextlib.contextmanager
    def trace(
        self,
        callback: Callable[[Compression], None],
        on_state: Callable[[State], None] | None = None,
    ) -> Iterator[None]:
        """Call `callback` with every compression inside the block.

        It is called between two decodes, in the thread that decodes, and may use the session. What
        it raises comes out of the decoding call. So is `on_state`, if given, with a `State` when
        the cache was cut, emptied or loaded, and at first if it is not empty.

        Raises
        ------
        ConfigError
            A trace is running already.
        NotFoundError
            The session has no budget.
        ContextError
            The session is closed.
        """
        self._require_free()
        self._tracer = Tracer(self, callback, on_state)
        self._tracer.is_stale = self.n_cached() > 0
        try:
            self._tracer.sync()
            yield
        finally:
            tracer, self._tracer = self._tracer, None
            tracer.close()

    @contextlib.contextmanager
    def trace_to(
        self,
        path: str | os.PathLike[str],
        n_prompt: int | None = None,
        also: Callable[[Compression | State], None] = lambda record: None,
    ) -> Iterator[None]:
        """Write every compression inside the block to a trace file; see `read_trace`.

        Parameters
        ----------
        path : path-like
            Is replaced. A name that ends in ``.gz`` is compressed.
        n_prompt : int, optional
            Length of the prompt, tokens; only noted in the file.
        also : callable, optional
            Gets what is written, as the callbacks of `trace` do.

        Raises
        ------
        TraceError
            Here or from a decode: the file cannot be written.
        ConfigError, NotFoundError, ContextError
            As `trace`.
        """
        self._require_free()
        header = self._trace_header(n_prompt)
        with contextlib.closing(TraceWriter(Path(path))) as writer:

            def on_compression(record: Compression) -> None:
                writer.compression(record)
                also(record)

            def on_state(record: State) -> None:
                writer.state(record)
                also(record)

            tracer = Tracer(self, on_compression, on_state)
            try:
                with hold_interrupts():
                    writer.header(header)
                    tracer.is_stale = self.n_cached() > 0
                    tracer.sync()
                self._tracer = tracer
                yield
            finally:
                self._tracer = None
                with hold_interrupts():
                    tracer.close()
                    if not writer.is_broken and self._ctx is not None and self._ctx.ctx:
                        tracer.sync()
                        self._trace_end(writer, tracer)

    def _require_free(self) -> None:
        self._require_open()
        if self._tracer is not None:
            raise ConfigError("a trace of this session is running already")

    def _trace_header(self, n_prompt: int | None) -> Header:
        stats = self.kv_stats()
        config = self.config
        return Header(
            model=self.metadata.get("general.name") or Path(self.model_path).name,
            n_head_kv=tuple(len(layer) for layer in stats.layers),
            budget=stats.budget,
            buffer=stats.buffer,
            sinks=config.sinks,
            window=config.window,
            policy=config.policy,
            layer_alloc=config.layers if isinstance(config.layers, str) else "explicit",
            head_alloc=config.heads,
            n_prompt=n_prompt,
            budgets=tuple(tuple(head.budget for head in layer) for layer in stats.layers),
        )

    def _trace_end(self, writer: TraceWriter, tracer: Tracer) -> None:
        tokens = self.input_ids[: self.n_cached()].tolist()
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        table = self.pieces(special=True)
        pieces = [decoder.decode(table[token]) for token in tokens]
        writer.end(tokens, pieces, tracer.held())
