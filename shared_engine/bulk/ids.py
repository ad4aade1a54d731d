"""Ids that are there twice, found exactly and in little memory before anything is embedded.

Every id is hashed to 64 bits, and the hashes are laid into files by their value; each file is
sorted by itself. Only where two hashes are equal are the ids themselves compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared_engine.bulk import tables
from shared_engine.bulk.job import Fragment, Job
from shared_engine.bulk.manifest import writing
from shared_engine.errors import ConfigurationError

_AT_ONCE = 1 << 20
"""Ids of which the hashes are sorted at once, 8 MB; more where there were over _MOST files."""
_MOST = 512
_READ = 1 << 16


def check_ids(job: Job, fragments: Sequence[Fragment], schema: Any) -> None:
    """Read the column of ids of a whole job, if it has one.

    Raises:
        ConfigurationError: an id is there twice; names it and both rows.
        InputError: a source cannot be read.
        OutputError: no space for the hashes in the folder of results, 8 bytes per row.
    """
    if job.id_column is None or not any(fragment.rows for fragment in fragments):
        return
    count = sum(fragment.rows for fragment in fragments)
    files = min(_MOST, -(-count // _AT_ONCE))
    with writing(job.out), tempfile.TemporaryDirectory(dir=job.out, prefix=".ids-") as folder:
        for _, _, ids in _read_ids(job, fragments, schema):
            hashes = _hash(ids)
            where = hashes % np.uint64(files)
            for number in np.unique(where).tolist():
                with open(f"{folder}/{number}", "ab") as file:
                    file.write(hashes[where == number].tobytes())
        suspects: set[int] = set()
        for path in Path(folder).iterdir():
            hashes = np.fromfile(path, np.uint64)
            hashes.sort()
            suspects.update(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if suspects:
        _compare(job, fragments, schema, suspects)


def _compare(job: Job, fragments: Sequence[Fragment], schema: Any, suspects: set[int]) -> None:
    seen: dict[Any, str] = {}
    for fragment, first, ids in _read_ids(job, fragments, schema):
        for row, (mark, id_) in enumerate(zip(_hash(ids).tolist(), ids, strict=True)):
            if mark not in suspects or id_ is None:
                continue
            here = f"{fragment.title}, row {first + row}"
            if id_ in seen:
                raise ConfigurationError(
                    f"id {id_!r} is there twice: {seen[id_]}, and {here}; every id must be of one "
                    "row (without --id-column, ids are made of file and row)"
                )
            seen[id_] = here


def _read_ids(
    job: Job, fragments: Sequence[Fragment], schema: Any
) -> Iterator[tuple[Fragment, int, list[Any]]]:
    column = pa.schema([schema.field("id").with_name(job.id_column)])
    for fragment in fragments:
        part = tables.Range(fragment.first, fragment.rows, fragment.begin, fragment.end)
        first = fragment.first
        for table in tables.read_batches(fragment.source, part, column, _READ):
            yield fragment, first, table.column(0).to_pylist()
            first += table.num_rows


def _hash(ids: list[Any]) -> Any:
    """Return the hashes of ids, (n,) uint64; one that is missing has none like it."""
    # Python's own hash is of 64 bits, keyed for this process, and an integer's is itself.
    own = np.fromiter((hash(id_) for id_ in ids if id_ is not None), np.int64)
    return own.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
