"""Into Milvus: Lite in a file, or a server with `MilvusClient(uri="http://...")`.

Rows go in as dictionaries, whose vectors are numpy arrays. Lite takes one process at a time. Both
frameworks' packages want pymilvus 2 (langchain-milvus, llama-index-vector-stores-milvus); where you
have 3, search through retrievers, as here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient

from cookbook.stores.rows import open_rows, read_batches


def load(folder: Path, client: MilvusClient, name: str = "passages") -> None:
    """Put all rows of `folder/vectors` into a collection."""
    rows = open_rows(folder)
    if not client.has_collection(name):
        size = rows.schema.field("vector").type.list_size
        schema = client.create_schema(enable_dynamic_field=True)  # for all kept columns
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=65_535)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=size)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
        client.create_collection(name, schema=schema, index_params=index)
    for vectors, kept in read_batches(rows):
        each = zip(kept, vectors, strict=True)
        client.upsert(name, [row | {"id": str(row["id"]), "vector": v} for row, v in each])


def search(
    client: MilvusClient, vector: np.ndarray, k: int, name: str = "passages"
) -> list[tuple[str, dict[str, Any], float]]:
    """Return texts, metadata and cosines of the nearest rows."""
    (found,) = client.search(name, [vector], limit=k, output_fields=["*"])
    rows = [({**hit["entity"], "id": hit["id"]}, hit["distance"]) for hit in found]
    for row, _ in rows:
        row.pop("vector", None)
    return [(row.pop("text"), row, cosine) for row, cosine in rows]
