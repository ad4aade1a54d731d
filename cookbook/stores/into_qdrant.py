"""Into Qdrant: in a folder, or on a server with `QdrantClient(url=...)`.

Ids must be integers or UUIDs there, so a row's id becomes the UUID of its text, and is kept as
metadata. Vectors are scaled to unit length once more there: each value changes by at most 5e-7 of
itself. `QdrantClient(path=...)` keeps all in memory and compares with every vector: for a server,
`upload_collection(..., parallel=4)` fills it from four processes.

With `is_binary=True` a server compares one bit of each value, in memory, and reads full vectors for
the candidates only, from its disk. Searches need `search_params=RESCORE`: in `similarity_search` of
LangChain's store, and in `as_retriever(vector_store_kwargs=...)` of LlamaIndex's index.
Of the ten nearest rows 0.46 are found without it and 0.88 with it, as
tests/cookbook/test_binary_first.py measures. `QdrantClient(path=...)` ignores both, with a warning.
"""

from __future__ import annotations

from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

from langchain_qdrant import QdrantVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.vector_stores.qdrant import QdrantVectorStore as QdrantStore
from qdrant_client import QdrantClient, models

from cookbook.stores.rows import open_rows, read_batches
from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding

RESCORE = models.SearchParams(
    quantization=models.QuantizationSearchParams(rescore=True, oversampling=10.0)
)
"""Ten candidates for each row that a search returns; Qdrant's default is one."""


def load(
    folder: Path, client: QdrantClient, name: str = "passages", is_binary: bool = False
) -> None:
    """Put all rows of `folder/vectors` into a collection."""
    rows = open_rows(folder)
    if not client.collection_exists(name):
        size = rows.schema.field("vector").type.list_size
        params = models.VectorParams(size=size, distance=models.Distance.COSINE)
        if is_binary:
            bits = models.BinaryQuantizationConfig(always_ram=True)
            params.on_disk = True
            params.quantization_config = models.BinaryQuantization(binary=bits)
        client.create_collection(name, params)
    for vectors, kept in read_batches(rows):
        texts = [row.pop("text") for row in kept]
        client.upload_collection(
            name,
            vectors,
            payload=[{"text": t, "metadata": k} for t, k in zip(texts, kept, strict=True)],
            ids=[str(uuid5(NAMESPACE_OID, str(row["id"]))) for row in kept],
            wait=True,
        )


def for_langchain(
    client: QdrantClient, embeddings: NeMoRetrieverEmbeddings, name: str = "passages"
) -> QdrantVectorStore:
    """Return the collection as LangChain's store."""
    return QdrantVectorStore(client, name, embeddings, content_payload_key="text")


def for_llamaindex(
    client: QdrantClient, embed_model: NeMoRetrieverEmbedding, name: str = "passages"
) -> VectorStoreIndex:
    """Return the collection as LlamaIndex's index; its metadata lie in `metadata["metadata"]`."""
    store = QdrantStore(name, client)
    return VectorStoreIndex.from_vector_store(store, embed_model)
