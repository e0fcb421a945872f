"""Make or refresh the patch of llama.cpp and its checksum table (for developers of the patch).

With `--tree`, every file of that llama.cpp tree which differs from the pinned one goes into the
patch (a git tree or a plain folder; files that the pinned tree lacks are ignored, since new files
belong into `native/llama`). Without it only the checksum table is made anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_patch import CHECKSUMS, PATCH_DIR, apply_series, describe_series, list_patches
from llama_source import TREE, BuildError, Files, load_pin, read_source

DEFAULT_NAME = "0001-cache-hooks.patch"


def changed_names(pristine: Files, tree: Path) -> list[str]:
    """Files of `tree`, relative to it, that differ from `pristine`."""
    prefix = TREE + "/"
    names = [name[len(prefix) :] for name in sorted(pristine) if name.startswith(prefix)]
    missing = [name for name in names if not (tree / name).is_file()]
    if missing:
        raise BuildError(f"{tree} lacks {len(missing)} files of llama.cpp, such as {missing[0]}")
    return [name for name in names if (tree / name).read_bytes() != pristine[prefix + name]]


def make_patch(pristine: Files, tree: Path) -> bytes:
    """The differences of `tree` from `pristine` as one patch in git's format."""
    names = changed_names(pristine, tree)
    with tempfile.TemporaryDirectory() as scratch:
        for side in ("a", "b"):
            for name in names:
                path = Path(scratch, side, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                old = side == "a"
                data = pristine[f"{TREE}/{name}"] if old else (tree / name).read_bytes()
                path.write_bytes(data)
            Path(scratch, side).mkdir(exist_ok=True)
        command = ["git", "-c", "core.autocrlf=false", "diff", "--no-index", "--no-prefix"]
        command += ["--no-color", "--no-ext-diff", "--no-renames", "--full-index", "a", "b"]
        done = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE)
    if done.returncode not in (0, 1):
        raise BuildError("git diff failed")
    return done.stdout


def refresh(folder: Path, tree: Path | None, name: str, source: str | None) -> None:
    """Write the patch (with `tree`) and the checksum table into `folder`."""
    pristine = read_source(load_pin(), source)
    if tree is not None:
        target = folder / name
        target.unlink(missing_ok=True)
        if any(path.name > name for path in list_patches(folder)):
            raise BuildError(f"{name} is not the last of the series: refresh the last one")
        base = {**pristine, **apply_series(pristine, folder)}
        text = make_patch(base, tree)
        if text:
            target.write_bytes(text)
        result = {**pristine, **apply_series(pristine, folder)}
        left = changed_names(result, tree)
        if left:
            raise BuildError(f"the patch does not reproduce {', '.join(left)}")
    table = json.dumps(describe_series(pristine, folder), indent=2, sort_keys=True)
    (folder / CHECKSUMS).write_text(table + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 after printing one message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tree", type=Path, help="changed llama.cpp tree to make the patch from")
    parser.add_argument("--name", default=DEFAULT_NAME, help="patch to write (%(default)s)")
    parser.add_argument("--source", help="pinned .tar.gz or folder instead of the package index")
    options = parser.parse_args(arguments)
    try:
        refresh(PATCH_DIR, options.tree, options.name, options.source)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    for patch in list_patches(PATCH_DIR):
        print(patch.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
