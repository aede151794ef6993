"""What the service counts, for Prometheus; right over all its workers, those that died included.

With several workers the counts lie in files that all of them map (PROMETHEUS_MULTIPROC_DIR, which must be set before
`prometheus_client` is imported); with one they lie in its memory.
"""

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class CacheMeter:
    """Counts for one cache; see `services.cache.Meter`."""

    def __init__(self, hits: Counter, loads: Counter, held: Gauge) -> None:
        self._hits, self._loads, self._held = hits, loads, held

    def hit(self) -> None:
        self._hits.inc()

    def load(self) -> None:
        self._loads.inc()

    def hold(self, num_bytes: int) -> None:
        self._held.set(num_bytes)


class Metrics:
    """One worker's counts."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "slidegrad_http_requests", "Requests by route and status.", ("route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "slidegrad_http_request_seconds",
            "Seconds until a request was answered, by route.",
            ("route",),
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self._children: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._in_hand = Gauge(
            "slidegrad_http_requests_in_hand", "Requests in hand.", registry=registry, multiprocess_mode="livesum"
        )
        self._hits = Counter("slidegrad_cache_hits", "Found in memory.", ("cache",), registry=registry)
        self._loads = Counter("slidegrad_cache_loads", "Read, or made, anew.", ("cache",), registry=registry)
        self._held = Gauge(
            "slidegrad_cache_bytes", "Held in memory.", ("cache",), registry=registry, multiprocess_mode="livesum"
        )

    def cache(self, name: str) -> CacheMeter:
        """The meter of one cache."""
        return CacheMeter(self._hits.labels(name), self._loads.labels(name), self._held.labels(name))

    def answered(self, route: str, status: int, seconds: float, num_in_hand: int) -> None:
        """Counts one request; `num_in_hand` others are not answered yet."""
        counts = self._children.get((route, status))
        if counts is None:  # `labels` takes as long as all the rest.
            counts = self._requests.labels(route, status), self._seconds.labels(route)
            self._children[route, status] = counts
        counts[0].inc()
        counts[1].observe(seconds)
        self._in_hand.set(num_in_hand)

    def render(self) -> bytes:
        """All workers' counts in Prometheus' text format, version 0.0.4."""
        return generate_latest(_all_workers() or self._registry)

    def num_requests(self) -> int:
        """Requests on all routes, of all workers."""
        return count_requests(_all_workers() or self._registry)


def count_requests(registry: CollectorRegistry) -> int:
    """Requests on all routes."""
    samples = (sample for metric in registry.collect() for sample in metric.samples)
    return round(sum(sample.value for sample in samples if sample.name == "slidegrad_http_requests_total"))


def shared_registry(folder: Path) -> CollectorRegistry:
    """What all workers counted into one folder."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return registry


def forget_worker(pid: int, folder: Path) -> None:
    """A worker died: what it counted stays, what it held does not."""
    mark_process_dead(pid, str(folder))


def _all_workers() -> CollectorRegistry | None:
    folder = os.environ.get(FOLDER)
    return shared_registry(Path(folder)) if folder else None
