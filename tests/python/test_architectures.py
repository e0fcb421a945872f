"""Every architecture of llama.cpp: decoded as stock does, or refused by name; never a crash.

llama.cpp's own ``test-llama-archs --out DIR`` writes a tiny random model of each architecture that
it can save; REASONALLOC_ARCH_DIR names that folder. Each model runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("REASONALLOC_ARCH_DIR")
MODELS = sorted(Path(FOLDER).glob("*.gguf")) if FOLDER else []

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from engine import Engine

tokens = [int(t) for t in np.random.default_rng(0).integers(1, 100, 60)]
stock = Engine(sys.argv[1], n_ctx=256)
try:
    ours = Engine(sys.argv[1], 200)
except RuntimeError as error:
    print("refused:", error)
    sys.exit()
expected = np.concatenate([stock.decode(tokens[:30]), stock.decode_each(tokens[30:])])
got = np.concatenate([ours.decode(tokens[:30]), ours.decode_each(tokens[30:])])
assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()
small = Engine(sys.argv[1], 40, config={"buffer": 16})
assert np.isfinite(small.decode_each(tokens * 3)).all()
assert small.stats().n_compressions > 5
print("decoded")
"""


@pytest.mark.slow
@pytest.mark.skipif(not MODELS, reason="REASONALLOC_ARCH_DIR names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=[path.stem for path in MODELS])
def test_decoded_or_refused_by_name(path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    name = path.stem.rpartition("-")[0]
    assert done.stdout.startswith(("decoded", f"refused: architecture '{name}' is not supported"))
