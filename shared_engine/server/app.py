"""The engine of this process as a NIM-compatible server.

    POST /v1/embeddings
      read ......... at most `max_body_bytes`, while they arrive
      parse ........ protocol.py: the fields of a NIM and its rules, or its error body; images come
                     inside the request and are never fetched
      admit ........ at most `max_waiting` inputs queued or running; beyond that 429
      embed ........ embedder.py: requests meet in the engine's queue and share its steps
      write ........ protocol.py: lists of numbers or base64

A client that hangs up cancels what has not started. Stopping finishes what was admitted.
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
from typing import Any, TypeVar

from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from shared_engine import images
from shared_engine._version import __version__
from shared_engine.backend import Backend, StepStats
from shared_engine.catalogue import lookup
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
from shared_engine.server.responses import collect_soon, refuse, refuse_route, respond
from shared_engine.wire import INPUT_TYPE, split_role_suffix

_log = logging.getLogger("shared_engine")
_T = TypeVar("_T")

_SMALL_BODY = 64 * 1024
_LARGE_BODY = 8 * 2**20
_SMALL_REPLY = 16 * 1024
"""Bytes to parse and values to write that the event loop does itself; more go to a thread."""
_pool = ThreadPoolExecutor(2, "nemoretriever-large")
"""Few: glibc keeps back up to 64 MB for each thread that had much, and they share a GIL anyway."""


def create_app(
    options: Options | None = None,
    *,
    served_name: str | None = None,
    api_key: str | None = None,
    limits: ServerLimits | None = None,
    allowed_hosts: Sequence[str] = (),
    on_failure: Callable[[Exception], object] | None = None,
) -> Starlette:
    """Return the ASGI app that serves the model of some options under `served_name`.

    The model loads in the background when the app starts; until then /v1/health/ready says no and
    requests get 503. Where loading fails, `on_failure` is called with the error, in the event loop.

    With `api_key`, everything but the health routes wants `Authorization: Bearer <key>`. Without,
    a request must name the server as localhost, by an address, or as one of `allowed_hosts`
    ("*.example.com" and "*" are patterns).

    Raises:
        ConfigurationError: the options, or NVIDIA_BASE_URL, mean a NIM, which serves itself; the
            key is blank; `allowed_hosts` is one text.
    """
    options = options or Options()
    middleware = control_access(api_key, allowed_hosts)
    if (elsewhere := select_backend(options)).base_url is not None:
        raise ConfigurationError(
            f"a server runs its model in its own process, but {elsewhere.reason}; leave that out"
        )
    server = _Server(options, served_name, limits or ServerLimits(), on_failure)
    routes = [
        Route("/v1/embeddings", server.embeddings, methods=["POST"]),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.show_model),
        Route("/v1/health/live", server.live),
        Route("/v1/health/ready", server.ready),
        Route("/v1/metadata", server.metadata),
        Route("/v1/metrics", server.metrics_text),
    ]
    app = Starlette(
        routes=routes,
        middleware=[middleware],
        exception_handlers={HTTPException: refuse_route},
        lifespan=server.lifespan,
    )
    app.router.redirect_slashes = False  # a redirected POST surprises more clients than a 404
    return app


class _Server:
    """One model, what is admitted to its queue, and the counts of both."""

    def __init__(
        self,
        options: Options,
        served_name: str | None,
        limits: ServerLimits,
        on_failure: Callable[[Exception], object] | None,
    ) -> None:
        self._embedder = Embedder(options)
        self._limits = limits
        self._on_failure = on_failure
        self._spec = spec = lookup(options.model)
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
        self._metrics = Metrics(lambda: self._waiting, self._read_stats)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Hold the engine while the app runs; requests share it."""
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

    async def embeddings(self, request: Request) -> Response:
        """Embed the inputs of a request."""
        request.state.held = 0
        try:
            response = Response(await self._answer(request), media_type="application/json")
        except ClientDisconnect:
            response = Response(status_code=499)  # nginx's number; nobody reads it
            self._metrics.errors.labels("disconnected").inc()
        except HTTPRefusal as refusal:
            response = refuse(refusal, request.headers)
            self._metrics.errors.labels(refusal.kind).inc()
        except Exception:
            _log.exception("a request failed")
            fault = HTTPRefusal(500, "internal", "internal error; the server's log has it")
            response = refuse(fault, request.headers)
            self._metrics.errors.labels("internal").inc()
        self._metrics.requests.labels(str(response.status_code)).inc()
        if request.state.held > _LARGE_BODY:
            # An error's frames keep what was read, in circles that are found late: the collector
            # counts objects, and a text of 60 MB is one.
            response.background = BackgroundTask(collect_soon)
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
        with self._holding(request) as hold:
            asked = await self._read(request, hold)
            large = sum(map(len, asked.input)) > _SMALL_BODY
            said = asked.find_role(self._served)
            documents = await _run(large, lambda: asked.read_inputs(backend.modalities))
            role = require_role(said, documents)
            asked.check_dimensions(backend.dimensions)
            kinds = Counter(document.modality for document in documents)
            if (pictured := len(documents) - kinds["text"]) > self._limits.max_images:
                raise refuse_size(
                    f"too many inputs with an image: {pictured} in one request; the limit is "
                    f"{self._limits.max_images}. Send them in several"
                )
            with self._admitted(len(documents)):
                vectors, tokens = await self._embed(request, asked, documents, role, large)
                body = await _run(
                    vectors.size > _SMALL_REPLY,
                    lambda: write_reply(vectors, asked.encoding_format, self._name, tokens),
                )
                self._last_seconds = time.perf_counter() - started
        side = INPUT_TYPE[role]
        self._metrics.seconds.labels(side).observe(self._last_seconds)
        self._metrics.inputs.labels(side).inc(len(documents))
        self._metrics.tokens.labels(side).inc(tokens)
        for kind, count in kinds.items():
            self._metrics.modalities.labels(kind).inc(count)
        return body

    async def _embed(
        self,
        request: Request,
        asked: EmbeddingsRequest,
        documents: list[EmbeddingInput],
        role: Role,
        large: bool,
    ) -> tuple[NDArray[Any], int]:
        """Return the vectors and how many tokens they took."""
        most = self._limits.max_image_bytes
        try:
            decoded = await _run(large, lambda: decode_images(documents, most))
            embedder = self._embedder.with_options(
                dimensions=asked.dimensions or None,
                embedding_type=asked.embedding_type,
                truncate=asked.truncate,
            )
            vectors = await _unless_gone(request, embedder.aembed(decoded, role))
            return vectors, embedder.usage
        except NeMoRetrieverError as exc:
            raise _refuse_logged(exc) from exc

    async def _read(self, request: Request, hold: Callable[[int], None]) -> EmbeddingsRequest:
        limits = self._limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another site cannot send unasked
            message = "the body should be JSON, with Content-Type: application/json"
            raise HTTPRefusal(415, "media_type", message)
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            message = "the body should be sent as it is, without Content-Encoding"
            raise HTTPRefusal(415, "content_encoding", message, headers={"Accept-Encoding": ""})
        if int(request.headers.get("content-length", 0)) > limits.max_body_bytes:
            raise self._refuse_body()
        body = bytearray()
        try:
            async with asyncio.timeout(limits.read_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.max_body_bytes:
                        raise self._refuse_body()
                    hold(len(chunk))
        except TimeoutError:
            message = f"the body did not arrive within {limits.read_seconds:g} s"
            headers = {"Connection": "close"}
            raise HTTPRefusal(408, "read_timeout", message, headers=headers) from None
        asked = await _run(len(body) > _SMALL_BODY, lambda: parse_request(body, limits.max_inputs))
        hold(max(0, sum(map(getsizeof, asked.input)) - len(body)))  # as text
        if len(asked.input) > limits.max_inputs:
            raise refuse_size(
                f"{len(asked.input)} inputs in one request; the limit is {limits.max_inputs}. "
                "Send them in several"
            )
        return asked

    @contextmanager
    def _holding(self, request: Request) -> Iterator[Callable[[int], None]]:
        """Count the bytes of a request until it is answered, as its images wait with it."""
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            mine += size
            self._held += size
            if self._held > 8 * self._limits.max_body_bytes:
                raise self._refuse_load()

        try:
            yield hold
        finally:
            self._held -= mine
            request.state.held = mine

    @contextmanager
    def _admitted(self, inputs: int) -> Iterator[None]:
        # An empty queue takes any request, however small the limit is.
        if self._waiting and self._waiting + inputs > self._limits.max_waiting:
            raise self._refuse_load()
        self._waiting += inputs
        try:
            yield
        finally:
            self._waiting -= inputs

    def _refuse_load(self) -> HTTPRefusal:
        # The last request went through the same queue, so one that comes now would take as long.
        seconds = min(30, max(1, math.ceil(self._last_seconds)))
        return refuse_load(f"{self._waiting} inputs are waiting; try again later", seconds)

    def _refuse_body(self) -> HTTPRefusal:
        limit = self._limits.max_body_bytes
        return refuse_size(f"the body is larger than {limit} bytes; send fewer inputs in one")

    async def list_models(self, _: Request) -> Response:
        """List the one model."""
        return respond({"object": "list", "data": [self._describe_model()]})

    async def show_model(self, request: Request) -> Response:
        """Describe the one model, under any name that a request may have for it."""
        name = request.path_params["name"]
        if split_role_suffix(name.lower())[0] not in self._served:
            return refuse(refuse_model(name), request.headers)
        return respond(self._describe_model())

    def _describe_model(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._started,
            "owned_by": "nemoretriever",
            "root": self._spec.name if self._spec else self._name,  # the catalogue's name
        }

    async def live(self, _: Request) -> Response:
        """Say that the process answers."""
        return respond({"object": "health.response", "message": "live", "live": True})

    async def ready(self, _: Request) -> Response:
        """Say whether the model has loaded and embedded something, and its device still works."""
        backend = self._backend
        if backend is None:
            message = "failed to load" if self._failure else "loading"
        elif backend.failure is not None:
            message = "the device has failed; only a new process can use it"
        else:
            message = "ready"
        ready = message == "ready"
        body = {"object": "health.response", "message": message, "ready": ready}
        return respond(body, 200 if ready else 503)

    async def metadata(self, _: Request) -> Response:
        """Say what runs here, and why."""
        backend = self._backend
        facts: dict[str, Any] = {"id": self._name, "version": __version__}
        facts["modelInfo"] = [{"shortName": self._name, "modelUrl": ""}]
        if backend is not None:
            facts["modalities"] = sorted(backend.modalities)
            facts["dimensions"] = list(backend.dimensions)
            facts["fingerprint"] = await asyncio.to_thread(lambda: backend.fingerprint)
        return respond(facts)

    async def metrics_text(self, _: Request) -> Response:
        """Give the counts to Prometheus."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _read_stats(self) -> StepStats | None:
        return None if self._backend is None else self._backend.step_stats


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


async def _run(large: bool, work: Callable[[], _T]) -> _T:
    """Do large work in a thread, so that the event loop goes on, and small work at once."""
    return await asyncio.get_running_loop().run_in_executor(_pool, work) if large else work()


def _refuse_logged(error: NeMoRetrieverError) -> HTTPRefusal:
    refusal = refuse_for(error)
    if refusal.status >= 500:
        _log.error("a request failed: %s", error, exc_info=error)
    return refusal
