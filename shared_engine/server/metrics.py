"""Metrics of the server for Prometheus."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared_engine._version import __version__
from shared_engine.server.models import ServedModel

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Metrics of one server and its process, in a separate registry."""

    def __init__(
        self, count_waiting: Callable[[], float], models: Sequence[ServedModel[Any]]
    ) -> None:
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
            ["model", "input_type"],
            registry=registry,
        )
        self.modalities = Counter(
            "nemoretriever_inputs_by_modality",
            "Computed inputs.",
            ["model", "modality"],
            registry=registry,
        )
        self.tokens = Counter(
            "nemoretriever_tokens", "Computed tokens.", ["model", "input_type"], registry=registry
        )
        self.seconds = Histogram(
            "nemoretriever_request_seconds",
            "Seconds from the first byte of a computed request to its complete response.",
            ["model", "input_type"],
            buckets=_SECONDS,
            registry=registry,
        )
        depth = Gauge(
            "nemoretriever_queue_inputs", "Accepted inputs without an answer.", registry=registry
        )
        depth.set_function(count_waiting)
        build = Info("nemoretriever_build", "Version of this package.", registry=registry)
        build.info({"version": __version__, "python": platform.python_version()})
        ProcessCollector(registry=registry)
        registry.register(_Engines(models))

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """Counts of the engines, read at each scrape."""

    def __init__(self, models: Sequence[ServedModel[Any]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        labels = ["task", "model"]
        steps = CounterMetricFamily(
            "nemoretriever_steps", "Forward passes; requests share them.", labels=labels
        )
        tokens = CounterMetricFamily(
            "nemoretriever_step_tokens", "Tokens of all steps.", labels=labels
        )
        most = GaugeMetricFamily(
            "nemoretriever_step_tokens_max", "Tokens in a full step.", labels=labels
        )
        fill = GaugeMetricFamily(
            "nemoretriever_batch_fill_ratio",
            "Mean tokens of a step divided by the tokens of a full step, since the start.",
            labels=labels,
        )
        waits = SummaryMetricFamily(
            "nemoretriever_queue_wait_seconds",
            "Seconds from the acceptance of a request by the engine to its first step.",
            labels=labels,
        )
        memory = GaugeMetricFamily(
            "nemoretriever_gpu_memory_bytes",
            "Bytes of a GPU that the allocator of the process holds.",
            labels=["device"],
        )
        gpus: dict[str, int] = {}
        for served in self._models:
            if served.backend is None or (stats := served.backend.step_stats) is None:
                continue
            values = [served.task, served.name]
            steps.add_metric(values, stats.steps)
            tokens.add_metric(values, stats.tokens)
            most.add_metric(values, stats.max_batch_tokens)
            fill.add_metric(values, stats.tokens / max(1, stats.steps * stats.max_batch_tokens))
            waits.add_metric(values, stats.started_requests, stats.wait_seconds)
            gpus |= served.backend.gpu_memory
        for device, size in gpus.items():
            memory.add_metric([device], size)
        yield from (steps, tokens, most, fill, waits, memory)
