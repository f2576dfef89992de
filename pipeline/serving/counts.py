"""Metrics for Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Counts:
    """Of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "smalti_requests", "requests by address and status", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "smalti_request_seconds", "from request to last byte", ["path"], buckets=_SECONDS, registry=self._registry
        )
        self._images = Counter("smalti_images", "images generated", registry=self._registry)
        self._codes = Counter("smalti_codes", "codes drawn, whoever still waits for them", registry=self._registry)
        self._waiting = Gauge("smalti_waiting_requests", "requests in the queue", registry=self._registry)
        self._drawn = Gauge("smalti_drawn_images", "images that are being drawn", registry=self._registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """`path`: the route's, not the client's, of which there may be any number."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def generated(self, images: int) -> None:
        self._images.inc(images)

    def drew(self, codes: int) -> None:
        self._codes.inc(codes)

    def watch(self, waiting: Callable[[], int], drawn: Callable[[], int]) -> None:
        """What tells of the queue and of the images that are drawn, when somebody asks."""
        self._waiting.set_function(waiting)
        self._drawn.set_function(drawn)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)
