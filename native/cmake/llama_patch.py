"""Apply the patch series `native/patches/*.patch` to pristine files, strictly.

`checksums.json` beside the patches lists the hash of each patch and, for each file they touch, the
hash before and after. Whatever does not match exactly is refused. `refresh_patch.py` writes it.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from llama_source import TREE, BuildError, Files, sha256_bytes

PATCH_DIR = Path(__file__).resolve().parent.parent / "patches"
CHECKSUMS = "checksums.json"
REFRESH_HINT = "Whoever changes a patch runs native/cmake/refresh_patch.py afterwards."


class _Messages(logging.Handler):
    """Keeps what patch-ng logs, for the error message."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip())


def list_patches(folder: Path) -> list[Path]:
    """The patches in the order of their names, which start with a number."""
    return sorted(folder.glob("*.patch"))


def touched_files(patch: Path) -> list[str]:
    """Files of the llama.cpp tree that `patch` changes, checked to be plain modifications."""
    names = []
    for line in patch.read_text(encoding="utf-8").splitlines():
        if line.startswith(("new file", "deleted file", "rename ", "copy ", "GIT binary")):
            raise BuildError(
                f"{patch.name}: '{line}': only changes to existing text files are supported; "
                "new files belong into native/llama."
            )
        if line.startswith("diff --git "):
            names.append(line.split(" b/", 1)[1])
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise BuildError(f"{patch.name}: path leaves the tree: {name}")
    return names


def apply_patch(patch: Path, files: Files) -> Files:
    """Contents, after `patch`, of the files that it touches; `files` holds them before."""
    try:
        import patch_ng
    except ImportError as error:
        raise BuildError(
            "The Python package patch-ng is needed to patch llama.cpp: pip install patch-ng"
        ) from error

    names = touched_files(patch)
    messages = _Messages()
    logger = logging.getLogger("patch_ng")
    logger.addHandler(messages)
    propagate, logger.propagate = logger.propagate, False
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for name in names:
                if f"{TREE}/{name}" not in files:
                    raise BuildError(f"{patch.name}: llama.cpp has no file {name}")
                target = Path(scratch, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(files[f"{TREE}/{name}"])
            parsed = patch_ng.fromfile(str(patch))
            if not parsed or not parsed.apply(strip=0, root=scratch) or messages.lines:
                detail = "".join(f"  {line}\n" for line in messages.lines[:8])
                raise BuildError(
                    f"{patch.name} does not apply to the pinned llama.cpp tree:\n"
                    f"{detail}Nothing was built."
                )
            return {f"{TREE}/{name}": Path(scratch, name).read_bytes() for name in names}
    finally:
        logger.removeHandler(messages)
        logger.propagate = propagate


def apply_series(files: Files, folder: Path = PATCH_DIR) -> Files:
    """Changed files only: name -> content after every patch of `folder`, in order."""
    changed: Files = {}
    for patch in list_patches(folder):
        changed.update(apply_patch(patch, {**files, **changed}))
    return changed


def describe_series(files: Files, folder: Path = PATCH_DIR) -> dict[str, dict[str, object]]:
    """The checksum table for the patches of `folder` on the pristine `files`."""
    changed = apply_series(files, folder)
    return {
        "patches": {path.name: sha256_bytes(path.read_bytes()) for path in list_patches(folder)},
        "files": {
            name[len(TREE) + 1 :]: {
                "before": sha256_bytes(files[name]),
                "after": sha256_bytes(changed[name]),
            }
            for name in sorted(changed)
        },
    }


def apply_checked_series(files: Files, folder: Path = PATCH_DIR) -> Files:
    """`apply_series`, refusing everything that differs from the checksum table."""
    patches = {path.name: sha256_bytes(path.read_bytes()) for path in list_patches(folder)}
    table_path = folder / CHECKSUMS
    table: dict[str, Any] = {"patches": {}, "files": {}}
    if table_path.is_file():
        table = json.loads(table_path.read_text(encoding="utf-8"))
    if patches != table["patches"]:
        names = {**patches, **table["patches"]}
        bad = [name for name in names if patches.get(name) != table["patches"].get(name)]
        raise BuildError(
            f"native/patches: not as listed in {CHECKSUMS}: {', '.join(sorted(bad))}\n"
            f"Restore the files as released. {REFRESH_HINT}"
        )
    for name, hashes in table["files"].items():
        if sha256_bytes(files.get(f"{TREE}/{name}", b"")) != hashes["before"]:
            raise BuildError(
                f"llama.cpp's {name} is not the version that the patch was made for. "
                "Use the pinned source distribution."
            )
    changed = apply_series(files, folder)
    after = {name[len(TREE) + 1 :]: sha256_bytes(data) for name, data in changed.items()}
    expected = {name: hashes["after"] for name, hashes in table["files"].items()}
    if after != expected:
        different = {name for name, _ in set(after.items()) ^ set(expected.items())}
        raise BuildError(
            "Patching llama.cpp gave an unexpected result in "
            f"{', '.join(sorted(different))}.\n{REFRESH_HINT}"
        )
    return changed
