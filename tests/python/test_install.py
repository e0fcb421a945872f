"""The installed package: its files, and the loader of the native library."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from py_reasonalloc.engine.library import ABI_VERSION

ROOT = Path(__file__).resolve().parents[2]


def run_python(code, **environment):
    """Run code outside the checkout, so that the installed package is what it imports."""
    base = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(sys.executable),
        env={**base, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def installed():
    """Names of the installed files."""
    try:
        files = importlib.metadata.distribution("reasonalloc").files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("reasonalloc is not installed")
    return {path.as_posix() for path in files}


def test_version_is_the_same_everywhere(installed):
    import py_reasonalloc

    assert importlib.metadata.version("reasonalloc") == py_reasonalloc.__version__
    done = run_python(
        "import ctypes; from py_reasonalloc.engine.library import load_library;"
        "lib = load_library(); lib.ra_version.restype = ctypes.c_char_p;"
        "print(lib.ra_version().decode())"
    )
    assert done.stdout.strip() == py_reasonalloc.__version__, done.stderr


def test_loader_constants_match_header_and_pin():
    from py_reasonalloc.engine import library

    header = (ROOT / "native" / "include" / "reasonalloc.h").read_text(encoding="utf-8")
    match = re.search(r"#define RA_ABI_VERSION (\d+)", header)
    assert match and int(match.group(1)) == library.ABI_VERSION
    pin = json.loads((ROOT / "native" / "cmake" / "llama_cpp.json").read_text(encoding="utf-8"))
    assert pin["version"] == library.BINDINGS_VERSION


def test_installed_files(installed):
    assert "py_reasonalloc/include/reasonalloc.h" in installed
    for profile in (ROOT / "profiles").glob("*.json"):
        assert f"py_reasonalloc/profiles/{profile.name}" in installed
    for model in (ROOT / "py_reasonalloc" / "demo").glob("*.gguf"):
        assert f"py_reasonalloc/demo/{model.name}" in installed
    libraries = {name for name in installed if name.startswith("llama_cpp/lib/")}
    stems = {re.sub(r"^(lib)?|\..*", "", name.rsplit("/", 1)[1]) for name in libraries}
    assert {"llama", "ggml", "ggml-base", "ggml-cpu"} <= stems
    assert len(stems) == len(libraries), "a library is there more than once"
    assert not any(name.split("/")[0] in ("include", "lib", "bin") for name in installed)


@pytest.mark.parametrize(
    "code",
    [
        "import llama_cpp; from py_reasonalloc.engine.library import load_library",
        "from py_reasonalloc.engine.library import load_library; load_library(); import llama_cpp",
    ],
)
def test_one_library_in_either_import_order(installed, code):
    done = run_python(
        code + "; assert load_library() is llama_cpp.llama_cpp._lib; llama_cpp.Llama;"
        "print(llama_cpp.__file__)"
    )
    assert done.returncode == 0, done.stderr
    assert "llama_cpp" in done.stdout


LOAD = "from py_reasonalloc.engine.library import load_library; load_library()"


def test_foreign_library_folder_gives_one_message(installed, tmp_path):
    done = run_python(LOAD, LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "LibraryError: Cannot load llama_cpp" in last
    assert f"LLAMA_CPP_LIB_PATH={tmp_path}" in last


FAKE = """
import sys, types, ctypes
package, module = types.ModuleType("llama_cpp"), types.ModuleType("llama_cpp.llama_cpp")
package.__version__ = "{version}"
package.llama_cpp = module
class Function:
    def __call__(self): return {abi}
class Library:
    _name = "/somewhere/libllama.so"
    if {abi}: ra_abi_version = Function()
module._lib = Library()
sys.modules.update({{"llama_cpp": package, "llama_cpp.llama_cpp": module}})
"""


@pytest.mark.parametrize(
    ("version", "abi", "message"),
    [
        ("0.3.36", 0, "is a llama.cpp without ReasonAlloc"),
        ("0.3.36", 999, "has interface version 999"),
        ("0.3.35", ABI_VERSION, r"llama_cpp 0\.3\.35 does not fit"),
    ],
)
def test_other_library_gives_one_message(version, abi, message):
    code = FAKE.format(version=version, abi=abi) + f"sys.path.insert(0, {str(ROOT)!r});" + LOAD
    done = run_python(code)
    assert done.returncode == 1
    assert re.search(rf"LibraryError: .*{message}.*pip install", done.stderr), done.stderr
