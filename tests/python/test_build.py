"""The build scripts, on tiny made-up trees, and CMake; tests marked `slow` build the package."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "native" / "cmake"
sys.path.insert(0, str(SCRIPTS))

import llama_patch  # noqa: E402
import llama_source  # noqa: E402
import prepare_llama  # noqa: E402
import refresh_patch  # noqa: E402

TREE = llama_source.TREE
CORE = TREE + "/src/core.cpp"
OTHER = TREE + "/src/other.cpp"
TEXT = "".join(f"line {i}\n" for i in range(1, 31)).encode()
PRISTINE = {
    TREE + "/CMakeLists.txt": b"project(x)\n",
    CORE: TEXT,
    OTHER: b"int other;\n",
    "llama_cpp/__init__.py": b'__version__ = "1.2.3"\n',
}
CHANGED = TEXT.replace(b"line 10\n", b"line 10\nhook();\n")


def write_files(files, root):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def unpacked(tmp_path):
    """A small unpacked source distribution, with files that the build does not use."""
    root = tmp_path / "llama_cpp_python-1.2.3"
    write_files({**PRISTINE, TREE + "/.git": b"gitdir: gone\n", TREE + "/docs/x.md": b"x"}, root)
    return root


@pytest.fixture
def archive(tmp_path, unpacked):
    path = tmp_path / "llama_cpp_python-1.2.3.tar.gz"
    with tarfile.open(str(path), "w:gz") as tar:
        tar.add(str(unpacked), arcname=unpacked.name)
    return path


@pytest.fixture
def pin(archive, monkeypatch):
    """Pins the small source distribution for every build script."""
    pin = llama_source.Pin(
        "1.2.3", llama_source.sha256_file(archive), llama_source.digest_files(PRISTINE)
    )
    monkeypatch.setattr(refresh_patch, "load_pin", lambda: pin)
    monkeypatch.setattr(prepare_llama, "load_pin", lambda: pin)
    return pin


@pytest.fixture
def patches(tmp_path, pin, archive, unpacked):
    """A series of one patch with its checksums, made by refresh_patch."""
    folder = tmp_path / "patches"
    folder.mkdir()
    work = tmp_path / "work" / "llama.cpp"
    shutil.copytree(str(unpacked / TREE), str(work))
    (work / "src" / "core.cpp").write_bytes(CHANGED)
    refresh_patch.refresh(folder, work, "0001-hooks.patch", str(archive))
    return folder


# ---- the source ----


def test_source_archive_and_folders_give_the_same_files(pin, archive, unpacked):
    for given in (archive, unpacked, unpacked / TREE):
        assert llama_source.read_source(pin, str(given)) == PRISTINE


def test_source_changed_archive_refused(pin, archive):
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(llama_source.BuildError, match="not the pinned source distribution"):
        llama_source.read_source(pin, str(archive))


@pytest.mark.parametrize("change", ["alter", "add", "remove"])
def test_source_changed_folder_refused(pin, unpacked, change):
    if change == "alter":
        (unpacked / OTHER).write_bytes(b"int other = 1;\n")
    elif change == "add":
        (unpacked / TREE / "src" / "new.cpp").write_bytes(b"")
    else:
        (unpacked / OTHER).unlink()
    with pytest.raises(llama_source.BuildError, match="is not the original"):
        llama_source.read_source(pin, str(unpacked))


def test_source_other_version_refused(pin, unpacked):
    (unpacked / "llama_cpp" / "__init__.py").write_bytes(b'__version__ = "1.2.2"\n')
    with pytest.raises(llama_source.BuildError, match=r"1\.2\.2, but 1\.2\.3 is needed"):
        llama_source.read_source(pin, str(unpacked))


def test_source_without_bindings_refused(pin, unpacked):
    shutil.rmtree(str(unpacked / "llama_cpp"))
    with pytest.raises(llama_source.BuildError, match="not an unpacked source distribution"):
        llama_source.read_source(pin, str(unpacked / TREE))


def test_source_missing_path_refused(pin, tmp_path):
    with pytest.raises(llama_source.BuildError, match="does not exist"):
        llama_source.read_source(pin, str(tmp_path / "nothing.tar.gz"))


@pytest.mark.parametrize(
    ("override", "xdg"), [(None, None), (None, "/x/cache"), ("/o", None), ("~/o", "/x/cache")]
)
def test_builds_and_the_package_keep_things_in_one_folder(override, xdg, monkeypatch):
    from py_reasonalloc.engine.cache import user_cache

    for name, value in (("REASONALLOC_CACHE_DIR", override), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert llama_source.cache_dir() == user_cache()


def test_cache_is_used_without_network(pin, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("REASONALLOC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(llama_source, "_pip_download", lambda *_: pytest.fail("downloaded"))
    (tmp_path / "cache").mkdir()
    shutil.copy(str(archive), str(tmp_path / "cache" / pin.sdist_name))
    assert llama_source.read_source(pin, None) == PRISTINE


def test_damaged_cache_is_replaced(pin, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("REASONALLOC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        llama_source, "_pip_download", lambda pin, to: shutil.copy(str(archive), str(to))
    )
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / pin.sdist_name).write_bytes(b"half a downl")
    assert llama_source.read_source(pin, None) == PRISTINE
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [pin.sdist_name]


def test_no_network_gives_one_message(pin, tmp_path, monkeypatch):
    monkeypatch.setenv("REASONALLOC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(llama_source.BuildError) as caught:
        llama_source.read_source(pin, None)
    message = str(caught.value)
    assert "Could not download" in message
    assert "REASONALLOC_LLAMA_CPP=" in message
    assert list((tmp_path / "cache").iterdir()) == []


# ---- the patch series ----


def test_patch_round_trip(pin, archive, patches, tmp_path):
    target = tmp_path / "target"
    assert prepare_llama.prepare(target, str(archive), patches) == len(PRISTINE)
    assert (target / CORE).read_bytes() == CHANGED
    assert (target / OTHER).read_bytes() == PRISTINE[OTHER]
    table = json.loads((patches / llama_patch.CHECKSUMS).read_text(encoding="utf-8"))
    assert list(table["files"]) == ["src/core.cpp"]


def test_prepare_touches_only_what_changed(pin, archive, patches, tmp_path):
    target = tmp_path / "target"
    prepare_llama.prepare(target, str(archive), patches)
    for name in PRISTINE:
        os.utime(str(target / name), (1, 1))
    assert prepare_llama.prepare(target, str(archive), patches) == 0

    (patches / "0001-hooks.patch").unlink()
    (patches / llama_patch.CHECKSUMS).unlink()
    (target / "stray.cpp").write_bytes(b"")
    assert prepare_llama.prepare(target, str(archive), patches) == 2
    assert (target / CORE).read_bytes() == TEXT
    assert not (target / "stray.cpp").exists()
    assert {name for name in PRISTINE if (target / name).stat().st_mtime > 1} == {CORE}


def test_second_patch_builds_on_the_first(pin, archive, patches, unpacked, tmp_path):
    tree = tmp_path / "second"
    shutil.copytree(str(unpacked / TREE), str(tree))
    both = CHANGED.replace(b"line 20\n", b"line twenty\n")
    (tree / "src" / "core.cpp").write_bytes(both)
    refresh_patch.refresh(patches, tree, "0002-more.patch", str(archive))
    assert llama_patch.apply_checked_series(PRISTINE, patches) == {CORE: both}
    assert b"hook" not in re.sub(rb"(?m)^ .*", b"", (patches / "0002-more.patch").read_bytes())


def test_patch_edited_without_refresh_refused(patches):
    with (patches / "0001-hooks.patch").open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(llama_source.BuildError, match=r"not as listed.*0001-hooks\.patch"):
        llama_patch.apply_checked_series(PRISTINE, patches)


def test_patch_for_another_version_refused(patches):
    other = {**PRISTINE, CORE: TEXT + b"more\n"}
    with pytest.raises(llama_source.BuildError, match=r"src/core\.cpp is not the version"):
        llama_patch.apply_checked_series(other, patches)


@pytest.mark.parametrize(
    "text", [TEXT.replace(b"line 9\n", b"line nine\n"), b"new first line\n" + TEXT, b"short\n"]
)
def test_patch_that_does_not_apply_refused(patches, text):
    with pytest.raises(llama_source.BuildError, match="does not apply"):
        llama_patch.apply_series({**PRISTINE, CORE: text}, patches)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("diff --git a/src/new.cpp b/src/new.cpp\nnew file mode 100644\n", "existing text files"),
        ("diff --git a/../x b/../x\n", "leaves the tree"),
        ("diff --git a/src/gone.cpp b/src/gone.cpp\n", "has no file"),
    ],
)
def test_patch_of_other_kinds_refused(tmp_path, header, message):
    (tmp_path / "0001-x.patch").write_text(header, encoding="utf-8")
    with pytest.raises(llama_source.BuildError, match=message):
        llama_patch.apply_series(PRISTINE, tmp_path)


def test_released_patches_match_their_checksums():
    folder = llama_patch.PATCH_DIR
    hashes = {p.name: llama_source.sha256_file(p) for p in llama_patch.list_patches(folder)}
    table_path = folder / llama_patch.CHECKSUMS
    table = {"patches": {}, "files": {}}
    if table_path.is_file():
        table = json.loads(table_path.read_text(encoding="utf-8"))
    assert hashes == table["patches"]
    touched = {n for p in llama_patch.list_patches(folder) for n in llama_patch.touched_files(p)}
    assert touched == set(table["files"])


# ---- CMake ----


def cmake(*arguments, **environment):
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed")
    return subprocess.run(
        ["cmake", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_missing_compiler_gives_one_message(tmp_path):
    done = cmake(
        *("-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DREASONALLOC_CORE_ONLY=ON"),
        CC="/nonexistent/cc",
    )
    assert done.returncode != 0
    assert "No working C compiler was found" in done.stdout
    assert done.stdout.count("CMake Error") == 1


@pytest.mark.slow
def test_core_only_build_under_sanitizers(tmp_path):
    options = ["-DREASONALLOC_CORE_ONLY=ON", "-DREASONALLOC_SANITIZE=ON"]
    done = cmake("-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options)
    assert done.returncode == 0, done.stdout
    done = cmake("--build", tmp_path)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(["ctest", "--test-dir", str(tmp_path), "--output-on-failure"])
    assert done.returncode == 0


@pytest.mark.slow
def test_wheel_twice(tmp_path):
    """The second build after a change of one file is quick, and nothing names this machine."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("build", ".git", ".venv", "__pycache__")
    shutil.copytree(str(ROOT), str(checkout), ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=str(checkout), check=True)

    with (checkout / "native" / "core" / "status.c").open("a", encoding="utf-8") as stream:
        stream.write("/* touched */\n")
    start = time.monotonic()
    subprocess.run(command, cwd=str(checkout), check=True)
    assert time.monotonic() - start < 60

    (wheel,) = tmp_path.glob("reasonalloc-*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as contents:
        for name in contents.namelist():
            assert str(tmp_path).encode() not in contents.read(name), name
