"""Into a FAISS index: vectors and integers, nothing else.

No texts and no metadata: they stay in the Parquet files and are read by the row's number. No ids
but integers: the row's number in the files, sorted by name. No update: an index is built anew, in
one go (`IndexFlatIP` is exact; `index_factory(n, "IVF4096,PQ64")` and `train` are for millions).
Packed bits are for an `IndexBinaryFlat(8 * n)`, which this recipe does not make.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from cookbook.stores.rows import BATCH, is_any, open_rows, read_vectors


def load(folder: Path, path: Path) -> None:
    """Write an index of all rows of `folder/vectors` to a file, in the place of the last one."""
    rows = open_rows(folder, is_held=is_any)
    index = faiss.IndexFlatIP(rows.schema.field("vector").type.list_size)
    for batch in rows.to_batches(columns=["vector"], batch_size=BATCH):
        index.add(read_vectors(rows, batch))
    beside = path.with_suffix(".part")
    faiss.write_index(index, str(beside))
    beside.replace(path)


def open_search(
    folder: Path, path: Path
) -> Callable[[np.ndarray, int], list[tuple[str, dict[str, Any], float]]]:
    """Return a function that gives texts, metadata and cosines of the nearest rows.

    Raises:
        ValueError: the folder does not have as many rows as the index.
    """
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    rows = open_rows(folder, is_held=is_any)
    if index.ntotal != (count := rows.count_rows()):
        raise ValueError(
            f"{path} holds {index.ntotal} rows, but {folder} has {count}; load the folder again"
        )
    columns = [name for name in rows.schema.names if name != "vector"]

    def search(vector: np.ndarray, k: int) -> list[tuple[str, dict[str, Any], float]]:
        scores, found = index.search(vector.reshape(1, -1), min(k, index.ntotal))
        kept = rows.take(found[0], columns=columns).to_pylist()
        each = zip(kept, scores[0], strict=True)
        return [(row.pop("text") or "", row, float(cosine)) for row, cosine in each]

    return search
