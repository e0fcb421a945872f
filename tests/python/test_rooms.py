"""The order of the package's rooms (CONTRIBUTING.md), read from its imports by import-linter."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")  # Python 3.10 or later

ROOT = Path(__file__).resolve().parents[2]
LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> tuple[int, str]:
    """Check the package in a folder against the contracts in its pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        env={"PATH": "", "PYTHONUTF8": "1", "COLUMNS": "200"},
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the sources, to be spoilt."""
    shutil.copytree(
        ROOT / "py_reasonalloc",
        tmp_path / "py_reasonalloc",
        ignore=shutil.ignore_patterns("*.gguf", "__pycache__"),
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_downwards_and_never_in_a_circle() -> None:
    code, out = lint(ROOT)
    assert code == 0, out


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        # upwards, at once and at run time
        ("engine/stats.py", "from ..session.config import BudgetConfig", "A room imports only"),
        ("task/problems.py", "def late():\n    from ..demo import model", "A room imports only"),
        # two rooms on one floor
        ("bench/jobs.py", "from ..eval.cases import rows", "A room imports only"),
        ("eval/cases/rows.py", "from ..decode import loops", "The same inside eval"),
        # a circle between two files of one room, closed at run time
        ("trace/format.py", "def late():\n    from . import read", "No two files"),
    ],
)
def test_a_wrong_import_is_found(copy: Path, file: str, line: str, broken: str) -> None:
    with (copy / "py_reasonalloc" / file).open("a", encoding="utf-8") as stream:
        stream.write(f"\n\n{line}\n")
    code, out = lint(copy)
    assert code == 1, out
    assert re.search(rf"^{broken}.* BROKEN", out, re.MULTILINE), out


def test_a_room_without_a_place_is_found(copy: Path) -> None:
    (copy / "py_reasonalloc" / "attic").mkdir()
    (copy / "py_reasonalloc" / "attic" / "__init__.py").touch()
    code, out = lint(copy)
    assert code == 1 and "py_reasonalloc.attic" in out, out


def test_every_room_says_what_it_is_for() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for init in sorted((ROOT / "py_reasonalloc").glob("*/**/__init__.py")):
        room = init.parent.relative_to(ROOT / "py_reasonalloc").as_posix()
        assert init.read_text(encoding="utf-8").startswith('"""'), room
        assert f"{init.parent.name}/" in contributing, f"CONTRIBUTING.md does not know {room}"


def test_files_stay_small() -> None:
    lines = {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8").count("\n")
        for file in (ROOT / "py_reasonalloc").rglob("*.py")
    }
    assert not {name: n for name, n in lines.items() if n > 400}
