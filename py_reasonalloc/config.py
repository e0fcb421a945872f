"""Where the installed headers, libraries and package files for C programs are.

python -m py_reasonalloc.config --cmake-dir        for CMake: -Dreasonalloc_DIR=$(...)
python -m py_reasonalloc.config --pkgconfig-dir    for pkg-config: PKG_CONFIG_PATH=$(...)
python -m py_reasonalloc.config --include-dir | --lib-dir
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

#: Option -> folder below the one that holds the packages.
FOLDERS = {
    "cmake-dir": ("py_reasonalloc/cmake", "folder of reasonalloc-config.cmake"),
    "pkgconfig-dir": ("py_reasonalloc/pkgconfig", "folder of reasonalloc.pc"),
    "include-dir": ("py_reasonalloc/include", "folder of reasonalloc.h and llama.h"),
    "lib-dir": ("llama_cpp/lib", "folder of libllama"),
}


def site_folder() -> Path:
    """Return the folder that holds the installed packages.

    Raises
    ------
    FileNotFoundError
        The bindings, which are installed beside us, are not there.
    """
    # An editable installation keeps the Python files elsewhere; the bindings are never there.
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llama_cpp is not installed: install ReasonAlloc again")
    return Path(spec.origin).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Print the folders asked for, one a line."""
    parser = argparse.ArgumentParser(
        prog="python -m py_reasonalloc.config", description=(__doc__ or "").splitlines()[0]
    )
    for option, (_, text) in FOLDERS.items():
        parser.add_argument(f"--{option}", action="store_true", help=text)
    given = vars(parser.parse_args(arguments))
    asked = [folder for option, (folder, _) in FOLDERS.items() if given[option.replace("-", "_")]]
    if not asked:
        parser.error(f"say which: {', '.join(f'--{option}' for option in FOLDERS)}")
    try:
        folders = [site_folder() / folder for folder in asked]
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for folder in folders:
        if not folder.is_dir():
            print(f"error: {folder} is not there: install ReasonAlloc again", file=sys.stderr)
            return 1
    print(*folders, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
