"""The results file: nothing acknowledged is lost or doubled, and nothing strange is believed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from py_reasonalloc.engine.errors import ConfigError, ReasonAllocError
from py_reasonalloc.eval.cases.rows import Row
from py_reasonalloc.eval.results import agreement
from py_reasonalloc.eval.results import file as results
from py_reasonalloc.eval.results.file import MAX_LINE, ResultsFile, read_results

SETTINGS: dict[str, Any] = {
    "model": "demo.gguf",
    "temp": 0.6,
    "raw": False,
    "profile": [1.5, 2.0],
    "shuffle_seed": None,
}
ROW = Row(
    method="rkv+lambda=0.5",
    budget=128,
    problem="7",
    sample=0,
    seed=3,
    gold="\\frac{1}{2}",
    answer=None,
    correct=False,
    n_prompt=20,
    n_generated=300,
    stop="loop",
    n_protect=20,
    peak_tokens=144,
    kv_bytes=1 << 20,
    n_evicted=170,
    n_compressions=9,
    prompt_seconds=0.1,
    decode_seconds=2.5,
    compress_seconds=0.01,
)


def numbered(i: int, **changes: Any) -> Row:
    return replace(ROW, problem=str(i), **changes)


@pytest.fixture
def three(tmp_path) -> Path:
    """A file with three rows."""
    path = tmp_path / "results.jsonl"
    with ResultsFile.open(path, SETTINGS) as file:
        for i in range(3):
            file.append(numbered(i))
    return path


def test_another_version_is_refused_unless_it_is_wanted(tmp_path) -> None:
    path, old, new = (
        tmp_path / "r.jsonl",
        {**SETTINGS, "version": "1"},
        {**SETTINGS, "version": "2"},
    )
    with ResultsFile.open(path, old) as file:
        file.append(numbered(0))  # as rows were before they named a version: the header's
    whole = path.read_bytes()
    with pytest.raises(ConfigError, match="of reasonalloc 1, these are of 2: .* --mix-versions"):
        ResultsFile.open(path, new)
    assert path.read_bytes() == whole
    with ResultsFile.open(path, new, mix_versions=True) as file:
        file.append(numbered(1, version="2"))
    for settings_now in (old, new):  # it is no file of one version any more
        with pytest.raises(ConfigError, match="has rows of reasonalloc"):
            ResultsFile.open(path, settings_now)
    assert agreement.versions_of(read_results(path)) == {"1": 1, "2": 1}
    with pytest.raises(ConfigError, match="other settings: temp"):
        ResultsFile.open(path, {**new, "temp": 0}, mix_versions=True)


def problems(path: Path) -> list[str]:
    return [row.problem for row in read_results(path).rows]


# --- writing and going on ------------------------------------------------------------------------


def test_rows_come_back_as_they_were(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    rows = [numbered(1, text="1 < 2\n\u2028 \u4e2d \U0001f600 \x00", answer="x"), numbered(2)]
    with ResultsFile.open(str(path), SETTINGS) as file:
        assert file.done == {}
        for row in rows:
            file.append(row)
        assert list(file.done) == [row.key for row in rows]
    found = read_results(path)
    assert (found.settings, found.rows, found.n_dropped) == (SETTINGS, tuple(rows), 0)
    assert found.n_bytes == path.stat().st_size
    assert read_results(path, keep_texts=False).rows == (replace(rows[0], text=None), rows[1])
    assert path.read_bytes().isascii() and path.read_bytes().count(b"\n") == 3
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_run_goes_on(three) -> None:
    before = three.read_bytes()
    with ResultsFile.open(three, dict(reversed(SETTINGS.items()))) as file:
        assert three.read_bytes() == before
        assert list(file.done.values()) == list(read_results(three).rows)
        with pytest.raises(
            ConfigError, match=r'there is a row of rkv\+lambda=0\.5@128, problem "1"'
        ):
            file.append(numbered(1, correct=True))
        assert three.read_bytes() == before
        file.append(numbered(1, sample=1))
        file.append(numbered(1, budget=0, method="full"))
    assert three.read_bytes().startswith(before)
    assert len(read_results(three).rows) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temp": 0.7}, "temp = 0.6 there, 0.7 here"),
        ({"temp": None}, "temp = 0.6 there, null here"),
        ({"model": "a\nb"}, 'model = "demo.gguf" there, "a\\nb" here'),
        ({"profile": [1.5]}, "profile = [1.5, 2.0] there, [1.5] here"),
        ({"new": 1}, "new = nothing there, 1 here"),
        (
            {"model": "b", "temp": 1, "raw": True, "profile": None, "shuffle_seed": 2},
            'model = "demo.gguf" there, "b" here; temp = 0.6 there, 1 here; raw = false there, '
            "true here; and 2 more",
        ),
    ],
)
def test_other_settings_are_refused(three, changes, message) -> None:
    before = three.read_bytes()
    with pytest.raises(ConfigError) as error:
        ResultsFile.open(three, {**SETTINGS, **changes}, ["wave"])
    assert str(error.value) == f"{three}: made with other settings: {message}"
    assert three.read_bytes() == before
    ResultsFile.open(three, SETTINGS).close()  # the refusal left no lock behind


def test_the_common_profile_matters_only_where_an_arm_uses_it(three) -> None:
    other = {**SETTINGS, "profile": [9.0, 2.0]}
    for methods in (
        [],
        ["rkv", "adaptive"],
        ["wave+profile=p.json"],
        ["reasonalloc+layers=pyramid"],
    ):
        ResultsFile.open(three, other, methods).close()
    for methods in (["wave"], ["snapkv+layers=wave"]):
        with pytest.raises(ConfigError, match="profile = "):
            ResultsFile.open(three, other, methods)
    with ResultsFile.open(three, SETTINGS) as file:
        file.append(numbered(1, method="reasonalloc+mu=0.5"))
    with pytest.raises(ConfigError, match="profile = "):
        ResultsFile.open(three, other, ["rkv"])


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("wave", "", "pass that one (--profile FILE), or another results file"),
        (
            "wave+profile=p.json",
            "p.json",
            "made before p.json changed: give the new profile another",
        ),
    ],
)
def test_a_profile_that_has_changed_is_refused(three, method, name, message) -> None:
    with ResultsFile.open(three, SETTINGS) as file:
        file.append(numbered(1, method=method, profile="0123"))
        file.append(numbered(2, method=method))  # not known: of a file before rows had it
    for profiles in ({}, {name: "0123"}, {"other.json": "4567"}):
        ResultsFile.open(three, SETTINGS, ["wave"], profiles).close()
    with pytest.raises(ConfigError) as error:
        ResultsFile.open(three, SETTINGS, ["rkv"], {name: "4567"})
    assert str(error.value).startswith(f"{three}: {method} there ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [{"a": 1}, [[1]], float("nan"), [float("inf")], (1, 2), Path("x"), [0] * 5000]
)
def test_settings_that_cannot_be_compared_are_refused(tmp_path, value) -> None:
    with pytest.raises(ConfigError, match="settings: x must be a number, a text, null, or a list"):
        ResultsFile.open(tmp_path / "r.jsonl", {"x": value})
    with pytest.raises(ConfigError, match="is no name of a setting"):
        ResultsFile.open(tmp_path / "r.jsonl", {"a b": 1})
    assert not list(tmp_path.iterdir())


def test_places_where_no_file_can_be(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written: there is no folder .*no"):
        ResultsFile.open(tmp_path / "no" / "r.jsonl", SETTINGS)
    with pytest.raises(ConfigError, match="cannot be written"):
        ResultsFile.open(tmp_path, SETTINGS)
    with pytest.raises(ConfigError, match=r"r\.jsonl: cannot be read"):
        read_results(tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(tmp_path)


def test_a_file_system_without_links(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with ResultsFile.open(tmp_path / "r.jsonl", SETTINGS) as file:
        file.append(ROW)
    assert read_results(tmp_path / "r.jsonl").rows == (ROW,)
    assert len(list(tmp_path.iterdir())) == 1


def test_rows_that_could_not_be_read_back_are_not_written(three) -> None:
    before = three.read_bytes()
    with ResultsFile.open(three, SETTINGS) as file:
        for changes, message in (
            ({"decode_seconds": float("nan")}, "decode_seconds must be a number of seconds"),
            ({"stop": "end of text"}, "stop must be one of end, length, loop"),
            ({"budget": -1}, "budget must be a whole number"),
            ({"method": ""}, "method must be a text"),
            ({"text": "x" * MAX_LINE}, "its line would be longer than"),
        ):
            with pytest.raises(ConfigError, match=message):
                file.append(numbered(9, **changes))
        assert len(file.done) == 3
    assert three.read_bytes() == before


# --- two at a time -------------------------------------------------------------------------------


def test_only_one_may_write(three) -> None:
    with ResultsFile.open(three, SETTINGS) as file:
        with pytest.raises(ConfigError, match="another process is writing results into it"):
            ResultsFile.open(three, SETTINGS)
        assert len(read_results(three).rows) == 3  # reading is free, and leaves the lock alone
        with pytest.raises(ConfigError, match="another process"):
            ResultsFile.open(three, SETTINGS)
        file.append(numbered(3))
    with pytest.raises(ReasonAllocError, match="the file was closed"):
        file.append(numbered(4))
    with ResultsFile.open(three, SETTINGS) as file:
        assert len(file.done) == 4


def test_threads(tmp_path, monkeypatch) -> None:
    """Four threads want to write the same rows: one does, three are refused."""
    path = tmp_path / "r.jsonl"
    monkeypatch.setattr(results, "_sync", lambda handle: None)
    refused = []
    barrier = threading.Barrier(4)
    interval = sys.getswitchinterval()
    with ResultsFile.open(path, SETTINGS) as file:

        def work() -> None:
            for i in range(300):
                barrier.wait()
                try:
                    file.append(numbered(i))
                except ConfigError:
                    refused.append(i)

        threads = [threading.Thread(target=work) for _ in range(4)]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert problems(path) == list(map(str, range(300)))
    assert sorted(refused) == sorted([*range(300)] * 3)


_CHILD = """
import json, random, sys
from dataclasses import replace
from py_reasonalloc.engine.errors import ConfigError
from py_reasonalloc.eval.results.file import ResultsFile
from py_reasonalloc.eval.cases.rows import Row

path, mode, settings, row = sys.argv[1:]
row = Row(**json.loads(row))
try:
    with ResultsFile.open(path, json.loads(settings)) as file:
        if mode == "hold":
            print("open", flush=True)
            sys.stdin.read()
        for i in range(len(file.done), 100_000 if mode == "append" else 0):
            text = "x" * random.randrange(1 << random.randrange(17))
            file.append(replace(row, problem=str(i), text=text))
            print(i, flush=True)
except ConfigError as error:
    print(error, flush=True)
"""


def child(path: Path, mode: str, **options: Any) -> subprocess.Popen[str]:
    arguments = [path, mode, json.dumps(SETTINGS), json.dumps(ROW.to_json())]
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, *map(str, arguments)], text=True, cwd=ROOT, **options
    )


def test_processes_that_start_at_once(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [child(path, "hold", **pipes) for _ in range(4)]
    said = [process.stdout.readline() for process in started if process.stdout]
    for process in started:
        process.communicate()
    assert said.count("open\n") == 1
    assert all("another process is writing" in line for line in said if line != "open\n")
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_file_made_by_another_process_meanwhile_is_left_alone(three) -> None:
    before = three.read_bytes()
    results._create(three, b"another header\n")
    assert three.read_bytes() == before
    assert [file.name for file in three.parent.iterdir()] == [three.name]


# --- what a killed process or a power cut leaves -------------------------------------------------


def test_kill_at_any_moment_loses_and_doubles_nothing(tmp_path) -> None:
    path, said = tmp_path / "r.jsonl", tmp_path / "said"
    rng = random.Random(4)
    n_rows = n_with_rows = 0
    for i in range(30):
        with said.open("w") as stream:
            process = child(path, "append", stdout=stream)
            if i % 5 > 0:  # else it dies while it starts
                while said.stat().st_size == 0:
                    assert process.poll() is None
                    time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05 if i % 5 > 0 else 0.2))
            process.kill()
            process.wait()
        acknowledged = [int(line) for line in said.read_text().split("\n")[:-1]]
        if not path.exists():
            assert acknowledged == []
            continue
        found = problems(path)  # whatever is in the file can be read, and no key is there twice
        assert found == [str(k) for k in range(len(found))]
        assert acknowledged == list(range(n_rows, n_rows + len(acknowledged)))
        assert n_rows + len(acknowledged) <= len(found) <= n_rows + len(acknowledged) + 1
        n_with_rows += len(found) > n_rows
        n_rows = len(found)
        if rng.random() < 0.3:  # a power cut in the middle of the next row
            with path.open("ab") as file:
                file.write(
                    rng.choice([b'{"method": "rkv", "bud', b"\0" * 4096, b"\0" * 99 + b"\n"])
                )
    assert n_with_rows >= 24
    with ResultsFile.open(path, SETTINGS) as file_:
        assert len(file_.done) == n_rows


def test_a_cut_at_any_byte(three, tmp_path) -> None:
    whole = three.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    path = tmp_path / "cut.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        if cut < ends[0]:
            with pytest.raises(ConfigError, match="not a results file"):
                read_results(path)
            continue
        n = sum(end <= cut for end in ends) - 1
        found = read_results(path)
        assert (len(found.rows), found.n_dropped) == (n, cut not in ends)
        assert path.read_bytes() == whole[:cut]
        if cut % 23 == 0 or cut + 1 in ends:
            with ResultsFile.open(path, SETTINGS) as file:
                assert path.read_bytes() == whole[: ends[n]]
                for i in range(n, 3):
                    file.append(numbered(i))
            assert path.read_bytes() == whole


def test_a_last_line_of_rubbish_is_dropped_and_one_in_the_middle_is_not(three) -> None:
    whole = three.read_bytes()
    three.write_bytes(whole + b"\0" * 100 + b"\n")
    assert read_results(three).n_dropped == 1
    ResultsFile.open(three, SETTINGS).close()
    assert three.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    for bad in (b"\n", b"\0\0\0\n", lines[2][:50] + b"\n", b'{"method": NaN}\n'):
        three.write_bytes(b"".join([*lines[:2], bad, *lines[2:]]))
        with pytest.raises(ReasonAllocError, match=r"results\.jsonl: line 3: it is not JSON"):
            read_results(three)
        with pytest.raises(ReasonAllocError, match="line 3: it is not JSON"):
            ResultsFile.open(three, SETTINGS)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_full_disk(three) -> None:
    import resource

    before = three.read_bytes()
    with ResultsFile.open(three, SETTINGS) as file:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        try:
            with pytest.raises(ReasonAllocError, match=r"results\.jsonl: cannot be written: "):
                file.append(numbered(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(file.done) == 3
        assert three.read_bytes() == before
        with pytest.raises(ReasonAllocError, match="was closed"):
            file.append(numbered(3))
    with ResultsFile.open(three, SETTINGS) as file:
        file.append(numbered(3))
    assert problems(three) == list("0123")


def test_a_disk_that_fails_to_keep_a_row(three, monkeypatch) -> None:
    before = three.read_bytes()
    with ResultsFile.open(three, SETTINGS) as file:

        def fail(handle: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(results, "_sync", fail)
        with pytest.raises(ReasonAllocError, match="cannot be written: Input/output error"):
            file.append(numbered(3))
    assert three.read_bytes() == before


# --- files from anyone ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"\n", "it is not JSON"),
        (b"hello", "it is cut off"),
        (b"hello\n", "it is not JSON"),
        (b"[1]\n", "it is not a JSON object"),
        (b'{"reasonalloc_trace": 1}\n', "its first line does not say so"),
        (b'{"reasonalloc_eval": 2, "settings": {}}\n', "its format is 2, this program reads"),
        (b'{"reasonalloc_eval": true, "settings": {}}\n', "its format is true"),
        (b'{"reasonalloc_eval": 1}\n', "its first line has no settings"),
        (b'{"reasonalloc_eval": 1, "settings": {"a": {}}}\n', "a must be a number"),
        (b'{"reasonalloc_eval": 1, "settings": {"a\\u0007": 1}}\n', '"a\\u0007" is no name'),
        (b"[" * 100_000 + b"\n", "it is not JSON"),
        (b"1" * 1_000_000 + b"\n", "it is not JSON"),
        (b"\xff\xfe\n", "it is not JSON"),
        (b"x" * (MAX_LINE + 1), "it is longer than"),
    ],
)
def test_files_that_are_none_of_ours(tmp_path, data, message) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(data)
    for read in (read_results, lambda path: ResultsFile.open(path, SETTINGS)):
        with pytest.raises(ConfigError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: not a results file: ")
        assert message in str(error.value)
    assert path.read_bytes() == data


COUNTS = ("budget", "sample", "n_prompt", "n_generated", "n_protect", "peak_tokens", "kv_bytes",
          "n_evicted", "n_compressions")  # fmt: skip
SECONDS = ("prompt_seconds", "decode_seconds", "compress_seconds")
STRANGE: list[tuple[str, list[Any], str]] = [
    *(
        (name, [-1, 1.5, True, "1", [1], 1 << 60], "must be a whole number, 0 to ")
        for name in COUNTS
    ),
    *((name, [-0.1, True, "1", [1.0]], "must be a number of seconds") for name in SECONDS),
    ("seed", [None, 1.0, 1 << 60], "must be a whole number"),
    ("method", [None, 1, "", "a\x1b[31m", "a\u202eb", "x" * 501], "must be a text of 1 to 500"),
    ("problem", [None, 7], "must be a text"),
    ("gold", [None, 7], "must be a text"),
    ("answer", [7, ["x"]], "must be a text or null"),
    ("correct", [None, 1, "true"], "must be true or false"),
    ("stop", [None, "eos", ["end"]], "must be one of end, length, loop"),
    ("text", [7], "must be a text"),
    ("profile", [7, "", ["x"]], "must be a text of 1 to 500"),
    ("n_words", [1], 'a row has no field "n_words"'),
]


@pytest.mark.parametrize(("name", "values", "message"), STRANGE, ids=[case[0] for case in STRANGE])
def test_strange_values(three, name, values, message) -> None:
    """They are whole lines, so they are an error even at the end of the file."""
    before = three.read_bytes()
    for value in values:
        line = {**numbered(3).to_json(), name: value}
        three.write_bytes(before + json.dumps(line).encode() + b"\n")
        for read in (read_results, lambda path: ResultsFile.open(path, SETTINGS)):
            with pytest.raises(ReasonAllocError) as error:
                read(three)
            assert str(error.value).startswith(f"{three}: line 5: ")
            assert message in str(error.value) and len(str(error.value)) < 300 + len(str(three))
            assert str(error.value).isprintable()


def test_huge_numbers_and_fields_that_are_missing(three) -> None:
    before = three.read_bytes()
    values = numbered(3).to_json()
    three.write_bytes(before + json.dumps(values).replace("2.5", "1e999").encode() + b"\n")
    with pytest.raises(ReasonAllocError, match="decode_seconds must be a number of seconds"):
        read_results(three)
    for name in ("method", "correct", "answer", "stop"):
        less = {key: value for key, value in values.items() if key != name}
        three.write_bytes(before + json.dumps(less).encode() + b"\n")
        with pytest.raises(ReasonAllocError, match=f"line 5: {name} is missing"):
            read_results(three)
    optional = [*COUNTS[4:], *SECONDS, "text", "profile"]
    less = {key: value for key, value in values.items() if key not in optional}
    three.write_bytes(before + json.dumps(less).encode() + b"\n")
    assert read_results(three).rows[3] == numbered(3, **dict.fromkeys(optional))


def test_a_key_twice_is_an_error(three) -> None:
    """Two processes, or two files put together: which row counts is not ours to say."""
    with three.open("ab") as stream:
        stream.write(json.dumps(numbered(1, correct=True).to_json()).encode() + b"\n")
    for read in (read_results, lambda path: ResultsFile.open(path, SETTINGS)):
        with pytest.raises(ReasonAllocError) as error:
            read(three)
        assert str(error.value) == (
            f'{three}: line 5: rkv+lambda=0.5@128, problem "1", sample 0 is in line 3 already: '
            "delete one of the two lines"
        )


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_is_noticed_or_harmless(data) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.jsonl"
        lines = [{"reasonalloc_eval": 1, "settings": SETTINGS}]
        lines += [numbered(i).to_json() for i in range(3)]
        damaged = bytearray("".join(json.dumps(line) + "\n" for line in lines).encode())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(damaged) - 1))
            damaged[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        path.write_bytes(damaged)
        with contextlib.suppress(ReasonAllocError):
            found = read_results(path)
            assert len({row.key for row in found.rows}) == len(found.rows) <= 3
        assert path.read_bytes() == damaged


COUNT = st.none() | st.integers(0, 1 << 53)
SECOND = st.none() | st.floats(0, 1e9)


@given(
    row=st.builds(
        Row,
        method=st.text("abz-+=.0@", min_size=1),
        budget=st.integers(0, 1 << 53),
        problem=st.text(),
        sample=st.integers(0, 1 << 30),
        seed=st.integers(-(1 << 53), 1 << 53),
        gold=st.text(),
        answer=st.none() | st.text(),
        correct=st.booleans(),
        n_prompt=st.integers(0, 1 << 53),
        n_generated=st.integers(0, 1 << 53),
        stop=st.sampled_from(["end", "length", "loop"]),
        n_protect=COUNT,
        peak_tokens=COUNT,
        kv_bytes=COUNT,
        n_evicted=COUNT,
        n_compressions=COUNT,
        prompt_seconds=SECOND,
        decode_seconds=SECOND,
        compress_seconds=SECOND,
        text=st.none() | st.text(),
        profile=st.none() | st.text("0123456789abcdef", min_size=1),
    )
)
@settings(max_examples=50, deadline=None)
def test_any_row_comes_back(row) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.jsonl"
        with ResultsFile.open(path, SETTINGS) as file:
            file.append(row)
        assert read_results(path).rows == (row,)
