"""What native/ promises about its files. Which room sees which: native/cmake/RoomTests.cmake."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
SOURCES = sorted(path for path in NATIVE.rglob("*") if path.suffix in {".c", ".cpp", ".h"})


def test_no_file_over_400_lines():
    assert len(SOURCES) > 40
    sizes = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: n for name, n in sizes.items() if n > 400} == {}


def find_circle(edges):
    """A path that comes back to its start, or [] if there is none."""
    done = set()

    def visit(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(edges.get(node, ())):
            circle = visit(other, [*path, node])
            if circle:
                return circle
        done.add(node)
        return []

    for start in sorted(edges):
        circle = visit(start, [])
        if circle:
            return circle
    return []


def test_find_circle():
    assert find_circle({"a": {"b", "c"}, "b": {"c"}}) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_headers_in_a_circle():
    """Header and source of one name are one unit: none includes one that includes it."""
    edges = {}
    for path in SOURCES:
        included = re.findall(r'^#\s*include "(\w+)\.h"', path.read_text(), re.MULTILINE)
        edges.setdefault(path.stem, set()).update(set(included) - {path.stem})
    assert {"ra_memory", "ra_scorer"} <= set(edges)
    assert find_circle(edges) == []


def test_no_calls_in_a_circle():
    """No translation unit needs a symbol of one that needs a symbol of it."""
    objects = [
        path
        for room in ("core", "policy", "alloc", "engine", "llama")
        for path in ROOT.glob(f"build/py3-*/native/CMakeFiles/reasonalloc_{room}.dir/{room}/*.o")
        if (NATIVE / room / path.stem).exists()  # else left from an earlier build
    ]
    if not objects or shutil.which("nm") is None:
        pytest.skip("no build folder of `pip install .`, or no nm")
    defined, needed = {}, {}
    for path in objects:
        name = path.name.split(".")[0]
        done = subprocess.run(
            ["nm", "-P", str(path)], stdout=subprocess.PIPE, text=True, check=True
        )
        for line in done.stdout.splitlines():
            symbol, kind = line.split()[:2]
            if kind == "U":
                needed.setdefault(name, set()).add(symbol)
            elif kind in "TDBR":
                defined[symbol] = name
    edges = {
        name: {defined[symbol] for symbol in symbols if symbol in defined} - {name}
        for name, symbols in needed.items()
    }
    assert "ra_compress" in edges["ra_memory"] and "ra_scorer" in edges["ra_compress"]
    assert find_circle(edges) == []
