"""The results file: nothing acknowledged is lost or doubled, and nothing strange is believed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from result_rows import ROW, SETTINGS, child, numbered, problems

from py_reasonalloc.engine.errors import ConfigError, ReasonAllocError
from py_reasonalloc.eval.results import agreement
from py_reasonalloc.eval.results import file as results
from py_reasonalloc.eval.results.file import MAX_LINE, ResultsFile, read_results


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
