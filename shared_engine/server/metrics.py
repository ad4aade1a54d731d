"""Metrics of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared_engine.backend import StepStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Metrics of one server, in a separate registry."""

    def __init__(
        self, count_waiting: Callable[[], float], read_stats: Callable[[], StepStats | None]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nemoretriever_requests", "Answered POST /v1/embeddings.", ["status"], registry=registry
        )
        self.errors = Counter(
            "nemoretriever_errors", "Requests answered with an error.", ["kind"], registry=registry
        )
        self.inputs = Counter(
            "nemoretriever_inputs", "Embedded inputs.", ["input_type"], registry=registry
        )
        self.modalities = Counter(
            "nemoretriever_inputs_by_modality", "Embedded inputs.", ["modality"], registry=registry
        )
        self.tokens = Counter(
            "nemoretriever_tokens", "Embedded tokens.", ["input_type"], registry=registry
        )
        self.seconds = Histogram(
            "nemoretriever_request_seconds",
            "Seconds from the first byte of an embedded request to its complete response.",
            ["input_type"],
            buckets=_SECONDS,
            registry=registry,
        )
        depth = Gauge(
            "nemoretriever_queue_inputs", "Accepted inputs without an answer.", registry=registry
        )
        depth.set_function(count_waiting)
        registry.register(_Steps(read_stats))

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Steps(Collector):
    """Counts of the engine, read at each scrape."""

    def __init__(self, read_stats: Callable[[], StepStats | None]) -> None:
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._read_stats()
        if stats is None:
            return
        yield CounterMetricFamily(
            "nemoretriever_steps", "Forward passes; requests share them.", value=stats.steps
        )
        yield CounterMetricFamily(
            "nemoretriever_step_tokens", "Tokens of all steps.", value=stats.tokens
        )
        yield GaugeMetricFamily(
            "nemoretriever_step_tokens_max", "Tokens in a full step.", value=stats.max_batch_tokens
        )
        yield GaugeMetricFamily(
            "nemoretriever_batch_fill_ratio",
            "Mean tokens of a step divided by the tokens of a full step, since the start.",
            value=stats.tokens / max(1, stats.steps * stats.max_batch_tokens),
        )
