"""Rows of the files that `nemoretriever embed` writes, as stores can hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from shared_engine.vectors import unit

BATCH = 1_024


def open_rows(folder: Path, is_held: Callable[[pa.DataType], object] | None = None) -> ds.Dataset:
    """Open all rows of `folder/vectors`, in the order of the files' names.

    Args:
        folder: the `--out` of `nemoretriever embed`.
        is_held: whether the store holds values of a type; by default those that JSON can hold.

    Raises:
        ValueError: there are no files; the vectors are packed bits; there is no column `text`; the
            store cannot hold a column.
    """
    files = sorted((folder / "vectors").glob("*.parquet"))
    if not files:
        raise ValueError(
            f"{folder} has no files vectors/*.parquet; expected the --out of `nemoretriever embed`"
        )
    rows = ds.dataset(files)
    kind = find_kind(rows)
    if kind not in ("float", "int8", "uint8"):
        raise ValueError(
            f"{folder} holds vectors of type {kind}, packed bits; expected float, int8 or uint8: "
            "embed with another --embedding-type"
        )
    if "text" not in rows.schema.names:
        raise ValueError(f"{folder} holds no column 'text'; embed with --columns text")
    for field in rows.schema.remove(rows.schema.get_field_index("vector")):
        if not (is_held or is_plain)(field.type):
            raise ValueError(
                f"column {field.name!r} holds {field.type}, which the store cannot hold; embed "
                "without it in --columns"
            )
    return rows


def find_kind(rows: ds.Dataset) -> str:
    """Return the `embedding_type` of the vectors; of files without one, their Arrow type."""
    known = rows.schema.metadata or {}
    if b"embedding_type" in known:
        return str(known[b"embedding_type"].decode())
    value = rows.schema.field("vector").type.value_type
    return "float" if value == pa.float32() else f"{value} of unknown kind"


def read_vectors(rows: ds.Dataset, batch: pa.RecordBatch) -> NDArray[np.float32]:
    """Return the vectors (n, d) of a batch as float32; those of int8 and uint8 of unit length."""
    kind = find_kind(rows)
    vectors = batch["vector"].flatten().to_numpy().reshape(len(batch), -1)
    if kind == "float":
        return vectors
    return unit(vectors.astype(np.float32) - (128 if kind == "uint8" else 0))


def read_batches(rows: ds.Dataset) -> Iterator[tuple[NDArray[np.float32], list[dict[str, Any]]]]:
    """Yield vectors and the other columns of some rows, in values that JSON can hold.

    Dates, times, decimals, UUIDs and uint64 become texts; NaN and infinities become None, and a
    null text becomes "".
    """
    schema = rows.schema.remove(rows.schema.get_field_index("vector"))
    for batch in rows.to_batches(batch_size=BATCH):
        columns = [
            [None if value is None else str(value) for value in batch[field.name].to_pylist()]
            if field.type == pa.uint64()
            else [to_plain(value) for value in batch[field.name].to_pylist()]
            for field in schema
        ]
        kept = [dict(zip(schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
        for row in kept:
            row["text"] = row["text"] or ""  # of an image alone, or a title without a text
        yield read_vectors(rows, batch), kept


def to_plain(value: Any) -> Any:
    """Return a value of Arrow as one that JSON can hold.

    >>> to_plain([date(2024, 1, 1), Decimal("1.10"), {"a": time(9, 30)}, float("nan")])
    ['2024-01-01', '1.10', {'a': '09:30:00'}, None]
    """
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID | timedelta):
        return str(value)
    if isinstance(value, list):
        return [to_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: to_plain(each) for name, each in value.items()}
    return value


def is_any(kind: pa.DataType) -> bool:
    """Return True: a store of Arrow's types holds values of every type."""
    return True


def is_plain(kind: pa.DataType) -> bool:
    """Return whether `to_plain` makes values of a type plain."""
    is_kind = pa.types
    if is_kind.is_struct(kind):
        return all(is_plain(field.type) for field in kind)
    if is_kind.is_list(kind) or is_kind.is_large_list(kind) or is_kind.is_fixed_size_list(kind):
        return is_plain(kind.value_type)
    return isinstance(kind, pa.UuidType) or any(
        test(kind)
        for test in (
            is_kind.is_string, is_kind.is_integer, is_kind.is_floating, is_kind.is_boolean,
            is_kind.is_null, is_kind.is_decimal, is_kind.is_temporal,
        )
    )  # fmt: skip
