"""`NeMoRetrieverRerank`: a LangChain document compressor and cross-encoder on the shared engine."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field

from langchain_nemoretriever.serializing import SerializableOptions
from shared_engine.adapter import RerankAdapter
from shared_engine.documents import EmbeddingInput
from shared_engine.reranker import RankedDocument


class NeMoRetrieverRerank(
    RerankAdapter, BaseDocumentCompressor, BaseCrossEncoder, SerializableOptions
):
    """Reranks documents for LangChain; takes the fields of `shared_engine.RerankOptions`.

    A document is its `page_content`, together with the image in its metadata if it has one: a path,
    a `file://` or `data:` URL, base64, or bytes. A text model ignores the image of a document that
    has a text.

    `reranker.score(...)` returns all scores as a float32 array. LangChain's `dumps` writes the
    options without key, headers and proxy; `loads` takes the key from NVIDIA_API_KEY.

    Every method raises the errors of `Reranker.score`: an `InputError` has the position of its
    document as `index`, a `PartialResultError` has the scores of the others.
    """

    score_threshold: float | None = Field(
        default=None,
        description="Minimum score of a document to return: a logit or a probability, as "
        "`reranker.score_kind` is. None returns documents of any score.",
    )
    image_key: str = Field(
        default="image", description="Key of the metadata that holds the image of a document."
    )

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return copies of the best `top_n` documents, by descending score.

        The metadata of each copy has its score as `relevance_score`.
        """
        return self._select(documents, self._rank(query, self._list_inputs(documents)))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents; see `compress_documents`."""
        return self._select(documents, await self._arank(query, self._list_inputs(documents)))

    def score(self, text_pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Score pairs of a query and a text, in order; `CrossEncoderReranker` calls this.

        `index` in an error is the position of the pair.
        """
        return self.reranker._score_pairs(text_pairs) if text_pairs else []

    def _list_inputs(self, documents: Sequence[Document]) -> list[EmbeddingInput]:
        return [
            EmbeddingInput(each.page_content, each.metadata.get(self.image_key) or None)
            for each in documents
        ]

    def _select(
        self, documents: Sequence[Document], ranking: list[RankedDocument]
    ) -> list[Document]:
        minimum = float("-inf") if self.score_threshold is None else self.score_threshold
        return [
            documents[index].model_copy(
                update={"metadata": {**documents[index].metadata, "relevance_score": score}}
            )
            for index, score in ranking
            if score >= minimum
        ]
