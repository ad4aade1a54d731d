"""`NeMoRetrieverEmbedding`: a LlamaIndex `MultiModalEmbedding` on the shared engine."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from shared_engine.adapter import Adapter
from shared_engine.documents import Document
from shared_engine.errors import MissingExtraError

try:
    from llama_index.core.base.embeddings.base import Embedding
    from llama_index.core.embeddings import MultiModalEmbedding
    from llama_index.core.schema import ImageType
except ModuleNotFoundError as exc:
    raise MissingExtraError(
        f"llamaindex_nemoretriever needs {exc.name!r}: "
        "pip install 'nemoretriever-embeddings[llamaindex]'"
    ) from exc


class NeMoRetrieverEmbedding(Adapter, MultiModalEmbedding):
    """Embeds texts and queries for LlamaIndex; takes the fields of `shared_engine.Options` too.

    `model_name` is `model`. `embedder.embed(...)` gives float32 arrays where lists are too slow.
    With `embeddings_cache`, texts are cached and queries are not: LlamaIndex keys its cache on the
    bare text, so a query would get the vector of a document with the same words.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    embed_batch_size: int = Field(
        default=2048,
        gt=0,
        le=2048,
        description="Texts handed to the engine at once; it forms its own steps by tokens.",
    )

    @model_validator(mode="before")
    @classmethod
    def _model_from_model_name(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("model_name") is None:
            return data
        if data.get("model", data["model_name"]) != data["model_name"]:
            raise ValueError("model and model_name are one option; give `model` alone")
        return {**data, "model": data["model_name"]}

    @model_validator(mode="after")
    def _model_name_from_model(self) -> NeMoRetrieverEmbedding:
        self.model_name = self.model
        return self

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises this class under."""
        return "NeMoRetrieverEmbedding"

    def get_query_embedding(self, query: str) -> Embedding:
        """Return the vector of a query; never from the cache."""
        return MultiModalEmbedding.get_query_embedding(self._uncached(), query)

    async def aget_query_embedding(self, query: str) -> Embedding:
        """Return the vector of a query; never from the cache."""
        return await MultiModalEmbedding.aget_query_embedding(self._uncached(), query)

    def _uncached(self) -> NeMoRetrieverEmbedding:
        if self.embeddings_cache is None:
            return self
        _ = self.embedder  # made here, so that the copy shares it
        return self.model_copy(update={"embeddings_cache": None})

    def _get_query_embedding(self, query: str) -> Embedding:
        return self.embedder.embed_lists([query], "query")[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self.embedder.aembed_lists([query], "query"))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self.embedder.embed_lists(texts, "document")

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self.embedder.aembed_lists(texts, "document")

    def _get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    async def _aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return (await self._aget_image_embeddings([img_file_path]))[0]

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return self.embedder.embed_lists([Document(image=i) for i in img_file_paths], "document")

    async def _aget_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        images = [Document(image=image) for image in img_file_paths]
        return await self.embedder.aembed_lists(images, "document")
