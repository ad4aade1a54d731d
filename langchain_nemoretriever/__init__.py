"""NVIDIA NeMo Retriever embeddings for LangChain."""

from langchain_nemoretriever.embeddings import NeMoRetrieverEmbeddings

__all__ = ["NeMoRetrieverEmbeddings"]
