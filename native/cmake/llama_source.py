"""Find, verify and read the pinned llama.cpp tree and its Python bindings.

Both come from one file, the source distribution of llama-cpp-python named in `llama_cpp.json`.
Nothing here writes outside the download cache; `prepare_llama.py` puts the files in place.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PIN_FILE = Path(__file__).with_name("llama_cpp.json")
TREE = "vendor/llama.cpp"
BINDINGS = "llama_cpp"

# What a build of the libraries reads; tests, tools, models and documents are left out.
TREE_PARTS = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "licenses", "src", "vendor")
BINDINGS_SUFFIXES = (".py", ".typed")

# Relative path below the source distribution, with forward slashes -> content.
Files = dict[str, bytes]


def _load_tempfiles() -> ModuleType:
    """Load the package's own module by its path: in a build, no package is installed."""
    path = Path(__file__).resolve().parents[2] / "py_reasonalloc" / "engine" / "tempfiles.py"
    spec = importlib.util.spec_from_file_location("reasonalloc_tempfiles", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tempfiles = _load_tempfiles()


class BuildError(Exception):
    """A problem whose message tells the user what to do; shown without a traceback."""


@dataclass(frozen=True)
class Pin:
    """The one llama-cpp-python release this project builds on."""

    version: str
    sdist_sha256: str
    files_sha256: str

    @property
    def sdist_name(self) -> str:
        """File name of the source distribution."""
        return f"llama_cpp_python-{self.version}.tar.gz"


def load_pin(path: Path = PIN_FILE) -> Pin:
    """Read the pinned version and hashes."""
    return Pin(**json.loads(path.read_text(encoding="utf-8")))


def sha256_bytes(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def digest_files(files: Files) -> str:
    """One digest over names and contents, independent of order, time stamps and modes."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{sha256_bytes(files[name])}  {name}\n".encode())
    return digest.hexdigest()


def is_wanted(name: str) -> bool:
    """Whether the file `name` of the source distribution is used by the build."""
    if name.startswith(TREE + "/"):
        return name[len(TREE) + 1 :].split("/", 1)[0] in TREE_PARTS
    return name.startswith(BINDINGS + "/") and name.endswith(BINDINGS_SUFFIXES)


def read_archive(path: Path) -> Files:
    """Wanted files of the source distribution `path`, whose hash has been checked."""
    files: Files = {}
    with tarfile.open(str(path), "r:gz") as archive:
        for member in archive:
            name = member.name.split("/", 1)[-1]
            if member.isfile() and is_wanted(name):
                stream = archive.extractfile(member)
                assert stream is not None  # a regular file always has one
                files[name] = stream.read()
    return files


def read_folder(root: Path) -> Files:
    """Wanted files of the unpacked source distribution at `root`."""
    files: Files = {}
    parts = [f"{TREE}/{part}" for part in TREE_PARTS] + [BINDINGS]
    for part in parts:
        start = root / part
        for path in [start] if start.is_file() else sorted(start.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and is_wanted(name):
                files[name] = path.read_bytes()
    return files


def cache_dir() -> Path:
    """Folder that keeps the download between builds; `REASONALLOC_CACHE_DIR` overrides it.

    The same folder as `py_reasonalloc.engine.cache.user_cache`, which asks platformdirs. A build
    cannot: it has no package but those of `build-system.requires`, or, with CMake alone, none. A
    test compares the two.
    """
    override = os.environ.get("REASONALLOC_CACHE_DIR")
    if override:
        return Path(override).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "reasonalloc"


def _pip_download(pin: Pin, target: Path) -> None:
    """Let pip put the source distribution into `target`, with the user's own pip settings.

    The hash is given to pip too, so that nothing of another file is ever run. Build isolation is
    off: scikit-build-core, which pip wants for the metadata, is in this build environment anyway.
    """
    requirement = target / "requirement.txt"
    requirement.write_text(
        f"llama-cpp-python=={pin.version} --hash=sha256:{pin.sdist_sha256}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", "llama-cpp-python", "--no-input", "--disable-pip-version-check"]
    command += ["--require-hashes", "--dest", str(target), "-r", str(requirement)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode == 0 and (target / pin.sdist_name).is_file():
        return
    output: list[str] = done.stdout.decode("utf-8", "replace").splitlines()
    errors = [line.strip() for line in output if re.match(r"\s*ERROR:|.*No module named", line)]
    raise BuildError(
        f"Could not download the source distribution llama-cpp-python {pin.version} with pip.\n"
        f"  pip said: {' '.join(errors or output[-3:]) or 'nothing'}\n"
        "Check the network and pip's index and proxy settings. Without a package index, fetch "
        f"{pin.sdist_name} elsewhere and pass it with\n"
        "  pip install . -C cmake.define.REASONALLOC_LLAMA_CPP=/path/to/file-or-unpacked-folder"
    )


def fetch_archive(pin: Pin) -> Path:
    """Path of the verified source distribution in the cache, downloaded when it is not there."""
    folder = cache_dir()
    cached = folder / pin.sdist_name
    if cached.is_file():
        if sha256_file(cached) == pin.sdist_sha256:
            return cached
        print(f"discarding damaged {cached}", flush=True)
        cached.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfiles.scratch_folder(folder, "download") as scratch:
            print(f"downloading {pin.sdist_name} (76 MB) with pip", flush=True)
            _pip_download(pin, scratch)
            check_archive(scratch / pin.sdist_name, pin)
            os.replace(str(scratch / pin.sdist_name), str(cached))
    except OSError as error:
        raise BuildError(
            f"Cannot write to the download cache: {error}\n"
            "Set REASONALLOC_CACHE_DIR to a folder that can be written."
        ) from error
    return cached


def check_archive(path: Path, pin: Pin) -> None:
    """Refuse any file that is not byte for byte the pinned source distribution."""
    found = sha256_file(path)
    if found != pin.sdist_sha256:
        raise BuildError(
            f"{path} is not the pinned source distribution of llama-cpp-python {pin.version}.\n"
            f"  sha256 is       {found}\n"
            f"  sha256 must be  {pin.sdist_sha256}\n"
            "Nothing was built. Give the original file, or none to download it."
        )


def _folder_root(path: Path) -> Path:
    """Top of the unpacked source distribution, given itself or its `vendor/llama.cpp`."""
    for root in (path, path.parent.parent):
        tree, bindings = root / TREE, root / BINDINGS / "__init__.py"
        is_source = (tree / "CMakeLists.txt").is_file() and bindings.is_file()
        if is_source and (path == root or path.resolve() == tree.resolve()):
            return root
    raise BuildError(
        f"{path} is not an unpacked source distribution of llama-cpp-python.\n"
        "REASONALLOC_LLAMA_CPP takes the .tar.gz file, the folder unpacked from it, or the "
        f"{TREE} folder inside that (the bindings in ../../{BINDINGS} are needed too)."
    )


def _bindings_version(files: Files) -> str:
    source = files.get(f"{BINDINGS}/__init__.py", b"").decode("utf-8", "replace")
    match = re.search(r"__version__\s*=\s*[\"']([^\"']+)", source)
    return match.group(1) if match else "unknown"


def check_files(files: Files, pin: Pin, origin: str) -> None:
    """Refuse files that differ from the pinned ones."""
    version = _bindings_version(files)
    if version != pin.version:
        raise BuildError(
            f"{origin} is llama-cpp-python {version}, but {pin.version} is needed.\n"
            f"Give {pin.sdist_name} or what was unpacked from it."
        )
    found = digest_files(files)
    if found != pin.files_sha256:
        raise BuildError(
            f"{origin} is not the original llama-cpp-python {pin.version}: "
            "files were changed, added or removed.\n"
            f"  digest is       {found}\n"
            f"  digest must be  {pin.files_sha256}\n"
            f"Nothing was built. Unpack {pin.sdist_name} again, or give the .tar.gz itself."
        )


def read_source(pin: Pin, given: str | None) -> Files:
    """Verified pristine files from `given` (archive or folder), or from the package index."""
    if given:
        path = Path(given).expanduser()
        if path.is_dir():
            files = read_folder(_folder_root(path))
            check_files(files, pin, str(path))
            return files
        if not path.is_file():
            raise BuildError(f"REASONALLOC_LLAMA_CPP names {path}, which does not exist.")
        check_archive(path, pin)
    else:
        path = fetch_archive(pin)
    files = read_archive(path)
    check_files(files, pin, str(path))
    return files
