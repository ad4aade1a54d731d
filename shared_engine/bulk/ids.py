"""Find ids that two rows share, exactly and in little memory, before anything is embedded.

Every id is hashed to 64 bits, and the hashes are laid into files by their value; each file is
sorted by itself. Only ids with equal hashes are compared themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_engine.bulk.files import TEMPORARY, writing
from shared_engine.bulk.job import Fragment, Job
from shared_engine.bulk.tables import Cursors, cast_rows, reading
from shared_engine.bulk.urls import is_url
from shared_engine.errors import ConfigurationError, InputError

_AT_ONCE = 1 << 20
"""Hashes that are sorted together, 8 MB; more if there were over _MOST files."""
_MOST = 512
_READ = 1 << 16


def check_ids(job: Job, fragments: Sequence[Fragment], schema: Any) -> None:
    """Check that every id of a job is there once; missing ids do not count.

    Fragments that cannot be read are left to the run.

    Raises:
        ConfigurationError: two rows have the same id; names it and both rows.
        OutputError: no space for the hashes, 8 bytes per row: in the folder of results, or in that
            for temporary files if the results are in an object store.
    """
    if job.id_column is None:
        return
    count = sum(fragment.rows for fragment in fragments)
    number_of_files = np.uint64(max(1, min(_MOST, -(-count // _AT_ONCE))))
    suspects: set[int] = set()
    above = tempfile.gettempdir() if is_url(job.out) else job.out
    with writing(above), tempfile.TemporaryDirectory(TEMPORARY, ".ids-", above) as folder:
        for _, _, ids in _read_ids(job, fragments, schema):
            hashes = _hash(ids)
            where = hashes % number_of_files
            for number in np.unique(where).tolist():
                with open(f"{folder}/{number}", "ab") as file:
                    file.write(hashes[where == number].tobytes())
        for path in Path(folder).iterdir():
            hashes = np.sort(np.fromfile(path, np.uint64))
            suspects.update(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: dict[Any, str] = {}
    for fragment, numbers, ids in _read_ids(job, fragments, schema) if suspects else ():
        for number, id_, hash_ in zip(numbers, ids, _hash(ids).tolist(), strict=True):
            if hash_ in suspects:
                here = f"{fragment.title}, row {number}"
                if id_ in seen:
                    raise ConfigurationError(
                        f"id {id_!r} occurs twice: {seen[id_]}, and {here}; every row needs a "
                        "unique id (without --id-column, ids are made of file and row)"
                    )
                seen[id_] = here


def _read_ids(
    job: Job, fragments: Sequence[Fragment], schema: Any
) -> Iterator[tuple[Fragment, list[int], list[Any]]]:
    """Yield some rows that have an id: their fragment, their numbers in the source, their ids."""
    with closing(Cursors()) as cursors:
        for fragment in fragments:
            first = fragment.first
            try:
                cursor = cursors.open(fragment.table, [str(job.id_column)])
                for table in cursor.read(first, fragment.rows, _READ):
                    with reading(fragment.title):
                        column, _ = cast_rows(table[0], schema.field("id").type)
                    ids = column.to_pylist()
                    rows = [row for row, id_ in enumerate(ids) if id_ not in (None, "")]
                    yield fragment, [first + row for row in rows], [ids[row] for row in rows]
                    first += table.num_rows
            except InputError:
                continue


def _hash(ids: list[Any]) -> NDArray[np.uint64]:
    """Return the hashes of ids, (n,)."""
    # Python's own hash is of 64 bits and keyed for this process, but an integer's is the integer.
    own = np.fromiter(map(hash, ids), np.int64, len(ids))
    return own.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
