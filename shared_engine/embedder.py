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

from collections.abc import AsyncIterable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from shared_engine.backend import Rows
from shared_engine.documents import EmbeddingInput, Role, require_list
from shared_engine.errors import ConfigurationError
from shared_engine.model import Model
from shared_engine.options import Options
from shared_engine.pipeline import Documents, EmbeddingPipeline
from shared_engine.stream import AsyncStream, Stream
from shared_engine.threads import result_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Embedder(Model[Options]):
    """Embeds documents with one model, in this process or at a NIM.

    Creating one is cheap: the model loads at first use. Safe to use from many threads and event
    loops. Pickles, copies and forks carry the options; equal options share one loaded model.
    """

    _options_type = Options
    _pipeline_type = EmbeddingPipeline
    _pipeline: EmbeddingPipeline

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
        return await self._await(partial(self._pipeline.submit, documents, role), self._unwrap)

    def _embed_lists(
        self,
        documents: Documents,
        role: Role = "document",
        data_urls: bool = False,
        show_progress: bool = False,
    ) -> list[list[float]]:
        """Embed documents and return plain lists, which the frameworks expect."""
        future = self._pipeline.submit(documents, role, data_urls, show_progress)
        return _to_lists(self._unwrap(result_of(future)))

    async def _aembed_lists(
        self,
        documents: Documents,
        role: Role = "document",
        data_urls: bool = False,
        show_progress: bool = False,
    ) -> list[list[float]]:
        def convert(rows: Rows) -> list[list[float]]:
            return _to_lists(self._unwrap(rows))

        submit = partial(self._pipeline.submit, documents, role, data_urls, show_progress)
        return await self._await(submit, convert)

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
        return Stream(self._pipeline, iter(require_list(documents)), role, batch_size, convert)

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
        documents = require_list(documents)
        source = aiter(documents) if isinstance(documents, AsyncIterable) else iter(documents)
        return AsyncStream(self._pipeline, source, role, batch_size, convert)

    @property
    def dimensions(self) -> int:
        """Length of a vector. Loads the model, or asks a server for one vector."""
        return self._pipeline.find_width()

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


def _convert_for(errors: str) -> Callable[[Rows], Any]:
    """Return the function from `Rows` to the items of a stream."""
    if errors == "raise":
        return Rows.unwrap
    if errors == "return":
        return lambda rows: rows
    raise ConfigurationError(f'errors={errors!r}: expected "raise" or "return"')


def _to_lists(array: NDArray[Any]) -> list[list[float]]:
    # Row by row, so that the interpreter can switch to another thread in between.
    return [row.tolist() for row in array]
