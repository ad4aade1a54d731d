"""Entry point: how a document becomes a vector. Start reading here.

    embed(documents, role)
      registry.py, routing.py ...... one engine for equal options: in this process, or at a NIM
      pipeline.py
        validate ... documents.py    every input is of a kind that the model takes
        submit ..... local/          tokenize ──► scheduler: steps ──► llama: mean vectors
                 or  nim/            batches ──► requests ──► validated replies
        finish ..... vectors.py      cut to `dimensions`, unit length, number type

The adapters for LangChain and LlamaIndex name a role, call this, and return lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from shared_engine.backend import Backend, Rows
from shared_engine.catalogue import CATALOGUE, DEFAULT_MODEL, AvailableModel
from shared_engine.documents import EmbeddingInput, Modality, Role, require_list
from shared_engine.errors import ConfigurationError
from shared_engine.options import Options
from shared_engine.pipeline import Documents, Pipeline
from shared_engine.registry import Lease
from shared_engine.routing import select_backend
from shared_engine.stream import AsyncStream, Stream
from shared_engine.threads import call_in_thread, result_of, run_off_loop, wait_until_done
from shared_engine.usage import TokenCount

if TYPE_CHECKING:
    from numpy.typing import NDArray

_T = TypeVar("_T")

_SMALL = 64 * 2048
"""Values of an array that is finished on the event loop, in well under a millisecond; larger ones
are finished in a thread."""


class Embedder:
    """Embeds documents with one model, in this process or at a NIM.

    Creating one is cheap: the model loads at first use. Safe to use from many threads and event
    loops. Pickles, copies and forks carry the options; equal options share one loaded model.
    """

    def __init__(self, options: Options | None = None, *, _lease: Lease | None = None) -> None:
        self.options = options or Options()
        self._lease = _lease or Lease(self.options)
        self._owns_lease = _lease is None
        self._used = TokenCount()
        self._pipeline = Pipeline(self._lease, self.options, self._used)

    def embed(self, documents: Documents, role: Role = "document") -> NDArray[Any]:
        """Embed documents and return their vectors.

        An empty text is embedded as its prefix alone.

        Args:
            documents: Texts, or `EmbeddingInput` for images.
            role: "query" for the text of a search; the models embed the two differently.

        Returns:
            (n, dimensions) float32 of unit length, in the order of the documents. With
            `embedding_type` "int8" or "uint8" the values have that type; "binary" (int8) and
            "ubinary" (uint8) pack eight values into a byte.

        Raises:
            InputError: an input is of the wrong type or modality (`index` is its position), and
                nothing was computed; or the only input is too long, or its image is unusable.
            PartialResultError: some of several inputs failed; the error has the other vectors, and
                the error of each failed input: InputTooLongError, ImageError and so on.
            RemoteError: the server refused or failed all of them, for one reason.
            ConfigurationError: the options cannot work; raised at first use.
            EngineClosedError: `close` was called.
        """
        return self._unwrap(result_of(self._pipeline.submit(documents, role)))

    async def aembed(self, documents: Documents, role: Role = "document") -> NDArray[Any]:
        """Embed documents without blocking the event loop; cancelling drops the waiting work.

        See `embed` for arguments, result and errors.
        """
        return await self._aembed(documents, role, self._unwrap)

    def _embed_lists(
        self, documents: Documents, role: Role = "document", data_urls: bool = False
    ) -> list[list[float]]:
        """Embed documents and return plain lists, which the frameworks expect."""
        return _to_lists(self._unwrap(result_of(self._pipeline.submit(documents, role, data_urls))))

    async def _aembed_lists(
        self, documents: Documents, role: Role = "document", data_urls: bool = False
    ) -> list[list[float]]:
        def convert(rows: Rows) -> list[list[float]]:
            return _to_lists(self._unwrap(rows))

        return await self._aembed(documents, role, convert, data_urls)

    def _unwrap(self, rows: Rows) -> NDArray[Any]:
        """Finish rows, and return their vectors or raise their errors."""
        rows = self._pipeline.finish(rows)
        try:
            if len(rows) == 1 and rows.errors:
                raise rows.errors[0]
            return rows.unwrap()
        finally:
            del rows  # an error holds this frame by its traceback, so the frame must not hold it

    async def _aembed(
        self,
        documents: Documents,
        role: Role,
        convert: Callable[[Rows], _T],
        data_urls: bool = False,
    ) -> _T:
        submitting = call_in_thread(self._pipeline.submit, documents, role, data_urls)
        try:
            future = await asyncio.wrap_future(submitting)
        except asyncio.CancelledError:  # here, as the loop may end before another task runs
            submitting.add_done_callback(_cancel_submitted)
            raise
        await wait_until_done(future)
        rows = result_of(future)
        try:
            if rows.vectors.size <= _SMALL:
                return convert(rows)
            return await run_off_loop(convert, rows)
        finally:
            del future, rows  # as in `_unwrap`

    @overload
    def stream(
        self,
        documents: Documents,
        role: Role = "document",
        batch_size: int = 1024,
        *,
        errors: Literal["raise"] = "raise",
    ) -> Stream[NDArray[Any]]: ...

    @overload
    def stream(
        self,
        documents: Documents,
        role: Role = "document",
        batch_size: int = 1024,
        *,
        errors: Literal["return"],
    ) -> Stream[Rows]: ...

    def stream(
        self,
        documents: Documents,
        role: Role = "document",
        batch_size: int = 1024,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> Stream[Any]:
        """Embed more documents than fit in memory; iterate over batches of vectors, in order.

        The source is read as the stream advances: two more batches are computed while the caller
        handles one. To keep inputs and vectors together, tee the source:

            texts, copies = itertools.tee(source)
            for vectors in embedder.stream(texts):
                store(list(itertools.islice(copies, len(vectors))), vectors)

        `close()`, or garbage collection, cancels the pending work.

        Args:
            documents: As for `embed`; may be endless.
            role: As for `embed`.
            batch_size: Documents per batch.
            errors: "raise" raises a PartialResultError for a batch with failed documents, which
                ends the stream. "return" yields `Rows` instead of arrays: the vectors of a batch
                and the errors of its failed rows, and continues.

        Raises, while iterating; an error ends the stream:
            PartialResultError: documents failed; the error has the vectors of the rest of the
                batch, which begins at `offset`, and the errors by position in the stream.
            RemoteError: the server failed a whole batch for one reason.
            Exception: the error of the source, after the vectors of the documents before it.
            ConfigurationError, EngineClosedError: as with `embed`.
        """
        convert = _convert_for(errors)
        return Stream(self._pipeline, require_list(documents), role, batch_size, convert)

    @overload
    def astream(
        self,
        documents: Documents | AsyncIterable[str | EmbeddingInput],
        role: Role = "document",
        batch_size: int = 1024,
        *,
        errors: Literal["raise"] = "raise",
    ) -> AsyncStream[NDArray[Any]]: ...

    @overload
    def astream(
        self,
        documents: Documents | AsyncIterable[str | EmbeddingInput],
        role: Role = "document",
        batch_size: int = 1024,
        *,
        errors: Literal["return"],
    ) -> AsyncStream[Rows]: ...

    def astream(
        self,
        documents: Documents | AsyncIterable[str | EmbeddingInput],
        role: Role = "document",
        batch_size: int = 1024,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> AsyncStream[Any]:
        """Embed a stream without blocking the event loop; see `stream`.

        A regular iterable is read in a worker thread. Cancelling closes the stream.
        """
        convert = _convert_for(errors)
        return AsyncStream(self._pipeline, require_list(documents), role, batch_size, convert)

    def load(self) -> Backend:
        """Load the model, or connect to the server's client, and return the shared backend.

        Not needed before `embed`; it lets a program pay for loading when it chooses to.

        Raises:
            CheckpointError: the weights cannot be found or are not supported.
            ConfigurationError: the options cannot work.
            EngineClosedError: `close` was called.
        """
        return self._lease.acquire()

    @property
    def model(self) -> str | None:
        """Name of the model. Loads nothing; None while only a server knows it."""
        if self.options.model is None and select_backend(self.options).base_url is None:
            return DEFAULT_MODEL
        return self.options.model or self.load().model

    @property
    def dimensions(self) -> int:
        """Length of a vector. Loads the model, or asks a server for one vector."""
        return self._pipeline.find_width()

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input that the model takes. Loads the model.

        A server with a model outside the catalogue may take fewer.
        """
        return self.load().modalities

    @property
    def description(self) -> str:
        """What runs where, and why. Loads the model."""
        return self.load().description

    @property
    def usage(self) -> int:
        """Tokens that this object has embedded so far, prefixes and special tokens included."""
        return self._used.tokens

    def cache_key(self, role: Role) -> str:
        """Return a namespace for cached vectors, such as `CacheBackedEmbeddings` takes.

        Equal keys mean equal vectors: it covers weights, tokenizer, dtype, role, dimensions,
        truncation and number type. Loads the model.

        Raises:
            CheckpointError: a file of the model changed after it was loaded.
        """
        o = self.options
        parts = (role, self.dimensions, o.embedding_type, o.truncate, o.max_tokens)
        return "-".join(str(part) for part in (self.load().fingerprint, *parts))

    def list_models(self) -> list[AvailableModel]:
        """Return the models that run in this process, or those that the server serves.

        Raises:
            RemoteError: the server does not list them.
        """
        if select_backend(self.options).base_url is None:
            return [AvailableModel(spec.name) for spec in CATALOGUE if spec.is_local]
        return self.load().list_models()

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Load the model, or wait until the server is ready.

        Raises:
            RequestTimeoutError: it was not ready within `timeout` seconds.
        """
        self.load().wait_until_ready(timeout)

    def with_options(self, **changes: Any) -> Embedder:
        """Return an embedder on the same engine with other `dimensions`, `truncate` and so on.

        It counts its own `usage`, and works until the original is closed.

        Raises:
            ConfigurationError: an option that needs an engine of its own.
            pydantic.ValidationError: an unknown option, or an invalid value.
        """
        if fixed := changes.keys() & {*Options.names_of("routing", "engine", "local", "nim")}:
            raise ConfigurationError(
                f"{', '.join(sorted(fixed))}: would need another engine; create a new Embedder, or "
                f"change only {', '.join(Options.names_of('request'))}"
            )
        return type(self)(self.options.replace(**changes), _lease=self._lease)

    def close(self, cancel: bool = False) -> None:
        """Release the model; further calls raise EngineClosedError.

        Closing the last embedder of a model finishes the accepted work, or cancels what has not
        started, and frees the device.
        """
        if self._owns_lease:
            self._lease.close(cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Embedder], tuple[Options]]:
        return type(self), (self.options,)

    def __repr__(self) -> str:
        return f"Embedder({self.options!r})"


def _convert_for(errors: str) -> Callable[[Rows], Any]:
    """Return the function that makes what a stream yields out of `Rows`."""
    if errors == "raise":
        return Rows.unwrap
    if errors == "return":
        return lambda rows: rows
    raise ConfigurationError(f'errors={errors!r}: expected "raise" or "return"')


def _to_lists(array: NDArray[Any]) -> list[list[float]]:
    # Row by row, so that the interpreter can switch to another thread in between.
    return [row.tolist() for row in array]


def _cancel_submitted(submitting: Future[Future[Rows]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
