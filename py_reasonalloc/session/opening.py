"""Make a session's context with its budget, and say why none could be made."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from ..engine import bindings as c
from ..engine.errors import ContextError, ModelFileError, ReasonAllocError, error_from_status
from ..engine.log import LogCapture, keep_descriptors
from ..engine.modelfile import load_failure


@contextlib.contextmanager
def pending_budget(
    session: Any, path: str, verbose: bool, vocab_only: bool = False
) -> Iterator[None]:
    """Apply a session's configuration to the context made inside; closes it if that fails.

    Parameters
    ----------
    session : ReasonLlama
        With its `config`; model and context may not be there yet.
    path : str
        Model file, for messages.
    verbose : bool
        Let llama.cpp log to stderr.
    vocab_only : bool
        No context will be made.

    Raises
    ------
    ReasonAllocError
        What the base class raised, by its type; anything else is let through.
    """
    with LogCapture(forward=verbose) as log, keep_descriptors():
        try:
            if session.config is not None:
                c.check(c.ra_configure_next(ctypes.byref(session.config.to_native())))
            yield
            if session.lora_path is not None and not session._lora_adapter:
                reason = log.reason() or "llama.cpp gave no reason"
                raise ModelFileError(
                    f"{session.lora_path}: no LoRA adapter for this model: {reason}"
                )
        except ValueError as error:
            failure = _failure(session, path, str(error), log)
            session.close()
            if failure is None:
                raise
            raise failure from None
        except BaseException:
            session.close()
            raise
        finally:
            c.ra_configure_next(None)
    if session.config is not None and not vocab_only and not c.ra_is_attached(session.ctx):
        session.close()
        raise ContextError(f"{path}: the context was made without a budgeted cache")


def _failure(session: Any, path: str, message: str, log: LogCapture) -> ReasonAllocError | None:
    """Return the typed exception for what the base constructor raised; None: keep that."""
    if message.startswith("Failed to load model"):
        return load_failure(path, log)
    if not message.startswith("Failed to create llama_context"):
        return None
    reason = log.reason()
    if session.config is not None:
        params = session.context_params
        status = c.ra_model_supported(session._model.model, params.type_k, params.type_v)
        if status != c.RA_STATUS_OK:
            return error_from_status(status, f"{path}: {c.last_error()}")
        reason = reason.replace("ReasonAlloc: ", "")
    return ContextError(f"{path}: no context could be made: {reason or 'no reason was given'}")
