"""`reasonalloc-eval --parallel`: texts side by side make the rows of texts decoded alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_eval_cli import run, without_times

from py_reasonalloc.eval.results.file import read_results

#: One thread: what a batch of several is rounded to then hangs on nothing else.
QUICK = ("demo", "--level", "1", "--limit", "5", "--buffer", "16", "--threads", "1")
ARMS = ("--methods", "full,rkv,random,reasonalloc+kv=q8_0", "--budgets", "112")
CHOICES = {
    "greedy": ("--max-tokens", "300", "--keep-texts"),
    "sampled": (
        "--temp",
        "2.5",
        "--top-p",
        "1",
        "--samples",
        "2",
        "--max-tokens",
        "70",
        "--keep-texts",
    ),
}


def rows_of(path: Path) -> dict[object, dict[str, object]]:
    """Return the rows by their keys, and check that there is one for each."""
    rows = read_results(path).rows
    found = {row.key: without_times(row) for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module", params=list(CHOICES))
def alone(request, tmp_path_factory):
    """A run of one text after the other, with its arguments."""
    path = tmp_path_factory.mktemp("eval") / "alone.jsonl"
    arguments = (*QUICK, *ARMS, *CHOICES[request.param])
    code, _, err = run("-o", path, *arguments)
    assert code == 0, err
    return path, arguments


def test_rows_are_those_of_texts_decoded_alone(alone, tmp_path) -> None:
    path, arguments = alone
    other = tmp_path / "side_by_side.jsonl"
    code, out, err = run("-o", other, *arguments, "--parallel", 3)
    assert code == 0, err
    expected = rows_of(path)
    assert rows_of(other) == expected
    assert len({row["seed"] for row in expected.values()}) >= 5
    assert len({row["text"] for row in expected.values()}) >= 8
    assert any(row["n_compressions"] for row in expected.values())
    assert "reasonalloc" in out


def test_a_run_goes_on_where_it_was(alone, tmp_path) -> None:
    path, arguments = alone
    other = tmp_path / "cut.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    n = len(lines) // 3
    other.write_text("".join(lines[:n]) + lines[n][:20])  # as a kill leaves it
    code, _, err = run("-o", other, *arguments, "--parallel", 3)
    assert code == 0, err
    assert rows_of(other) == rows_of(path)
    assert other.read_text().startswith("".join(lines[:n]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parallel", 0], "0 is not in the range"),
        (["--parallel", 300], "300 is not in the range"),
        (["--parallel", 2, "--jobs", 2], "--parallel decodes in one process: leave out --jobs"),
        (["--parallel", 2, "--server", "FILE"], "--parallel is of this machine"),
    ],
)
def test_bad_input(tmp_path, arguments, words) -> None:
    servers = tmp_path / "servers"
    servers.write_text("http://127.0.0.1:1\n")
    arguments = [servers if a == "FILE" else a for a in arguments]
    code, out, err = run("demo", "-o", tmp_path / "x.jsonl", "--methods", "full", *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert words in line
    assert not (tmp_path / "x.jsonl").exists()
