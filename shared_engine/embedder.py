"""The way of a document to its vector. Read this first.

    embed(documents, role)
      registry.py, routing.py ...... one engine for equal options: in this process, or at a NIM
      pipeline.py
        check ...... documents.py    every input is one the model takes, or an error with its index
        submit ..... local/          tokenise ──► scheduler: steps ──► llama: mean vectors
                 or  nim/            batches ──► requests ──► replies that were checked
        finish ..... vectors.py      cut to `dimensions`, unit length, number type

The adapters for LangChain and LlamaIndex name a role, call this, and return lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from shared_engine.backend import Backend, Remote
from shared_engine.catalogue import CATALOGUE, AvailableModel
from shared_engine.documents import EmbeddingInput, Modality, Role, require_list
from shared_engine.errors import ConfigurationError
from shared_engine.options import Options
from shared_engine.pipeline import SMALL, Documents, Pipeline
from shared_engine.registry import Lease
from shared_engine.routing import select_backend
from shared_engine.stream import AsyncStream, Stream
from shared_engine.threads import call_in_thread, run_off_loop, wait_until_done
from shared_engine.usage import TokenCount

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_T = TypeVar("_T")


class Embedder:
    """Embeds documents with the model and in the way that its options say.

    Making one is cheap: the model loads at first use. Safe to use from many threads and event
    loops. Pickles, copies and crosses a fork as its options; equal options share one loaded model.
    """

    def __init__(self, options: Options | None = None) -> None:
        self._begin(options or Options(), None)

    def _begin(self, options: Options, lease: Lease | None) -> None:
        self.options = options
        self._lease = lease or Lease(options)
        self._owns_lease = lease is None
        self._used = TokenCount()
        self._pipeline = Pipeline(self._lease, options, self._used)

    def embed(self, documents: Documents, role: Role = "document") -> NDArray[Any]:
        """Return one vector per document: (n, dimensions) float32 of unit length, in order.

        With `embedding_type` "int8" or "uint8" the values are of that type; "binary" (int8) and
        "ubinary" (uint8) pack eight to a byte. An empty text is embedded as its prefix alone.

        Raises:
            InputError: an input is of the wrong type or modality (`index` says which), and nothing
                was computed; or the only input is too long, or its image cannot be decoded.
            PartialResultError: some of several inputs failed; the vectors of the others are on it,
                and what went wrong by index: InputTooLongError, ImageError and the like.
            RemoteError: a NIM refused or failed at all of them, for one reason.
            ConfigurationError: the options cannot work; raised at first use.
            EngineClosedError: `close` was called.
        """
        future = self._pipeline.submit(documents, role)
        try:
            return self._pipeline.finish(future)
        finally:
            future.cancel()  # where we leave early, what has not started is dropped
            del future  # as in `finish`

    async def aembed(self, documents: Documents, role: Role = "document") -> NDArray[Any]:
        """Do as `embed` does without blocking the event loop; cancelling drops what waits."""
        return await self._afinish(documents, role, self._pipeline.finish)

    def _embed_lists(self, documents: Documents, role: Role = "document") -> list[list[float]]:
        """Return what `embed` does as plain lists, which the frameworks want."""
        return _to_lists(self.embed(documents, role))

    async def _aembed_lists(
        self, documents: Documents, role: Role = "document"
    ) -> list[list[float]]:
        """Do as `_embed_lists` does without blocking the event loop."""
        return await self._afinish(
            documents, role, lambda future: _to_lists(self._pipeline.finish(future))
        )

    async def _afinish(
        self,
        documents: Documents,
        role: Role,
        finish: Callable[[Future[NDArray[np.float32]]], _T],
    ) -> _T:
        submitting = call_in_thread(self._pipeline.submit, documents, role)
        try:
            future = await asyncio.wrap_future(submitting)
        except asyncio.CancelledError:  # a loop that ends with it would not come to do this
            submitting.add_done_callback(_cancel_submitted)
            raise
        await wait_until_done(future)
        if future.cancelled() or future.exception() or future.result().size <= SMALL:
            return finish(future)
        return await run_off_loop(finish, future)

    def stream(
        self, documents: Documents, role: Role = "document", batch_size: int = 1024
    ) -> Stream:
        """Return an iterator over the vectors of documents too many for memory.

        It yields what `embed` gives for `batch_size` documents at a time, in order, and reads the
        source as it goes: two more batches are computed while the caller is busy with one. What
        takes the vectors can read a twin of the source:

            texts, twin = itertools.tee(source)
            for vectors in embedder.stream(texts):
                store(list(itertools.islice(twin, len(vectors))), vectors)

        An error ends no stream: iterate on, with another `for` over the same object, for what comes
        after it. `close()`, or letting go of the object, cancels what has not started.

        Raises, while iterating:
            PartialResultError: some documents of a batch were refused or failed. The vectors of
                the others are on it, from position `offset`, and the errors by position in the
                stream. Iterate on for the next batch.
            RemoteError: a NIM failed at all of a batch, for one reason. Iterate on to try this
                batch again.
            Exception: what the source raised, after the vectors of all that it gave before.
            ConfigurationError, EngineClosedError: as with `embed`.
        """
        return Stream(self._pipeline, require_list(documents), role, batch_size)

    def astream(
        self,
        documents: Documents | AsyncIterable[str | EmbeddingInput],
        role: Role = "document",
        batch_size: int = 1024,
    ) -> AsyncStream:
        """Do as `stream` does without blocking the event loop; cancelling it closes the stream.

        What is no async iterable is read in a thread.
        """
        return AsyncStream(self._pipeline, require_list(documents), role, batch_size)

    @property
    def dimensions(self) -> int:
        """Length of a vector. Loads the model, or asks a NIM for one vector."""
        return self._pipeline.find_width()

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input that it takes; a NIM of a name that we do not know may take fewer.

        Loads the model.
        """
        return self._backend.modalities

    @property
    def description(self) -> str:
        """What runs where, and why. Loads the model."""
        return self._backend.description

    @property
    def usage(self) -> int:
        """Tokens that this object has embedded so far, prefixes and special tokens included."""
        return self._used.tokens

    def cache_key(self, role: Role) -> str:
        """Return a name for a cache of vectors: the same only where the vectors are.

        It covers weights, tokenizer, dtype, role, dimensions, truncation and number type. Give it
        to `CacheBackedEmbeddings` as `namespace`. Loads the model.

        Raises:
            CheckpointError: a file of the model was changed after it was loaded.
        """
        o = self.options
        parts = (role, self.dimensions, o.embedding_type, o.truncate, o.max_tokens)
        return "-".join(str(part) for part in (self._backend.fingerprint, *parts))

    def list_models(self) -> list[AvailableModel]:
        """Return the models that can be asked for: the catalogue's, or what the NIM serves.

        Raises:
            RemoteError: the NIM does not say.
        """
        if select_backend(self.options).base_url is None:
            return [AvailableModel(spec.name) for spec in CATALOGUE]
        backend = self._backend
        assert isinstance(backend, Remote)
        return backend.list_models()

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Load the model, or wait until the NIM says that it is ready.

        Raises:
            RequestTimeoutError: it did not say so within `timeout` seconds.
        """
        self._backend.wait_until_ready(timeout)

    def with_options(self, **changes: Any) -> Embedder:
        """Return an embedder on the same engine with other `dimensions`, `truncate` and the like.

        It counts its own `usage`, and works until the one that it came from is closed.

        Raises:
            ConfigurationError: an option that needs an engine of its own.
            pydantic.ValidationError: no such option, or not a value for it.
        """
        if fixed := changes.keys() & {*Options.names_of("routing", "engine", "local", "nim")}:
            raise ConfigurationError(
                f"{', '.join(sorted(fixed))} would need an engine of its own: make a new Embedder; "
                f"expected some of {', '.join(Options.names_of('request'))}"
            )
        sibling = Embedder.__new__(type(self))
        sibling._begin(self.options.replace(**changes), self._lease)
        return sibling

    def close(self, cancel: bool = False) -> None:
        """Let go of the model; further calls raise EngineClosedError.

        The last embedder of a model finishes what was accepted, or cancels what has not started,
        and frees the device.
        """
        if self._owns_lease:
            self._lease.close(cancel)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Embedder], tuple[Options]]:
        return type(self), (self.options,)

    def __repr__(self) -> str:
        return f"Embedder({self.options!r})"

    @property
    def _backend(self) -> Backend:
        return self._lease.backend


def _to_lists(array: NDArray[Any]) -> list[list[float]]:
    # Row by row, so that the interpreter can switch to another thread in between.
    return [row.tolist() for row in array]


def _cancel_submitted(submitting: Future[Future[Any]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
