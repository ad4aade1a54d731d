"""The engine of this process as a NIM-compatible server.

    POST /v1/embeddings
      read ......... at most `max_body_bytes`, while they arrive
      parsed ....... server_wire.py: the fields of a NIM and its rules, or its error body; images
                     come inside the request and are never fetched
      admitted ..... at most `max_waiting` inputs are in the house, or 429
      embedded ..... embedder.py: requests meet in the engine's queue and share its steps
      answered ..... server_wire.py: lists of numbers or base64

A client that hangs up cancels what has not started. Stopping finishes what was admitted.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from shared_engine._version import __version__
from shared_engine.backend import Backend, HasStepStats, StepStats
from shared_engine.catalogue import find
from shared_engine.documents import Document, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import ConfigurationError, NeMoRetrieverError
from shared_engine.options import Options
from shared_engine.registry import Lease
from shared_engine.routing import select_backend
from shared_engine.server import protocol
from shared_engine.server.metrics import Metrics
from shared_engine.server.protocol import Limits, Refusal

_log = logging.getLogger("shared_engine")
_T = TypeVar("_T")

_OPEN = ("/v1/health/live", "/v1/health/ready")  # a probe has no key
_SMALL_BODY = 64 * 1024
_SMALL_REPLY = 16 * 1024
"""Bytes to parse and values to write that the event loop does itself; more go to a thread."""


def create_app(
    options: Options | None = None,
    *,
    served_name: str | None = None,
    api_key: str | None = None,
    limits: Limits | None = None,
    on_failure: Callable[[Exception], object] | None = None,
) -> Starlette:
    """Return the ASGI app that serves the model of some options under `served_name`.

    The model loads in the background when the app starts; until then /v1/health/ready says no and
    requests get 503. Where loading fails, `on_failure` is called with the error, in the event loop.

    With `api_key`, everything but the health routes wants `Authorization: Bearer <key>`.

    Raises:
        ConfigurationError: the options, or NVIDIA_BASE_URL, mean a NIM, which serves itself.
    """
    options = options or Options()
    if (elsewhere := select_backend(options)).base_url is not None:
        raise ConfigurationError(
            f"a server runs its model in its own process, but {elsewhere.reason}; leave that out"
        )
    server = _Server(options, served_name, limits or Limits(), on_failure)
    routes = [
        Route("/v1/embeddings", server.embeddings, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/health/live", server.live),
        Route("/v1/health/ready", server.ready),
        Route("/v1/metadata", server.metadata),
        Route("/v1/metrics", server.metrics_text),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Keyed, key=api_key)] if api_key else [],
        exception_handlers={HTTPException: _http_error},
        lifespan=server.lifespan,
    )
    app.router.redirect_slashes = False  # a redirected POST surprises more clients than a 404
    return app


class _Server:
    """One model, its queue's door, and its counts."""

    def __init__(
        self,
        options: Options,
        served_name: str | None,
        limits: Limits,
        on_failure: Callable[[Exception], object] | None,
    ) -> None:
        self._options = options
        self._limits = limits
        self._on_failure = on_failure
        self._spec = spec = find(options.model)
        folder = Path(options.model)
        own_name = spec.name if spec else folder.name if folder.is_dir() else options.model
        self._name = served_name or own_name
        names = {self._name, *(spec.names if spec else ())}
        names |= {name.removeprefix("nvidia/") for name in names}
        self._served = frozenset(name.lower() for name in names)
        self._started = int(time.time())
        self._backend: Backend | None = None
        self._failure: Exception | None = None
        self._waiting = 0  # inputs
        self._held = 0  # bytes of bodies, read and not answered
        self._last_seconds = 1.0
        self._metrics = Metrics(lambda: self._waiting, self._load)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Hold the engine while the app runs; requests share it."""
        lease = Lease(self._options)
        loading = asyncio.create_task(self._start(lease))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.to_thread(lease.close, cancel=False)

    async def _start(self, lease: Lease) -> None:
        try:
            backend = await asyncio.to_thread(lambda: lease.backend)
            with Embedder(self._options) as embedder:  # the first call of a kernel is slow
                await embedder.aembed(["ready"], "query")
                if "image" in backend.modalities:
                    from PIL import Image

                    await embedder.aembed([Document(image=Image.new("RGB", (512, 512)))])
        except Exception as exc:
            self._failure = exc
            _log.error("the model cannot be served: %s", exc)
            if self._on_failure:
                self._on_failure(exc)
        else:
            self._backend = backend
            _log.info("serving %s: %s", self._name, backend.description)

    async def embeddings(self, request: Request) -> Response:
        """Embed the inputs of a request."""
        try:
            response = Response(await self._answer(request), media_type="application/json")
        except ClientDisconnect:
            response = Response(status_code=499)  # nginx's number; nobody reads it
            self._metrics.errors.labels("disconnected").inc()
        except Refusal as refused:
            response = _refused(refused)
            self._metrics.errors.labels(refused.kind).inc()
        except Exception:
            _log.exception("a request failed")
            response = _json({"error": "internal error; the server's log has it"}, 500)
            self._metrics.errors.labels("internal").inc()
        self._metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _answer(self, request: Request) -> bytes:
        started = time.perf_counter()
        if self._backend is None:
            raise protocol.unavailable(
                f"the model cannot be served: {self._failure}"
                if self._failure
                else "the model is loading"
            )
        if self._waiting >= self._limits.max_waiting:
            raise self._too_busy()
        with self._holding() as hold:
            asked = await self._read(request, hold)
            large = sum(map(len, asked.input)) > _SMALL_BODY
            modalities, dimensions = self._backend.modalities, self._backend.dimensions
            kinds = await _threaded(large, lambda: asked.kinds(modalities))
            role = asked.role(self._served, kinds)
            asked.check(kinds, role, modalities, dimensions)
            if (images := len(kinds) - kinds.count("text")) > self._limits.max_images:
                raise protocol.too_large(
                    f"too many inputs with an image: {images} in one request; the limit is "
                    f"{self._limits.max_images}. Send them in several"
                )
            with self._admitted(len(kinds)):
                vectors, tokens = await self._embed(request, asked, kinds, role, large)
                body = await _threaded(
                    vectors.size > _SMALL_REPLY,
                    lambda: protocol.reply(vectors, asked.encoding_format, self._name, tokens),
                )
                self._last_seconds = time.perf_counter() - started
        side = "query" if role == "query" else "passage"
        self._metrics.seconds.labels(side).observe(self._last_seconds)
        self._metrics.inputs.labels(side).inc(len(kinds))
        self._metrics.tokens.labels(side).inc(tokens)
        for kind, count in Counter(kinds).items():
            self._metrics.modalities.labels(kind).inc(count)
        return body

    async def _embed(
        self,
        request: Request,
        asked: protocol.EmbeddingsRequest,
        kinds: list[str],
        role: Role,
        large: bool,
    ) -> tuple[NDArray[Any], int]:
        """Return the vectors and how many tokens they took."""
        most = self._limits.max_image_bytes
        wanted = {
            "dimensions": asked.dimensions or None,
            "embedding_type": asked.embedding_type,
            "truncate": asked.truncate,
        }
        try:
            documents = await _threaded(large, lambda: asked.documents(kinds, most))
            with Embedder(self._options.model_copy(update=wanted)) as embedder:
                vectors = await _unless_gone(request, embedder.aembed(documents, role))
                return vectors, embedder.usage
        except NeMoRetrieverError as exc:
            refused = protocol.refusal(exc)
            if refused.status >= 500:
                _log.error("a request failed: %s", exc, exc_info=exc)
            raise refused from exc

    async def _read(
        self, request: Request, hold: Callable[[int], None]
    ) -> protocol.EmbeddingsRequest:
        limits = self._limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another site cannot send unasked
            message = "the body should be JSON, with Content-Type: application/json"
            raise Refusal(415, "media_type", {"error": message})
        if int(request.headers.get("content-length", 0)) > limits.max_body_bytes:
            raise self._body_too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(limits.read_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.max_body_bytes:
                        raise self._body_too_large()
                    hold(len(chunk))
            asked = await _threaded(len(body) > _SMALL_BODY, lambda: protocol.parsed(bytes(body)))
        except TimeoutError:
            message = f"the body did not arrive within {limits.read_seconds:g} s"
            raise Refusal(
                408, "read_timeout", {"error": message}, {"Connection": "close"}
            ) from None
        if len(asked.input) > limits.max_inputs:
            raise protocol.too_large(
                f"{len(asked.input)} inputs in one request; the limit is {limits.max_inputs}. "
                "Send them in several"
            )
        return asked

    @contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        """Count the bytes of a request until it is answered, as its images wait with it."""
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            mine += size
            self._held += size
            if self._held > 8 * self._limits.max_body_bytes:
                raise self._too_busy()

        try:
            yield hold
        finally:
            self._held -= mine

    @contextmanager
    def _admitted(self, inputs: int) -> Iterator[None]:
        # An empty queue takes any request, however small the limit is.
        if self._waiting and self._waiting + inputs > self._limits.max_waiting:
            raise self._too_busy()
        self._waiting += inputs
        try:
            yield
        finally:
            self._waiting -= inputs

    def _too_busy(self) -> Refusal:
        # The last request went through the same queue, so one that comes now would take as long.
        seconds = min(30, max(1, math.ceil(self._last_seconds)))
        return protocol.too_busy(f"{self._waiting} inputs are waiting; try again later", seconds)

    def _body_too_large(self) -> Refusal:
        limit = self._limits.max_body_bytes
        return protocol.too_large(
            f"the body is larger than {limit} bytes; send fewer inputs in one"
        )

    async def models(self, _: Request) -> Response:
        """List the one model; `root` is the catalogue's name for it."""
        model = {
            "id": self._name,
            "object": "model",
            "created": self._started,
            "owned_by": "nemoretriever",
            "root": self._spec.name if self._spec else self._name,
        }
        return _json({"object": "list", "data": [model]})

    async def live(self, _: Request) -> Response:
        """Say that the process answers."""
        return _json({"object": "health.response", "message": "live", "live": True})

    async def ready(self, _: Request) -> Response:
        """Say whether the model has loaded and embedded something."""
        ready = self._backend is not None
        waiting = "failed to load" if self._failure else "loading"
        body = {"object": "health.response", "message": "ready" if ready else waiting}
        return _json({**body, "ready": ready}, 200 if ready else 503)

    async def metadata(self, _: Request) -> Response:
        """Say what runs here, and why."""
        backend = self._backend
        facts: dict[str, Any] = {"id": self._name, "version": __version__}
        facts["modelInfo"] = [{"shortName": self._name, "modelUrl": ""}]
        if backend is not None:
            facts["modalities"] = sorted(backend.modalities)
            facts["dimensions"] = list(backend.dimensions)
            facts["fingerprint"] = await asyncio.to_thread(lambda: backend.fingerprint)
        return _json(facts)

    async def metrics_text(self, _: Request) -> Response:
        """Give the counts to Prometheus."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _load(self) -> StepStats | None:
        return self._backend.step_stats if isinstance(self._backend, HasStepStats) else None


class _Keyed:
    """Lets in who has the key, and probes."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN or self._knows(scope):
            await self._app(scope, receive, send)
            return
        detail = "Authorization: Bearer <key> is missing or wrong"
        body = {"status": 401, "title": "Unauthorized", "detail": detail}
        response = _json(body, 401, {"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of some work, or cancel it when the client hangs up."""
    working = asyncio.create_task(work)
    gone = asyncio.ensure_future(request.receive())  # the body was read: only the end can come
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


async def _threaded(large: bool, work: Callable[[], _T]) -> _T:
    """Do large work in a thread, so that the event loop goes on, and small work at once."""
    return await asyncio.to_thread(work) if large else work()


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(protocol.dumps(body), status, headers, media_type="application/json")


def _refused(refused: Refusal) -> Response:
    return _json(refused.body, refused.status, refused.headers)


async def _http_error(_: Request, exc: Exception) -> Response:
    """Answer a wrong path or method."""
    assert isinstance(exc, HTTPException)  # it is registered for these only
    return _json({"detail": exc.detail}, exc.status_code, dict(exc.headers or {}))
