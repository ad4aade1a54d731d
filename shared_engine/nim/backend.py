"""A NIM somewhere else, behind the same contract as a model in this process.

    submit ──► batches.py: which inputs together ──► client.py ──► transport.py ──► httpx
                   ▲                                     │
                   └── vectors, or which to send again ──┘     protocol.py: bytes of both ways

One event loop in one thread serves every caller, so that they share connections and a limit of
requests in flight, whatever thread or event loop they come from. Images are opened in threads, as
that takes too long for a loop that others wait for.

Whatever a server replies, n inputs take a bounded number of requests: they are split at most n - 1
times, so there are at most 2 n - 1 batches; each is sent at most MOST_SENDS times, each of these at
most once more for each of `max_retries`, and each time at most once to every address. The list of
models and a probe per modality come on top; a request that met a kept connection which the server
had closed is not counted.
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

import httpx
from pydantic import SecretStr

from shared_engine.backend import Backend, Request, Rows
from shared_engine.catalogue import AvailableModel, ModelSpec, lookup
from shared_engine.documents import EmbeddingInput, Modality
from shared_engine.endpoints import MOST_HOSTED_CHARACTERS, is_hosted
from shared_engine.errors import (
    ConfigurationError,
    EngineClosedError,
    EngineError,
    MalformedResponseError,
    ModelNotFoundError,
    NeMoRetrieverError,
    RequestTimeoutError,
)
from shared_engine.nim import protocol
from shared_engine.nim.batches import BatchLimits, Dispatch, RequestBatch
from shared_engine.nim.client import NimClient
from shared_engine.nim.transport import is_retried
from shared_engine.options import Options
from shared_engine.threads import result_of
from shared_engine.wire import INPUT_TYPE, split_role_suffix

TRIES_MALFORMED = 3
MOST_SENDS = TRIES_MALFORMED + 2
"""Once more where the server takes no base64, and once where it takes no modality."""
_LARGE_REPLY = 2**20
"""Bytes from which a reply is parsed in a thread, as it would keep the others waiting."""
_EVERY_KIND: frozenset[Modality] = frozenset({"text", "image", "text_image"})

_T = TypeVar("_T")
_log = logging.getLogger("shared_engine")


class NimBackend(Backend):
    """An embedding model behind `/v1/embeddings`, shared by any number of callers."""

    def __init__(self, options: Options, base_url: str, api_key: SecretStr | None = None) -> None:
        """Make the client and start its thread; nothing is sent yet.

        Raises:
            ConfigurationError: the key would travel in the clear, or an option cannot work.
        """
        self._options = options
        self._base_url = base_url
        self._name, self._fixed_role = split_role_suffix(options.model)
        self._spec: ModelSpec | None = lookup(self._name)
        self._served: str | None = self._name if is_hosted(base_url) else None
        self._client = NimClient(options, base_url, api_key)
        self._most_characters = options.max_image_characters
        if self._most_characters is None and is_hosted(base_url):
            self._most_characters = MOST_HOSTED_CHARACTERS
        self._told_of_limit = False
        self._limits = BatchLimits(options.max_batch_size)
        self._encoding = "base64"
        self._sends_modality = True
        self._width: int | None = None
        self._encoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "nemoretriever-images")
        self._succeeded = 0.0  # time.monotonic() of the last valid reply
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
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input of the model; all kinds if only the server knows."""
        return self._spec.modalities if self._spec and self._is_settled else _EVERY_KIND

    @property
    def description(self) -> str:
        """The model's name and the server's address, or addresses."""
        return f"{self._served or self._name} at {self._base_url}"

    @property
    def fingerprint(self) -> str:
        """A digest of addresses and model: what the server computes with is not known.

        Asks the server for the name of the model where none was given.
        """
        if not self._is_settled:
            self._start(self._find_model()).result()
        name = self._spec.name if self._spec else self._name
        return hashlib.sha256(f"{self._base_url} {name}".encode()).hexdigest()[:16]

    def submit(self, request: Request) -> Future[Rows]:
        """Accept a request; see `Backend.submit`."""
        if self._fixed_role not in (None, request.role):
            raise ConfigurationError(
                f"model={self._options.model!r} embeds only as {self._fixed_role}, and this is to "
                f"be a {request.role}; give model={self._name!r} for both"
            )
        return self._start(self._embed(request))

    def probe_width(self) -> int:
        """Return the length of a full vector; asks for one where none has come yet.

        Raises:
            RemoteError, EngineClosedError: as `submit`.
        """
        if self._width is None:
            request = Request([EmbeddingInput("?")], self._fixed_role or "query")
            self._width = int(result_of(self.submit(request)).unwrap().shape[1])
        return self._width

    def list_models(self) -> list[AvailableModel]:
        """Return what the server serves.

        Raises:
            RemoteError: it does not say.
            EngineClosedError: `close` was called.
        """
        return self._start(self._list_models()).result()

    def wait_until_ready(self, timeout: float) -> None:
        """Return when the server says that it is ready; NVIDIA's catalogue always is.

        One address of several is enough: those that are not ready rest.

        Raises:
            RequestTimeoutError: it did not within `timeout` seconds.
            RemoteError: it has no such path, or does not let us ask.
        """
        if not is_hosted(self._base_url):
            self._start(self._client.wait_until_ready(timeout)).result()

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Finish what was accepted, or cancel it, then close the connections and the thread.

        Closing again does what the first time did not: cancel, or wait.
        """
        with self._lock:
            is_first, self._closed = not self._closed, True
            calls = list(self._calls)
        if cancel:
            for call in calls:
                call.cancel()
        if is_first:
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
        await _finish_tasks()
        try:
            await self._client.aclose()
            await self._loop.shutdown_default_executor()
            await self._loop.shutdown_asyncgens()
            await _finish_tasks()
        finally:
            self._encoders.shutdown(wait=False, cancel_futures=True)
            self._loop.stop()

    async def _embed(self, request: Request) -> Rows:
        call = Dispatch(request, self._encode, self._spec.hidden_size if self._spec else 0)
        deadline = self._options.deadline
        try:
            async with asyncio.timeout(deadline) as running:
                await self._run(call)
        except TimeoutError:
            if not running.expired():  # a RequestTimeoutError
                raise
            call.stopped = RequestTimeoutError(f"not done within deadline={deadline} s")
        finally:
            call.close()
        return call.result()

    def _encode(self, document: EmbeddingInput) -> asyncio.Future[bytes]:
        urls, most = self._options.allow_image_urls, self._most_characters
        if most is not None and not self._told_of_limit:
            self._told_of_limit = True
            _log.info("images of over %d base64 characters are made smaller", most)
        return self._loop.run_in_executor(
            self._encoders, lambda: protocol.encode_input(document, urls, most)
        )

    async def _run(self, call: Dispatch) -> None:
        documents = len(call.request.documents)
        if not documents:
            return
        model = await self._find_model()
        has_images = any(document.image is not None for document in call.request.documents)
        batches = documents if has_images else -(-documents // self._limits.inputs)
        in_flight = self._client.most_in_flight
        most = min(2 * in_flight, batches)
        if most == 1 or in_flight == 1:
            return await self._send_batches(call, model)
        async with asyncio.TaskGroup() as group:  # twice, as some wait for their next attempt
            for _ in range(most):
                group.create_task(self._send_batches(call, model))

    async def _send_batches(self, call: Dispatch, model: str) -> None:
        while (batch := await call.next_batch(self._limits)) is not None:
            started = time.monotonic()
            try:
                await self._send_batch(call, batch, model)
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
                error = EngineError(f"sending failed: {self._client.mask(repr(exc))}")
                error.__cause__ = exc
                call.fail(batch, error)

    def _give_up(
        self, call: Dispatch, batch: RequestBatch, error: NeMoRetrieverError, started: float
    ) -> None:
        """Fail a batch after its last attempt, and with it the call if nothing else succeeds."""
        call.fail(batch, error)
        if self._succeeded < started:
            call.stopped = error

    async def _send_batch(self, call: Dispatch, batch: RequestBatch, model: str) -> None:
        """Send a batch once, and do what the reply says."""
        request, encoding = call.request, self._encoding
        has_modality = batch.has_images or self._takes_modality
        response = await self._post(request, batch, model, encoding, has_modality)
        if response.is_success:
            reply = await self._parse(response, len(batch.rows), request.dimensions)
            call.deliver(batch, reply.vectors, reply.tokens)
            self._succeeded = time.monotonic()
            self._limits.passed = max(self._limits.passed, batch.size)
            if request.dimensions is None:
                self._width = reply.vectors.shape[1]
            return
        error_reply = self._client.read_error(response)
        if encoding == "base64" and error_reply.is_about("encoding_format"):
            _log.info("the server sends no base64; asking for floats from now on")
            self._encoding = "float"
            call.send_again(batch)
            return
        if has_modality and not batch.has_images and error_reply.is_about("modality"):
            _log.info("the server takes no modality; leaving it out with texts from now on")
            self._sends_modality = False
            call.send_again(batch)
            return
        is_splittable = len(batch.rows) > 1
        if error_reply.is_too_large and error_reply.position is None and is_splittable:
            self._shrink(batch, error_reply)
            call.send_again(*batch.split())
            return
        blames_one = error_reply.blames_one_input or error_reply.is_too_large
        if not blames_one and error_reply.may_blame_one_input:
            blames_one = await call.is_request_accepted(
                batch, lambda probe: self._probe(request, probe, model)
            )
        if blames_one and is_splittable:
            call.send_again(*batch.isolate(error_reply.position))
            return
        error = protocol.build_error(response, error_reply, batch.has_images, blames_one)
        if is_retried(response.status_code):
            raise error
        call.fail(batch, error)
        if not blames_one:
            call.stopped = error  # the others would be refused as well

    async def _probe(self, request: Request, batch: RequestBatch, model: str) -> bool:
        """Whether the server takes an input that nothing is wrong with, sent as the others are."""
        has_modality = batch.has_images or self._takes_modality
        try:
            response = await self._post(request, batch, model, self._encoding, has_modality)
        except NeMoRetrieverError:
            return True  # not refused, at least
        return not self._client.read_error(response).may_blame_one_input

    async def _parse(
        self, response: httpx.Response, n: int, dimensions: int | None
    ) -> protocol.Reply:
        arguments = (response.content, n, dimensions, self._client.mask)
        if len(response.content) < _LARGE_REPLY:
            return protocol.parse_reply(*arguments)
        return await asyncio.to_thread(protocol.parse_reply, *arguments)

    def _shrink(self, batch: RequestBatch, reply: protocol.ErrorReply) -> None:
        if reply.is_about_count:
            self._limits.inputs = min(self._limits.inputs, len(batch.rows) // 2)
        else:
            self._limits.shrink_below(batch.size)
        _log.info("too large for the server: %d inputs, %d bytes", len(batch.rows), batch.size)

    @property
    def _is_settled(self) -> bool:
        """Whether it is known which model the vectors are of."""
        return self._options.is_model_given or self._served is not None

    @property
    def _takes_modality(self) -> bool:
        """Whether to say that a text is one; a multimodal NIM takes some for images otherwise."""
        is_known_text_model = self._spec is not None and not self._spec.is_multimodal
        return self._sends_modality and not is_known_text_model

    async def _post(
        self, request: Request, batch: RequestBatch, model: str, encoding: str, has_modality: bool
    ) -> httpx.Response:
        fields = {
            "model": model,
            "input_type": INPUT_TYPE[request.role],
            "encoding_format": encoding,
            "truncate": request.truncate,
            "dimensions": request.dimensions,
            "modality": batch.modality if has_modality else None,
            "user": self._options.user,
        }
        width = protocol.MOST_VALUES if self._spec is None else self._spec.hidden_size
        width = max(width, request.dimensions or 0)
        return await self._client.post_embeddings(
            protocol.build_body(fields, batch.inputs),
            protocol.bound_reply(len(batch.rows), width),
            urgent=request.role == "query",
        )

    async def _find_model(self) -> str:
        async with self._asking:
            if self._served is None:
                listed = protocol.list_models(await self._client.get_models())
                self._served = self._match_served_model(listed)
        return self._served

    async def _list_models(self) -> list[AvailableModel]:
        response = await self._client.get_models()
        if not response.is_success:
            raise protocol.build_error(response, self._client.read_error(response))
        return [AvailableModel(*item) for item in protocol.list_models(response).items()]

    def _match_served_model(self, listed: dict[str, str | None]) -> str:
        """Return the name under which the server serves the model; what it lists may be nothing.

        Where no model was asked for, the only one that it serves is taken.

        Raises:
            ModelNotFoundError: it serves others.
        """
        names = [self._name, *(self._spec.names if self._spec else ())]
        by_root = [name for name, root in listed.items() if root in names]
        for name in [*(name for name in names if name in listed), *by_root]:
            return name
        if not listed:
            return self._name
        if len(listed) == 1 and not self._options.is_model_given:
            (only,) = listed
            _log.info("no model= was given; using the only one of %s: %r", self._base_url, only)
            self._spec = lookup(only)
            self._name = only
            return only
        some = ", ".join(protocol.make_printable(name[:100]) for name in list(listed)[:20])
        raise ModelNotFoundError(
            f"{self._base_url} serves {some}, not {self._name}; give one of them as model="
        )


async def _finish_tasks() -> None:
    """Wait for all other tasks, and for those that close the generators of replies cut off."""
    await asyncio.sleep(0)
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
