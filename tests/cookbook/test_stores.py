"""The recipes for vector stores: every row arrives, once, and is found as numpy finds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from functools import partial
from math import inf
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine.vectors import quantize, unit
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


def open_pgvector(
    connection: Any, folder: Path, path: Path, embeddings: Any, embed_model: Any
) -> Recipe:
    from langchain_postgres import PGEngine
    from sqlalchemy.pool import NullPool

    from cookbook.stores import into_pgvector
    from cookbook.stores.retrievers import StoreRetriever

    into_pgvector.load(folder, connection)
    into_pgvector.load(folder, connection)

    def search(vector: np.ndarray, k: int) -> list[tuple[str, dict[str, Any], float]]:
        return into_pgvector.search(connection, vector, k)

    url = f"postgresql+psycopg://postgres@/{connection.info.dbname}?host={connection.info.host}"
    engine = PGEngine.from_connection_string(url, poolclass=NullPool)
    found = connection.execute("SELECT * FROM passages LIMIT 0")
    columns = [each.name for each in found.description if each.name not in {"text", "vector"}]
    store = into_pgvector.for_langchain(engine, embeddings, columns)
    return Recipe(
        store.as_retriever(search_kwargs={"k": K}),
        StoreRetriever(search, embed_model, K),
        lambda: connection.execute("SELECT count(*) FROM passages").fetchone()[0],
    )


STORES: dict[str, Open] = {
    "qdrant": open_qdrant,
    "chroma": open_chroma,
    "lancedb": open_lancedb,
    "faiss": open_faiss,
    "milvus": open_milvus,
}
NAMES = [*STORES, "pgvector"]


@pytest.fixture
def open_store(store: str, request: pytest.FixtureRequest) -> Open:
    """Load a folder twice into a store, and return it."""
    if store == "pgvector":
        return partial(open_pgvector, request.getfixturevalue("postgres"))
    return STORES[store]


def write_as_the_command_does(folder: Path, ids: pa.Array, rows: np.ndarray | None = None) -> None:
    rows = vectors(TEXTS) if rows is None else rows
    (folder / "vectors").mkdir(parents=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    columns = {"id": ids, "text": pa.array(TEXTS), "topic": pa.array(TOPICS), "vector": column}
    table = pa.table(columns).replace_schema_metadata({"model": "nvidia/m"})
    for n, first in enumerate(range(0, N, 40)):  # files of different length
        pq.write_table(table.slice(first, 40), folder / "vectors" / f"part-{n}.parquet")


def run_the_command(nim: FaultyNim, folder: Path, table: pa.Table, *more: str) -> None:
    from shared_engine.cli.main import main

    source = folder.with_suffix(".parquet")
    pq.write_table(table, source)
    options = ["--model", "nvidia/m", "--base-url", nim.url, "--rows-per-file", "40", *more]
    columns = ["--id-column", "id", "--columns", ",".join(table.column_names[1:])]
    assert main(["embed", str(source), "--out", str(folder), *options, *columns]) == 0


@pytest.mark.parametrize("kind", ["strings", "integers", "command"])
@pytest.mark.parametrize("store", NAMES)
def test_every_row_is_there_once_and_the_nearest_are_numpys(
    store: str, open_store: Open, kind: str, tmp_path: Path
) -> None:
    ids = pa.array([f"row {n}" for n in range(N)] if kind == "strings" else range(N))
    folder = tmp_path / "out"
    with FaultyNim() as nim:
        if kind == "command":
            run_the_command(nim, folder, pa.table({"id": ids, "text": TEXTS, "topic": TOPICS}))
        else:
            write_as_the_command_does(folder, ids)
        options = {"model": "nvidia/m", "base_url": nim.url}
        embeddings, embed_model = (
            NeMoRetrieverEmbeddings(**options),
            NeMoRetrieverEmbedding(**options),
        )
        recipe = open_store(folder, tmp_path / "store", embeddings, embed_model)
        assert recipe.count() == N, "loaded twice, every row is there once"
        cosines = vectors(QUESTIONS, "query") @ vectors(TEXTS).T  # (questions, N)
        for question, row in zip(QUESTIONS, cosines, strict=True):
            nearest = np.argsort(-row)[:K]
            for found in (recipe.ask_langchain(question), recipe.ask_llamaindex(question)):
                assert [text for text, _ in found] == [TEXTS[n] for n in nearest]
                for (_, metadata), n in zip(found, nearest, strict=True):
                    assert metadata.get("metadata", metadata)["topic"] == TOPICS[n]


def read_qdrant(folder: Path, path: Path) -> list[Any]:
    from qdrant_client import QdrantClient

    from cookbook.stores import into_qdrant

    client = QdrantClient(path=str(path))
    into_qdrant.load(folder, client)
    points, _ = client.scroll("passages", limit=N, with_vectors=True)
    client.close()
    return [point.vector for point in sorted(points, key=lambda p: p.payload["metadata"]["id"])]


def read_chroma(folder: Path, path: Path) -> Any:
    import chromadb

    from cookbook.stores import into_chroma

    collection = into_chroma.load(folder, chromadb.PersistentClient(path=str(path)))
    return collection.get([str(n) for n in range(N)], include=["embeddings"])["embeddings"]


def read_lancedb(folder: Path, path: Path) -> list[Any]:
    import lancedb

    from cookbook.stores import into_lancedb

    return into_lancedb.load(folder, lancedb.connect(path)).to_arrow().sort_by("id")["vector"]


def read_faiss(folder: Path, path: Path) -> Any:
    import faiss

    from cookbook.stores import into_faiss

    into_faiss.load(folder, path)
    return faiss.read_index(str(path)).reconstruct_n(0, N)


def read_milvus(folder: Path, path: Path) -> list[Any]:
    from pymilvus import MilvusClient

    from cookbook.stores import into_milvus

    client = MilvusClient(uri=str(path.with_suffix(".db")))
    into_milvus.load(folder, client)
    rows = client.query("passages", "id != ''", output_fields=["vector"], limit=N)
    return [row["vector"] for row in sorted(rows, key=lambda row: int(row["id"]))]


@pytest.mark.parametrize(
    ("read", "rtol"),
    [
        (read_qdrant, 5e-7),
        (read_chroma, 5e-7),
        (read_lancedb, 0),
        (read_faiss, 0),
        (read_milvus, 0),
    ],
)
def test_vectors_of_2048_values_come_back_as_they_were(
    read: Callable[[Path, Path], Any], rtol: float, tmp_path: Path
) -> None:
    """Qdrant and Chroma scale vectors to unit length once more."""
    values = unit(np.random.default_rng(0).standard_normal((N, 2048)).astype(np.float32))
    write_as_the_command_does(tmp_path / "out", pa.array(range(N)), values)
    found = read(tmp_path / "out", tmp_path / "store")
    rows = np.array(found.to_pylist() if hasattr(found, "to_pylist") else found, np.float32)
    np.testing.assert_allclose(rows, values, rtol=rtol, atol=0)


@pytest.mark.filterwarnings("ignore:Local mode performs exact")
def test_qdrant_keeps_bits_and_both_frameworks_ask_for_rescoring(tmp_path: Path) -> None:
    from qdrant_client import QdrantClient, models

    from cookbook.stores import into_qdrant

    write_as_the_command_does(tmp_path / "out", pa.array(range(N)))
    asked = []

    class Client(QdrantClient):
        """Notes how it is asked."""

        def query_points(self, *args: Any, **options: Any) -> Any:
            asked.append(options["search_params"])
            return super().query_points(*args, **options)

    client = Client(path=str(tmp_path / "store"))
    into_qdrant.load(tmp_path / "out", client, is_binary=True)
    params = client.get_collection("passages").config.params.vectors
    assert params.on_disk
    assert params.quantization_config == models.BinaryQuantization(
        binary=models.BinaryQuantizationConfig(always_ram=True)
    )
    with FaultyNim() as nim:
        options = {"model": "nvidia/m", "base_url": nim.url}
        store = into_qdrant.for_langchain(client, NeMoRetrieverEmbeddings(**options))
        index = into_qdrant.for_llamaindex(client, NeMoRetrieverEmbedding(**options))
        given = {"search_params": into_qdrant.RESCORE}
        assert store.similarity_search(QUESTIONS[0], k=K, **given)
        assert index.as_retriever(vector_store_kwargs=given).retrieve(QUESTIONS[0])
    assert asked == [into_qdrant.RESCORE] * 2
    client.close()


DAYS = [date(2024, 1, 1) + timedelta(n) for n in range(N)]
KEPT: dict[str, tuple[pa.DataType, list[Any], list[Any]]] = {
    "topic": (pa.string(), TOPICS, TOPICS),
    "day": (pa.date32(), DAYS, [day.isoformat() for day in DAYS]),
    "price": (pa.decimal128(12, 2), [Decimal(n) / 100 for n in range(N)],
              [f"{n / 100:.2f}" for n in range(N)]),
    "tags": (pa.list_(pa.string()), [[str(n), "a"] for n in range(N)],
             [[str(n), "a"] for n in range(N)]),
    "days": (pa.list_(pa.date32()), [[day] for day in DAYS], [[day.isoformat()] for day in DAYS]),
    "of": (pa.struct([("at", pa.time32("s"))]), [{"at": time(n % 24)} for n in range(N)],
           [{"at": f"{n % 24:02}:00:00"} for n in range(N)]),
    "key": (pa.uint64(), [2**64 - 1 - n for n in range(N)], [str(2**64 - 1 - n) for n in range(N)]),
    "uuid": (pa.uuid(), [UUID(int=n) for n in range(N)], [str(UUID(int=n)) for n in range(N)]),
    "some": (pa.float64(), [None if n % 2 else n / 3 for n in range(N)],
             [None if n % 2 else n / 3 for n in range(N)]),
    "odd": (pa.list_(pa.float64()), [[inf, n / 3] for n in range(N)],
            [[None, n / 3] for n in range(N)]),
}  # fmt: skip
"""Columns to keep: their types, their values, and these as JSON holds them."""
TYPED = {
    "faiss": set(KEPT),
    "lancedb": set(KEPT),
    "pgvector": set(KEPT) - {"tags", "days", "of", "odd"},
}
"""Columns whose values come back as they were; in PostgreSQL lists and structs are JSON."""


def keep() -> pa.Table:
    columns = {"id": pa.array(range(N)), "text": pa.array(TEXTS)}
    for name, (kind, values, _) in KEPT.items():
        held = [value.bytes for value in values] if name == "uuid" else values
        columns[name] = pa.array(held, kind)
    return pa.table(columns)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("store", NAMES)
def test_columns_of_all_types_and_small_numbers_are_held(
    store: str, open_store: Open, kind: str, tmp_path: Path
) -> None:
    with FaultyNim() as nim:
        run_the_command(nim, tmp_path / "out", keep(), "--embedding-type", kind)
        options = {"model": "nvidia/m", "base_url": nim.url}
        models = NeMoRetrieverEmbeddings(**options), NeMoRetrieverEmbedding(**options)
        recipe = open_store(tmp_path / "out", tmp_path / "store", *models)
        assert recipe.count() == N
        levels = quantize(vectors(TEXTS), "int8")
        cosines = vectors(QUESTIONS, "query") @ unit(levels.astype(np.float32)).T
        for question, row in zip(QUESTIONS, cosines, strict=True):
            nearest = np.argsort(-row)[:K]
            found = recipe.ask_langchain(question)
            assert [text for text, _ in found] == [TEXTS[n] for n in nearest]
            for (_, metadata), n in zip(found, nearest, strict=True):
                for name, (_, values, plain) in KEPT.items():
                    expected = (values if name in TYPED.get(store, ()) else plain)[n]
                    if store == "chroma" and isinstance(expected, list | dict):
                        expected = json.dumps(expected)
                    assert metadata.get(name) == expected
                if "score" in metadata:
                    assert metadata["score"] == pytest.approx(row[n], abs=1e-5)


@pytest.mark.parametrize("kind", ["binary", "ubinary"])
@pytest.mark.parametrize("store", NAMES)
def test_packed_bits_are_not_numbers(open_store: Open, kind: str, tmp_path: Path) -> None:
    with FaultyNim() as nim:
        run_the_command(nim, tmp_path / "out", keep(), "--embedding-type", kind)
    with pytest.raises(ValueError, match=f"vectors of type {kind}, packed bits; expected float"):
        open_store(tmp_path / "out", tmp_path / "store", None, None)


@pytest.mark.parametrize("store", ["qdrant", "chroma", "milvus"])
def test_a_column_that_the_store_cannot_hold_is_named(open_store: Open, tmp_path: Path) -> None:
    table = pa.table({"id": range(3), "text": list("abc"), "scan": [b"a", b"b", b"c"]})
    with FaultyNim() as nim:
        run_the_command(nim, tmp_path / "out", table)
    with pytest.raises(ValueError, match="column 'scan' holds binary, which the store cannot hold"):
        open_store(tmp_path / "out", tmp_path / "store", None, None)


def test_a_map_is_named_before_it_goes_to_lancedb(tmp_path: Path) -> None:
    kind = pa.struct([("of", pa.map_(pa.string(), pa.int8()))])
    table = pa.table({"id": [1], "text": ["a"], "scan": pa.array([{"of": [("x", 1)]}], kind)})
    with FaultyNim() as nim:
        run_the_command(nim, tmp_path / "out", table)
    with pytest.raises(ValueError, match=r"column 'scan' holds struct<.*, which the store cannot"):
        open_lancedb(tmp_path / "out", tmp_path / "store", None, None)


def test_a_field_that_is_always_null_is_named_before_it_goes_to_lancedb(tmp_path: Path) -> None:
    kind = pa.struct([("a", pa.null()), ("b", pa.int8())])
    of = pa.array([{"b": 1}, None], kind)
    table = pa.table({"id": [1, 2], "text": ["a", "b"], "of": of, "none": pa.nulls(2)})
    with FaultyNim() as nim:
        run_the_command(nim, tmp_path / "out", table)
    with pytest.raises(
        ValueError, match=r"column 'of' holds struct<a: null.*, which the store cann"
    ):
        open_lancedb(tmp_path / "out", tmp_path / "store", None, None)


@pytest.mark.parametrize("store", NAMES)
def test_a_row_without_a_text_is_found_with_its_columns_and_no_vector(
    store: str, open_store: Open, tmp_path: Path
) -> None:
    """Of two rows, which are fewer than are asked for."""
    name = "a path of many folders/" * 30
    table = pa.table({
        "id": [name, "b"], "title": ["Paris", "Rome"], "text": [None, "a city"], "score": [4.5, 2.0]
    })  # fmt: skip
    with FaultyNim() as nim:
        run_the_command(nim, tmp_path / "out", table, "--text-column", "title,text")
        options = {"model": "nvidia/m", "base_url": nim.url}
        models = NeMoRetrieverEmbeddings(**options), NeMoRetrieverEmbedding(**options)
        recipe = open_store(tmp_path / "out", tmp_path / "store", *models)
        for found in (recipe.ask_langchain("where?"), recipe.ask_llamaindex("where?")):
            assert {text for text, _ in found} == {"", "a city"}
            for text, data in found:
                kept = data.get("metadata", data)
                assert kept["score"] == (2.0 if text else 4.5)
                assert "vector" not in kept
        ids = [data.get("id") for text, data in recipe.ask_langchain("where?") if not text]
        assert ids == [name]


def test_a_null_replaces_a_value_in_chroma(tmp_path: Path) -> None:
    import chromadb

    from cookbook.stores import into_chroma

    client = chromadb.PersistentClient(path=str(tmp_path / "store"))
    with FaultyNim() as nim:
        for number, tags in enumerate((["x", "y"], [None, "z"])):
            table = pa.table({"id": [1, 2], "text": ["a", "b"], "tag": pa.array(tags, pa.string())})
            run_the_command(nim, tmp_path / str(number), table)
            collection = into_chroma.load(tmp_path / str(number), client)
    assert collection.get()["metadatas"] == [{"id": 1}, {"id": 2, "tag": "z"}]


def test_an_index_of_other_rows_is_refused(tmp_path: Path) -> None:
    from cookbook.stores import into_faiss

    write_as_the_command_does(tmp_path / "out", pa.array(range(N)))
    into_faiss.load(tmp_path / "out", tmp_path / "store")
    (tmp_path / "out" / "vectors" / "part-2.parquet").unlink()
    with pytest.raises(ValueError, match=r"store holds 100 rows, but .* has 80; load the folder"):
        into_faiss.open_search(tmp_path / "out", tmp_path / "store")


@pytest.mark.parametrize("store", NAMES)
def test_a_folder_without_files_is_named(store: str, open_store: Open, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"out has no files vectors/\*\.parquet; expected the --out"
    ):
        open_store(tmp_path / "out", tmp_path / "store", None, None)


@pytest.mark.parametrize("store", NAMES)
def test_a_folder_without_texts_is_named(open_store: Open, tmp_path: Path) -> None:
    with FaultyNim() as nim:
        run_the_command(nim, tmp_path / "out", pa.table({"id": [1], "body": ["a"]}),
                        "--text-column", "body")  # fmt: skip
    with pytest.raises(ValueError, match="no column 'text'; embed with --columns text"):
        open_store(tmp_path / "out", tmp_path / "store", None, None)
