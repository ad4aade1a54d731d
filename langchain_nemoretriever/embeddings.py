"""`NeMoRetrieverEmbeddings`: a LangChain `Embeddings` on the shared engine."""

from __future__ import annotations

from shared_engine.adapter import Adapter
from shared_engine.errors import MissingExtraError

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as exc:
    raise MissingExtraError(
        f"langchain_nemoretriever needs {exc.name!r}: "
        "pip install 'nemoretriever-embeddings[langchain]'"
    ) from exc


class NeMoRetrieverEmbeddings(Adapter, Embeddings):
    """Embeds texts and queries for LangChain; takes the fields of `shared_engine.Options`.

    `embedder.embed(...)` gives float32 arrays where lists are too slow.
    """

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector a text, in order."""
        return self.embedder.embed_lists(texts, "document")

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return self.embedder.embed_lists([text], "query")[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector a text, in order."""
        return await self.embedder.aembed_lists(texts, "document")

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return (await self.embedder.aembed_lists([text], "query"))[0]
