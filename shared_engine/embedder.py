"""The way of a document to its vector. Read this first.

    embed(documents, role)
      validate ..... documents.py   every input is one the model takes, or an error with its index
      submit ....... local.py       tokenise ──► scheduler.py: steps ──► encoder.py: mean vectors
               or .. nim.py         batches ──► requests ──► replies that were checked
      finish ....... vectors.py     cut to `dimensions`, unit length, number type

The adapters for LangChain and LlamaIndex name a role, call this, and return lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterable
from concurrent.futures import CancelledError, Future
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shared_engine import vectors
from shared_engine.backend import Backend, Flow, Request
from shared_engine.documents import Document, Modality, Role, require_list, validate
from shared_engine.errors import (
    EngineClosedError,
    NonFiniteVectorError,
    PartialResultError,
    UnsupportedDimensionsError,
    combine_errors,
)
from shared_engine.options import Options
from shared_engine.registry import Lease
from shared_engine.stream import AsyncStream, Stream
from shared_engine.usage import TokenCount, counting
from shared_engine.wire import split_role_suffix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Documents = Iterable[str | Document]


class Embedder:
    """Embeds documents with the model and in the way that its options say.

    Making one is cheap: the model loads at first use. Safe to use from many threads and event
    loops. Pickles, copies and crosses a fork as its options; equal options share one loaded model.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self._lease: Lease | None = None
        self._closed = False
        self._width: int | None = None
        self._used = TokenCount()

    def embed(self, documents: Documents, role: Role = "document") -> NDArray[Any]:
        """Return one vector a document: (n, dimensions) float32 of unit length, in order.

        With `embedding_type` "int8" or "uint8" the values are of that type; "binary" (int8) and
        "ubinary" (uint8) pack eight to a byte. An empty text is embedded as its prefix alone.

        Raises:
            InputError: an input is of the wrong type or modality, or too long (`index` says
                which). Nothing was computed.
            PartialResultError: some inputs failed later; the vectors of the others are on it.
            RemoteError: a NIM refused or failed at all of them, for one reason.
            ConfigurationError: the options cannot work; raised at first use.
            EngineClosedError: `close` was called.
        """
        future = self._submit(documents, role)
        try:
            return self._finish(future.result())
        except CancelledError:
            raise EngineClosedError("the engine was closed before this work was done") from None
        except PartialResultError as exc:
            raise self._finish_partial(exc) from None
        finally:
            future.cancel()  # where we leave early, what has not started is dropped

    async def aembed(self, documents: Documents, role: Role = "document") -> NDArray[Any]:
        """Do as `embed` does without blocking the event loop; cancelling drops what waits."""
        loop = asyncio.get_running_loop()
        submitting = loop.run_in_executor(None, copy_context().run, self._submit, documents, role)
        try:
            future = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_drop)
            raise
        waiting = asyncio.wrap_future(future)
        try:
            return await loop.run_in_executor(None, self._finish, await waiting)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EngineClosedError("the engine was closed before this work was done") from None
        except PartialResultError as exc:
            raise self._finish_partial(exc) from None

    def embed_lists(self, documents: Documents, role: Role = "document") -> list[list[float]]:
        """Return what `embed` does as plain lists, which the frameworks want."""
        return _lists(self.embed(documents, role))

    async def aembed_lists(
        self, documents: Documents, role: Role = "document"
    ) -> list[list[float]]:
        """Do as `embed_lists` does without blocking the event loop."""
        return await asyncio.to_thread(_lists, await self.aembed(documents, role))

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
        return Stream(self, require_list(documents), role, batch_size)

    def astream(
        self,
        documents: Documents | AsyncIterable[str | Document],
        role: Role = "document",
        batch_size: int = 1024,
    ) -> AsyncStream:
        """Do as `stream` does without blocking the event loop; cancelling it closes the stream.

        What is no async iterable is read in a thread.
        """
        return AsyncStream(self, require_list(documents), role, batch_size)

    @property
    def dimensions(self) -> int:
        """Length of a vector. Loads the model, or asks a NIM for one vector."""
        if self.options.dimensions is not None:
            return self.options.dimensions
        if offered := self._backend.dimensions:
            return offered[-1]
        if self._width is None:
            _, role = split_role_suffix(self.options.model)
            probe = Request([Document("?")], role or "query")
            self._width = self._backend.submit(probe).result().shape[1]
        return self._width

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
        """
        o = self.options
        parts = (role, self.dimensions, o.embedding_type, o.truncate, o.max_tokens)
        return "-".join(str(part) for part in (self._backend.fingerprint, *parts))

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Load the model, or wait until the NIM says that it is ready.

        Raises:
            RequestTimeoutError: it did not say so within `timeout` seconds.
        """
        self._backend.wait_until_ready(timeout)

    def close(self, cancel: bool = False) -> None:
        """Let go of the model; further calls raise EngineClosedError.

        The last embedder of a model finishes what was accepted, or cancels what has not started,
        and frees the device.
        """
        self._closed = True
        lease, self._lease = self._lease, None
        if lease is not None and not lease.foreign:
            lease.close(cancel)

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
        if self._closed:
            raise EngineClosedError("this Embedder was closed; make a new one")
        if self._lease is None or self._lease.foreign:
            self._lease = Lease(self.options)
            self._used = TokenCount()  # after a fork, the parent's lock may be held for ever
        return self._lease.backend

    def _submit(
        self,
        documents: Documents,
        role: Role,
        flow: Flow | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> Future[NDArray[np.float32]]:
        backend = self._backend
        wanted = self.options.dimensions
        offered = backend.dimensions
        if wanted is not None and offered and wanted not in offered:
            raise UnsupportedDimensionsError(
                f"dimensions={wanted}, but {self.options.model} offers "
                f"{', '.join(map(str, offered))}. For a folder or Hugging Face id, give "
                "the catalogue's name as `model` and the folder as `checkpoint`"
            )
        valid = validate(documents, role, backend.modalities)
        count = partial(_add, (self._used, *counting()))
        request = Request(valid, role, wanted, self.options.truncate, on_progress, count, flow)
        if on_progress or not self.options.show_progress:
            return backend.submit(request)
        from tqdm.auto import tqdm

        bar = tqdm(total=len(valid), unit="doc")

        def advance(count: int) -> None:
            bar.update(count)
            if bar.n >= len(valid):  # before the caller has the result, so that no line comes late
                bar.close()

        try:
            future = backend.submit(replace(request, on_progress=advance))
        except BaseException:
            bar.close()
            raise
        future.add_done_callback(lambda _: bar.close())
        return future

    def _finish(self, pooled: NDArray[np.float32]) -> NDArray[Any]:
        import numpy as np

        out = vectors.unit(pooled)
        bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
        if bad.size:
            out[bad] = np.nan
            error = NonFiniteVectorError(
                'gave a vector with NaN or infinity; try dtype="bfloat16" or "float32"'
            )
            raise combine_errors(out, dict.fromkeys(bad.tolist(), error))
        return vectors.quantize(out, self.options.embedding_type)

    def _finish_partial(self, error: PartialResultError) -> PartialResultError:
        error.vectors = vectors.unit(error.vectors)
        return error


def _add(counts: tuple[TokenCount, ...], tokens: int) -> None:
    for count in counts:
        count.add(tokens)


def _lists(array: NDArray[Any]) -> list[list[float]]:
    # Row by row, so that the interpreter can switch to another thread in between.
    return [row.tolist() for row in array]


def _drop(submitting: asyncio.Future[Future[Any]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
