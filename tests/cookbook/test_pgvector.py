"""The recipe for PostgreSQL: types, rounding, the index, and rows that it refuses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared_engine.vectors import unit

psycopg = pytest.importorskip("psycopg", reason="needs pip install '.[stores]'")
into_pgvector = pytest.importorskip(
    "cookbook.stores.into_pgvector", reason="needs pip install '.[stores]'"
)
pytestmark = pytest.mark.slow

DAY = datetime(2024, 2, 29, 12, 30, tzinfo=UTC)


def draw(n: int, size: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, size)).astype(np.float32))


def write(folder: Path, vectors: np.ndarray, first: int = 0, **columns: Any) -> Path:
    (folder / "vectors").mkdir(parents=True, exist_ok=True)
    ids = pa.array(range(first, first + len(vectors)))
    texts = [f"text {n}" for n in ids.to_pylist()]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({"id": ids, "text": texts, **columns, "vector": column})
    pq.write_table(table, folder / "vectors" / "part-0.parquet")
    return folder


@pytest.mark.parametrize(
    ("size", "kind", "held"),
    [(1024, "vector", np.float32), (2000, "vector", np.float32), (2048, "halfvec", np.float16)],
)
def test_vectors_come_back_as_they_were_or_as_float16(
    size: int, kind: str, held: type, tmp_path: Path, postgres: Any
) -> None:
    vectors = draw(50, size)
    into_pgvector.load(write(tmp_path, vectors), postgres)
    found = postgres.execute("SELECT vector::text, format_type(atttypid, atttypmod) FROM passages, "
                             "pg_attribute WHERE attrelid = 'passages'::regclass AND "
                             "attname = 'vector' ORDER BY id").fetchall()  # fmt: skip
    assert {of for _, of in found} == {f"{kind}({size})"}
    kept = np.array([text.strip("[]").split(",") for text, _ in found]).astype(held)
    np.testing.assert_array_equal(kept, vectors.astype(held))
    small = np.abs(vectors) < 2**-14  # float16's smallest normal value
    error = np.abs(kept.astype(np.float32) - vectors)
    assert (error <= np.where(small, 2**-25, np.abs(vectors) / 2048)).all()


def test_a_search_uses_the_index_and_returns_as_many_rows_as_asked(
    tmp_path: Path, postgres: Any
) -> None:
    vectors = draw(1000, 2048)
    into_pgvector.load(write(tmp_path, vectors), postgres)
    plan = postgres.execute("EXPLAIN SELECT id FROM passages ORDER BY vector <=> %s LIMIT 5",
                            [str(vectors[7].tolist())]).fetchall()  # fmt: skip
    assert "passages_vector" in str(plan)
    found = into_pgvector.search(postgres, vectors[7], 100)
    assert len(found) == 100
    assert found[0][:2] == ("text 7", {"id": 7})
    assert found[0][2] == pytest.approx(1, abs=1e-6)
    cosines = [cosine for _, _, cosine in found]
    assert cosines == sorted(cosines, reverse=True)
    for _, row, cosine in found:
        assert cosine == pytest.approx(float(vectors[row["id"]] @ vectors[7]), abs=1e-3)


@pytest.mark.parametrize("size", [1024, 2048, 4096])
def test_bits_find_candidates_and_full_vectors_order_them(
    size: int, tmp_path: Path, postgres: Any
) -> None:
    vectors = draw(1000, size)
    into_pgvector.load(write(tmp_path, vectors), postgres, is_binary=True)
    bits = "".join("1" if value > 0 else "0" for value in vectors[7])
    plan = postgres.execute(f"EXPLAIN SELECT id FROM passages ORDER BY "
                            f"binary_quantize(vector)::bit({size}) <~> %s LIMIT 5",
                            [bits]).fetchall()  # fmt: skip
    assert "passages_bits" in str(plan)
    (query,) = unit(vectors[7:8] + 0.5 * vectors[8:9])
    exact = np.argsort(-(vectors @ query))
    found = into_pgvector.search(postgres, query, 5, candidates=500)
    assert [row["id"] for _, row, _ in found][:2] == [7, 8]
    assert [row["id"] for _, row, _ in found] == exact[:5].tolist()
    for _, row, cosine in found:
        assert cosine == pytest.approx(float(vectors[row["id"]] @ query), abs=1e-3)
    first = into_pgvector.search(postgres, query, 2, candidates=1)
    assert [row["id"] for _, row, _ in first] == [7]


def test_columns_keep_their_types(tmp_path: Path, postgres: Any) -> None:
    columns = {
        "at": (pa.timestamp("ns", "Europe/Paris"), [DAY, None], "timestamp with time zone"),
        "local": (
            pa.timestamp("ms"),
            [DAY.replace(tzinfo=None)] * 2,
            "timestamp without time zone",
        ),
        "took": (pa.duration("s"), [timedelta(days=2, hours=30)] * 2, "interval"),
        "price": (pa.decimal128(20, 3), [Decimal("1.100"), Decimal("-7.250")], "numeric"),
        "scan": (pa.binary(), [b"\x00\xff", b""], "bytea"),
        "few": (pa.int16(), [-7, 7], "smallint"),
        "many": (pa.uint64(), [2**64 - 1, 0], "numeric"),
        "tags": (pa.list_(pa.string()), [["a"], []], "jsonb"),
        "cosine": (pa.float32(), [0.5, None], "real"),
        'odd "name"; --': (pa.bool_(), [True, None], "boolean"),
    }
    arrays = {name: pa.array(of, kind) for name, (kind, of, _) in columns.items()}
    into_pgvector.load(write(tmp_path, draw(2, 8), **arrays), postgres)
    types = dict(postgres.execute("SELECT column_name, data_type FROM information_schema.columns "
                                  "WHERE table_name = 'passages'").fetchall())  # fmt: skip
    assert {name: types[name] for name in columns} == {
        name: of for name, (_, _, of) in columns.items()
    }
    found = into_pgvector.search(postgres, draw(1, 8)[0], 2)
    rows = [row for _, row, _ in sorted(found, key=lambda each: each[1]["id"])]
    for name, (_, values, _) in columns.items():
        assert [row[name] for row in rows] == values
    assert str(rows[0]["price"]) == "1.100"


def test_loading_again_replaces_rows_of_equal_id_and_adds_others(
    tmp_path: Path, postgres: Any
) -> None:
    into_pgvector.load(write(tmp_path / "a", draw(3, 8)), postgres)
    changed = draw(3, 8, seed=1)
    into_pgvector.load(write(tmp_path / "b", changed, first=2), postgres)
    rows = postgres.execute("SELECT id, vector::text FROM passages ORDER BY id").fetchall()
    assert [id_ for id_, _ in rows] == [0, 1, 2, 3, 4]
    kept = np.array([text.strip("[]").split(",") for _, text in rows[2:]]).astype(np.float32)
    np.testing.assert_array_equal(kept, changed)


@pytest.mark.parametrize(
    ("size", "columns", "message"),
    [
        (8, {"n": [1.5, 2.5]}, "column 'n' of table 'passages' holds int8; the files hold float8"),
        (2048, {"n": [1, 2]}, "'vector' of table 'passages' holds vector; the files hold halfvec"),
        (9, {"n": [1, 2]}, "expected 8 dimensions, not 9"),
        (8, {"m": [1, 2]}, 'column "m" does not exist'),
    ],
)
def test_a_table_of_other_types_is_refused(
    size: int, columns: dict[str, Any], message: str, tmp_path: Path, postgres: Any
) -> None:
    into_pgvector.load(write(tmp_path / "a", draw(2, 8), n=[1, 2]), postgres)
    folder = write(tmp_path / "b", draw(2, size), **columns)
    with pytest.raises((ValueError, psycopg.Error), match=message):
        into_pgvector.load(folder, postgres)
    assert postgres.execute("SELECT n FROM passages ORDER BY id").fetchall() == [(1,), (2,)]


@pytest.mark.parametrize(
    ("size", "columns", "message"),
    [
        (4096, {}, "vectors of 4096 values; pgvector's index holds at most 4000"),
        (8, {"note": ["good", "b\x00d"]}, "0x00\nCONTEXT: .*line 2, column note"),
        (8, {"at": pa.array([0, 1], pa.timestamp("ns"))}, "column 'at': .*expected whole microsec"),
        (8, {"map": pa.array([[], []], pa.map_(pa.string(), pa.string()))}, "column 'map' holds"),
    ],
)
def test_what_cannot_be_held_is_named_and_nothing_is_left(
    size: int, columns: dict[str, Any], message: str, tmp_path: Path, postgres: Any
) -> None:
    folder = write(tmp_path, draw(2, size), **columns)
    with pytest.raises((ValueError, psycopg.DataError), match=message):
        into_pgvector.load(folder, postgres)
    assert postgres.execute("SELECT to_regclass('passages')").fetchone() == (None,)


def test_langchains_store_searches_halfvec_and_filters_by_typed_columns(
    tmp_path: Path, postgres: Any
) -> None:
    from langchain_postgres import PGEngine
    from sqlalchemy.pool import NullPool

    from langchain_nemoretriever import NeMoRetrieverEmbeddings

    vectors = draw(20, 2048)
    prices = pa.array([float(n) for n in range(20)])
    into_pgvector.load(write(tmp_path, vectors, price=prices), postgres)
    url = f"postgresql+psycopg://postgres@/{postgres.info.dbname}?host={postgres.info.host}"
    engine = PGEngine.from_connection_string(url, poolclass=NullPool)
    embeddings = NeMoRetrieverEmbeddings(base_url="http://localhost:9/v1")
    store = into_pgvector.for_langchain(engine, embeddings, ["price"])
    (found,) = store.similarity_search_by_vector(vectors[7].tolist(), k=1)
    assert (found.page_content, found.metadata) == ("text 7", {"price": 7.0})
    few = store.similarity_search_by_vector(vectors[7].tolist(), k=9, filter={"price": {"$lt": 3}})
    assert sorted(row.metadata["price"] for row in few) == [0.0, 1.0, 2.0]
