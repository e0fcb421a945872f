"""Fixtures that all tests share."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from openai import OpenAI
    from processes import Done
    from servers import Server

    from py_reasonalloc.eval.decode.worker import Job, Task

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

from gguf_factory import ModelSpec, write_gguf  # noqa: E402

#: Seconds after which a command that hangs is given up.
TIMEOUT = 120


@pytest.fixture(scope="session")
def make_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes ``ModelSpec(**parameters)`` once and returns its path."""
    folder = tmp_path_factory.mktemp("gguf")
    written: dict[ModelSpec, Path] = {}

    def make(**parameters: object) -> Path:
        spec = ModelSpec(**parameters)  # type: ignore[arg-type]
        if spec not in written:
            written[spec] = write_gguf(folder / f"{spec.arch}-{len(written)}.gguf", spec)
        return written[spec]

    return make


@pytest.fixture
def foreground() -> Iterator[None]:
    """Let Ctrl-C do what it does in the foreground, here and in processes that the test starts.

    A shell starts what runs in the background, pytest included, with SIGINT ignored, and so do
    its children.
    """
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Path of the model that the package ships."""
    from py_reasonalloc.task.shipped import DEMO_MODEL

    assert DEMO_MODEL.is_file(), f"{DEMO_MODEL} is part of the package"
    return DEMO_MODEL


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Path of a small real model, downloaded once; skips where it cannot be."""
    from smollm2 import smollm2_path

    return smollm2_path()


@pytest.fixture
def in_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, str, str]]:
    """Return a function that runs a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)

    def run(command: Callable[..., object], *arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            command([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


@pytest.fixture(scope="session")
def command() -> list[str]:
    """Return the real command: the installed console script, else the module it calls."""
    script = shutil.which("reasonalloc-run", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", "py_reasonalloc.commands.run"]


@pytest.fixture(scope="session")
def cli(command: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command and captures its output; stdin is empty."""

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=TIMEOUT,
            cwd=ROOT,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A `reasonalloc-serve` of the demo, in a process of its own."""
    from servers import CACHE, serving

    with serving("demo", *CACHE) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    """The openai client of `server`."""
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("REASONALLOC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def good_file(tmp_path: Path) -> Path:
    """A file with a profile of two layers."""
    from profile_data import GOOD

    path = tmp_path / "good.json"
    GOOD.save(path)
    return path


@pytest.fixture(scope="session")
def call() -> Callable[..., Done]:
    """Return a function that runs a command of the package with bytes in and out."""
    from processes import run_bytes

    return run_bytes


@pytest.fixture(scope="session")
def odd_files(
    make_gguf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Model files that are not quite as they should be, by name."""
    from processes import write_odd_files

    return write_odd_files(make_gguf, tmp_path_factory.mktemp("odd"))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A results file of three rows."""
    from result_rows import write_three

    return write_three(tmp_path / "results.jsonl")


@pytest.fixture(scope="module")
def job(demo_model: Path) -> Job:
    """Return the work of the tests of an evaluation over HTTP."""
    from eval_servers import make_job

    return make_job(demo_model)


@pytest.fixture(scope="module")
def tasks(job: Job) -> list[Task]:
    """Return all texts of the job."""
    from eval_servers import ARMS

    from py_reasonalloc.eval.decode.run import plan_tasks

    return plan_tasks(ARMS, job.problems, 1, ())
