"""Into Chroma, in a folder or on a server.

Ids are texts there and metadata hold no nulls or lists. It takes a bounded number of rows at once
(`client.get_max_batch_size()`).
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
from chromadb import Collection
from chromadb.api import ClientAPI
from langchain_chroma import Chroma
from llama_index.core import VectorStoreIndex
from llama_index.vector_stores.chroma import ChromaVectorStore

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding


def load(folder: Path, client: ClientAPI, name: str = "passages") -> Collection:
    """Put all rows of `folder/vectors` into a collection."""
    collection = client.get_or_create_collection(
        name, configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    for batch in ds.dataset(folder / "vectors").to_batches(batch_size=1024):
        kept = batch.drop_columns(["vector", "text"]).to_pylist()
        collection.upsert(
            ids=[str(row["id"]) for row in kept],
            embeddings=batch["vector"].flatten().to_numpy().reshape(len(batch), -1),
            documents=batch["text"].to_pylist(),
            metadatas=[{k: v for k, v in row.items() if v is not None} for row in kept],
        )
    return collection


def for_langchain(
    client: ClientAPI, embeddings: NeMoRetrieverEmbeddings, name: str = "passages"
) -> Chroma:
    """Return the collection as LangChain's store."""
    return Chroma(name, embeddings, client=client)


def for_llamaindex(collection: Collection, embed_model: NeMoRetrieverEmbedding) -> VectorStoreIndex:
    """Return the collection as LlamaIndex's index; the id is `node_id`, not among the metadata."""
    store = ChromaVectorStore(chroma_collection=collection)
    return VectorStoreIndex.from_vector_store(store, embed_model)
