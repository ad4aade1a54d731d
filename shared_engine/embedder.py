"""The way of a document to its vector. Read this first.

    embed(documents, role)
      checked ...... documents.py   every input is one the model takes, or an error with its index
      submit ....... local.py       tokenise ──► scheduler.py: steps ──► encoder.py: mean vectors
      finish ....... vectors.py     cut to `dimensions`, unit length, number type

The adapters for LangChain and LlamaIndex name a role, call this, and return lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_engine import vectors
from shared_engine.backend import Backend, Request
from shared_engine.documents import Document, Role, checked
from shared_engine.engines import Lease
from shared_engine.errors import (
    EngineClosedError,
    NeMoRetrieverError,
    NonFiniteVectorError,
    PartialResultError,
    UnsupportedDimensionsError,
)
from shared_engine.options import Options
from shared_engine.scheduler import failure

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

    def embed(self, documents: Documents, role: Role = "document") -> NDArray[Any]:
        """Return one vector a document: (n, dimensions) float32 of unit length, in order.

        With `embedding_type` "int8" or "uint8" the values are of that type; "binary" (int8) and
        "ubinary" (uint8) pack eight to a byte. An empty text is embedded as its prefix alone.

        Raises:
            InputError: an input is of the wrong type or modality, or too long (`index` says
                which). Nothing was computed.
            PartialResultError: some inputs failed later; the vectors of the others are on it.
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
        submitting = loop.run_in_executor(None, self._submit, documents, role)
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

    @property
    def dimensions(self) -> int:
        """Length of a vector. Loads the model."""
        return self.options.dimensions or self._backend.dimensions[-1]

    @property
    def description(self) -> str:
        """What runs where, and why. Loads the model."""
        return self._backend.description

    def cache_key(self, role: Role) -> str:
        """Return a name for a cache of vectors: the same only where the vectors are.

        It covers weights, tokenizer, dtype, role, dimensions, truncation and number type. Give it
        to `CacheBackedEmbeddings` as `namespace`. Loads the model.
        """
        o = self.options
        parts = (role, self.dimensions, o.embedding_type, o.truncate, o.max_tokens)
        return "-".join(str(part) for part in (self._backend.fingerprint, *parts))

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
        return self._lease.backend

    def _submit(self, documents: Documents, role: Role) -> Future[NDArray[np.float32]]:
        backend = self._backend
        wanted = self.options.dimensions
        if wanted is not None and wanted not in backend.dimensions:
            raise UnsupportedDimensionsError(
                f"dimensions={wanted}, but {self.options.model} offers "
                f"{', '.join(map(str, backend.dimensions))}. For a folder or Hugging Face id, give "
                "the catalogue's name as `model` and the folder as `checkpoint`"
            )
        valid = checked(documents, backend.modalities)
        if not self.options.show_progress:
            return backend.submit(Request(valid, role, wanted, self.options.truncate))
        from tqdm.auto import tqdm

        bar = tqdm(total=len(valid), unit="doc")
        try:
            future = backend.submit(Request(valid, role, wanted, self.options.truncate, bar.update))
        except BaseException:
            bar.close()
            raise
        future.add_done_callback(lambda _: bar.close())
        return future

    def _finish(self, pooled: NDArray[np.float32]) -> NDArray[Any]:
        out = vectors.unit(pooled)
        bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
        if bad.size:
            out[bad] = np.nan
            errors: dict[int, NeMoRetrieverError] = {row: _non_finite(row) for row in bad.tolist()}
            raise failure(out, errors) or AssertionError
        return vectors.quantize(out, self.options.embedding_type)

    def _finish_partial(self, error: PartialResultError) -> PartialResultError:
        error.vectors = vectors.unit(error.vectors)
        return error


def _non_finite(row: int) -> NonFiniteVectorError:
    return NonFiniteVectorError(
        f'the vector of input {row} holds NaN or infinity; try dtype="bfloat16" or "float32"',
        index=row,
    )


def _lists(array: NDArray[Any]) -> list[list[float]]:
    # Row by row, so that the interpreter can switch to another thread in between.
    return [row.tolist() for row in array]


def _drop(submitting: asyncio.Future[Future[Any]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
