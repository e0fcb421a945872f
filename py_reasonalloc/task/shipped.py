"""The model file that comes with this package, and what commands take for it."""

from __future__ import annotations

from pathlib import Path

from .vocab import FILE_NAMES

DEMO = "demo"
DEMO_MODEL = Path(__file__).parents[1] / "demo" / FILE_NAMES["q8_0"]
#: What `reasonalloc-run demo` uses where nothing else is asked for.
DEMO_DEFAULTS = {"budget": 160, "buffer": 16, "protect_prompt": "all", "temp": 0.0}


def model_path(name: str) -> Path:
    """Return the model file that a command line names, as a path or as ``demo``."""
    return DEMO_MODEL if name == DEMO else Path(name)
