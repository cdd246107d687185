"""Metrics of the server, for Prometheus."""

from __future__ import annotations

import jax
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from btlm_jax.generation.engine import Engine
from btlm_jax.utils.compile_cache import COMPILE_EVENT

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class ServerMetrics:
    """Counters, gauges and histograms."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._queue = self._gauge("btlm_requests_waiting", "Requests without a row")
        self._running = self._gauge("btlm_requests_running", "Requests in a row")
        self._shared = self._gauge("btlm_prefix_tokens", "Tokens of prompts that were read before")
        self._tokens = Counter("btlm_tokens", "Tokens that were generated", registry=self.registry)
        self._responses = Counter(
            "btlm_responses", "Responses", ["route", "status"], registry=self.registry
        )
        self._first = Histogram(
            "btlm_time_to_first_token_seconds", "From the request to its first token",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._between = Histogram(
            "btlm_token_seconds", "Between two tokens of a request", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._compilations = Counter(
            "btlm_compilations", "Programs that were compiled", registry=self.registry
        )
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(name, description, registry=self.registry)

    def _count_compilation(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            self._compilations.inc()

    def observe_engine(self, engine: Engine) -> None:
        """Records the state of the engine."""
        self._queue.set(engine.num_waiting)
        self._running.set(engine.num_running)
        self._shared.set(engine.prefixes.hits)

    def observe_tokens(self, count: int, seconds: float, first: bool) -> None:
        """Records tokens of a request.

        Args:
          count: their number.
          seconds: since the tokens before, or since the request.
          first: whether they are the first ones.
        """
        self._tokens.inc(count)
        if first:
            self._first.observe(seconds)
        else:
            self._between.observe(seconds / count)

    def observe_response(self, route: str, status: int) -> None:
        """Records a response."""
        self._responses.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' format."""
        return generate_latest(self.registry)

    def close(self) -> None:
        """Stops counting compilations."""
        jax.monitoring.unregister_event_duration_listener(self._count_compilation)
