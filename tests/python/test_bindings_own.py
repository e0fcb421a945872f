"""The pinned bindings' own test files, with `ReasonLlama` in the place of `llama_cpp.Llama`.

They come from the source distribution that the package is built from. The models that they
download are replaced by one small real model, and so are the few expectations that belong to those
models (`EXPECTED`). What cannot run says why (`LEFT_OUT`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from smollm2 import smollm2_path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "native" / "cmake"))

import llama_source  # noqa: E402

pytestmark = pytest.mark.slow

#: Theirs -> SmolLM2's, as stock llama.cpp gives it.
EXPECTED = {
    "assert tokens == [9419, 11, 1814, 0]": "assert tokens == [19556, 28, 905, 17]",
    '== " jumps over the lazy dog."': '== " is a classic example of a"',
}

RECURRENT = "a recurrent model has no cache to put a budget on: it is refused"
HYBRID = "hybrid models are refused with a budget"

#: Test -> why it is left out.
LEFT_OUT = {
    "test_recurrent_model_prompt_cache_reset": RECURRENT,
    "test_hybrid_model_prompt_cache_reset": HYBRID,
    "test_real_llama_embeddings": (
        "it is for models with pooling; of SmolLM2, which has none, the stock class gives other "
        "rows for a text in a batch than for the text alone"
    ),
    **{
        f"{test}[{model}]": why
        for test in (
            "test_exact_cached_prompt_reuse_matches_fresh",
            "test_loaded_exact_cached_prompt_reuse_matches_fresh",
            "test_ram_cache_exact_prompt_hit_matches_fresh",
            "test_shorter_prompt_prefix_reuse_matches_fresh",
        )
        for model, why in (
            ("llama_cpp_recurrent_model_path-True-False", RECURRENT),
            ("llama_cpp_hybrid_model_path-False-True", HYBRID),
        )
    },
}


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the unpacked tests, with our model's expectations, and the vocabularies they read."""
    folder = tmp_path_factory.mktemp("bindings")
    try:
        archive = llama_source.fetch_archive(llama_source.load_pin())
    except llama_source.BuildError as error:
        pytest.skip(f"the source distribution is not at hand: {error}")
    wanted = re.compile(r"tests/test_\w+\.py|vendor/llama\.cpp/models/ggml-vocab-llama-spm\.gguf")
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.split("/", 1)[-1]
            if wanted.fullmatch(name):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    path = folder / "tests" / "test_llama.py"
    text = path.read_text(encoding="utf-8")
    for theirs, ours in EXPECTED.items():
        assert theirs in text, theirs
        text = text.replace(theirs, ours)
    path.write_text(text, encoding="utf-8")
    return folder


#: Budget and buffer, tokens.
CASES = {"stock": ("none", "0"), "above": ("256", "32"), "below": ("13", "2")}


@pytest.mark.parametrize("case", CASES)
def test_the_bindings_own_tests(tests: Path, case: str) -> None:
    budget, buffer = CASES[case]
    deselect = [f"--deselect=tests/test_llama.py::{name}" for name in LEFT_OUT]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "bindings_plugin", "--tb=short", "tests", *deselect],
        cwd=tests,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "tests" / "python"),
            "REASONALLOC_TEST_MODEL": str(smollm2_path()),
            "REASONALLOC_TEST_BUDGET": budget,
            "REASONALLOC_TEST_BUFFER": buffer,
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed, (\d+) deselected", done.stdout)
    assert found and int(found[2]) == len(LEFT_OUT), done.stdout[-300:]
    n_opened, n_evicted = map(
        int, re.search(r"sessions (\d+), evicted (\d+)", done.stdout).groups()
    )
    assert n_opened > 10
    assert (n_evicted > 0) == (case == "below")
