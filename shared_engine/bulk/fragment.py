"""One fragment of input to one file of vectors, in whatever process."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared_engine.bulk import manifest
from shared_engine.bulk.job import Fragment, Job, take_fingerprint
from shared_engine.bulk.manifest import Done
from shared_engine.bulk.rows import Rows, read_rows
from shared_engine.documents import EmbeddingInput
from shared_engine.embedder import Embedder
from shared_engine.errors import (
    InputError,
    InvalidRequestError,
    NeMoRetrieverError,
    PayloadTooLargeError,
)
from shared_engine.vectors import EmbeddingType, quantize

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW = 1_024
"""Texts that are read, embedded and written at once; three such windows are in memory."""
IMAGE_WINDOW = 16
"""The same of rows with images, whose pixels may be 8 MB each."""

_OF_THE_ROW = (InputError, InvalidRequestError, PayloadTooLargeError)
"""Errors that come again whenever the row does; with any other, the run must be tried again."""

_VALUES: dict[EmbeddingType, Any] = {
    "float": pa.float32(), "int8": pa.int8(), "uint8": pa.uint8(),
    "binary": pa.int8(), "ubinary": pa.uint8(),
}  # fmt: skip

_ERRORS = (
    ("reason", pa.string()), ("kind", pa.string()), ("source", pa.string()), ("index", pa.int64()),
)  # fmt: skip


def embed_fragment(
    job: Job,
    embedder: Embedder,
    fragment: Fragment,
    on_rows: Callable[[int, int, int], object] | None = None,
    on_read: Callable[[], object] | None = None,
) -> Done:
    """Write `vectors/<name>.parquet`, and `errors/<name>.parquet` where rows failed.

    Each is written beside and then renamed, errors first; done twice, the same is written again.
    Memory is that of a few windows of rows. `on_rows(rows, failed, tokens)` is called after each
    window with what it added; `on_read()` once all rows are submitted: time to begin the next
    fragment, so that the device goes on. Safe in several threads with one embedder.
    `manifest.open_folder` comes first.

    Raises:
        InputError: the source cannot be read, or changed since it was listed; with `job.strict`
            also the first row that cannot be embedded. Other fragments are not concerned.
        ConfigurationError: the folder holds vectors of another engine; the options cannot work.
        OutputError: the files cannot be written: no space, no permission.
        RemoteError, EngineError, EngineClosedError: as with `Embedder.stream`; the run should stop.
    """
    start = time.monotonic()
    # It counts its own tokens; numbers become another type here, once it is known which are right.
    own = embedder.with_options(show_progress=False, embedding_type="float")
    schema = manifest.read_schema(job)
    facts = manifest.describe_engine(job, embedder)
    _check_unchanged(fragment)
    windows = read_rows(job, fragment, schema, find_window(job, fragment))
    vectors_path = os.path.join(job.out, "vectors", f"{fragment.name}.parquet")
    errors_path = os.path.join(job.out, "errors", f"{fragment.name}.parquet")
    rows = failed = told = 0
    bad: list[Any] = []
    with manifest.writing(vectors_path), manifest.write_beside(vectors_path) as beside:
        with open_writer(beside, job, schema, own.dimensions, facts) as writer:
            for window, vectors, errors in embed_windows(job, own, windows, on_read):
                if errors:
                    table = _name_errors(fragment, window, errors, fragment.first + rows + failed)
                    if job.strict:
                        raise _first_error(table)
                    bad.append(table)
                write_window(writer, window, vectors, errors, job.options.embedding_type)
                good = len(window.documents) - len(errors)
                rows, failed = rows + good, failed + len(errors)
                if on_rows is not None:
                    tokens = own.usage
                    on_rows(good, len(errors), tokens - told)
                    told = tokens
            _check_unchanged(fragment)
            seconds = time.monotonic() - start
            counts = {"rows": rows, "failed": failed, "tokens": own.usage, "seconds": seconds}
            writer.add_key_value_metadata(
                {name: str(value) for name, value in counts.items()}
                | {"source": fragment.title, "fingerprint": fragment.fingerprint}
            )
        if bad:
            with manifest.write_beside(errors_path) as errors_beside:
                pq.write_table(pa.concat_tables(bad), errors_beside)
        else:
            Path(errors_path).unlink(missing_ok=True)
    return Done(fragment.name, rows, failed, own.usage, seconds)


def find_window(job: Job, fragment: Fragment) -> int:
    """Return how many rows of a fragment are embedded at once."""
    has_images = fragment.names or job.image_column is not None
    if fragment.source.lower().endswith(".pdf"):
        has_images = job.pdf != "text"
    return IMAGE_WINDOW if has_images else WINDOW


def embed_windows(
    job: Job,
    embedder: Embedder,
    windows: Iterator[Rows],
    on_read: Callable[[], object] | None = None,
) -> Iterator[tuple[Rows, NDArray[Any], dict[int, NeMoRetrieverError]]]:
    """Yield windows with the vectors (n, d) float32 of their rows, and the errors of failed rows.

    All windows but the last have the same size.
    """
    first = next(windows, None)
    if first is None:
        return
    held: deque[Rows] = deque()

    def read() -> Iterator[str | EmbeddingInput]:
        for window in chain([first], windows):
            held.append(window)
            for row, document in enumerate(window.documents):
                yield EmbeddingInput() if row in window.refused else document
        if on_read is not None:
            on_read()

    with closing(
        embedder.stream(read(), job.role, len(first.documents), errors="return")
    ) as stream:
        for found in stream:
            window = held.popleft()
            errors = dict(found.errors)
            errors |= {row: InputError(reason) for row, reason in window.refused.items()}
            for error in errors.values():
                if not isinstance(error, _OF_THE_ROW):
                    raise error
            yield window, found.vectors, errors


def open_writer(path: str, job: Job, schema: Any, width: int, facts: dict[str, str]) -> Any:
    """Return a writer of ids, kept columns and vectors (fixed-size lists) with metadata."""
    kind = job.options.embedding_type
    if kind in ("binary", "ubinary"):
        width = -(-width // 8)
    vector = pa.field("vector", pa.list_(pa.field("item", _VALUES[kind], False), width), False)
    return pq.ParquetWriter(
        path,
        pa.schema([*schema, vector], {name: str(value) for name, value in facts.items()}),
        compression={**dict.fromkeys(schema.names, "zstd"), "vector.list.element": "none"},
        # Parquet has no bytes but in four: as numbers of 256 entries they are one again.
        use_dictionary=False if kind == "float" else ["vector.list.element"],
        write_statistics=list(schema.names),
    )


def write_window(
    writer: Any,
    window: Rows,
    vectors: NDArray[Any],
    errors: dict[int, NeMoRetrieverError],
    kind: EmbeddingType,
) -> None:
    """Write the rows of a window that have a vector."""
    kept = window.kept
    if errors:
        good = [row for row in range(len(window.documents)) if row not in errors]
        if not good:
            return
        kept, vectors = kept.take(good), vectors[good]
    vector = writer.schema.field("vector").type
    values = pa.array(quantize(vectors, kind).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, type=vector)
    writer.write_table(pa.table([*kept.columns, column], schema=writer.schema))


def _check_unchanged(fragment: Fragment) -> None:
    if take_fingerprint(fragment.source, fragment.names) != fragment.fingerprint:
        raise InputError(
            f"{fragment.source} changed since it was listed; begin again once it is as it should be"
        )


def _name_errors(
    fragment: Fragment, window: Rows, errors: dict[int, NeMoRetrieverError], first: int
) -> Any:
    rows = sorted(errors)
    columns = [
        [_name_reason(errors[row]) for row in rows],
        [type(errors[row]).__name__ for row in rows],
        [fragment.title] * len(rows),
        [first + row for row in rows],
    ]  # fmt: skip
    ids = window.kept["id"].take(rows)
    fields = pa.schema([window.kept.schema.field("id"), *_ERRORS])
    return pa.table([ids, *columns], schema=fields)


def _name_reason(error: NeMoRetrieverError) -> str:
    return str(error.at(None) if isinstance(error, InputError) else error)


def _first_error(table: Any) -> InputError:
    row = table.slice(0, 1).to_pylist()[0]
    return InputError(f"{row['source']}, row {row['index']}, id {row['id']!r}: {row['reason']}")
