"""The version: what a build calls itself, in a git repository, a source distribution, a folder."""

from __future__ import annotations

import email.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE = "0.2.0.dev"
#: What a build backend does before it compiles anything.
PREPARE = "import sys; from scikit_build_core import build; print(build.{hook}(sys.argv[1]))"

pytest.importorskip("scikit_build_core")
pytest.importorskip("setuptools_scm")


def git(folder: Path, *arguments: str) -> str:
    if shutil.which("git") is None:
        pytest.skip("git is needed")
    identity = ("-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false")
    return subprocess.check_output(["git", *identity, *arguments], cwd=folder, text=True).strip()


def version_of(folder: Path, hook: str = "prepare_metadata_for_build_wheel") -> str:
    """Let the build backend write metadata, or a source distribution, of a folder."""
    out = folder.parent / f"{folder.name}-out"
    out.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if "PRETEND" not in name} | {
        "GIT_CEILING_DIRECTORIES": str(folder.parent)
    }
    done = subprocess.run(
        [sys.executable, "-c", PREPARE.format(hook=hook), str(out)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = out / done.stdout.splitlines()[-1]
    if hook == "build_sdist":
        with tarfile.open(made) as archive:
            top = made.name[: -len(".tar.gz")]
            stream = archive.extractfile(f"{top}/PKG-INFO")
            assert stream is not None
            text = stream.read().decode()
    else:
        text = (made / "METADATA").read_text(encoding="utf-8")
    return str(email.parser.Parser().parsestr(text)["Version"])


@pytest.fixture
def folder(tmp_path) -> Path:
    """What the metadata are made of, without git."""
    target = tmp_path / "source"
    (target / "py_reasonalloc").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(str(ROOT / name), str(target / name))
    shutil.copy(str(ROOT / "py_reasonalloc" / "__init__.py"), str(target / "py_reasonalloc"))
    return target


@pytest.fixture
def repository(folder) -> Path:
    """The same with two commits and no tag."""
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    git(folder, "commit", "-qm", "two", "--allow-empty")
    return folder


def test_a_folder_without_git_has_the_base_version(folder) -> None:
    assert version_of(folder) == BASE + "0"


def test_a_clone_without_tags_names_the_commit(repository) -> None:
    found = version_of(repository)
    match = re.fullmatch(re.escape(BASE) + r"2\+g([0-9a-f]{7,})", found)
    assert match, found
    assert git(repository, "rev-parse", "HEAD").startswith(match.group(1))
    (repository / "README.md").write_text("changed\n", encoding="utf-8")
    assert re.fullmatch(re.escape(found) + r"\.d\d{8}", version_of(repository))


def test_a_source_distribution_keeps_the_version(repository, tmp_path) -> None:
    expected = version_of(repository)
    assert version_of(repository, "build_sdist") == expected
    (archive,) = (tmp_path / "source-out").glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        if hasattr(tarfile, "data_filter"):
            contents.extractall(tmp_path / "unpacked", filter="data")
        else:
            contents.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert version_of(unpacked) == expected


def test_a_tag_is_a_release(repository) -> None:
    git(repository, "tag", "v0.3.0")
    assert version_of(repository) == "0.3.0"


def test_cmake_alone_has_the_base_version(tmp_path) -> None:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja"]
    subprocess.run([*command, "-DREASONALLOC_CORE_ONLY=ON"], check=True, capture_output=True)
    commands = subprocess.check_output(["ninja", "-C", str(tmp_path), "-t", "commands"], text=True)
    named = [line for line in commands.splitlines() if "RA_VERSION" in line]
    assert [re.findall(r"RA_VERSION=\S*?(\d[\w.+]*)", line) for line in named] == [[BASE + "0"]]
    assert "status.c" in named[0]


@pytest.mark.parametrize("name", ["run", "eval", "bench", "inspect", "profile"])
def test_every_command_tells_the_version(name) -> None:
    import py_reasonalloc

    script = shutil.which(f"reasonalloc-{name}", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("reasonalloc is not installed")
    out = subprocess.check_output([script, "--version"], text=True)
    assert out.split()[-1] == py_reasonalloc.__version__
