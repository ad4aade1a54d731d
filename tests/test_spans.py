"""Spans of OpenTelemetry, from its own SDK: a call, its requests, and the server's part."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk")
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import (
    Embedder,
    InputTooLongError,
    Options,
    RemoteError,
    Reranker,
    RerankOptions,
    spans,
)
from shared_engine.stream import WINDOWS_AHEAD
from tests.conftest import ROOT
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.nim import Nim
from tests.support.servers import NAME, Running, running, wait_for


class Recorded:
    """The spans that have ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        spans._create_tracer.cache_clear()
        self.tracer = trace.get_tracer("of the program")

    def wait(self, count: int) -> list[ReadableSpan]:
        """Return this many spans, the earliest first, and forget them."""
        wait_for(lambda: len(self._exporter.get_finished_spans()) >= count)
        found = self._exporter.get_finished_spans()
        self._exporter.clear()
        assert len(found) == count, [span.name for span in found]
        return sorted(found, key=lambda span: span.start_time or 0)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    yield Recorded(monkeypatch)
    spans._create_tracer.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["sentence-transformers"])


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Running]:
    with running(Options(model=str(checkpoint), device="cpu")) as here:
        yield here


def check_chain(*chain: ReadableSpan) -> None:
    """Check that each span is the parent of the next one, in one trace."""
    for parent, child in itertools.pairwise(chain):
        assert child.parent is not None
        assert child.parent.span_id == parent.context.span_id
        assert child.context.trace_id == parent.context.trace_id


def test_a_call_a_request_and_the_server_are_one_trace(recorded: Recorded, served: Running) -> None:
    with Embedder(Options(base_url=served.url, model=NAME)) as embedder:
        embedder.embed(["connect"])
        recorded.wait(8)  # the list of models and the metadata, each with the server's part
        with recorded.tracer.start_as_current_span("ask"):
            vectors = embedder.embed(["a text", "another"])
        ask, call, request, of_server, inside = recorded.wait(5)
        used = embedder.usage
    check_chain(ask, call, request, of_server, inside)
    port = httpx.URL(served.url).port
    address = {"server.address": "127.0.0.1", "server.port": port}
    assert (call.name, call.kind) == (f"embeddings {NAME}", trace.SpanKind.CLIENT)
    tokens = (call.attributes or {})["gen_ai.usage.input_tokens"]
    assert isinstance(tokens, int)
    assert 0 < tokens < used
    common = {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "nvidia",
        "gen_ai.usage.input_tokens": tokens,
        "gen_ai.embeddings.dimension.count": vectors.shape[1],
    }
    assert call.attributes == common | address | {"gen_ai.request.model": NAME}
    assert (request.name, request.kind) == ("POST", trace.SpanKind.CLIENT)
    assert request.attributes == address | {
        "http.request.method": "POST",
        "http.request.resend_count": 0,
        "http.response.status_code": 200,
        "url.full": f"{served.url}/embeddings",
    }
    name = "POST /v1/embeddings"
    assert (of_server.name, of_server.kind) == (name, trace.SpanKind.SERVER)
    assert of_server.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/embeddings",
        "url.path": "/v1/embeddings",
        "url.scheme": "http",
    }
    assert inside.kind == trace.SpanKind.INTERNAL
    assert inside.attributes == common | {"gen_ai.request.model": served.options.model}
    assert served.client.get("/health/live").is_success  # a probe has no span
    assert served.client.get("/nowhere").status_code == 404
    (missing,) = recorded.wait(1)
    assert missing.name == "GET"


def test_spans_are_children_of_those_of_the_caller(recorded: Recorded, checkpoint: Path) -> None:
    given = {"model": str(checkpoint), "device": "cpu"}
    langchain, llamaindex = NeMoRetrieverEmbeddings(**given), NeMoRetrieverEmbedding(**given)
    embedder = langchain.embedder

    async def embed_at_the_same_time() -> None:
        async def embed(text: str) -> None:
            with recorded.tracer.start_as_current_span(f"of {text}"):
                await langchain.aembed_query(text)
                await llamaindex.aget_text_embedding(text)
                async for _ in embedder.astream([text]):
                    pass

        await asyncio.gather(*map(embed, "abc"))

    asyncio.run(embed_at_the_same_time())
    found = recorded.wait(12)
    for parent in (span for span in found if span.name.startswith("of ")):
        children = [s for s in found if s.parent and s.parent.span_id == parent.context.span_id]
        assert [child.name.partition(" ")[0] for child in children] == ["embeddings"] * 3

    def embed(text: str) -> None:
        with recorded.tracer.start_as_current_span(text):
            langchain.embed_documents([text])
            llamaindex.get_query_embedding(text)
            list(embedder.stream([text]))

    with ThreadPoolExecutor() as pool:
        list(pool.map(embed, "abc"))
    found = recorded.wait(12)
    for parent in (span for span in found if span.name in ("a", "b", "c")):
        children = [s for s in found if s.parent and s.parent.span_id == parent.context.span_id]
        assert len(children) == 3
    embedder.close()


def test_each_attempt_has_a_span_and_an_error_its_class_alone(recorded: Recorded) -> None:
    replies = iter([httpx.Response(503, headers={"Retry-After": "0"}), httpx.Response(400)])
    sent: list[str] = []

    def answer(request: httpx.Request, _: object) -> httpx.Response | None:
        assert "baggage" not in request.headers
        sent.append(request.headers["traceparent"].split("-")[2])
        return next(replies) if request.method == "POST" else None

    nim = Nim(answer)
    options = Options(base_url="http://nim", http_client_factory=nim.client, max_retries=1)
    token = context.attach(baggage.set_baggage("user", "secret"))
    with Embedder(options) as embedder, pytest.raises(RemoteError):
        embedder.embed(["a secret text"])
    context.detach(token)
    call, *_, busy, refused = recorded.wait(1 + len(nim.requests))
    for span, kind, resent in ((busy, "503", 0), (refused, "400", 1)):
        check_chain(call, span)
        assert span.attributes is not None
        assert span.attributes["error.type"] == kind
        assert span.attributes["http.request.resend_count"] == resent
        assert span.status.status_code == trace.StatusCode.ERROR
    assert (call.attributes or {})["error.type"] == "InvalidRequestError"
    assert sent[-2:] == [f"{span.context.span_id:016x}" for span in (busy, refused)]
    assert not [span for span in (call, busy, refused) if "secret" in span.to_json()]


def test_a_reranker_and_a_server_that_is_not_there(recorded: Recorded) -> None:
    options = RerankOptions(base_url="http://127.0.0.1:9/v1", max_retries=0)
    with Reranker(options) as reranker, pytest.raises(RemoteError):
        reranker.score("a query", ["a text"])
    call, request = recorded.wait(2)
    check_chain(call, request)
    assert (call.name, (call.attributes or {})["error.type"]) == ("rerank", "ConnectionFailedError")
    assert (request.attributes or {})["error.type"] == "ConnectError"


def test_an_input_that_failed_and_a_call_that_was_cancelled(
    recorded: Recorded, checkpoint: Path
) -> None:
    with Embedder(Options(model=str(checkpoint), device="cpu", max_tokens=64)) as embedder:
        with pytest.raises(InputTooLongError):
            embedder.embed(["word " * 100])
        (call,) = recorded.wait(1)
        assert (call.attributes or {})["error.type"] == "InputTooLongError"
        stream = embedder.stream("word " * 15 for _ in range(10_000))
        next(stream)
        stream.close()
        found = recorded.wait(WINDOWS_AHEAD)
    kinds = [(span.attributes or {}).get("error.type") for span in found]
    assert (kinds[0], kinds[-1]) == (None, "cancelled")


def test_a_trace_that_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, ParentBased(ALWAYS_OFF))
    nim = Nim()
    with nim.embedder() as embedder:
        embedder.embed(["a"])
    spans._create_tracer.cache_clear()
    flags = [int(request.headers["traceparent"][-2:], 16) for request in nim.requests]
    assert not [each for each in flags if each & trace.TraceFlags.SAMPLED]
    recorded.wait(0)


def test_without_a_provider_nothing_is_sent() -> None:
    nim = Nim()
    with nim.embedder() as embedder:
        embedder.embed(["a"])
    assert not [request for request in nim.requests if "traceparent" in request.headers]


def test_a_signal_loses_no_span_of_the_server(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from opentelemetry import trace\n"
        "from opentelemetry.sdk.trace import TracerProvider, export\n"
        "provider, out = TracerProvider(), open(sys.argv.pop(1), 'w')\n"
        "exporter = export.ConsoleSpanExporter(out=out)\n"
        "processor = export.BatchSpanProcessor(exporter, schedule_delay_millis=600_000)\n"
        "provider.add_span_processor(processor)\n"
        "trace.set_tracer_provider(provider)\n"
        "from shared_engine.cli.main import main\n"
        "main()\n"
    )
    spans_file = tmp_path / "spans"
    command = [sys.executable, "-c", code, str(spans_file), "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert any("INFO: serving" in line for line in process.stderr)  # it has computed a sample
        assert spans_file.read_text() == ""
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert '"gen_ai.operation.name": "embeddings"' in spans_file.read_text()
