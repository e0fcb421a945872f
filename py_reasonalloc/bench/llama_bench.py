"""The same figures by llama.cpp's own llama-bench, so that nobody has to trust our clock."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..engine.errors import ComputeError, ConfigError
from .guard import guarded
from .jobs import N_BATCH

NAME = "llama-bench"


def check_binary(path: str) -> Path:
    """Return the path if there is a file that can be a llama-bench; ConfigError if not."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--llama-bench {file}: no such file")
    return file.resolve()


def run(
    binary: Path,
    model: Path,
    kv_type: str,
    depths: Iterable[int],
    n_tokens: int,
    prompts: Iterable[int],
    n_threads: int,
    n_gpu_layers: int,
) -> list[dict[str, Any]]:
    """Measure decoding of `n_tokens` at depths, and prompts, once.

    Returns
    -------
    list of dict
        kind "decode" (with depth) or "prompt" (with n_prompt), and tokens_per_second.

    Raises
    ------
    ComputeError
        llama-bench failed, or printed something else than its JSON.
    """
    results = []
    for prompt, n_gen, depth in [
        *((0, n_tokens, depth) for depth in depths),
        *((prompt, 0, 0) for prompt in prompts),
    ]:
        command = [str(binary), "-m", str(model), "-r", "1", "-o", "json", "-fa", "1"]
        command += ["-ctk", kv_type, "-ctv", kv_type, "-t", str(n_threads)]
        command += ["-b", str(N_BATCH), "-ub", str(N_BATCH), "-ngl", str(n_gpu_layers)]
        command += ["-p", str(prompt), "-n", str(n_gen), "-d", str(depth)]
        speed = _speed(command)
        if n_gen > 0:
            results.append({"kind": "decode", "depth": depth, "tokens_per_second": speed})
        else:
            results.append({"kind": "prompt", "n_prompt": prompt, "tokens_per_second": speed})
    return results


def _speed(command: list[str]) -> float:
    try:
        done = subprocess.run(guarded(command), capture_output=True, text=True, check=False)
    except OSError as error:
        raise ComputeError(f"{command[0]}: cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ComputeError(f"{command[0]} failed: {reason}")
    try:
        return float(json.loads(done.stdout)[0]["avg_ts"])
    except (ValueError, LookupError, TypeError):
        raise ComputeError(f"{command[0]} printed no figures: is it a llama-bench?") from None
