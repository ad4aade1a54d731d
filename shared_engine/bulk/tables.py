"""Rows of Parquet files, read in order; the one place that casts foreign types and errors."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared_engine.bulk.urls import open_parquet
from shared_engine.errors import ConfigurationError, InputError, NeMoRetrieverError
from shared_engine.images.pages import Pages, open_pages

_BUFFER = 1 << 20
"""Bytes of a column that are read ahead: a whole row group may not fit into memory."""


@contextmanager
def reading(title: str) -> Iterator[None]:
    """Turn errors of Arrow and of the file system into an InputError of this input."""
    try:
        yield
    except NeMoRetrieverError:  # some are OSErrors or ValueErrors too
        raise
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise InputError(f"{title} cannot be read: {str(exc) or type(exc).__name__}") from exc


def require_columns(
    wanted: Iterable[str], found: Sequence[str], title: str, hint: str = ""
) -> None:
    """Check that a table has each column, once.

    Raises:
        ConfigurationError: a column is missing, or there twice.
    """
    for name in wanted:
        if (count := found.count(name)) != 1:
            problem = f"{count} columns {name!r}" if count else f"no column {name!r}"
            raise ConfigurationError(f"{title} has {problem}; it has {', '.join(found)}{hint}")


# Types

_SAME_VALUES = {
    pa.large_string(): pa.string(), pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(), pa.binary_view(): pa.binary(),
}  # fmt: skip


def simplify(kind: pa.DataType) -> pa.DataType:  # noqa: PLR0911
    """Return the type to keep values of a type as: without views, dictionaries, long offsets.

    >>> simplify(pa.dictionary(pa.int8(), pa.large_string()))
    DataType(string)
    """

    def inner(field: pa.Field) -> pa.Field:
        return field.with_type(simplify(field.type))

    if pa.types.is_dictionary(kind):
        return simplify(kind.value_type)
    if isinstance(kind, pa.JsonType):
        return simplify(kind.storage_type)
    if pa.types.is_list(kind):
        return pa.list_(inner(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(inner(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([inner(field) for field in kind])
    return _SAME_VALUES.get(kind, kind)


def cast(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return values as another type."""
    flat = simplify(values.type)
    try:
        values = values.cast(flat)
    except pa.ArrowNotImplementedError:  # a dictionary of views, which Polars writes
        values = pa.chunked_array([values.to_pylist()], flat)
    return values.cast(kind)


def find_id_type(kind: pa.DataType, name: str, title: str) -> pa.DataType:
    """Return the type of ids made of a column: an integer, or a text.

    Raises:
        ConfigurationError: the column's type has no ids.
    """
    kind = simplify(kind)
    if pa.types.is_integer(kind):
        return pa.uint64() if kind == pa.uint64() else pa.int64()
    is_text = kind in (pa.string(), pa.null()) or isinstance(kind, pa.UuidType)
    if is_text or pa.types.is_decimal(kind):
        return pa.string()
    raise ConfigurationError(
        f"{title}: column {name!r} holds {kind}; expected ids: integers, texts, UUIDs or decimals"
    )


def unify(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """Return a type for the values of two files: numbers become wider, all else becomes text."""
    if first == second:
        return first
    kinds = (first, second)
    is_one_decimal = sum(map(pa.types.is_decimal, kinds)) == 1 and pa.null() not in kinds
    if is_one_decimal or (pa.uint64() in kinds and any(map(pa.types.is_signed_integer, kinds))):
        return pa.string()  # Arrow would make them floats, or decimals of too few digits
    schemas = [pa.schema([("value", kind)]) for kind in kinds]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("value").type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.string()


def require_texts(kind: pa.DataType, name: str, title: str) -> None:
    """Check that a column can be read as texts.

    Raises:
        InputError: its type has no texts.
    """
    try:
        pa.nulls(0, simplify(kind)).cast(pa.string())
    except pa.ArrowNotImplementedError:
        raise InputError(f"{title}: column {name!r} holds {kind}; expected texts") from None


def cast_rows(column: pa.ChunkedArray, kind: pa.DataType) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """Return a column as another type, and the reasons of rows with values that it cannot hold.

    Every value has a text: lists, structs and maps become JSON, a duration has its unit, and bytes
    are UTF-8.
    """
    try:
        return _cast_checked(column, kind), {}
    except (pa.ArrowInvalid, UnicodeDecodeError):
        pass
    parts: list[pa.Array] = []
    reasons: dict[int, str] = {}
    for row in range(len(column)):
        try:
            parts += _cast_checked(column.take([row]), kind).chunks  # a slice has all children
        except (pa.ArrowInvalid, UnicodeDecodeError) as exc:
            parts.append(pa.nulls(1, kind))
            why = "it is not UTF-8" if kind == pa.string() else exc
            reasons[row] = f"holds a value that is no {kind}: {why}"
    return pa.chunked_array(parts), reasons


def read_texts(column: pa.ChunkedArray) -> tuple[list[str | None], dict[int, str]]:
    """Return the texts of a column, None for missing ones, and the reasons of `cast_rows`."""
    if pa.types.is_floating(column.type):  # a missing value of pandas is NaN
        column = pc.if_else(pc.is_nan(column), None, column)
    texts, reasons = cast_rows(column, pa.string())
    return texts.to_pylist(), reasons


def _cast_checked(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    has_no_cast = pa.types.is_nested(column.type) or isinstance(column.type, pa.UuidType)
    if kind == pa.string() and pa.types.is_duration(column.type):
        count = column.cast(pa.int64()).cast(kind)
        found = pc.binary_join_element_wise(count, column.type.unit, " ")
    elif kind == pa.string() and has_no_cast:
        texts = [None if value is None else _to_text(value) for value in column.to_pylist()]
        found = pa.chunked_array([texts], kind)
    else:
        found = cast(column, kind)
    found.validate(full=True)  # also the bytes of texts in lists and structs
    if pa.types.is_floating(kind):
        infinite = cast(column.filter(pc.is_inf(found)), pa.string())
        if pc.any(pc.match_substring_regex(infinite, "[0-9]")).as_py():  # not in "inf"
            raise pa.ArrowInvalid("it is out of range")
    return found


def _to_text(value: object) -> str:
    if isinstance(value, UUID):
        return str(value)
    return json.dumps(value, default=str, ensure_ascii=False)


# Rows


class Cursor:
    """Reads runs of rows from one Parquet file; a run that follows the last one needs no seek.

    Memory is that of a few pages and batches, whatever the size of the row groups. A seek reads the
    row group up to the wanted row. For one thread at a time.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)
        self._file = open_parquet(path, buffer_size=_BUFFER, pre_buffer=False)
        self._groups: list[pq.RowGroupMetaData] = [
            self._file.metadata.row_group(number) for number in range(self._file.num_row_groups)
        ]
        self._starts: list[int] = [0, *accumulate(group.num_rows for group in self._groups)]
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._held = pa.table({})
        """Rows of the last batch that were not returned yet."""
        self._at = -1
        """Number of the row that follows."""

    def read(self, first: int, rows: int, size: int) -> Iterator[pa.Table]:
        """Yield rows in tables of at most `size` rows; each is of one row group."""
        end = first + rows
        with reading(f"{self.path}, rows {first:,} to {end - 1:,},"):
            try:
                self._seek(first, size)
                while self._at < end:
                    yield self._take(min(size, end - self._at))
            except Exception:
                self._at = -1  # the next read opens its row group anew
                raise

    def limit_seek(self, row: int, cost: int) -> int:
        """Return a row of the same row group that a seek reaches for about `cost` bytes at most."""
        start = self._starts[self._find_group(row)]
        return min(row, start + cost // max(1, self.measure_row(row)))

    def measure_row(self, first: int, rows: int = 1) -> int:
        """Return the bytes of a mean row, decompressed, in the largest row group of some rows."""
        groups = self._groups[self._find_group(first) : self._find_group(first + rows - 1) + 1]
        sizes: list[int] = [self._measure_group(each) // max(1, each.num_rows) for each in groups]
        return max(sizes)

    def _measure_group(self, group: pq.RowGroupMetaData) -> int:
        sizes: Iterator[int] = (
            chunk.total_uncompressed_size
            for chunk in map(group.column, range(group.num_columns))
            if chunk.path_in_schema.partition(".")[0] in self.columns
        )
        return sum(sizes)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _find_group(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1

    def _seek(self, first: int, size: int) -> None:
        group = self._find_group(first)
        if not self._starts[group] <= self._at <= first:
            self._batches = self._read_groups(group, size)
            self._at, self._held = self._starts[group], pa.table({})
        while self._at < first:
            self._take(min(size, first - self._at))

    def _read_groups(self, group: int, size: int) -> Iterator[pa.RecordBatch]:
        for number in range(group, len(self._groups)):  # alone, so that a broken one costs no other
            yield from self._file.iter_batches(size, [number], self.columns, use_threads=False)

    def _take(self, most: int) -> pa.Table:
        """Return the rows that follow, one at least, of one batch."""
        while not self._held.num_rows:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError("the file has fewer rows than its footer counts")
            self._held = pa.Table.from_batches([batch]).select(self.columns)
        table, self._held = self._held.slice(0, most), self._held.slice(most)
        self._at += table.num_rows
        return table


class Cursors:
    """The file that is read now, a table or pages: a run of fragments of one file shares it."""

    def __init__(self) -> None:
        self._held: Cursor | Pages | None = None
        self._path = ""
        self._is_stopped = False

    def open(self, path: str, columns: Sequence[str]) -> Cursor:
        """Return a cursor of a file, where it was left.

        Raises:
            InputError: the file cannot be read.
        """
        held = self._held
        if not isinstance(held, Cursor) or (held.path, held.columns) != (path, list(columns)):
            self.close()
            with reading(path):
                self._held = held = Cursor(path, columns)
        return held

    def open_pages(self, path: str, title: str) -> Pages:
        """Return the pages of a file.

        Raises:
            PageError: the file cannot be read.
        """
        held = self._held
        if not isinstance(held, Pages) or self._path != path:
            self.close()
            self._held, self._path = (held := open_pages(path, title)), path
            if self._is_stopped:
                held.stop()
        return held

    def stop(self) -> None:
        """End the reads of pages, also in another thread; see `Pages.stop`."""
        self._is_stopped = True
        if isinstance(held := self._held, Pages):
            held.stop()

    def close(self) -> None:
        """Close the file that is open, if there is one."""
        if self._held is not None:
            self._held.close()
            self._held = None
