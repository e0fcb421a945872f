"""Hooks for PyInstaller: a frozen program brings libraries, demo and profiles along."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Return the folders in which PyInstaller finds hooks (entry point ``pyinstaller40``)."""
    return [str(Path(__file__).parent)]
