"""The engine of this process as a NIM-compatible server.

    POST /v1/embeddings, /v1/ranking, /v1/rerank
      read ......... admission.py: at most `max_body_bytes`, checked while they arrive
      parse ........ protocol.py, and embeddings.py or ranking.py: fields and rules of a NIM; images
                     are inside the request and are never fetched
      admit ........ admission.py: at most `max_waiting` inputs queued or running; beyond that 429
      compute ...... embedder.py, reranker.py: requests share the engine's queue and its batches
      write ........ embeddings.py: lists of numbers or base64; ranking.py: sorted scores

When a client disconnects, its work that has not started is cancelled. On shutdown, admitted
requests are finished; after `grace_seconds` they are cancelled and get 503.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from shared_engine._version import __version__
from shared_engine.embedder import Embedder
from shared_engine.errors import ConfigurationError, NeMoRetrieverError
from shared_engine.logs import request_id
from shared_engine.options import Options, RerankOptions
from shared_engine.reranker import Reranker
from shared_engine.server.access import control_access
from shared_engine.server.admission import Admission
from shared_engine.server.embeddings import EmbeddingsEndpoint
from shared_engine.server.endpoint import Endpoint, Work
from shared_engine.server.errors import HTTPRefusal, refuse_for, refuse_model
from shared_engine.server.limits import ServerLimits
from shared_engine.server.metrics import Metrics
from shared_engine.server.models import ServedModel
from shared_engine.server.protocol import SMALL_BODY, decode_images, parse_request
from shared_engine.server.ranking import RankingEndpoint, RerankEndpoint
from shared_engine.server.responses import refuse, refuse_route, respond
from shared_engine.server.tracking import TrackRequests
from shared_engine.threads import run_off_loop
from shared_engine.wire import ROLE

_log = logging.getLogger("shared_engine")
_T = TypeVar("_T")

_SMALL_REPLY = 16 * 1024
"""Values that are written on the event loop; more go to a thread, as does a large body."""
_HOME = {
    "start": """\
nemoretriever {version}: retrieval models, with the API of a NIM, OpenAI and Cohere

""",
    "embed": """\
POST /v1/embeddings  {{"model": "{name}", "input": ["a text"], "input_type": "passage"}}
                     input_type: passage or query; or append it to the name: {name}-query
""",
    "rerank": """\
POST /v1/ranking     {{"model": "{name}", "query": {{"text": "a query"}},
                      "passages": [{{"text": "a text"}}]}}; replies with logits
POST /v1/rerank      {{"model": "{name}", "query": "a query", "documents": ["a text"], "top_n": 1}};
                     replies with probabilities
""",
    "end": """\
GET  /v1/models      the models and their names
GET  /v1/metadata    their inputs and vector sizes
GET  /v1/health/ready, /v1/health/live, /v1/metrics, /v1/version
""",
}
"""Parts of the description: the start, a part for each task, and the end."""
_RERANKER = "a reranker; start the server with --rerank-model MODEL"
_NEEDED = {
    EmbeddingsEndpoint.path: "an embedding model; start the server with --model MODEL",
    RankingEndpoint.path: _RERANKER,
    RerankEndpoint.path: _RERANKER,
}
"""The model that each path needs."""
_CLOSE_SECONDS = 5.0
"""Time for the models to stop. The loading of a large one cannot be interrupted."""
_pool = ThreadPoolExecutor(2, "nemoretriever-large")
"""Two threads: they share a GIL, and glibc may retain 64 MB for each that used much memory."""


def create_app(
    options: Options | None = None,
    *,
    rerank_options: RerankOptions | None = None,
    served_name: str | None = None,
    rerank_served_name: str | None = None,
    api_key: str | None = None,
    limits: ServerLimits | None = None,
    allowed_hosts: Sequence[str] = (),
    default_input_type: Literal["query", "passage"] | None = None,
    access_log: bool = False,
    on_failure: Callable[[Exception], object] | None = None,
) -> Starlette:
    """Return the ASGI app that serves an embedding model, a reranker, or both.

    The models load in the background when the app starts. Until then /v1/health/ready answers
    "not ready" and requests get 503.

    Args:
        options: Options of an embedding model in this process. None with `rerank_options` serves
            no embedding model, else the default one.
        rerank_options: Options of a reranker in this process; None serves none.
        served_name: Name of the embedding model in the API. Default: its catalogue name or folder
            name.
        rerank_served_name: The same for the reranker.
        api_key: Key that every request must have as `Authorization: Bearer <key>`, except to the
            health routes.
        limits: Limits on requests.
        allowed_hosts: Host names accepted without a key, as IP addresses and names without a dot
            are; "*.example.com" and "*" are patterns.
        default_input_type: `input_type` of texts whose request has none, for clients that cannot
            send it. None refuses such a request.
        access_log: Log each request at the level INFO, and probes at DEBUG, to the logger
            `shared_engine.access`.
        on_failure: Called in the event loop with the error if a model cannot be loaded.

    Raises:
        ConfigurationError: the options, or NVIDIA_BASE_URL, select a NIM; both models have one
            name; an argument is of a model that is not served; the key is blank; `allowed_hosts`
            is a string or has an invalid pattern.
    """
    middleware = control_access(api_key, allowed_hosts)
    if options is None and rerank_options is None:
        options = Options()
    endpoints: list[Endpoint[Any]] = []
    if options is not None:
        embedder = ServedModel(Embedder(options), served_name)
        role = None if default_input_type is None else ROLE[default_input_type]
        if role is not None:
            _log.warning("texts without input_type are embedded as %s", default_input_type)
        endpoints.append(EmbeddingsEndpoint(embedder, role))
    elif served_name or default_input_type:
        raise ConfigurationError(
            "served_name= and default_input_type= are of an embedding model, and none is served; "
            "use rerank_served_name=, or pass options="
        )
    if rerank_options is not None:
        reranker = ServedModel(Reranker(rerank_options), rerank_served_name)
        endpoints += [RankingEndpoint(reranker), RerankEndpoint(reranker)]
    elif rerank_served_name:
        raise ConfigurationError(
            "rerank_served_name= is of a reranker, and none is served; pass rerank_options="
        )
    server = _Server(endpoints, limits or ServerLimits(), on_failure)
    routes = [
        Route("/", server.home),
        Route("/health", server.ready),
        Route("/metrics", server.metrics_text),
        *(Route(path, partial(server.answer, path), methods=["POST"]) for path in _NEEDED),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.show_model),
        Route("/v1/health/live", server.live),
        Route("/v1/health/ready", server.ready),
        Route("/v1/metadata", server.metadata),
        Route("/v1/metrics", server.metrics_text),
        Route("/v1/version", server.version),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(TrackRequests, access_log), middleware],
        exception_handlers={HTTPException: refuse_route},
        lifespan=server.lifespan,
    )
    app.router.redirect_slashes = False  # clients handle a 404 better than a redirected POST
    return app


class _Server:
    """Request handlers of the endpoints and their models."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint[Any]],
        limits: ServerLimits,
        on_failure: Callable[[Exception], object] | None,
    ) -> None:
        self._endpoints = {endpoint.path: endpoint for endpoint in endpoints}
        self._models = list(dict.fromkeys(endpoint.served for endpoint in endpoints))
        self._limits = limits
        self._on_failure = on_failure
        self._admission = Admission(limits)
        self._metrics = Metrics(lambda: self._admission.waiting, self._models)
        for one, other in itertools.combinations(self._models, 2):
            if both := sorted(one.names & other.names):
                raise ConfigurationError(
                    f"both models have the name {both[0]!r}; set served_name= or "
                    "rerank_served_name="
                )

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Load the models when the app starts, and close them when it stops."""
        loading = asyncio.create_task(self._start())
        try:
            yield
        finally:
            loading.cancel()
            closing = [run_off_loop(served.model.close, cancel=True) for served in self._models]
            await asyncio.wait(closing, timeout=_CLOSE_SECONDS)

    async def _start(self) -> None:
        for served in self._models:
            try:
                backend = await served.load()
            except Exception as exc:
                _log.error("the model cannot be served: %s", exc)
                if self._on_failure:
                    self._on_failure(exc)
            else:
                _log.info("serving %s: %s", served.name, backend.description)

    async def answer(self, path: str, request: Request) -> Response:
        """Compute the inputs of a request."""
        request.state.route = path
        try:
            if (endpoint := self._endpoints.get(path)) is None:
                raise HTTPRefusal(404, "not_served", f"{path} needs {_NEEDED[path]}")
            response = Response(
                await self._compute(endpoint, request), media_type="application/json"
            )
        except ClientDisconnect:
            response = Response(status_code=499)  # as nginx logs it; nobody receives it
            self._metrics.errors.labels("disconnected").inc()
        except HTTPRefusal as refusal:
            response = refuse(refusal)
            self._metrics.errors.labels(refusal.kind).inc()
        except Exception:
            _log.exception("a request failed")
            where = f"see the log of the server at request {request_id.get()}"
            failure = HTTPRefusal(500, "internal", f"internal error; {where}")
            response = refuse(failure)
            self._metrics.errors.labels("internal").inc()
        self._metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    async def _compute(self, endpoint: Endpoint[Any], request: Request) -> bytes:
        started = time.perf_counter()
        backend = endpoint.served.require_backend()
        admission = self._admission
        admission.require_space()
        with admission.hold_bytes() as hold:
            content = await admission.read_body(request, hold)
            is_large = len(content) > SMALL_BODY
            most = min(self._limits.max_inputs, endpoint.max_inputs or self._limits.max_inputs)
            body = await _run(is_large, partial(parse_request, endpoint.body, content, most))
            del content
            request.state.inputs = body.count
            work = await _run(is_large, lambda: endpoint.prepare(body, backend))
            with admission.admit(len(work.inputs)):
                values = await self._run_engine(endpoint, request, work, is_large)
                reply = await _run(values.size > _SMALL_REPLY, lambda: work.write(values))
                request.state.tokens = work.model.usage
                admission.last_seconds = time.perf_counter() - started
        labels = endpoint.served.name, work.label
        self._metrics.seconds.labels(*labels).observe(admission.last_seconds)
        self._metrics.inputs.labels(*labels).inc(len(work.inputs))
        self._metrics.tokens.labels(*labels).inc(work.model.usage)
        for kind, count in Counter(item.modality for item in work.inputs).items():
            self._metrics.modalities.labels(endpoint.served.name, kind).inc(count)
        return reply

    async def _run_engine(
        self, endpoint: Endpoint[Any], request: Request, work: Work, is_large: bool
    ) -> NDArray[Any]:
        limit = self._limits.max_image_bytes
        try:
            inputs = await _run(is_large, lambda: decode_images(work.inputs, limit))
            return await _cancel_on_disconnect(request, work.compute(inputs))
        except NeMoRetrieverError as exc:
            raise _refuse_logged(exc, endpoint.too_long_status) from exc

    async def home(self, _: Request) -> Response:
        """Describe the server in plain text."""
        parts = [_HOME["start"].format(version=__version__)]
        parts += [_HOME[served.task].format(name=served.name) for served in self._models]
        return Response("".join([*parts, _HOME["end"]]), media_type="text/plain")

    async def version(self, _: Request) -> Response:
        """Return the version of the package and that of the API."""
        return respond({"release": __version__, "api": "v1"})

    async def list_models(self, _: Request) -> Response:
        """List the models, an embedding model also with each role as suffix."""
        found = [served.describe(end) for served in self._models for end in served.suffixes]
        return respond({"object": "list", "data": found})

    async def show_model(self, request: Request) -> Response:
        """Describe a model, by any of its names."""
        name = request.path_params["name"]
        for served in self._models:
            if (suffix := served.find_suffix(name)) is not None:
                return respond(served.describe(suffix))
        return refuse(refuse_model(name))

    async def live(self, _: Request) -> Response:
        """Answer a liveness probe."""
        return respond({"object": "health.response", "message": "live", "live": True})

    async def ready(self, _: Request) -> Response:
        """Answer a readiness probe: every model has computed an input and its device works."""
        states = [served.state for served in self._models]
        message = next((state for state in states if state != "ready"), "ready")
        ready = message == "ready"
        body = {"object": "health.response", "message": message, "ready": ready}
        return respond(body, 200 if ready else 503)

    async def metadata(self, _: Request) -> Response:
        """Describe the models; outside of `modelInfo` the first of them, as a NIM has only one."""
        facts = [await served.read_facts() for served in self._models]
        infos = [
            {"shortName": served.name, "modelUrl": "", "task": served.task, **each}
            for served, each in zip(self._models, facts, strict=True)
        ]
        first = {"id": self._models[0].name, "version": __version__, **facts[0]}
        return respond({**first, "modelInfo": infos})

    async def metrics_text(self, _: Request) -> Response:
        """Return the metrics for Prometheus."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of a coroutine, or cancel it when the client disconnects.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    task = asyncio.create_task(work)
    # after the body, the next message can only be a disconnect
    disconnect = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        disconnect.cancel()
        task.cancel()
        await asyncio.gather(disconnect, task, return_exceptions=True)
        del task  # it has the error, whose traceback has this frame


async def _run(is_large: bool, work: Callable[[], _T]) -> _T:
    """Do large work in a thread, so that the event loop stays free, and small work directly."""
    if not is_large:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_pool, copy_context().run, work)


def _refuse_logged(error: NeMoRetrieverError, too_long_status: int) -> HTTPRefusal:
    refusal = refuse_for(error, too_long_status)
    if refusal.status >= 500:
        _log.error("a request failed: %s", error, exc_info=error)
    return refusal
