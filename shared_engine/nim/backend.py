"""A NIM somewhere else, behind the same contract as a model in this process.

    submit ──► batches (nim_batches.py) ──► requests (nim_wire.py) ──► nim_transport.py ──► rows

One event loop in one thread serves every caller, so that they share connections and a limit of
requests in flight, whatever thread or event loop they come from. Images are opened in threads, as
that takes too long for a loop that others wait for.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

from shared_engine.backend import Request
from shared_engine.catalogue import find
from shared_engine.documents import Document, Modality
from shared_engine.endpoints import POLLING, is_hosted
from shared_engine.errors import (
    ConfigurationError,
    ConnectionFailedError,
    EngineClosedError,
    EngineError,
    MalformedResponseError,
    ModelNotFoundError,
    NeMoRetrieverError,
    RequestTimeoutError,
)
from shared_engine.nim import protocol
from shared_engine.nim.batches import Batch, Call, Limits
from shared_engine.nim.client import build_clients, build_headers
from shared_engine.nim.transport import RETRIED, Limited, Retrying, Sending
from shared_engine.options import Options
from shared_engine.wire import split_role_suffix
from shared_engine.wire import INPUT_TYPE, split_role_suffix

POLL_EVERY = 0.5
TRIES_MALFORMED = 3

_T = TypeVar("_T")
_log = logging.getLogger("shared_engine")


class NimBackend:
    """An embedding model behind `/v1/embeddings`, shared by any number of callers."""

    dimensions: tuple[int, ...] = ()  # versions and models differ, so the server judges

    def __init__(self, options: Options, base_url: str, api_key: SecretStr | None = None) -> None:
        """Make the client and start its thread; nothing is sent yet.

        Raises:
            ConfigurationError: the key would travel in the clear, or the TLS options cannot work.
        """
        self._options = options
        self._base_url = base_url
        self._name, self._fixed_role = split_role_suffix(options.model)
        self._spec = find(self._name)
        kinds: frozenset[Modality] = frozenset({"text", "image", "text_image"})
        self.modalities = kinds if self._spec is None else self._spec.modalities
        self._headers = build_headers(options, base_url, api_key)
        self._key = api_key
        self._clients = build_clients(options, base_url)  # one for each place in flight
        self._timeout = httpx.Timeout(options.timeout, pool=None)
        self._once = Limited(Sending(self._clients, options.timeout), options.concurrency)
        self._transport = Retrying(self._once, options.max_retries)
        self._limits = Limits(options.max_batch_size)
        self._encoding = "base64"
        # Unsaid, a multimodal NIM takes a text that holds a data URL for an image.
        self._says_text = self._spec is None or self._spec.is_multimodal
        self._encoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "nemoretriever-images")
        self._succeeded = 0.0  # time.monotonic() of the last reply that was used
        self._served: str | None = self._name if is_hosted(base_url) else None
        self._asking = asyncio.Lock()
        self._lock = threading.RLock()  # reentrant, as a finalizer may close us anywhere
        self._closed = False
        self._calls: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run_loop, name="nemoretriever-nim", daemon=True
        )
        self._thread.start()

    @property
    def description(self) -> str:
        """The model's name and the server's address."""
        return f"{self._served or self._name} at {self._base_url}"

    @property
    def fingerprint(self) -> str:
        """A digest of address and model: what the server computes with is not known."""
        name = self._spec.name if self._spec else self._name
        return hashlib.sha256(f"{self._base_url} {name}".encode()).hexdigest()[:16]

    def submit(self, request: Request) -> Future[NDArray[np.float32]]:
        """Accept a request; see `Backend.submit`."""
        if self._fixed_role not in (None, request.role):
            raise ConfigurationError(
                f"model={self._options.model!r} embeds only as {self._fixed_role}, and this is to "
                f"be a {request.role}; give model={self._name!r} for both"
            )
        return self._start(self._embed(request))

    def wait_until_ready(self, timeout: float) -> None:
        """Return when the server says that it is ready; NVIDIA's catalogue always is.

        Raises:
            RequestTimeoutError: it did not within `timeout` seconds.
            RemoteError: it has no such path, or does not let us ask.
        """
        if not is_hosted(self._base_url):
            self._start(self._ready(timeout)).result()

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Finish what was accepted, or cancel it, then close the connections and the thread."""
        with self._lock:
            first, self._closed = not self._closed, True
            calls = list(self._calls)
        if cancel:
            for call in calls:
                call.cancel()
        if first:
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def _start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        with self._lock:
            if self._closed:
                work.close()
                raise EngineClosedError("this engine was closed; make a new Embedder")
            future: Future[_T] = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            for client in set(self._clients):
                await client.aclose()
        finally:
            self._encoders.shutdown(wait=False, cancel_futures=True)
            self._loop.stop()

    async def _embed(self, request: Request) -> NDArray[np.float32]:
        call = Call(request, self._encode, self._spec.hidden_size if self._spec else 0)
        deadline = self._options.deadline
        try:
            async with asyncio.timeout(deadline) as running:
                await self._work(call)
        except TimeoutError:
            if not running.expired():  # a RequestTimeoutError
                raise
            call.stopped = RequestTimeoutError(f"not done within deadline={deadline} s")
        finally:
            call.close()
        return call.result()

    def _encode(self, document: Document) -> asyncio.Future[bytes]:
        urls = self._options.image_urls
        return self._loop.run_in_executor(self._encoders, lambda: protocol.encoded(document, urls))

    async def _work(self, call: Call) -> None:
        documents = len(call.request.documents)
        if not documents:
            return
        model = await self._model()
        has_images = any(document.image is not None for document in call.request.documents)
        batches = documents if has_images else -(-documents // self._limits.inputs)
        most = min(2 * self._options.concurrency, batches)
        if most == 1 or self._options.concurrency == 1:
            return await self._worker(call, model)
        async with asyncio.TaskGroup() as group:  # twice, as some wait for their next attempt
            for _ in range(most):
                group.create_task(self._worker(call, model))

    async def _worker(self, call: Call, model: str) -> None:
        while (batch := await call.next_batch(self._limits)) is not None:
            started = time.monotonic()
            try:
                await self._try(call, batch, model)
            except MalformedResponseError as exc:
                if batch.malformed + 1 < TRIES_MALFORMED:
                    _log.info("%s; asking again", exc)
                    call.send_again(replace(batch, malformed=batch.malformed + 1))
                else:
                    self._give_up(call, batch, exc, started)
            except ConfigurationError as exc:  # true of every other batch
                call.fail(batch, exc)
                call.stopped = exc
            except NeMoRetrieverError as exc:
                self._give_up(call, batch, exc, started)
            except Exception as exc:
                error = EngineError(f"sending failed: {exc!r}")
                error.__cause__ = exc
                call.fail(batch, error)

    def _give_up(self, call: Call, batch: Batch, error: NeMoRetrieverError, started: float) -> None:
        """Fail a batch after its last attempt, and with it the call if nothing else succeeds."""
        call.fail(batch, error)
        if self._succeeded < started:
            call.stopped = error

    async def _try(self, call: Call, batch: Batch, model: str) -> None:
        encoding, says_text = self._encoding, self._says_text and batch.modality == "text"
        response = await self._send(self._embeddings_request(call.request, batch, model, encoding))
        if response.is_success:
            reply = protocol.parse(response.content, len(batch.rows), call.request.dimensions)
            call.deliver(batch, reply.vectors, reply.tokens)
            self._succeeded = time.monotonic()
            self._limits.passed = max(self._limits.passed, batch.size)
            return
        said = self._refusal(response)
        one_input = said.one_input or (batch.has_images and said.unexplained)
        if encoding == "base64" and said.about("encoding_format"):
            _log.info("the server sends no base64; asking for floats from now on")
            self._encoding = "float"
            call.send_again(batch)
        elif says_text and said.about("modality"):
            _log.info("the server takes no modality; leaving it out with texts from now on")
            self._says_text = False
            call.send_again(batch)
        elif one_input and len(batch.rows) > 1:
            call.send_again(*batch.apart(said.position))
        elif said.too_large and len(batch.rows) > 1:
            self._shrink(batch, said)
            call.send_again(*batch.halves())
        else:
            error = protocol.error(response, said, batch.has_images)
            if response.status_code in RETRIED:
                raise error
            call.fail(batch, error)
            if not (one_input or said.too_large) or (said.unexplained and call.is_hopeless):
                call.stopped = error  # the others would be refused as well

    def _shrink(self, batch: Batch, said: protocol.Refusal) -> None:
        if said.by_count:
            self._limits.inputs = min(self._limits.inputs, len(batch.rows) // 2)
        else:
            self._limits.shrink_below(batch.size)
        _log.info("too large for the server: %d inputs, %d bytes", len(batch.rows), batch.size)

    def _refusal(self, response: httpx.Response) -> protocol.Refusal:
        said = protocol.refusal(response)
        if self._key is not None:  # some servers quote it
            said = said._replace(detail=said.detail.replace(self._key.get_secret_value(), "***"))
        return said

    def _embeddings_request(
        self, request: Request, batch: Batch, model: str, encoding: str
    ) -> httpx.Request:
        fields = {
            "model": model,
            "input_type": INPUT_TYPE[request.role],
            "encoding_format": encoding,
            "truncate": request.truncate,
            "dimensions": request.dimensions,
            "modality": batch.modality if batch.has_images or self._says_text else None,
            "user": self._options.user,
        }
        content = protocol.body(fields, batch.inputs)
        out = self._request("POST", f"{self._base_url}/embeddings", content)
        out.extensions["urgent"] = request.role == "query"
        return out

    def _request(self, method: str, url: str, content: bytes | None = None) -> httpx.Request:
        headers = self._headers
        return self._clients[0].build_request(
            method, url, content=content, headers=headers, timeout=self._timeout
        )

    async def _send(self, request: httpx.Request) -> httpx.Response:
        response = await self._exchange(self._transport, request)
        if response.status_code != 202:
            return response
        try:
            async with asyncio.timeout(self._options.timeout) as running:
                return await self._poll(response)
        except TimeoutError:
            if not running.expired():
                raise
            raise RequestTimeoutError(
                f"the catalogue had no result after {self._options.timeout} s", status=202
            ) from None

    async def _poll(self, response: httpx.Response) -> httpx.Response:
        """Ask the catalogue for the reply that it owes."""
        while response.status_code == 202:
            owed = response.headers.get("nvcf-reqid")
            if owed is None or not is_hosted(self._base_url):
                raise MalformedResponseError("the server replied 202, not with vectors", status=202)
            await asyncio.sleep(POLL_EVERY)
            request = self._request("GET", POLLING + quote(owed, safe=""))
            response = await self._exchange(self._transport, request)
        return response

    async def _exchange(
        self, transport: httpx.AsyncBaseTransport, request: httpx.Request
    ) -> httpx.Response:
        try:
            return await transport.handle_async_request(request)
        except (httpx.TimeoutException, TimeoutError):
            error: NeMoRetrieverError = RequestTimeoutError(
                f"no reply from {self._base_url} within timeout={self._options.timeout} s"
            )
        except httpx.TransportError as exc:
            why = str(exc) or type(exc).__name__
            error = ConnectionFailedError(f"no connection to {self._base_url}: {why}")
        except httpx.RequestError as exc:
            error = MalformedResponseError(f"the reply cannot be read: {exc}")
        raise error  # here, as httpx's own errors hold the request and so the key

    async def _model(self) -> str:
        async with self._asking:
            if self._served is None:
                response = await self._send(self._request("GET", f"{self._base_url}/models"))
                self._served = self._choose(protocol.models(response))
        return self._served

    def _choose(self, listed: dict[str, str | None]) -> str:
        """Return the name under which the server serves the model.

        Raises:
            ModelNotFoundError: the only model it serves is known to be another one.
        """
        names = [self._name, *(self._spec.names if self._spec else ())]
        by_root = [name for name, root in listed.items() if root in names]
        for name in [*(name for name in names if name in listed), *by_root]:
            return name
        if len(listed) != 1:
            return self._name
        (only,) = listed
        if self._spec is not None and find(only) is not None:
            raise ModelNotFoundError(
                f"{self._base_url} serves {only}, not {self._name}; give model={only!r}"
            )
        _log.warning("%s serves only %r; using it for %r", self._base_url, only, self._name)
        return only

    async def _ready(self, seconds: float) -> None:
        url = f"{self._base_url}/health/ready"
        last = "no reply"
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        response = await self._exchange(self._once, self._request("GET", url))
                    except NeMoRetrieverError as exc:
                        last = str(exc)
                    else:
                        if response.is_success:
                            return
                        last = f"status {response.status_code}"
                        if response.status_code not in RETRIED:
                            raise protocol.error(response, self._refusal(response))
                    await asyncio.sleep(min(1.0, seconds / 20))
        except TimeoutError:
            raise RequestTimeoutError(
                f"{self._base_url} was not ready within {seconds} s: {last}"
            ) from None
