"""Run one generation in OpenVINO GenAI, for `rival_openvino.py`, in an environment of its own.

Reads a JSON object from standard input and writes one to standard output. Uses nothing of this
package, so that it runs where only ``openvino-genai`` is installed.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai


def _status(name: str) -> int | None:
    """Return a field of /proc/self/status in bytes; None where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, flags=re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


class Stamps(openvino_genai.StreamerBase):
    """Notes the time of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: Any) -> Any:
        """Take one token, or several."""
        n = len(token) if isinstance(token, list) else 1
        self.times += [time.perf_counter()] * n
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is left to do."""


def scheduler(job: dict[str, Any]) -> Any:
    """Return the scheduler's configuration, with eviction if the job asks for it."""
    config = openvino_genai.SchedulerConfig()
    config.enable_prefix_caching = False
    config.max_num_batched_tokens = 512
    wanted = job["eviction"]
    if wanted is not None:
        config.use_cache_eviction = True
        config.cache_eviction_config = openvino_genai.CacheEvictionConfig(
            start_size=wanted["start"],
            recent_size=wanted["recent"],
            max_cache_size=wanted["max"],
            aggregation_mode=getattr(openvino_genai.AggregationMode, wanted["mode"]),
        )
    return config


def main() -> None:
    """Load, generate, report."""
    job = json.load(sys.stdin)
    start = time.perf_counter()
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        job["model"],
        scheduler(job),
        "CPU",
        {"INFERENCE_NUM_THREADS": job["n_threads"], "KV_CACHE_PRECISION": job["kv_type"]},
    )
    load_seconds = time.perf_counter() - start
    rss_loaded_bytes = _status("VmRSS")
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = job["n_tokens"]
    config.ignore_eos = True
    config.do_sample = False
    draw = random.Random(0)
    prompt = np.array([[draw.randrange(2, 256) for _ in range(job["n_prompt"])]], dtype=np.int64)
    stamps = Stamps()
    start = time.perf_counter()
    pipeline.generate([openvino.Tensor(prompt)], [config], stamps)
    metrics = pipeline.get_metrics()
    json.dump(
        {
            "version": openvino_genai.__version__,
            "load_seconds": load_seconds,
            "rss_loaded_bytes": rss_loaded_bytes,
            "rss_peak_bytes": _status("VmHWM"),
            "cache_bytes": metrics.cache_size_in_bytes,
            "cache_usage_percent": metrics.max_cache_usage,
            "token_seconds": [t - start for t in stamps.times],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
