"""The build backend: scikit-build-core, and an entry of the bindings in the wheel that it makes.

Installers shall see llama-cpp-python as present, else the next package that needs it puts another
`llama_cpp` over ours. So the wheel carries a second .dist-info. At its top a wheel may have only
one, and scikit-build-core drops what it finds below such a name; hence it is added here, in the
wheel's data folder, from where installers spread it beside the packages. It is part of our RECORD
and goes when ReasonAlloc is uninstalled; its own RECORD names nothing but itself.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from llama_source import load_pin
from scikit_build_core import build as _backend
from scikit_build_core.build import (  # noqa: F401  the hooks of PEP 517 and PEP 660
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

TEMPLATE = Path(__file__).with_name("bindings_metadata.txt")


def _record_line(name: str, data: bytes) -> list[str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return [name, f"sha256={digest}", str(len(data))]


def _record(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8")


def bindings_entry(version: str) -> dict[str, bytes]:
    """Files of the bindings' .dist-info: path below the packages' folder -> content."""
    folder = f"llama_cpp_python-{version}+reasonalloc.dist-info"
    files = {
        f"{folder}/METADATA": TEMPLATE.read_text(encoding="utf-8").format(version=version).encode(),
        f"{folder}/INSTALLER": b"reasonalloc\n",
        f"{folder}/WHEEL": b"Wheel-Version: 1.0\nGenerator: reasonalloc\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    own = [_record_line(name, data) for name, data in files.items()]
    return {**files, f"{folder}/RECORD": _record([*own, [f"{folder}/RECORD", "", ""]])}


def add_to_wheel(wheel: Path, files: dict[str, bytes]) -> None:
    """Add files to the data folder of a wheel, to be installed beside its packages."""
    scratch = wheel.with_name(wheel.name + ".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(scratch, "w", old.compression) as new:
        (record_name,) = [
            name for name in old.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)
        ]
        data = record_name.split(".dist-info/")[0] + ".data/platlib/"
        record = list(csv.reader(io.StringIO(old.read(record_name).decode("utf-8"))))
        for member in old.infolist():
            if member.filename != record_name:
                new.writestr(member, old.read(member))
        stamp = old.getinfo(record_name)  # date, mode and compression of what is added
        added = {data + name: content for name, content in files.items()}
        rows = [_record_line(name, content) for name, content in added.items()]
        for name, content in {**added, record_name: _record(rows + record)}.items():
            member = zipfile.ZipInfo(name, stamp.date_time)
            member.external_attr = stamp.external_attr
            member.compress_type = stamp.compress_type
            new.writestr(member, content)
    os.replace(scratch, wheel)


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """PEP 517."""
    name = _backend.build_wheel(wheel_directory, config_settings, metadata_directory)
    add_to_wheel(Path(wheel_directory, name), bindings_entry(load_pin().version))
    return name


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """PEP 660."""
    name = _backend.build_editable(wheel_directory, config_settings, metadata_directory)
    add_to_wheel(Path(wheel_directory, name), bindings_entry(load_pin().version))
    return name
