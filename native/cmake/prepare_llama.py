"""Put the pinned, patched llama.cpp tree and its Python bindings into a build folder.

Run by CMake at every configuration. Files that are already right are left alone, time stamps
included, so that after a change of one patch only the files it touches are compiled again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_patch import PATCH_DIR, apply_checked_series
from llama_source import BuildError, Files, load_pin, read_source


def sync_files(files: Files, target: Path) -> int:
    """Make the folder `target` hold exactly `files`; return how many files changed."""
    changed = 0
    for path in [p for p in target.rglob("*") if p.is_file() or p.is_symlink()]:
        if path.relative_to(target).as_posix() not in files:
            path.unlink()
            changed += 1
    for name, data in files.items():
        path = target / name
        if path.is_file() and path.read_bytes() == data:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        changed += 1
    return changed


def prepare(target: Path, source: str | None, patches: Path | None = PATCH_DIR) -> int:
    """Fill `target` from `source` (or the package index), patched unless `patches` is None.

    Returns how many files changed.
    """
    files = read_source(load_pin(), source)
    if patches is not None:
        files.update(apply_checked_series(files, patches))
    return sync_files(files, target)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 after printing one message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", type=Path, required=True, help="folder to fill")
    parser.add_argument("--source", help=".tar.gz or unpacked folder instead of the package index")
    parser.add_argument("--no-patches", action="store_true", help="leave llama.cpp as it is")
    options = parser.parse_args(arguments)
    patches = None if options.no_patches else PATCH_DIR
    try:
        changed = prepare(options.target, options.source or None, patches)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"llama.cpp tree ready in {options.target}, {changed} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
