"""Into Chroma, in a folder or on a server.

Ids are texts there and metadata hold no nulls; lists and structs become JSON. It takes a bounded
number of rows at once (`client.get_max_batch_size()`), and scales vectors to unit length once more:
each value changes by at most 5e-7 of itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chromadb import Collection
from chromadb.api import ClientAPI
from langchain_chroma import Chroma
from llama_index.core import VectorStoreIndex
from llama_index.vector_stores.chroma import ChromaVectorStore

from cookbook.stores.rows import open_rows, read_batches
from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding


def load(folder: Path, client: ClientAPI, name: str = "passages") -> Collection:
    """Put all rows of `folder/vectors` into a collection."""
    rows = open_rows(folder)
    collection = client.get_or_create_collection(
        name, configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    for vectors, kept in read_batches(rows):
        collection.upsert(
            ids=[str(row["id"]) for row in kept],
            embeddings=vectors,
            documents=[row.pop("text") for row in kept],
            # A null removes the value of an earlier load.
            metadatas=[{name: _flatten(value) for name, value in row.items()} for row in kept],
        )
    return collection


def _flatten(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def for_langchain(
    client: ClientAPI, embeddings: NeMoRetrieverEmbeddings, name: str = "passages"
) -> Chroma:
    """Return the collection as LangChain's store."""
    return Chroma(name, embeddings, client=client)


def for_llamaindex(collection: Collection, embed_model: NeMoRetrieverEmbedding) -> VectorStoreIndex:
    """Return the collection as LlamaIndex's index; the id is `node_id`, not among the metadata."""
    store = ChromaVectorStore(chroma_collection=collection)
    return VectorStoreIndex.from_vector_store(store, embed_model)
