"""What processes leave that are killed, with SIGKILL, in the middle of something."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TIMEOUT

from py_reasonalloc.engine.tempfiles import SUFFIX, remove_stale, scratch_folder, write_whole

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks differ")


def temporaries(folder: Path) -> list[Path]:
    return sorted(folder.glob(f".*{SUFFIX}*"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(code: str, is_time: Callable[[], object], **environment: str) -> None:
    """Run code in a process, and kill it when it is time."""
    with start(code, **environment) as process:
        wait_for(is_time, process)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def start(code: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[1].decode())
        time.sleep(0.005)


WAITING = """
import sys
from pathlib import Path
from py_reasonalloc.engine.tempfiles import {what}
with {what}(Path({target!r}){more}) as made:
    path = getattr(made, "path", made)
    (path / "part" if path.is_dir() else path).write_bytes(b"half")
    print("there", flush=True)
    sys.stdin.read()
"""


def waiting(folder: Path, what: str) -> str:
    target, more = (folder, ", 'x'") if what == "scratch_folder" else (folder / "x", "")
    return WAITING.format(what=what, target=str(target), more=more)


@pytest.mark.parametrize("what", ["temporary_file", "scratch_folder"])
def test_what_a_living_process_has_stays_and_a_dead_ones_goes(tmp_path, what) -> None:
    (tmp_path / f"mine{SUFFIX}").write_bytes(b"")  # no hidden file: not ours
    (tmp_path / ".x.gguf.abcd").write_bytes(b"")
    others = names(tmp_path)
    with start(waiting(tmp_path, what)) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        found = temporaries(tmp_path)
        assert len(found) == (1 if what == "temporary_file" else 2)
        remove_stale(tmp_path)
        write_whole(tmp_path / "x", b"whole")
        assert temporaries(tmp_path) == found
        process.kill()
        process.communicate()
    assert temporaries(tmp_path) == found
    with scratch_folder(tmp_path, "y"):
        assert not set(found) & set(temporaries(tmp_path))
    assert names(tmp_path) == sorted([*others, "x"])
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    target = tmp_path / "x"
    write_whole(target, b"old")
    with pytest.raises(TypeError):
        write_whole(target, "text")  # type: ignore[arg-type]
    with pytest.raises(OSError), scratch_folder(tmp_path, "y") as folder:
        (folder / "z").write_bytes(b"")
        raise OSError
    assert names(tmp_path) == ["x"] and target.read_bytes() == b"old"
    assert target.stat().st_mode & 0o777 == 0o644


def test_writers_of_one_file_at_once_never_lose_their_own(tmp_path) -> None:
    code = (
        "from pathlib import Path\n"
        "from py_reasonalloc.engine.tempfiles import write_whole, scratch_folder\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "for i in range(150):\n"
        "    write_whole(folder / 'x', b'%d' % i * 1000)\n"
        "    with scratch_folder(folder, 'y') as made: (made / 'z').write_bytes(b'z')\n"
    )
    processes = [start(code) for _ in range(4)]
    errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert errors == [b""] * 4 and names(tmp_path) == ["x"]


def test_a_killed_benchmark_leaves_no_model_behind(tmp_path) -> None:
    from py_reasonalloc.bench.models import cached_path
    from py_reasonalloc.bench.shapes import SHAPES

    name = next(iter(SHAPES))
    code = f"from py_reasonalloc.bench.models import model_file; model_file({name!r}, 'q4_0')"
    folder = tmp_path / "bench"

    def is_half_written() -> bool:
        return any(path.stat().st_size > 4 << 20 for path in temporaries(folder))

    killed(code, is_half_written, REASONALLOC_CACHE_DIR=str(tmp_path))
    assert len(temporaries(folder)) == 1 == len(names(folder))
    killed(code, is_half_written, REASONALLOC_CACHE_DIR=str(tmp_path))
    assert len(temporaries(folder)) == 1 == len(names(folder))
    assert cached_path(name, "q4_0").name not in names(folder)


def test_a_killed_measurement_leaves_no_rows_behind(tmp_path, monkeypatch) -> None:
    from py_reasonalloc.bench.measure import make_bench_folder
    from py_reasonalloc.bench.models import bench_folder

    monkeypatch.setenv("REASONALLOC_CACHE_DIR", str(tmp_path))
    make_bench_folder()
    killed(waiting(bench_folder(), "scratch_folder"), lambda: len(temporaries(bench_folder())) == 2)
    make_bench_folder()
    assert names(bench_folder()) == []


def test_a_killed_download_is_nothing_to_the_next(tmp_path) -> None:
    """pip is played by a program that writes half of the file and waits."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "native" / "cmake")!r})
import llama_source
def download(pin, target):
    (target / pin.sdist_name).write_bytes(b"half")
    sys.stdin.read()
llama_source._pip_download = download
llama_source.fetch_archive(llama_source.load_pin())
"""
    for _ in range(2):
        killed(
            code, lambda: list(tmp_path.glob(".*/*.tar.gz")), REASONALLOC_CACHE_DIR=str(tmp_path)
        )
        assert len(names(tmp_path)) == 2
    remove_stale(tmp_path)
    assert names(tmp_path) == []


LONG_JOB = """
from py_reasonalloc.bench.jobs import Arm, Job
from py_reasonalloc.bench.measure import run_job
from py_reasonalloc.bench.turns import Group, take_turns
job = Job({kind!r}, Arm("stock"), {model!r}, 1, n_tokens=1 << 18)
run_job(job) if job.kind == "decode" else take_turns(Group("stock", (job, job)), 1000, 128)
"""
LLAMA_BENCH = "from py_reasonalloc.bench.llama_bench import _speed; _speed(['/bin/sleep', '600'])"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own means")
@pytest.mark.parametrize("kind", ["decode", "turns", "llama-bench"])
def test_a_killed_benchmark_takes_its_processes_with_it(make_gguf, kind) -> None:
    model = str(make_gguf(n_ctx_train=1 << 20))
    code = LLAMA_BENCH if kind == "llama-bench" else LONG_JOB.format(kind=kind, model=model)
    with start(code) as process:
        wait_for(lambda: children(process.pid), process)
        (child,) = children(process.pid)
        process.kill()
        process.communicate()
    deadline = time.monotonic() + TIMEOUT
    while state_of(child)[0] not in "Z":  # ended, and nobody has asked how
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [number for number in numbers if state_of(number)[1] == parent]


def state_of(number: int) -> tuple[str, int]:
    """Return the state letter of a process, and its parent."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", 0
    return fields[0], int(fields[1])
