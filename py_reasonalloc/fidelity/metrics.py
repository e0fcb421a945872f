"""What is compared at a position: two distributions of the next token."""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import ReasonAllocError

Floats = npt.NDArray[np.float32]
#: Least log-probability that is kept: of what float16 can hold.
_LEAST = -60000.0


class Scores(NamedTuple):
    """Of consecutive positions, [n] each.

    Attributes
    ----------
    kl : array of float64
        Kullback-Leibler divergence of the arm's distribution from the full cache's, nats.
    agree : array of bool
        Both have the same likeliest token.
    nll, nll_full : array of float64
        Negative log-likelihood of the token that comes next, nats: the arm's, the full cache's.
    """

    kl: npt.NDArray[np.float64]
    agree: npt.NDArray[np.bool_]
    nll: npt.NDArray[np.float64]
    nll_full: npt.NDArray[np.float64]


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities, [n, n_vocab], for logits of the same shape."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def kl_divergence(log_p: Floats, log_q: Floats) -> npt.NDArray[np.float64]:
    """Return sum_i p_i (ln p_i - ln q_i) of each row, [n], for log-probabilities [n, n_vocab]."""
    p = np.exp(log_p)
    terms = np.where(p > 0, p * (log_p - log_q), np.float32(0))
    return terms.sum(axis=1, dtype=np.float64)


def next_nll(log_p: Floats, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Return -ln p of one token of each row, [n]."""
    return -log_p[np.arange(len(tokens)), tokens].astype(np.float64)


class Reference:
    """What the full cache says at the positions of one text, for all arms to be held against.

    Log-probabilities lie in a temporary file as float16 (n_vocab x 2 bytes a position) and are
    normalized again when they are read, so that they are a distribution: rounding then changes a
    divergence by less than a part in a hundred, and that of the full cache from itself, which is 0,
    to less than 1e-5 (flat distributions; a mean over text is below 1e-6).
    The likeliest token, and the likelihood of the next one, are kept unrounded.

    Parameters
    ----------
    start : int
        First position.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self._file = tempfile.TemporaryFile(prefix="reasonalloc-")  # noqa: SIM115
        self._n_vocab = 0
        self._best: list[npt.NDArray[np.intp]] = []
        self._nll: list[npt.NDArray[np.float64]] = []

    def add(self, logits: Floats, next_tokens: npt.NDArray[np.intp]) -> None:
        """Take the next positions: logits [n, n_vocab], and the tokens that come next, [n].

        Raises
        ------
        ReasonAllocError
            The temporary file cannot be written.
        """
        log_p = log_softmax(logits)
        self._n_vocab = log_p.shape[1]
        self._best.append(logits.argmax(axis=1))
        self._nll.append(next_nll(log_p, next_tokens))
        try:
            self._file.write(np.maximum(log_p, _LEAST).astype(np.float16).tobytes())
            self._file.flush()
        except OSError as error:
            raise ReasonAllocError(
                f"{tempfile.gettempdir()}: the full cache's log-probabilities cannot be written: "
                f"{error.strerror or error} (TMPDIR names another folder; --max-tokens takes less)"
            ) from None

    def compare(self, pos: int, logits: Floats, next_tokens: npt.NDArray[np.intp]) -> Scores:
        """Compare an arm's logits [n, n_vocab] at positions pos .. pos + n - 1 with what was added.

        Parameters
        ----------
        next_tokens : [n]
            Tokens that come next.
        """
        first, n = pos - self.start, len(logits)
        self._file.seek(first * self._n_vocab * 2)
        data = self._file.read(n * self._n_vocab * 2)
        rounded = np.frombuffer(data, np.float16).reshape(n, self._n_vocab).astype(np.float32)
        log_q = log_softmax(logits)
        best, nll = np.concatenate(self._best), np.concatenate(self._nll)
        return Scores(
            kl=kl_divergence(log_softmax(rounded), log_q),
            agree=logits.argmax(axis=1) == best[first : first + n],
            nll=next_nll(log_q, next_tokens),
            nll_full=nll[first : first + n],
        )

    def close(self) -> None:
        """Free the file."""
        self._file.close()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
