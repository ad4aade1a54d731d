"""A model at a NIM, behind the same contract as a model in this process.

    submit ─► batches.py: inputs of one request ─► client.py ─► transport.py ─► httpx
                   ▲                                   │
                   └──────── decisions.py ◄────────────┘      forms.py: bodies
                                                              protocol.py: replies, errors

One event loop in one thread serves all callers, so they share connections and one limit of requests
in flight, from any thread or event loop. Images are opened in other threads, as that would block
the loop for too long.

Independent of the server's replies, n inputs take a bounded number of requests. They are split at
most n - 1 times, so there are at most 2 n - 1 batches. Each is sent at most MOST_SENDS times, and
each of these has at most `max_retries` retries. Additional requests are the list of models, the
server's metadata, one probe per modality, role and form of rerankers, and those over connections
that the server had closed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

from shared_engine.backend import Backend, Request, Rows, ScoreKind
from shared_engine.catalogue import (
    DEFAULT_MODELS,
    AvailableModel,
    explain_end,
    lookup,
    require_hosted,
)
from shared_engine.documents import EmbeddingInput, Modality, Role
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
from shared_engine.nim.decisions import (
    Fail,
    Feature,
    Isolate,
    Probe,
    Resend,
    Split,
    decide,
)
from shared_engine.nim.forms import (
    MOST_VALUES,
    RERANK_FORMS,
    EmbeddingsForm,
    Form,
    Known,
    RankingForm,
)
from shared_engine.nim.roles import have_same_scale, have_same_text
from shared_engine.nim.transport import is_retried
from shared_engine.options import EngineOptions, Options
from shared_engine.threads import result_of
from shared_engine.wire import split_role_suffix

TRIES_MALFORMED = 3
MOST_SENDS = TRIES_MALFORMED + 3
"""Once more for a server without base64, without `modality` and without `truncate`."""
_LARGE_REPLY = 2**20
"""Bytes from which a reply is parsed in a thread, as it would block the loop for too long."""
_ALL_MODALITIES: frozenset[Modality] = frozenset({"text", "image", "text_image"})

_T = TypeVar("_T")
_log = logging.getLogger("shared_engine")


class NimBackend(Backend):
    """An embedding model or reranker at a server, shared by any number of callers."""

    base_url = ""

    def __init__(
        self, options: EngineOptions, base_url: str, api_key: SecretStr | None = None
    ) -> None:
        """Create the client and start its thread; nothing is sent yet.

        Raises:
            ConfigurationError: the key would travel unencrypted, or an option cannot work.
        """
        self._options = options
        self.base_url = base_url
        self._name: str | None = None
        self._fixed_role: Role | None = None
        if options.model is not None:
            self._name, self._fixed_role = split_role_suffix(options.model)
        self._spec = lookup(self._name)
        self._served: str | None = None
        self._replied = ""
        self._client = NimClient(options, base_url, api_key)
        self._most_characters = options.max_image_characters
        if self._most_characters is None and is_hosted(base_url):
            self._most_characters = MOST_HOSTED_CHARACTERS
        self._has_logged_limit = False
        self._limits = BatchLimits(options.max_batch_size)
        self._lacks: set[Feature] = set()
        """Features of requests that the server does not have."""
        self._form: Form | None = None
        if isinstance(options, Options) and isinstance(options.prefixes, dict):
            self._form = self._create_embeddings_form(options.prefixes)
        elif isinstance(options, Options) and (is_hosted(base_url) or options.prefixes == "server"):
            self._form = self._create_embeddings_form()
        elif is_hosted(base_url):
            self._form = RankingForm()
        self._has_logits = False
        self._width: int | None = None
        self._encoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "nemoretriever-images")
        self._succeeded = 0.0  # time.monotonic() of the last valid reply
        self._connecting = asyncio.Lock()
        self._lock = threading.RLock()  # reentrant, as a finalizer may call close() anywhere
        self._closed = False
        self._calls: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run_loop, name="nemoretriever-nim", daemon=True
        )
        self._thread.start()

    @property
    def model(self) -> str | None:
        """The server's name of the model, the given one before the first request, or None."""
        return self._served or self._name

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input that the model takes; all if only the server knows."""
        return self._spec.modalities if self._spec else _ALL_MODALITIES

    @property
    def description(self) -> str:
        """The name of the model, the address of the server and, once known, its form."""
        form = f" ({self._form.name})" if self._form and self._form.name else ""
        return f"{self.model or 'the only model'} at {self.base_url}{form}"

    @property
    def score_kind(self) -> ScoreKind:
        """Meaning of the scores; sends a request if the server's form is unknown.

        Raises:
            RemoteError: the server has no reranker.
        """
        if self._form is None:
            result_of(self._start(self._connect()))
        return "logit" if self._has_logits or self._form is None else self._form.score_kind

    @property
    def fingerprint(self) -> str:
        """A digest of model and prefixes, as the server's weights are unknown.

        Asks the server for the name of its model if the options have none, and for its form. A
        server may move, so its address is no part of it.
        """
        if self._name is None or self._form is None:
            result_of(self._start(self._connect()))
        identity = str(self._spec.name if self._spec else self._name)
        if self._form is not None and self._form.prefixes is not None:
            identity += f" {sorted(self._form.prefixes.items())}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def submit(self, request: Request) -> Future[Rows]:
        """Accept a request; see `Backend.submit`."""
        if self._fixed_role not in (None, request.role):
            raise ConfigurationError(
                f"model={self._options.model!r} embeds only as {self._fixed_role}, not as "
                f"{request.role}; use model={self._name!r} for both"
            )
        return self._start(self._embed(request))

    def probe_width(self) -> int:
        """See `Backend.probe_width`: embeds a text if no vector has arrived yet."""
        if self._width is None:
            request = Request([EmbeddingInput("?")], self._fixed_role or "query")
            self._width = int(result_of(self.submit(request)).unwrap().shape[1])
        return self._width

    def list_models(self) -> list[AvailableModel]:
        """See `Backend.list_models`."""
        return result_of(self._start(self._list_models()))

    def wait_until_ready(self, timeout: float) -> None:
        """See `Backend.wait_until_ready`: NVIDIA's catalogue always is."""
        if not is_hosted(self.base_url):
            result_of(self._start(self._client.wait_until_ready(timeout)))

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Finish or cancel the accepted requests, then close the connections and the thread.

        A second call may cancel or wait if the first did not.
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
                raise EngineClosedError("this object was closed; create a new one")
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
        width = self._spec.hidden_size if self._spec else 0
        call = Dispatch(request, self._encode, 1 if request.query is not None else width)
        seconds = self._options.deadline
        try:
            async with asyncio.timeout(seconds) as deadline:
                await self._run(call)
        except TimeoutError:
            if not deadline.expired():  # a RequestTimeoutError
                raise
            call.stopped = RequestTimeoutError(f"not finished within deadline={seconds} s")
        finally:
            call.close()
        return call.result()

    def _encode(self, form: Form, document: EmbeddingInput) -> asyncio.Future[bytes]:
        urls, most = self._options.allow_image_urls, self._most_characters
        if most is not None and not self._has_logged_limit:
            self._has_logged_limit = True
            _log.info("images with more than %d base64 characters are reduced", most)
        return self._loop.run_in_executor(
            self._encoders,
            lambda: form.encode_input(document, allow_image_urls=urls, most_characters=most),
        )

    async def _run(self, call: Dispatch) -> None:
        n = len(call.request.documents)
        if not n:
            return
        model, call.form = await self._connect()
        has_images = any(document.image is not None for document in call.request.documents)
        batches = n if has_images else -(-n // self._limits.inputs)
        in_flight = self._options.concurrency
        workers = min(2 * in_flight, batches)  # twice, as some wait for their next attempt
        if workers == 1 or in_flight == 1:
            return await self._send_batches(call, model)
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._send_batches(call, model))

    async def _send_batches(self, call: Dispatch, model: str) -> None:
        while (batch := await call.next_batch(self._limits)) is not None:
            started = time.monotonic()
            try:
                await self._send_batch(call, batch, model)
            except MalformedResponseError as exc:
                if batch.malformed + 1 < TRIES_MALFORMED:
                    _log.info("%s; sending the request again", exc)
                    call.send_again(replace(batch, malformed=batch.malformed + 1))
                else:
                    self._give_up(call, batch, exc, started)
            except ConfigurationError as exc:  # other batches would fail the same way
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
        """Fail a batch after its last attempt; stop the call if no other request succeeds."""
        call.fail(batch, error)
        if self._succeeded < started:
            call.stopped = error

    async def _send_batch(self, call: Dispatch, batch: RequestBatch, model: str) -> None:
        """Send a batch once, and carry out the decision on its reply."""
        known = self._get_known(call.request, batch)
        reply = await self._post(call.form, call.request, batch, model, known)
        if isinstance(reply, protocol.Reply):
            return self._deliver(call, batch, reply)
        decision = decide(reply, batch, known)
        if isinstance(decision, Probe):
            is_accepted = await call.is_accepted(
                batch.modality, lambda probe: self._probe(call, probe, model)
            )
            decision = decide(reply, batch, replace(known, is_accepted=is_accepted))
        match decision:
            case Resend(feature):
                self._leave_out(feature)
                call.send_again(batch)
            case Split(by_count):
                self._limits.shrink_below(batch, by_count)
                call.send_again(*batch.split())
            case Isolate(position):
                call.send_again(*batch.isolate(position))
            case Fail(fault):
                error = protocol.build_error(
                    reply,
                    batch.has_images,
                    fault == "input",
                    spec=self._spec,
                    task=self._options.task,
                    model=model,
                )
                if fault == "server":
                    raise error
                call.fail(batch, error)
                if fault == "request":
                    call.stopped = error

    def _leave_out(self, feature: Feature) -> None:
        _log.info("the server lacks %s; requests are without it from now on", feature)
        self._lacks.add(feature)

    def _check_same_model(self, request: Request, reply: protocol.Reply) -> None:
        """Compare a reply with the first one, as a server may be restarted with another model."""
        width = reply.vectors.shape[1]
        self._replied = self._replied or reply.model
        if reply.model and reply.model != self._replied:
            was, now = map(protocol.make_printable, (self._replied[:100], reply.model[:100]))
            change = f"model {now!r} after {was!r}"
        elif request.has_full_vectors and self._width not in (None, width):
            change = f"vectors of {width} values after {self._width}"
        else:
            return
        raise ModelNotFoundError(
            f"{self.base_url} replied with {change}: it serves another model now. Start it with "
            "the first model again, or create a new object for the other one"
        )

    def _deliver(self, call: Dispatch, batch: RequestBatch, reply: protocol.Reply) -> None:
        self._check_same_model(call.request, reply)
        call.deliver(batch, reply.vectors, reply.tokens)
        self._succeeded = time.monotonic()
        self._limits.accepted_size = max(self._limits.accepted_size, batch.size)
        if call.request.query is not None:
            # Some servers of Cohere's form send logits instead.
            self._has_logits |= not ((reply.vectors >= 0) & (reply.vectors <= 1)).all()
        elif call.request.has_full_vectors:
            self._width = reply.vectors.shape[1]

    async def _probe(self, call: Dispatch, batch: RequestBatch, model: str) -> bool:
        """Return whether the server accepts a valid input, sent as other batches are."""
        known = self._get_known(call.request, batch)
        try:
            reply = await self._post(call.form, call.request, batch, model, known)
        except NeMoRetrieverError:
            return True  # no refusal of the input
        return isinstance(reply, protocol.Reply) or not reply.is_ambiguous

    def _get_known(self, request: Request, batch: RequestBatch) -> Known:
        """Return how a batch is sent now.

        Texts have a `modality` too, as a multimodal NIM may take some of them for images. A
        `truncate` that is not the default is never left out.
        """
        is_text_model = self._spec is not None and not self._spec.is_multimodal
        has_modality = batch.has_images or not (is_text_model or "modality" in self._lacks)
        truncate = request.truncate
        has_truncate = truncate != "NONE" or "truncate" not in self._lacks
        return Known(
            "float" if "base64" in self._lacks else "base64",
            batch.modality if has_modality else None,
            truncate if has_truncate else None,
        )

    async def _post(
        self, form: Form, request: Request, batch: RequestBatch, model: str, known: Known
    ) -> protocol.Reply | protocol.ErrorReply:
        response = await self._client.post(
            form.find_url(self.base_url, model),
            form.build_body(request, model, batch.inputs, known),
            form.bound_reply(request, batch.inputs),
            urgent=request.is_search,
        )
        if not response.is_success:
            return self._client.read_error(response)
        arguments = (response.content, request, len(batch.rows), self._client.mask)
        if len(response.content) < _LARGE_REPLY:
            return form.parse_reply(*arguments)
        return await asyncio.to_thread(form.parse_reply, *arguments)

    async def _connect(self) -> tuple[str, Form]:
        """Return the server's name of the model, and the form of its requests."""
        async with self._connecting:
            if self._served is None:
                self._served = await self._find_model()
            if self._form is None:
                is_embedding = self._options.task == "embed"
                choose = self._choose_embeddings_form if is_embedding else self._choose_rerank_form
                self._form = await choose(self._served)
                _log.info("%s", self.description)
        return self._served, self._form

    async def _find_model(self) -> str:
        if not is_hosted(self.base_url):
            response = await self._client.get("/models")
            if is_retried(response.status_code):  # it may have a list later, unlike with a 404
                raise protocol.build_error(self._client.read_error(response))
            return self._match_served_model(protocol.list_models(response))
        model = require_hosted(self._options.model, self._options.task)
        if self._spec is not None and self._spec.hosted.state == "deprecated":
            since, newer = self._spec.hosted.since, explain_end(self._spec, self._spec.task)
            _log.warning("hosted model %s is deprecated since %s; %s", self._name, since, newer)
        return model

    def _create_embeddings_form(self, prefixes: Mapping[Role, str] | None = None) -> EmbeddingsForm:
        width = self._spec.hidden_size if self._spec else MOST_VALUES
        return EmbeddingsForm(width, self._options.user, prefixes)

    async def _choose_embeddings_form(self, model: str) -> Form:
        """Return the form with prefixes if the server embeds a text equally in both roles.

        A NIM is not probed: it adds the prefixes itself, and some of its models have no roles.
        """
        form = self._create_embeddings_form()
        if protocol.is_nim(await self._client.get("/metadata")):
            return form
        self._lacks.add("base64")
        query = await self._probe_role(form, "query", model)
        self._lacks.discard("base64")
        try:
            document = await self._probe_role(form, "document", model)
            is_float32 = have_same_scale(query, document)
        except MalformedResponseError:
            is_float32 = False
        if not is_float32:
            self._leave_out("base64")
            document = await self._probe_role(form, "document", model)
        if not have_same_text(query, document):
            return form
        if self._spec is None:
            raise ConfigurationError(
                f"{self.base_url} ignores input_type, so a query and a document of one text have "
                f"the same vector, and the prefixes of {model} are unknown; pass those of its "
                'model card, such as prefixes={"query": "query: ", "document": "passage: "}, or '
                "empty ones for a model without roles"
            )
        return self._create_embeddings_form(self._spec.prefixes)

    async def _probe_role(self, form: Form, role: Role, model: str) -> NDArray[np.float32]:
        """Return the vector of a text in a role, without `input_type` if the server refuses it."""
        request = Request([EmbeddingInput("?")], role)
        batch = RequestBatch((0,), (form.build_probe("text"),), "text")
        for _ in range(MOST_SENDS):
            known = self._get_known(request, batch)
            reply = await self._post(form, request, batch, model, known)
            if isinstance(reply, protocol.Reply):
                return reply.vectors
            if reply.is_about("input_type"):
                form = self._create_embeddings_form({"query": "", "document": ""})
            elif isinstance(decision := decide(reply, batch, known), Resend):
                self._leave_out(decision.without)
            else:
                raise protocol.build_error(reply, spec=self._spec)
        raise MalformedResponseError(f"{self.base_url} refuses each form of a request")

    async def _choose_rerank_form(self, model: str) -> Form:
        """Return the first form in which the server replies with a score."""
        request = Request([EmbeddingInput("?")], "query", query="?")
        refusing: Form | None = None
        for kind in RERANK_FORMS:
            form = kind()
            batch = RequestBatch((0,), (form.build_probe("text"),), "text")
            known = self._get_known(request, batch)
            try:
                reply = await self._post(form, request, batch, model, known)
            except MalformedResponseError:  # a web page, for example
                continue
            if isinstance(reply, protocol.Reply):
                return form
            if reply.status in (401, 403, 407, 410, 429) or reply.status >= 500:
                raise protocol.build_error(reply, spec=self._spec, task="rerank")
            if refusing is None and reply.status not in (404, 405):
                refusing = form
        if refusing is not None:  # its path exists, so the first request will have its error
            return refusing
        raise ModelNotFoundError(
            f"{self.base_url} serves no reranker: it has neither /ranking nor /rerank"
        )

    async def _list_models(self) -> list[AvailableModel]:
        response = await self._client.get("/models")
        if not response.is_success:
            raise protocol.build_error(self._client.read_error(response))
        return [AvailableModel(*item) for item in protocol.list_models(response).items()]

    def _match_served_model(self, listed: dict[str, str | None]) -> str:
        """Return the server's name of the model, which is the only one if none was given."""
        name = self._name or DEFAULT_MODELS[self._options.task]
        spec = lookup(name)
        found = _find_listed((name, *spec.names) if spec else (name,), listed)
        if self._name is None and found is None and len(listed) == 1:
            (found,) = listed
            name, spec = found, lookup(found)
            _log.info("model= is not given; using the only one of %s: %r", self.base_url, found)
        if found is None and listed:
            some = ", ".join(protocol.make_printable(name[:100]) for name in list(listed)[:20])
            raise ModelNotFoundError(
                f"{self.base_url} serves {some}, not {name}; use one of them as model="
            )
        self._name, self._spec = name, spec or lookup(listed.get(found or ""))
        return found or name


def _find_listed(names: Sequence[str], listed: Mapping[str, str | None]) -> str | None:
    """Return the first of the names that is listed, or the first listed id with such a root."""
    by_root = (served for served, root in listed.items() if root in names)
    return next((name for name in names if name in listed), next(by_root, None))


async def _finish_tasks() -> None:
    """Wait for all other tasks, and for those that close generators of unfinished replies."""
    await asyncio.sleep(0)
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
