"""`NeMoRetrieverEmbedding`: a LlamaIndex `MultiModalEmbedding` on the shared engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index.core.schema import BaseNode, ImageType
from llama_index_instrumentation import get_dispatcher
from pydantic import ConfigDict, Field, model_validator

from llamaindex_nemoretriever.nodes import list_inputs
from shared_engine import images
from shared_engine.adapter import EmbeddingAdapter
from shared_engine.documents import EmbeddingInput, wrap_images
from shared_engine.threads import run_off_loop

dispatcher = get_dispatcher(__name__)


class NeMoRetrieverEmbedding(EmbeddingAdapter, MultiModalEmbedding):
    """Embeds texts, images and queries for LlamaIndex; takes the fields of `shared_engine.Options`.

    An image is a path, a `file://` or `data:` URL, base64, or a BytesIO. In an `IngestionPipeline`
    a node with image and text gets one vector of both. The cache identifies nodes by text and by
    metadata: give images metadata that differ, or pass `disable_cache=True` to the pipeline.

    `model_name` is an alias of `model`. `embedder.embed(...)` returns float32 arrays, which are
    faster than lists. `embeddings_cache` applies to documents only: LlamaIndex's key is the text
    alone, so a query would get the vector of a document with the same words.

    Every method raises the errors of `Embedder.embed`: an `InputError` has the position of its
    input as `index`, a `PartialResultError` has the vectors of the other inputs.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    model_name: str = Field(default="", description="Alias of `model`.")
    embed_batch_size: int = Field(
        default=2048,
        gt=0,
        le=2048,
        description="Texts per call of the engine, which forms its own batches by tokens.",
    )

    if not TYPE_CHECKING:  # as in `EngineOptions`

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__("model" if name == "model_name" else name, value)

    @model_validator(mode="before")
    @classmethod
    def _model_from_model_name(cls, data: Any) -> Any:
        return _one_model(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _model_name_from_model(self) -> NeMoRetrieverEmbedding:
        vars(self)["model_name"] = self.model or ""
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy as pydantic does; `model_name` in `update` sets `model`."""
        copy = super().model_copy(update=update and _one_model(dict(update)), deep=deep)
        vars(copy)["model_name"] = copy.model or ""
        return copy

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises this class under."""
        return "NeMoRetrieverEmbedding"

    def to_payload(self) -> dict[str, Any]:
        """Return the description of this model in events; LlamaIndex uses it since 0.14.23."""
        return {
            "class_name": self.class_name(),
            "model_name": self.embedder.model or "unknown",  # before a NIM has named it
            "embed_batch_size": self.embed_batch_size,
        }

    def get_query_embedding(self, query: str) -> Embedding:
        """Embed a query; never from the cache."""
        return MultiModalEmbedding.get_query_embedding(self._uncached(), query)

    async def aget_query_embedding(self, query: str) -> Embedding:
        """Embed a query; never from the cache."""
        return await MultiModalEmbedding.aget_query_embedding(self._uncached(), query)

    def _uncached(self) -> NeMoRetrieverEmbedding:
        if self.embeddings_cache is None:
            return self
        return self.model_copy(update={"embeddings_cache": None})

    def _get_query_embedding(self, query: str) -> Embedding:
        return self.embedder._embed_lists([query], "query")[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self.embedder._aembed_lists([query], "query"))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self.embedder._embed_lists(texts, "document")

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self.embedder._aembed_lists(texts, "document")

    def get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        """Embed an image."""
        return self._embed([EmbeddingInput(image=img_file_path)])[0]

    async def aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        """Embed an image."""
        return (await self._aembed([EmbeddingInput(image=img_file_path)]))[0]

    def get_image_embedding_batch(
        self, img_file_paths: list[ImageType], show_progress: bool = False
    ) -> list[Embedding]:
        """Embed images and return one vector per image, in order."""
        return self._embed(wrap_images(img_file_paths), show_progress)

    async def aget_image_embedding_batch(
        self, img_file_paths: list[ImageType], show_progress: bool = False
    ) -> list[Embedding]:
        """Embed images and return one vector per image, in order."""
        return await self._aembed(wrap_images(img_file_paths), show_progress)

    # Abstract in the base class, whose own public methods would put the images into events.
    _get_image_embedding = get_image_embedding
    _aget_image_embedding = aget_image_embedding

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Set the vector of each node: of its text, its image, or both.

        A text model embeds the text of an image node. With images, `embeddings_cache` is not used.
        """
        documents = self._documents(nodes)
        if not documents:
            return super().__call__(nodes, **kwargs)
        return _with_vectors(nodes, self._embed(documents))

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Set the vector of each node; see `__call__`."""
        documents = await run_off_loop(self._documents, nodes)
        if not documents:
            return await super().acall(nodes, **kwargs)
        return _with_vectors(nodes, await self._aembed(documents))

    def _documents(self, nodes: Sequence[BaseNode]) -> list[EmbeddingInput]:
        """Return the inputs of the nodes; empty if no node has an image."""
        documents = list_inputs(nodes)
        if all(document.image is None for document in documents):
            return []
        return self._drop_images(documents)

    @dispatcher.span
    def _embed(
        self, documents: list[EmbeddingInput], show_progress: bool = False
    ) -> list[Embedding]:
        with self._announced(documents) as embeddings:
            if (limiter := self._limiter) is not None:
                limiter.acquire()
            vectors = self.embedder._embed_lists(documents, show_progress=show_progress)
            embeddings.extend(vectors)
        return embeddings

    @dispatcher.span
    async def _aembed(
        self, documents: list[EmbeddingInput], show_progress: bool = False
    ) -> list[Embedding]:
        with self._announced(documents) as embeddings:
            if (limiter := self._limiter) is not None:
                await limiter.async_acquire()
            vectors = await self.embedder._aembed_lists(documents, show_progress=show_progress)
            embeddings.extend(vectors)
        return embeddings

    @property
    def _limiter(self) -> Any:
        return getattr(self, "rate_limiter", None)  # since LlamaIndex 0.14.16

    @contextmanager
    def _announced(self, documents: list[EmbeddingInput]) -> Iterator[list[Embedding]]:
        """Send LlamaIndex's events for texts around a call; events describe images by name."""
        model = self.to_payload()
        dispatcher.event(EmbeddingStartEvent(model_dict=model))
        payload: dict[str, Any] = {EventPayload.SERIALIZED: model}
        with self.callback_manager.event(CBEventType.EMBEDDING, payload) as event:
            embeddings: list[Embedding] = []
            yield embeddings
            chunks = [
                f"<image {images.describe(document.image)}>"
                if document.text is None
                else document.text
                for document in documents
            ]
            event.on_end({EventPayload.CHUNKS: chunks, EventPayload.EMBEDDINGS: embeddings})
        dispatcher.event(EmbeddingEndEvent(chunks=chunks, embeddings=embeddings))


def _one_model(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with `model` set from `model_name`."""
    if not (name := options.get("model_name")):
        return options
    if options.get("model") not in (None, name):
        raise ValueError("model= and model_name= are one option; pass only model=")
    return {**options, "model": name}


def _with_vectors(nodes: Sequence[BaseNode], vectors: list[Embedding]) -> Sequence[BaseNode]:
    for node, vector in zip(nodes, vectors, strict=True):
        node.embedding = vector
    return nodes
