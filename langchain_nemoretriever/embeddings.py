"""`NeMoRetrieverEmbeddings`: a LangChain `Embeddings` on the shared engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.embeddings import Embeddings

from langchain_nemoretriever.serializing import SerializableOptions
from shared_engine.adapter import EmbeddingAdapter
from shared_engine.documents import EmbeddingInput, pair_with_images, wrap_images


class NeMoRetrieverEmbeddings(EmbeddingAdapter, Embeddings, SerializableOptions):
    """Embeds texts, images and queries for LangChain; takes the fields of `shared_engine.Options`.

    An image is a path, a `file://` or `data:` URL, base64, bytes, a binary file or a Pillow image.
    `embedder.embed(...)` returns float32 arrays, which are faster than lists. LangChain's `dumps`
    writes the options without key, headers and proxy; `loads` takes the key from NVIDIA_API_KEY.

    Every method raises the errors of `Embedder.embed`: an `InputError` has the position of its
    input as `index`, a `PartialResultError` has the vectors of the other inputs.
    """

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents and return one vector per text, in order.

        If the model takes images, a text that is the data URL of an image, from its first character
        to its last, is embedded as that image, as in NVIDIA's sample.
        """
        return self.embedder._embed_lists(texts, "document", data_urls=True)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        return self.embedder._embed_lists([text], "query")[0]

    def embed_image(self, uris: Sequence[Any]) -> list[list[float]]:
        """Embed images and return one vector per image, in order; vector stores call this."""
        return self.embedder._embed_lists(wrap_images(uris), "document")

    def embed_text_image(self, texts: Sequence[str], images: Sequence[Any]) -> list[list[float]]:
        """Embed each text together with its image, in order."""
        return self.embedder._embed_lists(pair_with_images(texts, images), "document")

    def embed_mixed(self, documents: Sequence[str | EmbeddingInput]) -> list[list[float]]:
        """Embed texts, and `EmbeddingInput`s of an image, or of a text with an image, in order."""
        return self.embedder._embed_lists(documents, "document")

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents; see `embed_documents`."""
        return await self.embedder._aembed_lists(texts, "document", data_urls=True)

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query."""
        return (await self.embedder._aembed_lists([text], "query"))[0]

    async def aembed_image(self, uris: Sequence[Any]) -> list[list[float]]:
        """Embed images; see `embed_image`."""
        return await self.embedder._aembed_lists(wrap_images(uris), "document")

    async def aembed_text_image(
        self, texts: Sequence[str], images: Sequence[Any]
    ) -> list[list[float]]:
        """Embed each text together with its image; see `embed_text_image`."""
        return await self.embedder._aembed_lists(pair_with_images(texts, images), "document")

    async def aembed_mixed(self, documents: Sequence[str | EmbeddingInput]) -> list[list[float]]:
        """Embed texts, images and both; see `embed_mixed`."""
        return await self.embedder._aembed_lists(documents, "document")
