"""One fragment of the input to one file of vectors, in any process."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared_engine.backend import Rows
from shared_engine.bulk import files, manifest
from shared_engine.bulk.job import Fragment, Job, take_fingerprint
from shared_engine.bulk.manifest import Done
from shared_engine.bulk.rows import Window, open_table, read_windows
from shared_engine.bulk.tables import Cursors
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import (
    EngineClosedError,
    InputError,
    InvalidRequestError,
    NeMoRetrieverError,
    PayloadTooLargeError,
)
from shared_engine.stream import Stream
from shared_engine.vectors import EmbeddingType, quantize

WINDOW = 1_024
"""Texts that are read, embedded and written together; three such windows are in memory."""
IMAGE_WINDOW = 16
"""The most rows with images of a window; their pixels may be 8 MB each."""
_IMAGE_BYTES = 1 << 24
"""The most bytes of the images of a table in a window; a larger image has its own window."""

_OF_THE_ROW = (InputError, InvalidRequestError, PayloadTooLargeError)
"""Errors that a row causes each time; after any other, the run must be tried again."""

_VALUES: dict[EmbeddingType, Any] = {
    "float": pa.float32(), "int8": pa.int8(), "uint8": pa.uint8(),
    "binary": pa.int8(), "ubinary": pa.uint8(),
}  # fmt: skip


def embed_fragment(  # noqa: PLR0917
    job: Job,
    embedder: Embedder,
    fragment: Fragment,
    on_rows: Callable[[int, int, int], object] | None = None,
    on_read: Callable[[], object] | None = None,
    cursors: Cursors | None = None,
    on_stream: Callable[[Stream[Rows]], object] | None = None,
) -> Done:
    """Write `vectors/<name>.parquet`, and `errors/<name>.parquet` if rows failed.

    Each file is written under a temporary name and renamed, errors first. A second call writes the
    same again. Memory is that of a few windows of rows. Safe in several threads with one embedder.
    Call `manifest.open_folder` first.

    Args:
        on_rows: called after each window with the rows embedded, rows failed and tokens it added.
        on_read: called once all rows are submitted. Begin the next fragment then, and the device
            does not wait for it.
        cursors: holds the file open between fragments, which saves seeks in it. It may be used
            again after `on_read`.
        on_stream: called with the stream of the rows. Another thread ends the fragment by closing
            the stream; what it raises then is an EngineClosedError.

    Raises:
        InputError: the source cannot be read, or changed since it was listed; with `job.strict`
            also the first row that cannot be embedded. Other fragments are not affected.
        ConfigurationError: the folder holds vectors of another engine; the options cannot work.
        OutputError: the files cannot be written: no space, no permission.
        RemoteError, EngineError, EngineClosedError: as with `Embedder.stream`; stop the run.
    """
    start = time.monotonic()
    # Counts its own tokens. Numbers are quantized here, after the rows that failed are taken out.
    own = embedder.with_options(show_progress=False, embedding_type="float")
    schema = manifest.read_schema(job)
    facts = manifest.describe_engine(job, embedder)
    _check_unchanged(fragment)
    failed: list[dict[str, Any]] = []
    rows = 0
    reported = (0, 0, 0)

    def report() -> None:
        nonlocal reported
        now = (rows, len(failed), own.usage)
        if on_rows is not None and now != reported:
            on_rows(*(new - old for new, old in zip(now, reported, strict=True)))
        reported = now

    def fail(number: int, id_: Any, error: NeMoRetrieverError) -> None:
        error = error.at(None) if isinstance(error, InputError) else error
        if job.strict:
            raise InputError(f"{fragment.title}, row {number}, id {id_!r}: {error}")
        failed.append(manifest.make_error_row(fragment.title, number, id_, error))

    def read(size: int, cursors: Cursors) -> Iterator[Window]:
        for window in read_windows(job, fragment, schema, size, cursors):
            for number, id_, reason in window.refused:
                fail(number, id_, InputError(reason))
            yield window

    vectors_path = os.path.join(job.out, "vectors", f"{fragment.name}.parquet")
    with ExitStack() as stack:
        cursors = cursors or stack.enter_context(closing(Cursors()))
        size = find_window(job, fragment)
        if job.image_column is not None:  # a few at a time where they are large
            row = open_table(job, fragment, cursors).measure_row(fragment.first, fragment.rows)
            size = max(1, min(size, _IMAGE_BYTES // max(1, row)))
        stack.enter_context(files.writing(vectors_path))
        temporary = stack.enter_context(files.write_atomically(vectors_path))
        with open_writer(temporary, job, schema, own.dimensions, facts) as writer:
            windows = read(size, cursors)
            for kept, found in embed_windows(own, job.role, windows, size, on_read, on_stream):
                for row, error in sorted(found.errors.items()):
                    fail(kept[0][row].as_py(), kept["id"][row].as_py(), error)
                write_rows(writer, kept, found, job.options.embedding_type)
                rows += len(found) - len(found.errors)
                report()
            report()
            if rows + len(failed) != fragment.rows:  # never a file with some of the rows
                raise EngineClosedError(f"{fragment.title}: the run was stopped")
            _check_unchanged(fragment)
            manifest.describe_engine(job, embedder)  # another process may have replaced it
            writer.add_key_value_metadata(
                {
                    "rows": str(rows),
                    "failed": str(len(failed)),
                    "tokens": str(own.usage),
                    "seconds": str(time.monotonic() - start),
                    "source": fragment.title,
                    "fingerprint": fragment.fingerprint,
                }
            )
        _write_errors(job, fragment, schema, failed)
    return Done(fragment.name, rows, len(failed), own.usage)


def find_window(job: Job, fragment: Fragment) -> int:
    """Return how many rows of a fragment are embedded together, at most."""
    if fragment.table:
        return WINDOW if job.image_column is None else IMAGE_WINDOW
    return WINDOW if fragment.is_pdf and job.pdf == "text" else IMAGE_WINDOW


def embed_windows(  # noqa: PLR0917
    embedder: Embedder,
    role: Role,
    windows: Iterable[Window],
    size: int,
    on_read: Callable[[], object] | None = None,
    on_stream: Callable[[Stream[Rows]], object] | None = None,
) -> Iterator[tuple[Any, Rows]]:
    """Yield `size` rows at a time: the table of what is kept of them, and their `Rows`."""
    held: deque[Any] = deque()

    def read() -> Iterator[str | EmbeddingInput]:
        for window in windows:
            held.append(window.kept)
            yield from window.documents
        if on_read is not None:
            on_read()

    with closing(embedder.stream(read(), role, size, errors="return")) as stream:
        if on_stream is not None:
            on_stream(stream)
        for rows in stream:
            check_errors(rows)
            table = pa.concat_tables(held)
            held.clear()
            held.append(table.slice(len(rows)))
            yield table.slice(0, len(rows)), rows


def check_errors(rows: Rows) -> None:
    """Raise the first error that no row is to blame for."""
    for error in rows.errors.values():
        if not isinstance(error, _OF_THE_ROW):
            raise error


def open_writer(path: str, job: Job, schema: Any, width: int, facts: dict[str, str]) -> Any:
    """Return a writer of ids, kept columns and vectors (fixed-size lists) with metadata."""
    kind = job.options.embedding_type
    if kind in ("binary", "ubinary"):
        width = -(-width // 8)
    vector = pa.field("vector", pa.list_(pa.field("item", _VALUES[kind], False), width), False)
    return pq.ParquetWriter(
        path,
        pa.schema([*schema, vector], facts),
        compression={**dict.fromkeys(schema.names, "zstd"), "vector.list.element": "none"},
        # Parquet stores an int8 as four bytes; a dictionary of 256 entries makes it one again.
        use_dictionary=False if kind == "float" else ["vector.list.element"],
        write_statistics=list(schema.names),
        write_page_checksum=True,  # readers that verify it find damage inside a file
    )


def write_rows(writer: Any, kept: Any, rows: Rows, kind: EmbeddingType) -> None:
    """Write the rows that have a vector."""
    vectors = rows.vectors
    if rows.errors:
        good = [row for row in range(len(rows)) if row not in rows.errors]
        if not good:
            return
        kept, vectors = kept.take(good), vectors[good]
    vector = writer.schema.field("vector").type
    values = pa.array(quantize(vectors, kind).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, type=vector)
    writer.write_table(pa.table([*kept.columns[1:], column], schema=writer.schema))


def _write_errors(job: Job, fragment: Fragment, schema: Any, rows: list[dict[str, Any]]) -> None:
    """Write the file of errors, or remove one of an earlier try."""
    path = os.path.join(job.out, "errors", f"{fragment.name}.parquet")
    if not rows:
        files.remove(path)
        return
    errors = manifest.make_error_schema(schema.field("id").type)
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["index"]), schema=errors)
    with files.write_atomically(path) as temporary:
        pq.write_table(table, temporary)


def _check_unchanged(fragment: Fragment) -> None:
    if take_fingerprint(fragment.source, fragment.names) != fragment.fingerprint:
        raise InputError(f"{fragment.source} changed since it was listed; start the run again")
