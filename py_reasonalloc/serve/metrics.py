"""/metrics: what the server does, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from .engine import Engine

#: Field of a snapshot -> name and what it says.
_COUNTERS = {
    "n_prompt_tokens": ("prompt_tokens", "Tokens of prompts that were read."),
    "n_reused": ("reused_tokens", "Tokens of prompts that were copied and not read."),
    "n_tokens": ("generated_tokens", "Tokens that were generated."),
    "n_steps": ("steps", "Batches that were decoded."),
    "n_ended": ("sequences_ended", "Texts that are over, for whatever reason."),
    "n_cancelled": ("sequences_cancelled", "Of those, ended early: a stop string, a client gone."),
    "n_failed": ("sequences_failed", "Of those, failed."),
    "n_compressions": ("compressions", "Compressions of the cache."),
    "n_evicted": ("evicted_entries", "Entries (token, head) that compressions evicted."),
}
_GAUGES = {
    "n_running": ("sequences_running", "Texts that have a sequence."),
    "n_waiting": ("queue_length", "Texts that wait for one."),
    "tokens_per_second": ("tokens_per_second", "Generated over the last 10 seconds."),
    "n_cached_tokens": ("cache_entries", "Entries (token, head) that the cache holds now."),
}


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        snapshot = engine.snapshot
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(
                f"reasonalloc_{name}", text, value=float(getattr(snapshot, field))
            )
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(
                f"reasonalloc_{name}", text, value=float(getattr(snapshot, field))
            )
        sizes = {
            "sequences": (engine.n_parallel, "Texts that are decoded side by side."),
            "cache_bytes": (engine.cache_bytes, "Allocated for the cache of all sequences."),
            "checkpoint_bytes": (
                0 if engine.prefixes is None else engine.prefixes.store.n_bytes,
                "Of snapshots that requests share.",
            ),
            "weights_bytes": (engine.weights_bytes, "Of the model's weights."),
        }
        for name, (value, text) in sizes.items():
            yield GaugeMetricFamily(f"reasonalloc_{name}", text, value=float(value))


class Metrics:
    """Counts requests, and shows what the engine counts.

    Parameters
    ----------
    engine : Engine
        Is asked for its snapshot when somebody looks.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._requests = Counter(
            "reasonalloc_requests",
            "Requests by path and HTTP status; 499: the client went before the answer.",
            ["path", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "reasonalloc_request_seconds",
            "From the request to the end of its answer.",
            ["path"],
            registry=self._registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count a request that is answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return bytes(generate_latest(self._registry))
