"""The recipes for vector stores: every row arrives, once, and is found as numpy finds it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import vectors

pytestmark = pytest.mark.slow

N = 100
TEXTS = [f"passage {n} of {N}" for n in range(N)]
TOPICS = [f"topic {n % 7}" for n in range(N)]
QUESTIONS = ["where is it?", "who was it?", "passage 7"]
K = 5

Found = list[tuple[str, dict[str, Any]]]
"""Texts and metadata, best first."""


class Recipe:
    """A loaded store, asked through both frameworks."""

    def __init__(self, langchain: Any, llamaindex: Any, count: Callable[[], int]) -> None:
        self._langchain, self._llamaindex, self.count = langchain, llamaindex, count

    def ask_langchain(self, question: str) -> Found:
        return [(row.page_content, row.metadata) for row in self._langchain.invoke(question)]

    def ask_llamaindex(self, question: str) -> Found:
        rows = self._llamaindex.retrieve(question)
        assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)
        return [(row.node.get_content(), row.node.metadata) for row in rows]


Open = Callable[[Path, Path, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding], Recipe]


def open_qdrant(folder: Path, path: Path, embeddings: Any, embed_model: Any) -> Recipe:
    from qdrant_client import QdrantClient

    from cookbook.stores import into_qdrant

    client = QdrantClient(path=str(path))
    into_qdrant.load(folder, client)
    client.close()
    client = QdrantClient(path=str(path))
    into_qdrant.load(folder, client)
    return Recipe(
        into_qdrant.for_langchain(client, embeddings).as_retriever(search_kwargs={"k": K}),
        into_qdrant.for_llamaindex(client, embed_model).as_retriever(similarity_top_k=K),
        lambda: client.count("passages").count,
    )


def open_chroma(folder: Path, path: Path, embeddings: Any, embed_model: Any) -> Recipe:
    import chromadb

    from cookbook.stores import into_chroma

    client = chromadb.PersistentClient(path=str(path))
    into_chroma.load(folder, client)
    collection = into_chroma.load(folder, client)
    return Recipe(
        into_chroma.for_langchain(client, embeddings).as_retriever(search_kwargs={"k": K}),
        into_chroma.for_llamaindex(collection, embed_model).as_retriever(similarity_top_k=K),
        collection.count,
    )


def open_lancedb(folder: Path, path: Path, embeddings: Any, embed_model: Any) -> Recipe:
    import lancedb

    from cookbook.stores import into_lancedb
    from cookbook.stores.retrievers import StoreRetriever, for_langchain

    database = lancedb.connect(path)
    into_lancedb.load(folder, database)
    table = into_lancedb.load(folder, database)

    def search(vector: np.ndarray, k: int) -> list[tuple[str, dict[str, Any], float]]:
        return into_lancedb.search(table, vector, k)

    return Recipe(
        for_langchain(search, embeddings, K),
        StoreRetriever(search, embed_model, K),
        table.count_rows,
    )


def open_faiss(folder: Path, path: Path, embeddings: Any, embed_model: Any) -> Recipe:
    import faiss

    from cookbook.stores import into_faiss
    from cookbook.stores.retrievers import StoreRetriever, for_langchain

    into_faiss.load(folder, path)
    into_faiss.load(folder, path)
    search = into_faiss.open_search(folder, path)
    return Recipe(
        for_langchain(search, embeddings, K),
        StoreRetriever(search, embed_model, K),
        lambda: faiss.read_index(str(path)).ntotal,
    )


def open_milvus(folder: Path, path: Path, embeddings: Any, embed_model: Any) -> Recipe:
    from pymilvus import MilvusClient

    from cookbook.stores import into_milvus
    from cookbook.stores.retrievers import StoreRetriever, for_langchain

    client = MilvusClient(uri=str(path.with_suffix(".db")))
    into_milvus.load(folder, client)
    into_milvus.load(folder, client)

    def search(vector: np.ndarray, k: int) -> list[tuple[str, dict[str, Any], float]]:
        return into_milvus.search(client, vector, k)

    return Recipe(
        for_langchain(search, embeddings, K),
        StoreRetriever(search, embed_model, K),
        lambda: client.query("passages", output_fields=["count(*)"])[0]["count(*)"],
    )


STORES: dict[str, Open] = {
    "qdrant": open_qdrant,
    "chroma": open_chroma,
    "lancedb": open_lancedb,
    "faiss": open_faiss,
    "milvus": open_milvus,
}


def write_as_the_command_does(folder: Path, ids: pa.Array) -> None:
    (folder / "vectors").mkdir(parents=True)
    values = pa.array(vectors(TEXTS).ravel())
    column = pa.FixedSizeListArray.from_arrays(values, vectors(["a"]).shape[1])
    columns = {"id": ids, "text": pa.array(TEXTS), "topic": pa.array(TOPICS), "vector": column}
    table = pa.table(columns).replace_schema_metadata({"model": "nvidia/m"})
    for n, first in enumerate(range(0, N, 40)):  # files of different length
        pq.write_table(table.slice(first, 40), folder / "vectors" / f"part-{n}.parquet")


def run_the_command(nim: FaultyNim, folder: Path, ids: pa.Array) -> None:
    from shared_engine.cli.main import main

    source = folder.with_suffix(".parquet")
    pq.write_table(pa.table({"id": ids, "text": TEXTS, "topic": TOPICS}), source)
    options = ["--model", "nvidia/m", "--base-url", nim.url, "--rows-per-file", "40"]
    columns = ["--id-column", "id", "--columns", "text,topic"]
    assert main(["embed", str(source), "--out", str(folder), *options, *columns]) == 0


@pytest.mark.parametrize("kind", ["strings", "integers", "command"])
@pytest.mark.parametrize("store", STORES)
def test_every_row_is_there_once_and_the_nearest_are_numpys(
    store: str, kind: str, tmp_path: Path
) -> None:
    ids = pa.array([f"row {n}" for n in range(N)] if kind == "strings" else range(N))
    folder = tmp_path / "out"
    with FaultyNim() as nim:
        if kind == "command":
            if importlib.util.find_spec("shared_engine.cli.embed") is None:
                pytest.skip("there is no such command yet")
            run_the_command(nim, folder, ids)
        else:
            write_as_the_command_does(folder, ids)
        options = {"model": "nvidia/m", "base_url": nim.url}
        embeddings, embed_model = (
            NeMoRetrieverEmbeddings(**options),
            NeMoRetrieverEmbedding(**options),
        )
        recipe = STORES[store](folder, tmp_path / "store", embeddings, embed_model)
        assert recipe.count() == N, "loaded twice, every row is there once"
        cosines = vectors(QUESTIONS, "query") @ vectors(TEXTS).T  # (questions, N)
        for question, row in zip(QUESTIONS, cosines, strict=True):
            nearest = np.argsort(-row)[:K]
            for found in (recipe.ask_langchain(question), recipe.ask_llamaindex(question)):
                assert [text for text, _ in found] == [TEXTS[n] for n in nearest]
                for (_, metadata), n in zip(found, nearest, strict=True):
                    assert metadata.get("metadata", metadata)["topic"] == TOPICS[n]
