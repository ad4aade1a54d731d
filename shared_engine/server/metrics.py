"""Metrics of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared_engine.backend import StepStats
from shared_engine.catalogue import Task

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Metrics of one server, in a separate registry."""

    def __init__(
        self,
        count_waiting: Callable[[], float],
        read_stats: Callable[[], Mapping[Task, StepStats]],
    ) -> None:
        """Create the metrics.

        Args:
            count_waiting: Returns the number of accepted inputs without an answer.
            read_stats: Returns the counts of each model that is loaded, by its task.
        """
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nemoretriever_requests",
            "Answered POST requests.",
            ["path", "status"],
            registry=registry,
        )
        self.errors = Counter(
            "nemoretriever_errors", "Requests answered with an error.", ["kind"], registry=registry
        )
        self.inputs = Counter(
            "nemoretriever_inputs",
            "Computed inputs; those of a reranker have the input_type rerank.",
            ["input_type"],
            registry=registry,
        )
        self.modalities = Counter(
            "nemoretriever_inputs_by_modality", "Computed inputs.", ["modality"], registry=registry
        )
        self.tokens = Counter(
            "nemoretriever_tokens", "Computed tokens.", ["input_type"], registry=registry
        )
        self.seconds = Histogram(
            "nemoretriever_request_seconds",
            "Seconds from the first byte of a computed request to its complete response.",
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

    def __init__(self, read_stats: Callable[[], Mapping[Task, StepStats]]) -> None:
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        steps = CounterMetricFamily(
            "nemoretriever_steps", "Forward passes; requests share them.", labels=["task"]
        )
        tokens = CounterMetricFamily(
            "nemoretriever_step_tokens", "Tokens of all steps.", labels=["task"]
        )
        most = GaugeMetricFamily(
            "nemoretriever_step_tokens_max", "Tokens in a full step.", labels=["task"]
        )
        fill = GaugeMetricFamily(
            "nemoretriever_batch_fill_ratio",
            "Mean tokens of a step divided by the tokens of a full step, since the start.",
            labels=["task"],
        )
        for task, stats in self._read_stats().items():
            steps.add_metric([task], stats.steps)
            tokens.add_metric([task], stats.tokens)
            most.add_metric([task], stats.max_batch_tokens)
            fill.add_metric([task], stats.tokens / max(1, stats.steps * stats.max_batch_tokens))
        yield from (steps, tokens, most, fill)
