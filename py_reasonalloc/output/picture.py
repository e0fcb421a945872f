"""Pictures drawn with matplotlib: what can be drawn, and the file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..engine.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: str) -> None:
    """Raise ConfigError unless a picture can be drawn into that file."""
    if Path(path).suffix.lower() not in PICTURES:
        raise ConfigError(f"plot = {path!r} must end in {', '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")


def save_figure(figure: Any, path: str) -> None:
    """Write a matplotlib figure: the same one always gives the same file.

    Raises
    ------
    ConfigError
        The file cannot be written.
    """
    import matplotlib

    # no date and no random names inside
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    try:
        with matplotlib.rc_context({"svg.hashsalt": "reasonalloc"}):
            figure.savefig(path, metadata=metadata.get(Path(path).suffix.lower()), dpi=150)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None
