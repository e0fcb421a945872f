"""Fixtures that all tests share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

from gguf_factory import ModelSpec, write_gguf  # noqa: E402

#: Seconds after which a command that hangs is given up.
TIMEOUT = 120


@pytest.fixture(scope="session")
def make_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes ``ModelSpec(**parameters)`` once and returns its path."""
    folder = tmp_path_factory.mktemp("gguf")
    written: dict[ModelSpec, Path] = {}

    def make(**parameters: object) -> Path:
        spec = ModelSpec(**parameters)  # type: ignore[arg-type]
        if spec not in written:
            written[spec] = write_gguf(folder / f"{spec.arch}-{len(written)}.gguf", spec)
        return written[spec]

    return make


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Path of the model that the package ships."""
    from py_reasonalloc.cli import DEMO_MODEL

    assert DEMO_MODEL.is_file(), f"{DEMO_MODEL} is part of the package"
    return DEMO_MODEL


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Path of a small real model, downloaded once; skips where it cannot be."""
    from py_reasonalloc.errors import ReasonAllocError
    from py_reasonalloc.fidelity.smollm2 import model_path

    try:
        return model_path()
    except ReasonAllocError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")


@pytest.fixture(scope="session")
def command() -> list[str]:
    """Return the real command: the installed console script, else the module it calls."""
    script = shutil.which("reasonalloc-run", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", "py_reasonalloc.cli"]


@pytest.fixture(scope="session")
def cli(command: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command and captures its output; stdin is empty."""

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=TIMEOUT,
            cwd=ROOT,
            check=False,
        )

    return run
