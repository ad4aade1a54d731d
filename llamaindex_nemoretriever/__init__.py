"""NVIDIA NeMo Retriever embeddings for LlamaIndex."""

from llamaindex_nemoretriever.embedding import NeMoRetrieverEmbedding

__all__ = ["NeMoRetrieverEmbedding"]
