"""Reading traces: round trips, and files that nobody should trust."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traces import as_lists, small_trace

from py_reasonalloc import TraceError
from py_reasonalloc.trace.format import flat_of, positions_of, runs_of
from py_reasonalloc.trace.read import read_trace
from py_reasonalloc.trace.view import Style, chosen_heads, heat_map, marked_text, summary


@given(st.sets(st.integers(0, 200)))
def test_runs(positions) -> None:
    expected = sorted(positions)
    runs = runs_of(np.array(expected, dtype=np.int32))
    assert positions_of(runs).tolist() == expected
    assert (runs[1:, 0] > runs[:-1, 1]).all()
    flat = flat_of(runs)
    assert np.cumsum(flat).reshape(-1, 2).tolist() == runs.tolist()
    assert sum(flat[1::2]) == len(expected)


def test_round_trip_by_hand(tmp_path) -> None:
    trace = read_trace(small_trace(tmp_path / "t.jsonl"))
    assert [done.n_pos for done in trace.compressions] == [8, 11]
    first, second, last = trace.snapshot(1), trace.snapshot(2), trace.snapshot()
    assert as_lists(first.held) == [[[0, 1, 2, 6, 7], [0, 6, 7]], [[0, 5, 6, 7]]]
    # layer 1 was not compressed again: it holds what it held and what came since
    assert as_lists(second.held)[1] == [[0, 5, 6, 7, 8, 9, 10]]
    assert second.budgets == ((5, 3), (4,))
    assert as_lists(last.held)[1] == [[0, 5, 6, 7, 8, 9, 10, 11]]
    share = first.share(chosen_heads(trace, None, None))
    assert share.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 0, 0, 1 / 3, 1, 1])
    assert first.share([(0, 1)]).tolist() == [1, 0, 0, 0, 0, 0, 1, 1]
    with pytest.raises(TraceError, match="no compression 3: the trace has 2"):
        trace.snapshot(3)


def changed(path: Path, line: int, **values) -> Path:
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = json.loads(lines[line])
    for name, value in values.items():
        fields.pop(name) if value is None else fields.update({name: value})
    lines[line] = json.dumps(fields)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


LAYER = {"il": 0, "budgets": [5, 3], "kept": [[0, 2], [0, 1]]}


@pytest.mark.parametrize(
    ("line", "values", "pattern"),
    [
        (0, {"reasonalloc_trace": 2}, r"format version is 2, this program reads 1"),
        (0, {"reasonalloc_trace": None}, r"not a trace that can be read"),
        (0, {"n_head_kv": [2, 1, 1]}, r"budgets must be a list of 3 values"),
        (0, {"n_head_kv": [10**9] * 2}, r"n_head_kv must be whole numbers, 0 to 4096"),
        (0, {"n_head_kv": [1] * 5000}, r"n_head_kv must be a list of 1 to 1024"),
        (0, {"budget": -1}, r"budget must be a whole number"),
        (0, {"model": 5}, r"model must be a text"),
        (0, {"n_prompt": float("nan")}, r"it is not JSON"),
        (1, {"n_pos": 10**30}, r"line 2: n_pos must be a whole number, 0 to"),
        (1, {"n_pos": True}, r"line 2: n_pos must be"),
        (1, {"step": None}, r"line 2: it has none of"),
        (1, {"layers": []}, r"line 2: layers must be a list of 1 to 2"),
        (1, {"layers": [5]}, r"layers\[0\] is not an object"),
        (1, {"layers": [LAYER, LAYER]}, r"layers\[1\]: il must be a whole number, 1 to 1"),
        (1, {"layers": [{**LAYER, "il": 7}]}, r"layers\[0\]: il must be .* 0 to 1"),
        (1, {"layers": [{**LAYER, "kept": [[0, 2]]}]}, r"kept must be a list of 2 values"),
        (1, {"layers": [{**LAYER, "kept": [[0], [0, 1]]}]}, r"kept\[0\] must be a list of pairs"),
        (1, {"layers": [{**LAYER, "kept": [[0, 0], []]}]}, r"kept\[0\] must be whole numbers"),
        (1, {"layers": [{**LAYER, "kept": [[4, 1, 4, 1], []]}]}, r"beyond the sequence of 8"),
        (1, {"layers": [{**LAYER, "kept": [[0, 6], []]}]}, r"keeps 6 tokens, more than .* of 5"),
        (2, {"n_pos": 3}, r"line 3: n_pos must be a whole number, 8 to"),
        (3, {"tokens": [1]}, r"line 4: tokens must be a list of 12 values"),
        (3, {"pieces": [5] * 12}, r"line 4: pieces\[0\]: piece must be a text"),
        (3, {"held": [[[], []], 7]}, r"line 4: layer 1: held must be a list of 1 values"),
    ],
)
def test_damaged_values(tmp_path, line, values, pattern) -> None:
    path = changed(small_trace(tmp_path / "t.jsonl"), line, **values)
    with pytest.raises(TraceError, match=pattern) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_damaged_files(tmp_path) -> None:
    path = small_trace(tmp_path / "t.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    packed = gzip.compress(whole)
    for content, pattern in [
        (b"", r"not a trace that can be read: it is empty"),
        (b"GGUF\x00\x01", r"not a trace that can be read: it is cut off"),
        (b"[]\n", r"not a trace that can be read: it is not a JSON object"),
        (b"[" * 200_000 + b"\n", r"it is not JSON"),
        (b'{"reasonalloc_trace":' + b"1" * 5000 + b"}\n", r"thousands of digits"),
        (whole[:-20], r"truncated or damaged: line 4: it is cut off"),
        (whole + b"{}\n", r"line 5: something follows the end"),
        (lines[0] + b"\xff\n", r"line 2: it is not JSON"),
        (packed[:20] + b"\x00" * 8 + packed[28:], r"the compressed data is damaged"),
        (packed + b"x", r"something follows the compressed data"),
    ]:
        path.write_bytes(content)
        with pytest.raises(TraceError, match=pattern):
            read_trace(path)
    path.write_bytes(b"".join(lines[:-1]))
    assert "has no end" in read_trace(path).notes[0]
    path.write_bytes(packed[:-4])
    assert "no end" in read_trace(path).notes[0]
    with pytest.raises(TraceError, match=r"no\.jsonl: cannot be read: No such file"):
        read_trace(tmp_path / "no.jsonl")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), is_packed=st.booleans(), n_flips=st.integers(0, 4))
def test_any_damage_is_one_line(tmp_path_factory, seed, is_packed, n_flips) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    content = bytearray(small_trace(path).read_bytes())
    if is_packed:
        content = bytearray(gzip.compress(content))
    rng = random.Random(seed)
    for _ in range(n_flips):
        content[rng.randrange(len(content))] = rng.choice([rng.randrange(256), *b'0159-,[]{}"'])
    path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content) + 1)])])
    try:
        trace = read_trace(path)
    except TraceError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
        return
    page = [*summary(trace), *heat_map(trace, Style())]
    for after in (None, *range(1, len(trace.compressions) + 1)):
        heads = chosen_heads(trace, None, None)
        page += marked_text(trace, trace.snapshot(after), heads, Style())
    assert all(char.isprintable() for line in page for char in line)
