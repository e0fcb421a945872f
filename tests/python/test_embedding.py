"""The wheel in fresh environments, as others use it: beside other packages, frozen, from C, typed.

The Python blocks of docs/embedding.md are what runs with the frameworks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from smollm2 import smollm2_path
from virtual_display import display, require_tkinter

from py_reasonalloc.engine.library import BINDINGS_VERSION

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"```python\n# needs: (.+?)\n(.*?)```",
    (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8"),
    flags=re.DOTALL,
)
FRAMEWORKS = [needs for needs, _ in BLOCKS if needs != "nothing"]

pytestmark = pytest.mark.slow


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: object, cwd: Path | None = None, **environment: str):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd or Path(sys.prefix),
        env={**clean_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )


def must(*command: object, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


class Venv:
    """A fresh environment."""

    def __init__(self, folder: Path) -> None:
        must(sys.executable, "-m", "venv", folder)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        site = "import sysconfig; print(sysconfig.get_path('platlib'))"
        self.site = Path(must(self.python, "-c", site).strip())

    def pip(self, *arguments: object) -> str:
        return must(self.python, "-m", "pip", *arguments)

    def entries(self) -> set[str]:
        return {
            path.name
            for path in self.site.iterdir()
            if re.match(r"(llama_cpp|py_reasonalloc|reasonalloc)", path.name)
        }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    must(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ".", cwd=ROOT)
    (path,) = folder.glob("reasonalloc-*.whl")
    return path


@pytest.fixture
def bare(wheel: Path, tmp_path: Path) -> Venv:
    """The wheel without what it depends on."""
    venv = Venv(tmp_path / "venv")
    venv.pip("install", "-q", "--no-deps", wheel)
    return venv


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """The wheel as a user installs it."""
    venv = Venv(tmp_path_factory.mktemp("plain") / "venv")
    venv.pip("install", "-q", wheel)
    return venv


@pytest.fixture(scope="module")
def crowded(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """The same with every framework of the page, each of which wants llama-cpp-python or has it."""
    venv = Venv(tmp_path_factory.mktemp("crowded") / "venv")
    venv.pip("install", "-q", wheel)
    done = run(venv.python, "-m", "pip", "install", "-q", *FRAMEWORKS)
    if done.returncode != 0:
        pytest.skip(f"the frameworks do not install here: {done.stderr[-300:]}")
    return venv


# --- the entry of the bindings -------------------------------------------------------------------

ENTRY = f"llama_cpp_python-{BINDINGS_VERSION}+reasonalloc.dist-info"


def test_the_record_of_the_wheel_is_whole(wheel: Path) -> None:
    """pip does not check it; others do."""
    with zipfile.ZipFile(wheel) as contents:
        names = contents.namelist()
        (record,) = [n for n in names if re.fullmatch(r"reasonalloc-[^/]+\.dist-info/RECORD", n)]
        listed = [line.split(",")[0] for line in contents.read(record).decode().splitlines()]
    assert sorted(listed) == sorted(names)
    assert len(set(names)) == len(names)
    assert any(name.endswith(f".data/platlib/{ENTRY}/METADATA") for name in names)


def test_installers_see_the_bindings_and_they_go_with_us(bare: Venv) -> None:
    assert ENTRY in bare.entries()
    wanted = f"llama-cpp-python=={BINDINGS_VERSION}"
    assert "already satisfied" in bare.pip("install", "--no-deps", wanted)
    bare.pip("uninstall", "-q", "-y", "reasonalloc")
    assert bare.entries() == set()


def test_the_entry_alone_can_go_without_harm(bare: Venv) -> None:
    before = bare.entries()
    bare.pip("uninstall", "-q", "-y", "llama-cpp-python")
    assert bare.entries() == before - {ENTRY}
    assert any((bare.site / "llama_cpp" / "lib").iterdir())
    bare.pip("uninstall", "-q", "-y", "reasonalloc")
    assert bare.entries() == set()


def test_the_entry_asks_for_what_the_bindings_ask_for(plain: Venv, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "native" / "cmake"))
    import tarfile

    import llama_source

    archive = llama_source.fetch_archive(llama_source.load_pin())
    with tarfile.open(archive) as tar:
        name = f"llama_cpp_python-{BINDINGS_VERSION}/PKG-INFO"
        theirs = tar.extractfile(name).read().decode()
    ours = (plain.site / ENTRY / "METADATA").read_text(encoding="utf-8")

    def wanted(text: str) -> set[str]:
        lines = re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)
        return {line for line in lines if not re.search(r'extra == "(dev|test|all)"', line)}

    assert wanted(ours) == wanted(theirs) | {"reasonalloc"}
    assert "No broken requirements" in plain.pip("check")


def test_uv_sees_it_too(bare: Venv) -> None:
    done = run(bare.python, "-m", "pip", "install", "-q", "uv")
    if done.returncode != 0:
        pytest.skip("uv does not install here")

    def uv(*arguments: str) -> str:
        done = run(bare.bin / "uv", "pip", *arguments, "--python", bare.python)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = uv("install", "--offline", "--no-deps", f"llama-cpp-python=={BINDINGS_VERSION}")
    assert "Installed" not in said and "Checked 1 package" in said
    uv("uninstall", "reasonalloc")
    assert bare.entries() == set()


def test_overwritten_bindings_are_noticed_at_the_first_import(plain: Venv, tmp_path: Path) -> None:
    """By a real llama.cpp of the same release: only its library differs."""
    stock = os.environ.get("REASONALLOC_STOCK_LIB")
    if not stock:
        pytest.skip("REASONALLOC_STOCK_LIB names no unpatched build")
    foreign = tmp_path / f"llama_cpp_python-{BINDINGS_VERSION}-py3-none-any.whl"
    info = f"llama_cpp_python-{BINDINGS_VERSION}.dist-info"
    with zipfile.ZipFile(foreign, "w") as contents:
        for path in (plain.site / "llama_cpp").glob("**/*.py"):
            contents.write(path, path.relative_to(plain.site))
        for path in Path(stock).iterdir():
            contents.write(path.resolve(), f"llama_cpp/lib/{path.name}")
        metadata = f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {BINDINGS_VERSION}\n"
        contents.writestr(f"{info}/METADATA", metadata)
        contents.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n")
        names = [*contents.namelist(), f"{info}/RECORD"]
        contents.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))

    venv = Venv(tmp_path / "venv")
    shutil.copytree(plain.site, venv.site, dirs_exist_ok=True)
    venv.pip("install", "-q", "--force-reinstall", "--no-deps", foreign)
    done = run(venv.python, "-c", "from py_reasonalloc import ReasonLlama")
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "is a llama.cpp without ReasonAlloc" in line
    assert f"llama-cpp-python {BINDINGS_VERSION} has overwritten" in line
    assert "pip uninstall -y llama-cpp-python" in line
    done = run(venv.python, "-m", "py_reasonalloc.commands.run", "demo")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1


# --- frameworks ----------------------------------------------------------------------------------


def test_frameworks_leave_our_bindings_alone(crowded: Venv, plain: Venv) -> None:
    assert "No broken requirements" in crowded.pip("check")
    listed = crowded.pip("list", "--format=freeze")
    assert f"llama_cpp_python=={BINDINGS_VERSION}+reasonalloc" in listed
    for path in (plain.site / "llama_cpp").glob("**/*"):
        if path.is_file() and path.suffix != ".pyc":
            other = crowded.site / path.relative_to(plain.site)
            assert other.read_bytes() == path.read_bytes(), path.name


CHECKS = {
    "langchain-community": """
assert isinstance(text, str) and len(text) > 100 and isinstance(message.content, str)
assert message.content and all(answers) and len(answers) == 2
assert llm.client is llama and llama.kv_stats().n_compressions > 0
assert llm.batch(["One, two,", "Monday, Tuesday,"]) == answers
""",
    "llama-index-llms-llama-cpp": """
assert len(text) > 100 and "".join(pieces) == text
assert llama.kv_stats().n_compressions > 0 and llm.metadata.context_window == llama.n_ctx()
""",
    "outlines[llamacpp]": 'assert answer in ("yes", "no") and llama.kv_stats().n_pos > 0',
    "instructor": "assert isinstance(answer, Sky) and llama.kv_stats().n_pos > 0",
    "nothing": "assert isinstance(llama, ReasonLlama) and llama.kv_stats().n_compressions > 0",
}


@pytest.mark.parametrize(("needs", "code"), BLOCKS, ids=[needs for needs, _ in BLOCKS])
def test_what_the_page_shows(request, tmp_path: Path, needs: str, code: str) -> None:
    venv = request.getfixturevalue("plain" if needs == "nothing" else "crowded")
    (tmp_path / "model.gguf").symlink_to(smollm2_path())
    (tmp_path / "block.py").write_text(code + CHECKS[needs], encoding="utf-8")
    must(venv.python, "block.py", cwd=tmp_path)


def test_what_is_no_session_is_refused(crowded: Venv) -> None:
    code = (
        "from py_reasonalloc.integrations import langchain, llama_index\n"
        "makers = (lambda: langchain.ReasonLLM(model_path='x'), langchain.ChatReason, "
        "lambda: llama_index.ReasonLLM('x'))\n"
        "for make in makers:\n"
        "    try: make()\n"
        "    except ValueError as error: assert 'must be a ReasonLlama' in str(error), error\n"
        "    else: raise SystemExit('taken')\n"
    )
    must(crowded.python, "-c", code)


# --- programs ------------------------------------------------------------------------------------

LAST_LINE = r"(\d+) tokens, at most (\d+) held, (\d+) evicted, (\d+) bytes"


def last_line(text: str) -> tuple[int, ...]:
    found = re.fullmatch(LAST_LINE, text.splitlines()[-1])
    assert found, text[-300:]
    return tuple(map(int, found.groups()))


@pytest.fixture(scope="module")
def python_example(plain: Venv) -> str:
    script = ROOT / "examples" / "python" / "generate.py"
    return must(plain.python, script, smollm2_path(), 64, 250)


def test_the_example_in_python(plain: Venv, python_example: str) -> None:
    n_pos, peak, n_evicted, n_bytes = last_line(python_example)
    assert n_pos > 192 >= peak and n_evicted > 0 and n_bytes > 0
    script = ROOT / "examples" / "python" / "generate.py"
    assert run(plain.python, script).returncode == 2
    done = run(plain.python, script, "nope.gguf")
    assert (done.returncode, done.stderr) == (1, "error: nope.gguf: no such file\n")


@pytest.mark.parametrize("way", ["cmake", "pkg-config"])
def test_the_example_in_c(plain: Venv, python_example: str, tmp_path: Path, way: str) -> None:
    """Built against the installed package; the same text as in Python, in a folder moved away."""
    if not shutil.which(way):
        pytest.skip(f"{way} is not installed")
    site = tmp_path / "elsewhere"  # what is installed may be moved
    for name in ("llama_cpp", "py_reasonalloc"):
        shutil.copytree(plain.site / name, site / name)
    source = ROOT / "examples" / "c"

    def where(option: str) -> str:
        folder = must(plain.python, "-m", "py_reasonalloc.config", option).strip()
        return str(site / Path(folder).relative_to(plain.site.resolve()))

    if way == "cmake":
        build = tmp_path / "build"
        must("cmake", "-S", source, "-B", build, f"-Dreasonalloc_DIR={where('--cmake-dir')}")
        must("cmake", "--build", build)
        program = build / "generate"
    else:
        program, path = tmp_path / "generate", where("--pkgconfig-dir")
        flags = must("pkg-config", "--cflags", "--libs", "reasonalloc", PKG_CONFIG_PATH=path)
        warnings = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
        must("cc", *warnings, source / "main.c", *flags.split(), "-o", program)
    text = must(program, smollm2_path(), 64, 250, LD_LIBRARY_PATH="")
    assert last_line(text) == last_line(python_example)
    assert text == python_example
    assert run(program).returncode == 2
    done = run(program, smollm2_path(), 5)
    assert done.returncode == 1 and "budget 5 is too small" in done.stderr


def test_a_frozen_program(wheel: Path, tmp_path: Path) -> None:
    venv = Venv(tmp_path / "venv")
    done = run(venv.python, "-m", "pip", "install", "-q", wheel, "pyinstaller")
    if done.returncode != 0:
        pytest.skip("PyInstaller does not install here")
    (tmp_path / "app.py").write_text(
        "from py_reasonalloc import ReasonLlama\n"
        "from py_reasonalloc.task.shipped import DEMO_MODEL\n"
        "with ReasonLlama(DEMO_MODEL, budget=64, buffer=16, profile='auto') as llama:\n"
        "    text = llama('x', max_tokens=100, temperature=0)['choices'][0]['text']\n"
        "    config = llama.config\n"
        "    print(len(text) > 0, config.profile.source, config.layers, llama.kv_stats().budget)\n"
    )
    must(venv.bin / "pyinstaller", "--log-level", "ERROR", "app.py", cwd=tmp_path)
    moved = tmp_path / "moved"
    (tmp_path / "dist" / "app").rename(moved)
    shutil.rmtree(tmp_path / "venv")
    done = subprocess.run([moved / "app"], env={}, cwd=moved, capture_output=True, text=True)
    # a source without a folder: a profile that came along
    assert (done.returncode, done.stdout) == (0, "True demo-reasoner-horizon error 64\n"), (
        done.stderr
    )


def test_the_frozen_desktop_example(wheel: Path, tmp_path: Path) -> None:
    """In a window of a virtual display, with the environment out of reach."""
    require_tkinter()
    venv = Venv(tmp_path / "venv")
    done = run(venv.python, "-m", "pip", "install", "-q", wheel, "pyinstaller")
    if done.returncode != 0:
        pytest.skip("PyInstaller does not install here")
    app = ROOT / "examples" / "desktop" / "app.py"
    must(venv.bin / "pyinstaller", "--log-level", "ERROR", app, cwd=tmp_path)
    moved = tmp_path / "moved"
    (tmp_path / "dist" / "app").rename(moved)
    shutil.rmtree(tmp_path / "venv")
    with display() as name:
        done = subprocess.run(
            [moved / "app", "--selftest"],
            env={"DISPLAY": name},
            cwd=moved,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["was_stopped"] is True and report["n_evicted"] > 0
    assert "<think>" in report["text"] and report["kv_bytes"] > 0


def test_types_reach_a_user(plain: Venv, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(
        "from py_reasonalloc import BudgetConfig, ReasonLlama\n"
        "config = BudgetConfig(budget='many')\n"
        "with ReasonLlama('x.gguf', config) as llama:\n"
        "    reveal_type(llama.kv_stats().n_evicted)\n"
        "    reveal_type(llama.n_cached())\n"
        "    llama.kv_stats(1)\n"
    )
    done = run(
        sys.executable, "-m", "mypy", "--python-executable", plain.python, "use.py", cwd=tmp_path
    )
    found = re.findall(r"use.py:(\d+): (\w+): (.+)", done.stdout)
    assert [(int(line), kind) for line, kind, _ in found] == [
        (2, "error"),
        (4, "note"),
        (5, "note"),
        (6, "error"),
    ], done.stdout
    assert all('"builtins.int"' in text or '"int"' in text for _, kind, text in found[1:3])
