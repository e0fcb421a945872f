"""Every architecture of llama.cpp: decoded as stock does, or refused by name; never a crash.

The models are random ones of llama.cpp's own ``test-llama-archs``: tests/archs/check_archs.cpp
makes each, decodes 120 tokens with a budget that holds them all and compares the logits with those
of stock llama.cpp, then 240 tokens with a budget of 40.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from py_reasonalloc.engine import bindings as c

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"

#: One or two models of each kind of memory.
FAST = (
    "llama dense",  # plain
    "qwen3moe moe",  # plain, experts
    "qwen2vl dense",  # plain, M-RoPE
    "bloom dense",  # plain, ALiBi
    "gemma2 dense",  # windows, soft caps
    "gpt-oss moe",  # windows, attention sinks
    "gemma4 dense",  # windows, layers that share rows
    "deepseek2 moe",  # latent
    "qwen3next moe",  # hybrid
    "lfm2moe moe",  # hybrid, experts
    "kimi-linear moe",  # hybrid, latent
)


def archs() -> list[c.ra_arch]:
    """What the library says about every architecture."""
    found = []
    for i in range(c.ra_arch_count()):
        arch = c.ra_arch(size=ctypes.sizeof(c.ra_arch))
        c.check(c.ra_arch_get(i, ctypes.byref(arch)))
        found.append(arch)
    return found


@pytest.fixture(scope="module")
def program() -> Path:
    if not list(ROOT.glob("build/py3-none-linux_*/CMakeCache.txt")):
        pytest.skip("no build folder of pip install . to build the program with")
    done = subprocess.run(
        ["bash", str(ROOT / "native/cmake/build_check_archs.sh")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(done.stdout.split()[-1])


def check(program: Path, model: str) -> tuple[int, str]:
    done = subprocess.run([program, *model.split()], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr[-500:]


@pytest.mark.parametrize("model", FAST)
def test_decoded_like_stock(program: Path, model: str) -> None:
    status, text = check(program, model)
    assert status == 0, text
    assert text.startswith("decoded"), text


@pytest.mark.slow
def test_every_random_model(program: Path) -> None:
    models = subprocess.run([program], capture_output=True, text=True).stdout.splitlines()
    assert len(models) >= 128
    refused = {arch.name.decode() for arch in archs() if arch.layers is None}
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda model: check(program, model), models))
    failed, n_decoded = {}, 0
    for model, (status, text) in zip(models, results):
        name = model.split()[0]
        if status != 0 or (name in refused) != text.startswith(f"refused: architecture '{name}'"):
            failed[model] = text
        n_decoded += text.startswith("decoded")
    assert failed == {}
    assert n_decoded >= 110


def test_the_page_lists_every_architecture() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+?) \|", PAGE.read_text(), re.MULTILINE))
    says = {arch.name.decode(): (arch.layers or arch.why_not).decode() for arch in archs()}
    assert rows == says


def test_no_such_architecture() -> None:
    arch = c.ra_arch(size=ctypes.sizeof(c.ra_arch))
    for i in (-1, c.ra_arch_count()):
        assert c.ra_arch_get(i, ctypes.byref(arch)) == 1
    assert c.ra_arch_get(0, ctypes.byref(c.ra_arch(size=1))) == 1
