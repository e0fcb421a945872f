"""What a killed process, a full disk or a stranger leaves of a results file."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_rows import SETTINGS, child, numbered, problems

from py_reasonalloc.engine.errors import ConfigError, ReasonAllocError
from py_reasonalloc.eval.cases.rows import Row
from py_reasonalloc.eval.results import file as results
from py_reasonalloc.eval.results.file import MAX_LINE, ResultsFile, read_results

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
