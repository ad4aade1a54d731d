"""The engine of this process as a NIM-compatible server.

    POST /v1/embeddings
      read ......... at most `max_body_bytes`, checked while they arrive
      parse ........ protocol.py: fields and rules of a NIM; images are inside the request and are
                     never fetched
      admit ........ at most `max_waiting` inputs queued or running; beyond that 429
      embed ........ embedder.py: requests share the engine's queue and its batches
      write ........ protocol.py: lists of numbers or base64

When a client disconnects, its work that has not started is cancelled. On shutdown, admitted
requests are finished.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from sys import getsizeof
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from shared_engine import images
from shared_engine._version import __version__
from shared_engine.backend import Backend, StepStats
from shared_engine.catalogue import DEFAULT_MODEL, lookup
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import ConfigurationError, NeMoRetrieverError
from shared_engine.options import Options
from shared_engine.routing import select_backend
from shared_engine.server.access import control_access
from shared_engine.server.errors import (
    HTTPRefusal,
    refuse_for,
    refuse_for_now,
    refuse_load,
    refuse_model,
    refuse_size,
)
from shared_engine.server.limits import ServerLimits
from shared_engine.server.metrics import Metrics
from shared_engine.server.protocol import (
    EmbeddingsRequest,
    decode_images,
    parse_request,
    require_role,
    write_reply,
)
from shared_engine.server.responses import refuse, refuse_route, respond
from shared_engine.wire import INPUT_TYPE, ROLE, split_role_suffix

_log = logging.getLogger("shared_engine")
_T = TypeVar("_T")

_SMALL_BODY = 64 * 1024
_SMALL_REPLY = 16 * 1024
"""Bytes to parse and values to write on the event loop; more of them go to a thread."""
_HOME = """\
nemoretriever {version}: an embedding model, with the API of a NIM and of OpenAI

POST /v1/embeddings  {{"model": "{name}", "input": ["a text"], "input_type": "passage"}}
                     input_type: passage or query; or append it to the name: {name}-query
GET  /v1/models      the model and its names
GET  /v1/metadata    its inputs and vector sizes
GET  /v1/health/ready, /v1/health/live, /v1/metrics, /v1/version
"""
_pool = ThreadPoolExecutor(2, "nemoretriever-large")
"""Two threads: they share a GIL, and glibc may retain 64 MB for each that used much memory."""


def create_app(
    options: Options | None = None,
    *,
    served_name: str | None = None,
    api_key: str | None = None,
    limits: ServerLimits | None = None,
    allowed_hosts: Sequence[str] = (),
    default_input_type: Literal["query", "passage"] | None = None,
    on_failure: Callable[[Exception], object] | None = None,
) -> Starlette:
    """Return the ASGI app that serves a model.

    The model loads in the background when the app starts. Until then /v1/health/ready answers
    "not ready" and requests get 503.

    Args:
        options: Options of a model in this process.
        served_name: Name of the model in the API. Default: its catalogue name or folder name.
        api_key: Key that every request must have as `Authorization: Bearer <key>`, except to the
            health routes.
        limits: Limits on requests.
        allowed_hosts: Host names accepted without a key, besides localhost and IP addresses;
            "*.example.com" and "*" are patterns.
        default_input_type: `input_type` of texts whose request has none, for clients that cannot
            send it. None refuses such a request.
        on_failure: Called in the event loop with the error if the model cannot be loaded.

    Raises:
        ConfigurationError: the options, or NVIDIA_BASE_URL, select a NIM; the key is blank;
            `allowed_hosts` is a string or has an invalid pattern.
    """
    options = options or Options()
    middleware = control_access(api_key, allowed_hosts)
    if (selected := select_backend(options)).base_url is not None:
        raise ConfigurationError(
            f"a server runs its model in this process, but {selected.reason}; remove that setting"
        )
    role = None if default_input_type is None else ROLE[default_input_type]
    server = _Server(options, served_name, limits or ServerLimits(), role, on_failure)
    routes = [
        Route("/", server.home),
        Route("/health", server.ready),
        Route("/metrics", server.metrics_text),
        Route("/v1/embeddings", server.embeddings, methods=["POST"]),
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
        middleware=[Middleware(_TrimSlash), middleware],
        exception_handlers={HTTPException: refuse_route},
        lifespan=server.lifespan,
    )
    app.router.redirect_slashes = False  # clients handle a 404 better than a redirected POST
    return app


class _TrimSlash:
    """Removes slashes at the end of the path; a redirect would lose the body of a POST."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


class _Server:
    """Request handlers of one model, and the inputs and bytes that are in progress."""

    def __init__(
        self,
        options: Options,
        served_name: str | None,
        limits: ServerLimits,
        default_role: Role | None,
        on_failure: Callable[[Exception], object] | None,
    ) -> None:
        self._embedder = Embedder(options)
        self._limits = limits
        self._default_role = default_role
        self._on_failure = on_failure
        model = options.model or DEFAULT_MODEL
        self._spec = spec = lookup(model)
        own_name = spec.name if spec else Path(model).name if Path(model).is_dir() else model
        self._name = served_name or own_name
        names = {self._name, *(spec.names if spec else ())}
        names |= {name.removeprefix("nvidia/") for name in names}
        self._served = frozenset(name.lower() for name in names)
        self._started = int(time.time())
        self._backend: Backend | None = None
        self._failure: Exception | None = None
        self._waiting = 0  # inputs
        self._held_bytes = 0  # of bodies without an answer
        self._last_seconds = 1.0
        self._metrics = Metrics(lambda: self._waiting, self._read_stats)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Load the engine when the app starts, and close it when it stops."""
        loading = asyncio.create_task(self._start())
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.to_thread(self._embedder.close)

    async def _start(self) -> None:
        try:
            backend = await asyncio.to_thread(self._embedder.load)
            await self._embedder.aembed(["ready"], "query")  # the first call of a kernel is slow
            if "image" in backend.modalities:
                await self._embedder.aembed([EmbeddingInput(image=images.draw_sample(512, 512))])
        except Exception as exc:
            self._failure = exc
            _log.error("the model cannot be served: %s", exc)
            if self._on_failure:
                self._on_failure(exc)
        else:
            self._backend = backend
            _log.info("serving %s: %s", self._name, backend.description)
            if self._default_role is not None:
                word = INPUT_TYPE[self._default_role]
                _log.warning("texts without input_type are embedded as %s", word)

    async def embeddings(self, request: Request) -> Response:
        """Embed the inputs of a request."""
        try:
            response = Response(await self._answer(request), media_type="application/json")
        except ClientDisconnect:
            response = Response(status_code=499)  # as nginx logs it; nobody receives it
            self._metrics.errors.labels("disconnected").inc()
        except HTTPRefusal as refusal:
            response = refuse(refusal, _is_nim_client(request))
            self._metrics.errors.labels(refusal.kind).inc()
        except Exception:
            _log.exception("a request failed")
            failure = HTTPRefusal(500, "internal", "internal error; see the log of the server")
            response = refuse(failure, _is_nim_client(request))
            self._metrics.errors.labels("internal").inc()
        self._metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _answer(self, request: Request) -> bytes:
        started = time.perf_counter()
        if (backend := self._backend) is None:
            raise refuse_for_now(
                f"the model cannot be served: {self._failure}"
                if self._failure
                else "the model is loading"
            )
        if self._waiting >= self._limits.max_waiting:
            raise self._refuse_load()
        with self._hold_bytes() as hold:
            body = await self._read(request, hold)
            request.state.has_input_type = bool(body.input_type)
            is_large = sum(map(len, body.input)) > _SMALL_BODY
            given_role = body.find_role(self._served)
            inputs = await _run(is_large, lambda: body.read_inputs(backend.modalities))
            role = require_role(given_role, inputs, self._default_role)
            body.check_dimensions(backend.dimensions)
            kinds = Counter(item.modality for item in inputs)
            if (with_image := len(inputs) - kinds["text"]) > self._limits.max_images:
                raise refuse_size(
                    f"too many inputs with an image: {with_image} in one request; the limit is "
                    f"{self._limits.max_images}. Send several requests"
                )
            with self._admit(len(inputs)):
                vectors, tokens = await self._embed(request, body, inputs, role, is_large)
                reply = await _run(
                    vectors.size > _SMALL_REPLY,
                    lambda: write_reply(vectors, body.encoding_format, self._name, tokens),
                )
                self._last_seconds = time.perf_counter() - started
        side = INPUT_TYPE[role]
        self._metrics.seconds.labels(side).observe(self._last_seconds)
        self._metrics.inputs.labels(side).inc(len(inputs))
        self._metrics.tokens.labels(side).inc(tokens)
        for kind, count in kinds.items():
            self._metrics.modalities.labels(kind).inc(count)
        return reply

    async def _embed(
        self,
        request: Request,
        body: EmbeddingsRequest,
        inputs: list[EmbeddingInput],
        role: Role,
        is_large: bool,
    ) -> tuple[NDArray[Any], int]:
        """Return the vectors and the number of tokens."""
        limit = self._limits.max_image_bytes
        try:
            decoded = await _run(is_large, lambda: decode_images(inputs, limit))
            embedder = self._embedder.with_options(
                dimensions=body.dimensions,
                embedding_type=body.embedding_type,
                truncate=body.truncate,
            )
            vectors = await _cancel_on_disconnect(request, embedder.aembed(decoded, role))
            return vectors, embedder.usage
        except NeMoRetrieverError as exc:
            raise _refuse_logged(exc) from exc

    async def _read(self, request: Request, hold: Callable[[int], None]) -> EmbeddingsRequest:
        limits = self._limits
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # a page of another site cannot send it unasked
            message = "the body must be JSON, with Content-Type: application/json"
            raise HTTPRefusal(415, "media_type", message)
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            message = "the body must not be compressed; remove Content-Encoding"
            raise HTTPRefusal(415, "content_encoding", message, headers={"Accept-Encoding": ""})
        if int(request.headers.get("content-length", 0)) > limits.max_body_bytes:
            raise self._refuse_body()
        content = bytearray()
        try:
            async with asyncio.timeout(limits.read_seconds):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > limits.max_body_bytes:
                        raise self._refuse_body()
                    hold(len(chunk))
        except TimeoutError:
            message = f"the body did not arrive within {limits.read_seconds:g} s"
            headers = {"Connection": "close"}
            raise HTTPRefusal(408, "read_timeout", message, headers=headers) from None
        body = await _run(
            len(content) > _SMALL_BODY, lambda: parse_request(content, limits.max_inputs)
        )
        hold(max(0, sum(map(getsizeof, body.input)) - len(content)))  # text may take more memory
        if len(body.input) > limits.max_inputs:
            raise refuse_size(
                f"{len(body.input)} inputs in one request; the limit is {limits.max_inputs}. "
                "Send several requests"
            )
        return body

    @contextmanager
    def _hold_bytes(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes of a request as held until it is answered."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            self._held_bytes += size
            if self._held_bytes > 8 * self._limits.max_body_bytes:
                raise self._refuse_load()

        try:
            yield hold
        finally:
            self._held_bytes -= held

    @contextmanager
    def _admit(self, inputs: int) -> Iterator[None]:
        # an empty queue accepts any request, however small the limit is
        if self._waiting and self._waiting + inputs > self._limits.max_waiting:
            raise self._refuse_load()
        self._waiting += inputs
        try:
            yield
        finally:
            self._waiting -= inputs

    def _refuse_load(self) -> HTTPRefusal:
        # the last request waited in the same queue, so it predicts the wait of a new one
        seconds = min(30, max(1, math.ceil(self._last_seconds)))
        return refuse_load(f"{self._waiting} inputs are waiting; try again later", seconds)

    def _refuse_body(self) -> HTTPRefusal:
        limit = self._limits.max_body_bytes
        return refuse_size(f"the body is larger than {limit} bytes; send fewer inputs in a request")

    async def home(self, _: Request) -> Response:
        """Describe the server in plain text."""
        return Response(_HOME.format(version=__version__, name=self._name), media_type="text/plain")

    async def version(self, _: Request) -> Response:
        """Return the version of the package and that of the API."""
        return respond({"release": __version__, "api": "v1"})

    async def list_models(self, _: Request) -> Response:
        """List the model, under its name and with each role as suffix."""
        suffixes = ("", *(f"-{word}" for word in ROLE))
        return respond({"object": "list", "data": [self._describe_model(s) for s in suffixes]})

    async def show_model(self, request: Request) -> Response:
        """Describe the model, by any of its names."""
        name = request.path_params["name"]
        base, role = split_role_suffix(name.lower())
        if base not in self._served:
            return refuse(refuse_model(name))
        return respond(self._describe_model("" if role is None else f"-{INPUT_TYPE[role]}"))

    def _describe_model(self, suffix: str) -> dict[str, Any]:
        return {
            "id": self._name + suffix,
            "object": "model",
            "created": self._started,
            "owned_by": "nemoretriever",
            "root": self._spec.name if self._spec else self._name,  # the catalogue's name
        }

    async def live(self, _: Request) -> Response:
        """Answer a liveness probe."""
        return respond({"object": "health.response", "message": "live", "live": True})

    async def ready(self, _: Request) -> Response:
        """Answer a readiness probe: the model has embedded an input and its device works."""
        backend = self._backend
        if backend is None:
            message = "failed to load" if self._failure else "loading"
        elif backend.failure is not None:
            message = "the device has failed; restart the process"
        else:
            message = "ready"
        ready = message == "ready"
        body = {"object": "health.response", "message": message, "ready": ready}
        return respond(body, 200 if ready else 503)

    async def metadata(self, _: Request) -> Response:
        """Describe the model and its vectors."""
        backend = self._backend
        facts: dict[str, Any] = {"id": self._name, "version": __version__}
        facts["modelInfo"] = [{"shortName": self._name, "modelUrl": ""}]
        if backend is not None:
            facts["modalities"] = sorted(backend.modalities)
            facts["dimensions"] = list(backend.dimensions)
            facts["fingerprint"] = await asyncio.to_thread(lambda: backend.fingerprint)
        return respond(facts)

    async def metrics_text(self, _: Request) -> Response:
        """Return the metrics for Prometheus."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _read_stats(self) -> StepStats | None:
        return None if self._backend is None else self._backend.step_stats


def _is_nim_client(request: Request) -> bool:
    """Return whether the client has sent `input_type` and is none of OpenAI's."""
    has_input_type = getattr(request.state, "has_input_type", False)
    return has_input_type and "x-stainless-lang" not in request.headers


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


async def _run(is_large: bool, work: Callable[[], _T]) -> _T:
    """Do large work in a thread, so that the event loop stays free, and small work directly."""
    return await asyncio.get_running_loop().run_in_executor(_pool, work) if is_large else work()


def _refuse_logged(error: NeMoRetrieverError) -> HTTPRefusal:
    refusal = refuse_for(error)
    if refusal.status >= 500:
        _log.error("a request failed: %s", error, exc_info=error)
    return refusal
