"""Tables of other formats, streamed into Parquet once: CSV, TSV, JSON Lines, lines and Arrow.

Values of text formats stay texts: nothing guesses their types. Arrow's own readers of CSV and JSON
stop at the first bad byte and change numbers, so Python's read these: a record that cannot be read
becomes a row with the reason in the column REASON, and the rows after it keep their numbers.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TextIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from shared_engine.bulk.files import make_folder, write_atomically, writing
from shared_engine.bulk.tables import cast, reading, require_columns, simplify
from shared_engine.bulk.urls import is_url, locate, open_parquet
from shared_engine.errors import InputError

REASON = "nemoretriever:reason"
"""Column of a converted text table: why a record cannot be read; null in all other rows."""
_LONGEST = 1 << 24
"""Characters of a CSV field or of a line of JSON. After an opening quote that is never closed, so
much is read before the record is given up."""
_BUFFER = 1 << 20
_GROUP_BYTES = 1 << 25
"""Bytes of values in a row group, about: a group is in memory while it is written."""

_Record = list[str | None] | str
"""The values of the wanted columns, or why the record cannot be read."""


def convert(  # noqa: PLR0917
    path: str,
    title: str,
    target: str,
    columns: Mapping[str, bool],
    rows: int,
    fingerprint: str,
    dialect: Mapping[str, Any],
) -> None:
    """Write some columns of a table to a Parquet file, unless it holds them already.

    Args:
        title: name of the table in messages.
        target: the Parquet file, written as a whole or not at all.
        columns: names, each with whether the column is only kept; JSON in others is refused.
        rows: the most rows in a row group.
        fingerprint: changes when the table does; a target with the same one is kept.
        dialect: see `Job.dialect`.

    Raises:
        InputError: the table cannot be read.
        ConfigurationError: a column is missing, or there twice.
        OutputError: the target cannot be written.
    """
    facts = {"fingerprint": fingerprint, "columns": json.dumps([*columns, dialect])}
    with suppress(pa.ArrowException, OSError), open_parquet(target) as file:
        found = file.metadata.metadata or {}
        if all(found.get(name.encode()) == value.encode() for name, value in facts.items()):
            return
    with writing(target):
        make_folder(os.path.dirname(target))
        groups = _read_groups(path, title, columns, max(rows, 1024), dialect)
        schema = next(groups)
        with write_atomically(target) as temporary:
            try:
                with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                    for group in groups:
                        writer.write_table(group)
                    writer.add_key_value_metadata(facts)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as exc:  # none of Parquet's types
                raise InputError(f"{title} cannot be read: {exc}") from exc


def _read_groups(
    path: str, title: str, columns: Mapping[str, bool], rows: int, dialect: Mapping[str, Any]
) -> Iterator[Any]:
    """Yield the schema, then the row groups of a table."""
    with reading(title):
        if (suffix := find_suffix(path)) in _ARROW:
            yield from _read_arrow(path, columns, rows)
        else:
            dialect = {"delimiter": "\t" if suffix == ".tsv" else ",", **dialect}
            yield from _make_groups(TEXT[suffix](path, columns, dialect), columns, rows)


# Text


def _make_groups(
    records: Iterator[_Record], columns: Mapping[str, bool], rows: int
) -> Iterator[Any]:
    """Yield the schema, then the row groups of records."""
    schema = pa.schema([(name, pa.string()) for name in (*columns, REASON)])
    yield schema
    size = 0
    values: list[list[str | None]] = [[] for _ in schema]
    for record in records:
        for column, value in zip(values, _check(record, columns), strict=True):
            column.append(value)
            size += len(value or "")
        if len(values[0]) == rows or size >= _GROUP_BYTES:
            yield pa.table(values, schema=schema)
            size = 0
            values = [[] for _ in schema]
    if values[0]:
        yield pa.table(values, schema=schema)


def _check(record: _Record, columns: Mapping[str, bool]) -> list[str | None]:
    """Return a row: values and no reason, or no values and the reason."""
    if not isinstance(record, str):
        try:
            for value in record:
                (value or "").encode()
            return [*record, None]
        except UnicodeEncodeError as exc:
            name = list(columns)[record.index(exc.object)]
            record = (
                f"holds bytes that are not UTF-8 in column {name!r}, at {exc.start}; convert the "
                "file first, as by iconv -f CP1252 -t UTF-8"
            )
    return [*(None for _ in columns), record]


def _open_text(path: str, newline: str | None) -> TextIO:
    """Open a UTF-8 file, compressed or not; bytes that are not UTF-8 become lone surrogates."""
    system, inner = locate(path)
    compression = _COMPRESSED.get(os.path.splitext(path.lower())[1])
    file = io.BufferedReader(system.open_input_stream(inner, compression=compression), _BUFFER)
    head = file.peek(8)[:8]
    problem = next((what for start, what in _NO_TEXT.items() if head.startswith(start)), "")
    if not problem and (head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:4]):
        problem = "UTF-16; convert it first, as by iconv -f UTF-16 -t UTF-8"
    if problem:
        file.close()
        raise ValueError(f"it is {problem}")
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline)


def _read_csv(path: str, columns: Mapping[str, bool], dialect: dict[str, Any]) -> Iterator[_Record]:
    r"""Yield records, without blank lines; empty fields, and ids and texts `\N`, are None.

    A first line such as `sep=;`, as Excel reads it, gives the delimiter. A record with a quote that
    is not closed, or closed in the middle of a field, ends with its first line, so that it costs no
    other. So does a record of TSV whose lines are each a record if quotation marks are text.
    """
    limit = csv.field_size_limit(_LONGEST)
    names: list[str] = list(dialect.pop("header", ()))
    try:
        with _open_text(path, newline="") as file:
            taken: list[str] = []
            again = deque([file.readline()])
            if found := re.fullmatch(r"sep=(.)\r?\n?", again[0]):  # Excel's, before the names
                dialect["delimiter"] = found[1]
                again.clear()

            def take_line() -> str:
                taken.append(again.popleft() if again else file.readline())
                return taken[-1]

            def parse() -> Iterator[list[str]]:
                return csv.reader(iter(take_line, ""), strict=True, **dialect)

            records = parse()
            names = names or next(filter(None, records), [])
            if not names:
                return  # an empty file, as Spark writes them
            hint = " (--delimiter sets the delimiter, --header the names if the file has none)"
            require_columns(columns, names, path, hint)
            where = [  # a kept value stays as it is
                (names.index(name), ("",) if is_kept else ("", r"\N"))
                for name, is_kept in columns.items()
            ]
            tabs = len(names) - 1
            is_tsv = dialect["delimiter"] == "\t" and tabs > 0
            while True:
                taken.clear()
                try:
                    record = next(records)
                    is_joined = is_tsv and len(taken) > 1
                    if is_joined and all(line.count("\t") == tabs for line in taken):
                        raise csv.Error("a quoted field holds the start of another record")
                except StopIteration:
                    return
                except csv.Error as exc:
                    again.extendleft(reversed(taken[1:]))
                    records = parse()
                    hint = "; --no-quotes takes quotation marks as text" * ('"' in taken[0])
                    if r"\"" in taken[0]:
                        hint = """; write \\" as "", as Spark does with escape='"'"""
                    yield f"is not valid CSV: {exc}{hint}"
                    continue
                if len(record) == len(names):
                    yield [None if record[at] in missing else record[at] for at, missing in where]
                elif record:
                    yield f"has {len(record)} fields; expected {len(names)}"
    except csv.Error as exc:
        raise ValueError(str(exc)) from exc
    finally:
        csv.field_size_limit(limit)


class _Number(str):
    """The digits of a JSON number."""

    __slots__ = ()


_decode = json.JSONDecoder(parse_float=_Number, parse_int=_Number, parse_constant=_Number).decode


def _to_text(value: Any) -> str | None:
    """Return a JSON value as text: strings and digits as they are, the others as JSON.

    >>> [_to_text(value) for value in _decode('["1.10", 1.10, "", null, true, {"a": [1.10]}]')]
    ['1.10', '1.10', '', None, 'true', '{"a":[1.10]}']
    """
    if value is None or isinstance(value, str):
        return None if value is None else str(value)
    passed = orjson.OPT_PASSTHROUGH_SUBCLASS  # numbers go to `default`
    return orjson.dumps(value, lambda number: orjson.Fragment(str(number)), passed).decode()


def _take_members(found: dict[str, Any], columns: Mapping[str, bool]) -> _Record:
    """Return the wanted members of an object, or why one that is not only kept is no text.

    A missing value of pandas is NaN.
    """
    record: list[str | None] = []
    for name, is_kept in columns.items():
        value = found.get(name)
        if not is_kept and isinstance(value, (list, dict, bool)):
            return f"holds a {type(value).__name__} in column {name!r}; expected a text"
        is_missing = not is_kept and isinstance(value, _Number) and value == "NaN"
        record.append(None if is_missing else _to_text(value))
    return record


def _read_json(path: str, columns: Mapping[str, bool], _: object) -> Iterator[_Record]:
    """Yield the wanted members of each object; an object without one of them has None.

    Raises:
        ValueError: the file is no JSON Lines.
        ConfigurationError: no object has a wanted member.
    """
    names: dict[str, None] = {}
    missing = set(columns)
    has_good = has_bad = False
    with _open_text(path, newline="\n") as file:
        while line := file.readline(_LONGEST):
            if line.isspace():
                continue
            record: _Record
            try:
                found = _decode(_require_whole(line, file))
                if not isinstance(found, dict):
                    raise ValueError(f"it is a {type(found).__name__}")
                record = _take_members(found, columns)
            except (ValueError, TypeError, RecursionError) as exc:
                record = f"is not a JSON object: {exc}"
                has_bad = True
                if not has_good and line.strip() == "[":
                    break
            else:
                has_good = True
                if missing:
                    missing.difference_update(found)
                    names |= dict.fromkeys(found)
            yield record
    if has_bad and not has_good:
        raise ValueError(
            "expected JSON Lines: an object in each line, and none over several "
            "(jq -c . makes them of objects, jq -c '.[]' of an array)"
        )
    if has_good and missing:
        require_columns(sorted(missing), list(names), path)


def _read_lines(path: str, columns: Mapping[str, bool], _: object) -> Iterator[_Record]:
    """Yield each line that is not blank as the value of a column `text`."""
    require_columns(columns, ["text"], path)
    with _open_text(path, newline=None) as file:
        while line := file.readline(_LONGEST):
            if line.isspace():
                continue
            try:
                yield [_require_whole(line, file).removesuffix("\n")] * len(columns)
            except ValueError as exc:
                yield f"is not a line of text: {exc}"


def _require_whole(line: str, file: TextIO) -> str:
    """Return a line; refuse one that is longer than what was read of it, and skip its rest."""
    if len(line) < _LONGEST or line[-1] == "\n":
        return line
    while (rest := file.readline(_LONGEST)) and rest[-1] != "\n":
        pass
    raise ValueError(f"it has more than {_LONGEST:,} characters")


# Arrow


def _read_arrow(path: str, columns: Mapping[str, bool], rows: int) -> Iterator[Any]:
    """Yield the schema, then the row groups of an Arrow file or stream.

    One of its batches is in memory, of the wanted columns only.
    """
    system, inner = locate(path)
    with system.open_input_file(inner) if is_url(path) else pa.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
        found = open_reader(source).schema
        source.seek(0)
        require_columns(columns, found.names, path)
        schema = pa.schema([(name, simplify(found.field(name).type)) for name in columns])
        yield schema
        options = pa.ipc.IpcReadOptions(included_fields=list(map(found.get_field_index, columns)))
        reader = open_reader(source, options=options)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for first in range(0, batch.num_rows, rows):
                some = pa.Table.from_batches([batch.slice(first, rows)])
                yield pa.table([cast(some[f.name], f.type) for f in schema], schema=schema)


TEXT: dict[str, Callable[[str, Mapping[str, bool], dict[str, Any]], Iterator[_Record]]] = {
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json),
    ".txt": _read_lines,
}
"""Formats of text, by suffix; their converted tables have the column REASON."""
_ARROW = (".arrow", ".feather")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_NO_TEXT = {
    b"\x1f\x8b": "compressed by gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; add .zst to its name",
    b"BZh91AY&": "compressed by bzip2; add .bz2 to its name",
    b"PK\x03\x04": "an Excel or ZIP file; export the sheet as CSV, or unpack the file",
    b"\xd0\xcf\x11\xe0": "an Excel file; export the sheet as CSV",
}
"""First bytes of other formats, by which a file with a suffix of text is named."""
SUFFIXES = (*TEXT, *_ARROW)
"""Formats to convert."""


def find_suffix(path: str) -> str:
    """Return the suffix that gives a file's format, in lower case, without that of a compression.

    >>> [find_suffix(name) for name in ("a.csv.gz", "a.JSONL", "a.parquet", "a.parquet.gz")]
    ['.csv', '.jsonl', '.parquet', '.gz']
    """
    stem, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(stem)[1]
    return inner if suffix in _COMPRESSED and inner in TEXT else suffix
