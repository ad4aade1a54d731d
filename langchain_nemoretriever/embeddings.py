"""`NeMoRetrieverEmbeddings`: a LangChain `Embeddings` on the shared engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared_engine.adapter import Adapter
from shared_engine.documents import EmbeddingInput, pair_with_images, wrap_images
from shared_engine.errors import MissingExtraError

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as exc:
    raise MissingExtraError(
        f"langchain_nemoretriever needs {exc.name!r}: "
        "pip install 'nemoretriever-embeddings[langchain]'"
    ) from exc


class NeMoRetrieverEmbeddings(Adapter, Embeddings):
    """Embeds texts, images and queries for LangChain; takes the fields of `shared_engine.Options`.

    An image is a path, a file:// or data: URL, base64, bytes, a binary file or a Pillow image.
    `embedder.embed(...)` gives float32 arrays where lists are too slow.

    Every method raises, synchronous or not:
        InputError: an input is of the wrong type or modality (`index` says which), and nothing was
            computed; or the only input is too long, or its image cannot be used.
        PartialResultError: some of several inputs failed: `errors` by index, and the `vectors` of
            the others.
        RemoteError: a NIM refused or failed at all of them.
        ConfigurationError: the options cannot work; at first use.
        EngineClosedError: `embedder.close()` was called.
    """

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector per text, in order.

        A text that is a data URL of an image from its first character to its last is taken for that
        image, as in NVIDIA's sample, where the model takes images.
        """
        return self.embedder._embed_lists(texts, "document", data_urls=True)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return self.embedder._embed_lists([text], "query")[0]

    def embed_image(self, uris: Sequence[Any]) -> list[list[float]]:
        """Return one vector per image, in order; the vector stores call it so."""
        return self.embedder._embed_lists(wrap_images(uris), "document")

    def embed_text_image(self, texts: Sequence[str], images: Sequence[Any]) -> list[list[float]]:
        """Return one vector for each text together with its image, in order."""
        return self.embedder._embed_lists(pair_with_images(texts, images), "document")

    def embed_mixed(self, documents: Sequence[str | EmbeddingInput]) -> list[list[float]]:
        """Return one vector for each text, image, or both as one `shared_engine.EmbeddingInput`."""
        return self.embedder._embed_lists(documents, "document")

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Do as `embed_documents` does."""
        return await self.embedder._aembed_lists(texts, "document", data_urls=True)

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return (await self.embedder._aembed_lists([text], "query"))[0]

    async def aembed_image(self, uris: Sequence[Any]) -> list[list[float]]:
        """Do as `embed_image` does."""
        return await self.embedder._aembed_lists(wrap_images(uris), "document")

    async def aembed_text_image(
        self, texts: Sequence[str], images: Sequence[Any]
    ) -> list[list[float]]:
        """Do as `embed_text_image` does."""
        return await self.embedder._aembed_lists(pair_with_images(texts, images), "document")

    async def aembed_mixed(self, documents: Sequence[str | EmbeddingInput]) -> list[list[float]]:
        """Do as `embed_mixed` does."""
        return await self.embedder._aembed_lists(documents, "document")
