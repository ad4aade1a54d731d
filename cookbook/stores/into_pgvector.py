"""Into PostgreSQL with pgvector 0.7 or later, in columns of the files' types.

Vectors of up to 2,000 values are kept as they are, as a `vector`. Longer ones become a `halfvec`,
because pgvector's HNSW index holds at most 2,000 values of a `vector`, and 4,000 of a `halfvec`. A
`halfvec` rounds each value to float16, by at most 1 part in 2,048 (by 3e-8 if it is below 6e-5). To
keep float32, embed with `--dimensions 1024`.

With `is_binary=True` the index holds one bit of each value: 0.6 KB for each row of 2,048 values,
instead of 8 KB. A search with `candidates` finds them by Hamming distance, and orders them by full
vectors. Of the ten nearest rows 0.88 are found with 100 candidates, 0.95 with 200 and 0.99 with
500, as tests/cookbook/test_binary_first.py measures.

A load is one transaction. The index is built in memory if it fits there: run `SET
maintenance_work_mem = '8GB'` on the connection before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.dataset as ds
from langchain_postgres import PGEngine, PGVectorStore
from langchain_postgres.v2.indexes import HNSWQueryOptions
from pgvector.psycopg import Vector, register_vector
from psycopg.sql import SQL, Composable, Identifier

from cookbook.stores.rows import BATCH, is_plain, open_rows, read_vectors, to_plain
from langchain_nemoretriever import NeMoRetrieverEmbeddings

EF_SEARCH = 100
"""Rows that a search in the index collects, at least; pgvector's default of 40 would cut `k`."""

_TYPES = {
    pa.bool_(): "bool",
    **dict.fromkeys([pa.int8(), pa.uint8(), pa.int16()], "int2"),
    **dict.fromkeys([pa.uint16(), pa.int32()], "int4"),
    **dict.fromkeys([pa.uint32(), pa.int64()], "int8"),
    pa.uint64(): "numeric",
    **dict.fromkeys([pa.float16(), pa.float32()], "float4"),
    pa.float64(): "float8",
    **dict.fromkeys([pa.string(), pa.large_string(), pa.null()], "text"),
    **dict.fromkeys([pa.binary(), pa.large_binary()], "bytea"),
    **dict.fromkeys([pa.date32(), pa.date64()], "date"),
    pa.uuid(): "uuid",
}


def load(
    folder: Path,
    connection: psycopg.Connection,
    table: str = "passages",
    is_binary: bool = False,
) -> None:
    """Put all rows of `folder/vectors` into a table, and index their vectors by cosine.

    Args:
        folder: the `--out` of `nemoretriever embed`.
        connection: to a database whose user may create tables.
        table: its name; it is created if it does not exist.
        is_binary: whether to index bits, for searches with `candidates`.

    Raises:
        ValueError: as `open_rows`; the vectors have over 4,000 values and `is_binary` is false; the
            table holds another type; a time has nanoseconds.
        psycopg.DataError: PostgreSQL cannot hold a value, such as a NUL character in a text; names
            its row (`line`) and column.
    """
    rows = open_rows(folder, is_held=find_type)
    size = rows.schema.field("vector").type.list_size
    if size > 4_000 and not is_binary:
        raise ValueError(
            f"{folder} holds vectors of {size} values; pgvector's index holds at most 4000: embed "
            "with --dimensions, or index bits by is_binary=True"
        )
    kind = "vector" if size <= 2_000 else "halfvec"
    types = {field.name: find_type(field.type) for field in rows.schema} | {"vector": kind}
    names = {
        "table": Identifier(table),
        "index": Identifier(f"{table}_bits" if is_binary else f"{table}_vector"),
        "columns": SQL(", ").join(map(Identifier, types)),
        "typed": SQL(", ").join(
            SQL("{} {}").format(
                Identifier(name), SQL(f"{kind}({size})" if name == "vector" else of)
            )
            for name, of in types.items()
        ),
        "indexed": _bits(size) if is_binary else SQL("vector"),
        "operators": SQL("bit_hamming_ops" if is_binary else f"{kind}_cosine_ops"),
    }

    def run(statement: str) -> psycopg.Cursor:
        return connection.execute(SQL(statement).format(**names))

    with connection.transaction():
        run("CREATE EXTENSION IF NOT EXISTS vector")
        register_vector(connection)
        run("CREATE TABLE IF NOT EXISTS {table} ({typed}, PRIMARY KEY (id))")
        run("CREATE TEMP TABLE loaded ({typed}) ON COMMIT DROP")
        held, given = (
            run(f"SELECT {{columns}} FROM {source} LIMIT 0").description or ()
            for source in ("{table}", "loaded")
        )
        for old, new in zip(held, given, strict=True):
            if old.type_code != new.type_code:
                raise ValueError(
                    f"column {new.name!r} of table {table!r} holds {old.type_display}; the files "
                    f"hold {new.type_display}: load them into another table"
                )
        _copy(rows, connection, types)
        run("DELETE FROM {table} USING loaded WHERE {table}.id = loaded.id")
        run("INSERT INTO {table} ({columns}) SELECT {columns} FROM loaded")
        run("CREATE INDEX IF NOT EXISTS {index} ON {table} USING hnsw (({indexed}) {operators})")


def find_type(kind: pa.DataType) -> str:
    """Return PostgreSQL's type for values of a type, or "" where it has none."""
    is_kind = pa.types
    if is_kind.is_timestamp(kind):
        return "timestamptz" if kind.tz else "timestamp"
    if is_kind.is_time(kind):
        return "time"
    if is_kind.is_duration(kind):
        return "interval"
    if is_kind.is_decimal(kind):
        return "numeric"
    if is_kind.is_nested(kind):
        return "jsonb" if is_plain(kind) else ""
    return _TYPES.get(kind, "")


def _copy(rows: ds.Dataset, connection: psycopg.Connection, types: dict[str, str]) -> None:
    """Copy all rows into the table `loaded`."""
    columns = SQL(", ").join(map(Identifier, types))
    statement = SQL("COPY loaded ({}) FROM STDIN (FORMAT BINARY)").format(columns)
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(list(types.values()))
        for batch in rows.to_batches(columns=list(types), batch_size=BATCH):
            vectors = read_vectors(rows, batch)
            values = [vectors if name == "vector" else _read(batch, name) for name in types]
            for row in zip(*values, strict=True):
                copy.write_row(row)


def _read(batch: pa.RecordBatch, name: str) -> list[Any]:
    """Return the values of a column; those of nanoseconds must be whole microseconds."""
    column, is_kind = batch[name], pa.types
    if name == "text" and is_kind.is_string(column.type):
        column = column.fill_null("")  # LangChain's store must have a text
    kind = column.type
    if is_kind.is_nested(kind):
        return [to_plain(value) for value in column.to_pylist()]
    if is_kind.is_timestamp(kind):
        kind = pa.timestamp("us", kind.tz)
    elif is_kind.is_time(kind):
        kind = pa.time64("us")
    elif is_kind.is_duration(kind):
        kind = pa.duration("us")
    try:
        return column.cast(kind).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"column {name!r}: {error}; expected whole microseconds") from error


def _bits(size: int) -> SQL:
    return SQL(f"binary_quantize(vector)::bit({size})")


def search(
    connection: psycopg.Connection,
    vector: np.ndarray,
    k: int,
    table: str = "passages",
    candidates: int | None = None,
) -> list[tuple[str, dict[str, Any], float]]:
    """Return texts, metadata and cosines of the nearest rows.

    Args:
        connection: to the database.
        vector: of the query.
        k: number of rows to return.
        table: its name.
        candidates: number of rows to find by their bits first, at most 1,000; None searches by full
            vectors.
    """
    source: Composable = Identifier(table)
    if candidates:
        source = SQL(
            "(SELECT * FROM {} ORDER BY {} <~> %(bits)s LIMIT %(candidates)s) AS candidates"
        ).format(source, _bits(len(vector)))
    given = {"vector": Vector(vector).to_text(), "k": k, "candidates": candidates}
    given["bits"] = "".join("1" if value > 0 else "0" for value in vector)  # as binary_quantize
    collected = str(max(candidates or k, EF_SEARCH))
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute("SELECT set_config('hnsw.ef_search', %s, true)", [collected])
        cursor.execute(SQL("SELECT * FROM {} LIMIT 0").format(Identifier(table)))
        names = [column.name for column in cursor.description or () if column.name != "vector"]
        statement = SQL(
            "SELECT {}, 1 - (vector <=> %(vector)s) FROM {} ORDER BY vector <=> %(vector)s "
            "LIMIT %(k)s"
        ).format(SQL(", ").join(map(Identifier, names)), source)
        found = [
            (dict(zip(names, row, strict=False)), row[-1])
            for row in cursor.execute(statement, given)
        ]
    return [(row.pop("text"), row, cosine) for row, cosine in found]


def for_langchain(
    engine: PGEngine,
    embeddings: NeMoRetrieverEmbeddings,
    columns: Sequence[str],
    table: str = "passages",
) -> PGVectorStore:
    """Return the table as LangChain's store of at most EF_SEARCH rows, some columns as metadata.

    LlamaIndex's class needs columns of its own, so it searches through `StoreRetriever`.
    """
    return PGVectorStore.create_sync(
        engine,
        embeddings,
        table,
        id_column="id",
        content_column="text",
        embedding_column="vector",
        metadata_columns=list(columns),
        index_query_options=HNSWQueryOptions(EF_SEARCH),
    )
