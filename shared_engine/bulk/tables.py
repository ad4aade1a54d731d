"""Rows of tables: Parquet, Arrow files, CSV and JSON Lines, cut into ranges and read in windows."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from shared_engine.errors import InputError, NeMoRetrieverError

_AT_ONCE = 1024
"""Rows that are read at once."""
_BUFFER = 1 << 20
"""Bytes of a Parquet column that are read at once: a row group may not fit into memory."""
_LONGEST = 1 << 26
"""Bytes of a CSV's record: with one quote too many, all that follows would be of its row."""
_OPEN = re.compile(
    rb'(?:(?:"(?:[^"]++|"")*+"[^,]*+|[^",][^,]*+|),)*+'  # fields, of which quoted ones are closed
    rb'"(?:[^"]++|"")*+\Z'
)
"""A line of a CSV that ends within quotes; a quote is a letter but where a field begins with it."""
_LONE_CR = re.compile(rb"\r(?!\n)")
_HEAD = 1 << 22
"""Bytes at the head of a JSON file from which the types of its columns are told."""


class Range(NamedTuple):
    """Some consecutive rows of a table."""

    first: int
    rows: int
    begin: int = 0
    """First byte, in a file of text."""
    end: int = 0
    """The byte after the last."""


class Format(NamedTuple):
    """What a kind of table needs."""

    read_schema: Callable[[str], pa.Schema]
    split: Callable[[str, int], Iterator[Range]]
    read: Callable[[str, Range, pa.Schema], Iterator[pa.RecordBatch]]
    """Yield the rows of a range, of the columns in a schema; text is read as these types."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what Arrow and the file system raise into an error of this input."""
    try:
        yield
    except NeMoRetrieverError:  # some are OSErrors or ValueErrors too
        raise
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise InputError(f"{what} cannot be read: {str(exc) or type(exc).__name__}") from exc


# Parquet


def _split_parquet(path: str, rows: int) -> Iterator[Range]:
    yield from cut(pq.read_metadata(path).num_rows, rows)


def _read_parquet(path: str, part: Range, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, buffer_size=_BUFFER) as file:
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        groups, skip = _overlap(counts, part)
        batches = file.iter_batches(_AT_ONCE, row_groups=groups, columns=schema.names)
        yield from _limit(batches, skip, part.rows)


# Arrow files, which Feather files are


def _read_arrow_schema(path: str) -> pa.Schema:
    with pa.memory_map(path) as source:
        return pa.ipc.open_file(source).schema


def _count_arrow(source: Any) -> list[int]:
    one_column = pa.ipc.IpcReadOptions(included_fields=[0])  # the others are not decompressed
    file = pa.ipc.open_file(source, options=one_column)
    return [file.get_batch(n).num_rows for n in range(file.num_record_batches)]


def _split_arrow(path: str, rows: int) -> Iterator[Range]:
    with pa.memory_map(path) as source:
        yield from cut(sum(_count_arrow(source)), rows)


def _read_arrow(path: str, part: Range, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(path) as source:
        which, skip = _overlap(_count_arrow(source), part)
        file = pa.ipc.open_file(source)
        batches = (file.get_batch(n).select(schema.names) for n in which)
        yield from _limit(batches, skip, part.rows)


# Text


def _records(file: Any, quoted: bool) -> Iterator[bytes]:
    """Yield lines that are not blank; of a CSV records, which may have line ends in quotes."""
    lines: list[bytes] = []
    size = rows = 0
    is_open = False
    for line in file:
        lines.append(line)
        size += len(line)
        if quoted and (is_open or b'"' in line):  # an open field goes on as one that begins does
            is_open = _OPEN.match(b'"' + line if is_open else line) is not None
        if is_open:
            if size > _LONGEST:
                break
            continue
        record = b"".join(lines)
        yield b"" if record.isspace() else record  # an empty one counts for the position alone
        rows += not record.isspace()
        lines, size = [], 0
    if lines:
        raise ValueError(f"row {rows} has a quote that is not closed")


def _split_text(path: str, rows: int, quoted: bool) -> Iterator[Range]:
    with open(path, "rb") as file:
        begin = _skip_head(file, quoted)
        first = count = 0
        lines = _Counted(file, begin)
        for record in _records(lines, quoted):
            count += bool(record)
            if count == rows:
                yield Range(first, count, begin, lines.at)
                first, count, begin = first + count, 0, lines.at
        if count:
            yield Range(first, count, begin, lines.at)


class _Counted:
    """Lines of a file, and how far it was read."""

    def __init__(self, file: Any, at: int, end: int | None = None) -> None:
        self._file, self.at, self._end = file, at, end
        file.seek(at)

    def __iter__(self) -> Iterator[bytes]:
        for line in self._file:
            self.at += len(line)
            yield line
            if self._end is not None and self.at >= self._end:
                return


def _skip_head(file: Any, quoted: bool) -> int:
    """Return where the rows begin: after the names of a CSV's columns."""
    if not quoted:
        return 0
    lines = _Counted(file, 0)
    if _LONE_CR.search(_read_head(lines)):
        raise ValueError("its lines end with CR alone; expected LF, or CR and LF")
    return lines.at


def _read_head(lines: Iterable[bytes]) -> bytes:
    return next(filter(None, _records(lines, quoted=True)), b"")


def _read_text(path: str, part: Range, quoted: bool) -> Iterator[bytes]:
    """Yield the bytes of some rows at a time, those of a CSV with their head."""
    with open(path, "rb") as file:
        head = _read_head(file) if quoted else b""
        records = _records(_Counted(file, part.begin, part.end), quoted)
        kept = (
            record if record.endswith(b"\n") else record + b"\n" for record in records if record
        )
        while some := list(islice(kept, _AT_ONCE)):
            yield head + b"".join(some)


def _read_csv(path: str, part: Range, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    convert = pyarrow.csv.ConvertOptions(include_columns=schema.names, column_types=schema)
    for data in _read_text(path, part, quoted=True):
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        )
        yield from table.combine_chunks().to_batches()


def _read_json(path: str, part: Range, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    parse = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    for data in _read_text(path, part, quoted=False):
        options = pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1)
        table = pyarrow.json.read_json(io.BytesIO(data), options, parse)
        yield from table.combine_chunks().to_batches()


def _read_csv_schema(path: str) -> pa.Schema:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.open_csv(path, parse_options=parse).schema


def _read_json_schema(path: str) -> pa.Schema:
    with open(path, "rb") as file:
        lines = file.readlines(_HEAD)  # whole ones
    head = b"".join(line for line in lines if _is_json(line))  # others are for when they are read
    first = next(filter(None, map(bytes.strip, lines)), b"")
    if first[:1] == b"[" or (first and not head):
        raise ValueError(
            "expected JSON Lines: an object in each line, and none over several "
            "(jq -c . makes them of objects, jq -c '.[]' of an array)"
        )
    options = pyarrow.json.ReadOptions(block_size=len(head) + 1)
    return (
        pyarrow.json.read_json(io.BytesIO(head), options).schema if head.strip() else pa.schema([])
    )


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


_PARQUET = Format(pq.read_schema, _split_parquet, _read_parquet)
_ARROW = Format(_read_arrow_schema, _split_arrow, _read_arrow)
_CSV = Format(_read_csv_schema, lambda path, rows: _split_text(path, rows, True), _read_csv)
_JSON = Format(_read_json_schema, lambda path, rows: _split_text(path, rows, False), _read_json)
FORMATS = {
    ".parquet": _PARQUET, ".arrow": _ARROW, ".feather": _ARROW, ".csv": _CSV,
    ".jsonl": _JSON, ".ndjson": _JSON, ".json": _JSON,
}  # fmt: skip
"""Kinds of table, by the suffix of a file."""


def find_format(path: str) -> Format:
    """Return the kind of a table."""
    return FORMATS[os.path.splitext(path)[1].lower()]


def is_csv(path: str) -> bool:
    """Whether a table has no types of its own."""
    return find_format(path) is _CSV


def read_batches(path: str, part: Range, schema: pa.Schema, size: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a range in windows of `size`, but for the last, as a schema says.

    Raises:
        InputError: they cannot be read, are of other types, or fewer than were counted.
    """
    where = f"{path}, rows {part.first:,} to {part.first + part.rows - 1:,},"
    kind = find_format(path)
    if kind is not _JSON:  # where a column may be missing from some rows
        with reading(where):
            missing = set(schema.names) - set(kind.read_schema(path).names)
        if missing:
            raise InputError(f"{where} has no column {', '.join(sorted(missing))}")
    found = 0
    windows = _windows(kind.read(path, part, schema), size)
    while True:
        with reading(where):
            window = next(windows, None)
            if window is None:
                break
            window = window.select(schema.names).cast(schema)
        found += window.num_rows
        yield window
    if found != part.rows:
        raise InputError(f"{where} cannot be read: {found:,} rows where {part.rows:,} were counted")


def cut(count: int, rows: int) -> Iterator[Range]:
    """Yield the ranges of so many rows."""
    for first in range(0, count, rows):
        yield Range(first, min(rows, count - first))


def _overlap(counts: Sequence[int], part: Range) -> tuple[list[int], int]:
    """Return which of some pieces hold a range, and the rows to skip in the first of them."""
    which: list[int] = []
    skip = start = 0
    for number, count in enumerate(counts):
        if start < part.first + part.rows and start + count > part.first:
            skip = skip if which else part.first - start
            which.append(number)
        start += count
    return which, skip


def _limit(batches: Iterable[pa.RecordBatch], skip: int, rows: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        part = batch.slice(skip, rows)
        skip = max(0, skip - batch.num_rows)
        rows -= part.num_rows
        if part.num_rows:
            yield part
        if not rows:
            return


def _windows(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += batch.num_rows
        while count >= size:
            table = pa.Table.from_batches(held)
            yield table.slice(0, size)
            held = table.slice(size).to_batches()
            count -= size
    if count:
        yield pa.Table.from_batches(held)
