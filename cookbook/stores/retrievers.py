"""Retrievers for stores that a framework has no maintained class for.

Of a `search` that takes a vector and a number, and returns texts, metadata and scores, best first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableLambda
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding

Search = Callable[[np.ndarray, int], list[tuple[str, dict[str, Any], float]]]


def for_langchain(
    search: Search, embeddings: NeMoRetrieverEmbeddings, k: int = 4
) -> Runnable[str, list[Document]]:
    """Return what a chain takes for a retriever: a question in, documents out.

    The score is in the metadata, unless the files have a column `score`.
    """

    def retrieve(question: str) -> list[Document]:
        (vector,) = embeddings.embedder.embed([question], "query")
        found = search(vector, k)
        return [Document(text, metadata={"score": score} | data) for text, data, score in found]

    return RunnableLambda(retrieve)


class StoreRetriever(BaseRetriever):
    """The same for LlamaIndex's query engines."""

    def __init__(self, search: Search, embed_model: NeMoRetrieverEmbedding, k: int = 4) -> None:
        super().__init__()
        self._search, self._embed_model, self._k = search, embed_model, k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        (vector,) = self._embed_model.embedder.embed([query_bundle.query_str], "query")
        found = self._search(vector, self._k)
        return [
            NodeWithScore(node=TextNode(text=text, metadata=data), score=score)
            for text, data, score in found
        ]
