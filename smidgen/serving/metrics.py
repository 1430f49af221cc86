"""What a server counts, for Prometheus: requests by route and status, seconds, what runs, and what the library counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters of one application. No label names an adapter or a key: there are thousands, and they are people."""

    def __init__(self, library: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "smidgen_requests", "Requests answered", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "smidgen_request_seconds",
            "Seconds to the end of an answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.running = Gauge("smidgen_requests_running", "Requests that are being answered", registry=self.registry)
        self.disconnects = Counter(
            "smidgen_disconnects", "Answers whose client went away before they ended", registry=self.registry
        )
        self.registry.register(_Library(library))  # type: ignore[arg-type]

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)


class _Library:
    def __init__(self, counters: Callable[[], Mapping[str, float]]) -> None:
        self.counters = counters

    def collect(self) -> Iterator[Metric]:
        for name, value in self.counters().items():
            yield GaugeMetricFamily(f"smidgen_library_{name}", f"{name.replace('_', ' ')} of the library", value=value)
