"""The ctypes layer against the header, the errors against the status codes, and lazy imports."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

import py_reasonalloc
from py_reasonalloc.engine import bindings as c
from py_reasonalloc.engine import errors

HEADER = "".join(
    re.sub(r"/\*.*?\*/", "", file.read_text(), flags=re.DOTALL)
    for file in sorted((ROOT / "native/include").glob("*.h"))
)


def functions() -> dict[str, list[str]]:
    """Name -> parameters of every public function of the header."""
    found = re.findall(r"RA_API\s+[\w\s*]+?\b(ra_\w+)\(([^;]*)\);", HEADER)
    return {name: [] if text.strip() == "void" else text.split(",") for name, text in found}


def test_the_header_was_understood() -> None:
    assert len(functions()) == HEADER.count("RA_API ") - len(re.findall(r"define RA_API", HEADER))


# the ra_sizeof_ functions are called by library.check_struct_sizes
@pytest.mark.parametrize("name", sorted(n for n in functions() if not n.startswith("ra_sizeof_")))
def test_every_function_is_bound(name) -> None:
    assert len(getattr(c, name).argtypes) == len(functions()[name])


@pytest.mark.parametrize("name", ["ra_config", "ra_stats", "ra_head_stats", "ra_shape"])
def test_fields_are_the_headers(name) -> None:
    body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", HEADER, re.DOTALL)[1]
    fields = re.findall(r"(\w+);", body)
    assert [field.rstrip("_") for field, _ in getattr(c, name)._fields_] == fields


def test_every_status_has_an_exception() -> None:
    enum = re.search(r"enum ra_status \{(.*?)\}", HEADER, re.DOTALL)[1]
    codes = {int(code) for code in re.findall(r"= (\d+)", enum)}
    assert codes - {0} == set(errors.STATUS_ERRORS)
    for code, kind in errors.STATUS_ERRORS.items():
        error = errors.error_from_status(code, "what is wrong")
        assert type(error) is kind and isinstance(error, errors.ReasonAllocError)
        assert str(error) == "what is wrong"
        assert str(code) in str(errors.error_from_status(code, ""))


def test_check_carries_the_librarys_message() -> None:
    c.check(0)
    with pytest.raises(errors.NotFoundError, match="no budgeted cache"):
        c.check(c.ra_set_protect(None, 0, 0))


def test_argument_errors_are_value_errors() -> None:
    for kind in (errors.ConfigError, errors.BudgetError, errors.ModelFileError):
        assert issubclass(kind, ValueError)
    assert issubclass(errors.NoMemoryError, MemoryError)


def test_import_is_cheap_and_complete() -> None:
    script = (
        "import sys, py_reasonalloc\n"
        "assert not {'llama_cpp', 'numpy', 'click'} & set(sys.modules)\n"
        "for name in py_reasonalloc.__all__: assert getattr(py_reasonalloc, name)\n"
        "assert set(py_reasonalloc.__all__) <= set(dir(py_reasonalloc))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = py_reasonalloc.nonsense


def test_log_callback_is_put_back() -> None:
    import ctypes

    from llama_cpp import llama_cpp as bindings

    from py_reasonalloc.engine.log import LogCapture

    def address() -> int:
        callback = bindings.llama_log_callback()
        bindings.llama_log_get(ctypes.byref(callback), ctypes.byref(ctypes.c_void_p()))
        return ctypes.cast(callback, ctypes.c_void_p).value

    before = address()
    with LogCapture(forward=False):
        assert address() != before
    assert address() == before
