"""What the documentation shows is true: the worked example compiles, tables are the engine's."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from py_reasonalloc.engine import bindings as c

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("include", "core", "policy", "alloc", "engine")


def example_parts() -> dict[str, str]:
    """Map each marker comment of the page to the code block after it."""
    page = (ROOT / "docs" / "writing-a-policy.md").read_text()
    return dict(re.findall(r"<!-- (.+?) -->\n```\w+\n(.+?)```", page, flags=re.DOTALL))


@pytest.fixture(scope="module")
def example_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C core with the page's edits made, as a shared library."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler on PATH")
    folder = tmp_path_factory.mktemp("native")
    for room in ROOMS:
        shutil.copytree(ROOT / "native" / room, folder / room)
    for marker, code in example_parts().items():
        if marker.startswith("file: "):
            (folder / marker[6:]).write_text(code)
        found = re.fullmatch(r'(before|after) "(.+)" in (\S+)', marker)
        if found:
            side, anchor, name = found.groups()
            text = (folder / name).read_text()
            assert text.count(anchor) == 1, f"{name} has no single {anchor!r}"
            new = f"{code}{anchor}" if side == "before" else f"{anchor}\n{code}"
            (folder / name).write_text(text.replace(anchor, new))
    sources = [str(p) for room in ROOMS for p in sorted((folder / room).glob("*.c"))]
    library = folder / "example.so"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    includes = [f"-I{folder / room}" for room in ROOMS]
    subprocess.run([compiler, *flags, *includes, *sources, "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library))


def test_the_worked_example_of_a_policy(example_library: ctypes.CDLL) -> None:
    lib = example_library
    lib.ra_policy_score.argtypes = c.ra_policy_score.argtypes
    lib.ra_config_default_params.restype = c.ra_config
    rng = np.random.default_rng(0)
    n_kv, n_window, head_dim = 50, 8, 16
    k = rng.standard_normal((n_kv, head_dim)).astype(np.float32)
    q = rng.standard_normal((n_window, 2, head_dim)).astype(np.float32)
    pos = np.arange(n_kv, dtype=np.int32)

    def score(policy: bytes) -> np.ndarray:
        config = lib.ra_config_default_params()
        config.policy, config.n_sink = policy, 0
        out = np.empty(n_kv, np.float32)
        head = c.ra_head_arrays(
            size=ctypes.sizeof(c.ra_head_arrays),
            n_kv=n_kv,
            n_group=2,
            n_obs=n_window,
            head_dim_k=head_dim,
            kq_scale=0.25,
            k=k.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            q=q.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
        )
        status = lib.ra_policy_score(
            ctypes.byref(config),
            ctypes.byref(head),
            out.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            None,
            None,
        )
        assert status == 0
        return out[: n_kv - n_window]

    namespace = {"np": np}
    exec(example_parts()["twin"], namespace)  # the page's own code
    expected = namespace["example"](score(b"snapkv"), n_kv, n_window)
    assert np.abs(score(b"example") - expected).max() < 1e-6


def test_size_table_of_the_readme() -> None:
    """The table is what `python -m py_reasonalloc.sizes` prints."""
    from py_reasonalloc.sizes import table

    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- sizes -->\n(.+?)\n<!-- /sizes -->", readme, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == table(16384, (128, 256, 512, 1024), "f16")


def test_every_policy_has_a_row_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for i in range(c.ra_policy_count()):
        assert f"| `{c.ra_policy_name(i).decode()}`" in readme


def test_the_tests_of_the_invariants_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:test|ra_pool)_\w+(?:\.c)?)`", page))
    folders = (ROOT / "tests" / "native", ROOT / "tests" / "python")
    files = [path for folder in folders for path in folder.glob("*.*") if path.is_file()]
    text = "\n".join(path.read_text() for path in files)
    found = {path.name for path in files} | set(re.findall(r"(?:def|void|ra_status) (\w+)\(", text))
    assert len(named) > 30 and named - found == set()


def test_pictures_are_there_and_small() -> None:
    shown = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            picture = page.parent / name
            assert picture.is_file(), name
            if picture.parent.name == "docs":  # those of measurements have thousands of points
                assert picture.stat().st_size < 100_000, name
            shown.add(picture.name)
    assert shown >= {"chat.svg", "watch.svg", "desktop.png"}
