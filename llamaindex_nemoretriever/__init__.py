"""NVIDIA NeMo Retriever models for LlamaIndex, loaded when they are first used."""

from typing import TYPE_CHECKING

from shared_engine._lazy import attach

__all__ = ["NeMoRetrieverEmbedding", "NeMoRetrieverRerank"]

if TYPE_CHECKING:
    from llamaindex_nemoretriever.embedding import NeMoRetrieverEmbedding
    from llamaindex_nemoretriever.rerank import NeMoRetrieverRerank
else:
    __getattr__, __dir__ = attach(
        __name__,
        {"embedding": ("NeMoRetrieverEmbedding",), "rerank": ("NeMoRetrieverRerank",)},
        extra="llamaindex",
    )
