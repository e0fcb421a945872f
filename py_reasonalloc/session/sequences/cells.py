"""What is done to the sequences of a context: `Cells`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_cpp import llama_cpp as bindings

from ...engine import bindings as c
from ...engine.errors import ComputeError
from .drawing import logits_row
from .pieces import Piece, fill
from .request import TokenLogprob, token_logprob


class Cells:
    """The sequences of one llama_context, and a batch to fill them with.

    Parameters
    ----------
    llama : ReasonLlama
        An open session.
    """

    def __init__(self, llama: Any) -> None:
        self._ctx = llama.ctx
        self._n_vocab = llama.n_vocab()
        self._memory = bindings.llama_get_memory(llama.ctx)
        self._batch: Any = bindings.llama_batch_init(llama.n_batch, 0, 1)

    @property
    def is_closed(self) -> bool:
        """The batch is freed."""
        return self._batch is None

    def decode(self, pieces: Sequence[Piece]) -> list[int]:
        """Decode pieces in one batch; return each one's first row.

        Raises
        ------
        ComputeError
            The batch failed or was aborted; parts of it may have been decoded.
        """
        rows = fill(self._batch, pieces)
        former = c.last_error()
        status = bindings.llama_decode(self._ctx, self._batch)
        if status != 0:
            reason = c.last_error() if c.last_error() != former else ""
            raise ComputeError(": ".join(filter(None, (f"llama_decode returned {status}", reason))))
        return rows

    def prompt_logprobs(self, piece: Piece, row: int) -> list[TokenLogprob]:
        """Return those of a prompt's tokens that follow the piece's, just decoded.

        Parameters
        ----------
        row : int
            The piece's first row.
        """
        request, found = piece.chain.request, []
        for position in range(piece.start, min(piece.end, len(request.prompt) - 1)):
            logits = logits_row(self._ctx, row + position - piece.start, self._n_vocab)
            token = request.prompt[position + 1]
            found.append(token_logprob(logits, token, request.n_top or 0))
        return found

    def empty(self, seq_id: int) -> None:
        """Free what a sequence holds."""
        bindings.llama_memory_seq_rm(self._memory, seq_id, -1, -1)

    def copy(self, seq_id: int, to: int) -> None:
        """Make an empty sequence hold what another one does."""
        bindings.llama_memory_seq_cp(self._memory, seq_id, to, -1, -1)

    def cut(self, seq_id: int, n: int) -> bool:
        """Cut a sequence to its first `n` tokens; False: it could not be, and is empty now."""
        bindings.llama_memory_seq_rm(self._memory, seq_id, n, -1)
        if bindings.llama_memory_seq_pos_max(self._memory, seq_id) + 1 == n:
            return True
        self.empty(seq_id)
        return False

    def close(self) -> None:
        """Free the batch."""
        bindings.llama_batch_free(self._batch)
        self._batch = None
