"""NVIDIA NeMo Retriever models for LangChain, loaded when they are first used."""

from typing import TYPE_CHECKING

from shared_engine._lazy import attach

__all__ = ["NeMoRetrieverEmbeddings", "NeMoRetrieverRerank"]

if TYPE_CHECKING:
    from langchain_nemoretriever.embeddings import NeMoRetrieverEmbeddings
    from langchain_nemoretriever.rerank import NeMoRetrieverRerank
else:
    __getattr__, __dir__ = attach(
        __name__,
        {"embeddings": ("NeMoRetrieverEmbeddings",), "rerank": ("NeMoRetrieverRerank",)},
        extra="langchain",
    )
