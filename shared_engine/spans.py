"""Spans of OpenTelemetry, in the context of the caller.

Nothing is done, or imported, in a program that has not imported OpenTelemetry itself. Attributes
follow its semantic conventions for GenAI (embeddings) and HTTP; none holds an input or a key.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from shared_engine._version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

Kind = Literal["CLIENT", "INTERNAL", "SERVER"]
_PORTS = {"http": 80, "https": 443}


def find_tracer() -> Tracer | None:
    """Return the tracer, or None if the program has not imported OpenTelemetry."""
    return _create_tracer() if "opentelemetry.trace" in sys.modules else None


@cache
def _create_tracer() -> Tracer:
    from opentelemetry import trace

    return trace.get_tracer("shared_engine", __version__)  # of the provider that is set by then


def start_span(
    tracer: Tracer,
    name: str,
    kind: Kind,
    attributes: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> Span:
    """Return a span that has begun.

    Args:
        headers: Headers of a request, whose `traceparent` is the parent without a current span.
    """
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = None
    if headers is not None and not trace.get_current_span().get_span_context().is_valid:
        parent = TraceContextTextMapPropagator().extract(headers)
    return tracer.start_span(name, parent, trace.SpanKind[kind], _known(attributes))


def make_current(span: Span | None) -> AbstractContextManager[object]:
    """Make a span, if there is one, the parent of spans that the `with` block starts."""
    if span is None:
        return nullcontext()
    from opentelemetry import trace

    return trace.use_span(span, record_exception=False, set_status_on_exception=False)


def write_context(span: Span, headers: MutableMapping[str, str]) -> None:
    """Write `traceparent` into the headers of a request, but no baggage: it may hold user data."""
    from opentelemetry.trace.propagation import set_span_in_context, tracecontext

    tracecontext.TraceContextTextMapPropagator().inject(headers, set_span_in_context(span))


def end_span(
    span: Span, attributes: Mapping[str, Any], error: BaseException | str | None = None
) -> None:
    """End a span; an error is recorded by its class or status alone."""
    span.set_attributes(_known(attributes))
    if error is not None:
        from opentelemetry import trace

        kind = error if isinstance(error, str) else type(error).__name__
        span.set_attribute("error.type", kind)
        span.set_status(trace.StatusCode.ERROR)
    span.end()


def flush(seconds: float) -> None:
    """Export the spans that have ended, for a process that a signal ends."""
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import trace

        provider: Any = trace.get_tracer_provider()
        if hasattr(provider, "force_flush"):  # the SDK's
            provider.force_flush(int(seconds * 1000))


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}


def describe_server(url: str | None) -> dict[str, Any]:
    """Return the attributes of a server.

    >>> describe_server("https://nim.test/v1")
    {'server.address': 'nim.test', 'server.port': 443}
    """
    if url is None:
        return {}
    parts = urlsplit(url)
    port = parts.port or _PORTS.get(parts.scheme)
    return {"server.address": parts.hostname, "server.port": port}
