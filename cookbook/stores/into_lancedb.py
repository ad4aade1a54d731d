"""Into LanceDB, a folder of Arrow files: no server, and no index for up to some 100,000 rows.

Beyond that `table.create_index(metric="cosine", vector_column_name="vector")` makes searches fast,
and approximate. LangChain's class for it is in langchain-community, which is not maintained any
more, and LlamaIndex's wants metadata in a column of its own, so both search through retrievers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from cookbook.stores.rows import BATCH, open_rows, read_vectors


def load(folder: Path, database: lancedb.DBConnection, name: str = "passages") -> lancedb.Table:
    """Put all rows of `folder/vectors` into a table, as Arrow from end to end, in their types."""
    rows = open_rows(folder, is_held=is_held)
    kind = pa.list_(pa.float32(), rows.schema.field("vector").type.list_size)
    place = rows.schema.get_field_index("vector")
    schema = rows.schema.remove_metadata().set(place, pa.field("vector", kind))

    def read() -> Iterator[pa.RecordBatch]:
        for batch in rows.to_batches(batch_size=BATCH):
            values = pa.array(read_vectors(rows, batch).reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(values, type=kind)
            columns = [*batch.columns[:place], vectors, *batch.columns[place + 1 :]]
            yield pa.record_batch(columns, schema)

    is_new = name not in database.list_tables().tables
    table = database.create_table(name, schema=schema) if is_new else database.open_table(name)
    reader = pa.RecordBatchReader.from_batches(schema, read())
    merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    merge.execute(reader)
    return table


def is_held(kind: pa.DataType) -> bool:
    """Return whether LanceDB holds values of a type.

    It has no maps, list views, short decimals, and no fields of structs that are always null.
    """
    refused = ("map", "list_view", "large_list_view", "decimal32", "decimal64")
    if any(getattr(pa.types, f"is_{name}")(kind) for name in refused):
        return False
    fields = [kind.field(number).type for number in range(kind.num_fields)]
    return all(map(is_held, fields)) and not (pa.types.is_struct(kind) and pa.null() in fields)


def search(
    table: lancedb.Table, vector: np.ndarray, k: int
) -> list[tuple[str, dict[str, Any], float]]:
    """Return texts, metadata and cosines of the nearest rows."""
    columns = [name for name in table.schema.names if name != "vector"]
    query = table.search(vector, vector_column_name="vector").metric("cosine").limit(k)
    found = query.select([*columns, "_distance"]).to_list()
    return [(row.pop("text") or "", row, 1 - row.pop("_distance")) for row in found]
