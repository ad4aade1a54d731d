"""Values of tables come out as they went in, whatever the format, its types and its row groups."""

from __future__ import annotations

import csv
import json
import random
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared_engine.bulk.batch import EmbedBatch
from shared_engine.bulk.job import Job
from shared_engine.bulk.run import begin
from shared_engine.bulk.tables import Cursor
from shared_engine.cli.main import main
from shared_engine.errors import ConfigurationError
from tests.bulk.conftest import passages, run
from tests.conftest import ROOT

Make = Callable[..., Job]

_LONG = 2**63
VALUES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), st.text()),
    "large text": (pa.large_string(), st.text()),
    "view": (pa.string_view(), st.text()),
    "category": (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["a", "b", ""])),
    "integer": (pa.int64(), st.integers(-_LONG, _LONG - 1)),
    "unsigned": (pa.uint64(), st.integers(0, 2 * _LONG - 1)),
    "small": (pa.int8(), st.integers(-128, 127)),
    "float": (pa.float64(), st.floats(allow_nan=False)),
    "bool": (pa.bool_(), st.booleans()),
    "bytes": (pa.binary(), st.binary()),
    "bytes view": (pa.binary_view(), st.binary()),
    "decimal": (pa.decimal128(12, 2), st.decimals(-9999, 9999, places=2)),
    "date": (pa.date32(), st.dates(date(1900, 1, 1), date(2100, 1, 1))),
    "time": (pa.timestamp("us", "UTC"), st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1))),
    "texts": (pa.list_(pa.string_view()), st.lists(st.text(), max_size=3)),
    "pair": (pa.list_(pa.float32(), 2), st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2)),  # noqa: E501
    "struct": (pa.struct([("a", pa.string()), ("b", pa.int32())]), st.fixed_dictionaries({"a": st.text(), "b": st.integers(-9, 9)})),  # noqa: E501
    "nothing": (pa.null(), st.none()),
}  # fmt: skip


def write(table: pa.Table, path: Path, group: int = 7) -> None:
    if path.suffix == ".parquet":
        plain = table.cast(pa.schema([f.with_type(_storable(f.type)) for f in table.schema]))
        pq.write_table(plain, path, row_group_size=group)
        return
    make = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with path.open("wb") as file, make(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=group)


def _storable(kind: pa.DataType) -> pa.DataType:
    """Return a type without views, which Parquet does not store."""
    if kind == pa.list_(pa.string_view()):
        return pa.list_(pa.string())
    return {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)


@st.composite
def _columns(draw: Any) -> pa.Table:
    count = draw(st.integers(1, 12))
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4, unique=True))
    columns = {}
    for name in names:
        kind, values = VALUES[name]
        some = draw(st.lists(st.none() | values, min_size=count, max_size=count))
        if name == "time":
            some = [value and value.replace(tzinfo=UTC) for value in some]
        columns[name] = pa.array(some, kind)
    return pa.table(columns).append_column("body", pa.array([f"text {n}" for n in range(count)]))


@given(table=_columns(), suffix=st.sampled_from([".parquet", ".arrow", ".feather"]))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_kept_columns_stay_as_they_are(
    table: pa.Table, suffix: str, make_job: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    write(table, folder / f"in{suffix}")
    names = tuple(name for name in table.column_names if name != "body")
    job = make_job(
        folder / f"in{suffix}", id_column=None, text_column="body", columns=names, rows_per_file=5
    )
    job = Job(**{**vars(job), "out": str(folder / "out")})
    assert run(job).is_complete
    found = pq.read_table(folder / "out" / "vectors")
    order = sorted(
        range(found.num_rows), key=lambda row: int(found["id"][row].as_py().split(":")[1])
    )
    assert found.take(order).select(names).to_pylist() == table.select(names).to_pylist()


ODD = [{"zip": "00501", "price": "1.10", "when": "2024-01-01"},
       {"zip": "", "price": " NA ", "when": '"x", y\n'}]  # fmt: skip


def write_odd(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"text": f"text {n}", **row} for n, row in enumerate(ODD)]
    table = pa.Table.from_pylist(rows)
    pyarrow.csv.write_csv(table, folder / "a.csv")
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(table, folder / "c.parquet")
    write(table, folder / "d.arrow")
    return folder


def check_odd(out: Path) -> None:
    table = pq.read_table(out / "vectors").drop_columns("vector").sort_by("id")
    assert table["id"].to_pylist() == [
        f"{name}:{n}" for name in ("a.csv", "b.jsonl", "c.parquet", "d.arrow") for n in range(2)
    ]
    of_csv = [{name: value or None for name, value in row.items()} for row in ODD]
    assert table.drop_columns("id").to_pylist() == [*of_csv, *ODD, *ODD, *ODD]


def test_texts_stay_texts_by_run_local(tmp_path: Path, make_job: Make) -> None:
    source = write_odd(tmp_path / "in")
    assert run(make_job(source, id_column=None, columns=("zip", "price", "when"))).is_complete
    check_odd(tmp_path / "out")


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_texts_stay_texts_by_the_command(ray: bool, tmp_path: Path, checkpoint: Path) -> None:
    source = write_odd(tmp_path / "in")
    more = ["--columns", "zip,price,when", "--model", str(checkpoint), "--device", "cpu"]
    command = ["embed", str(source), "--out", str(tmp_path / "out"), *more]
    if ray:
        command = [sys.executable, "-m", "shared_engine.cli", *command, "--ray", "local"]
        subprocess.run(command, cwd=ROOT, check=True)
    else:
        assert main(command) == 0
    check_odd(tmp_path / "out")


# Ids

UUIDS = [uuid.UUID(int=n) for n in range(3)]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (pa.uuid(), [each.bytes for each in UUIDS], list(map(str, UUIDS))),
        (pa.decimal128(5, 2), [Decimal("1.10"), Decimal("1.20"), None], ["1.10", "1.20"]),
        (pa.string_view(), ["007", "", None], ["007"]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "c"], ["a", "b", "c"]),
        (pa.uint64(), [2**64 - 1, 0, 1], [0, 1, 2**64 - 1]),
        (pa.int8(), [-3, None, None], [-3]),
    ],
)  # fmt: skip
def test_ids_are_integers_or_texts_and_empty_ones_are_missing(
    kind: pa.DataType, values: list[Any], expected: list[Any], tmp_path: Path, make_job: Make
) -> None:
    table = passages(3).set_column(0, "key", pa.array(values, kind))
    write(table, tmp_path / "in.arrow")
    job = make_job(tmp_path / "in.arrow")
    assert run(job).failed == 3 - len(expected)
    assert sorted(pq.read_table(Path(job.out, "vectors"))["id"].to_pylist()) == expected


def test_empty_ids_of_a_csv_are_bad_rows_and_hide_no_double_one(
    tmp_path: Path, make_job: Make
) -> None:
    (tmp_path / "in.csv").write_text("key,text\n,a\n,b\n1,c\n2,d\n")
    job = make_job(tmp_path / "in.csv", columns=())
    summary = run(job)
    assert (summary.rows, summary.failed) == (2, 2)
    (tmp_path / "in.csv").write_text("key,text\n,a\n1,b\n,c\n1,d\n")
    with pytest.raises(ConfigurationError, match=r"id '1' .*row 1, and in\.csv, row 3"):
        run(Job(**{**vars(job), "out": str(tmp_path / "other")}))


def test_files_with_other_types_of_a_column_are_one_job(tmp_path: Path, make_job: Make) -> None:
    (tmp_path / "in").mkdir()
    for name, values in (("a", pa.array([1, 2], pa.int8())), ("b", pa.array([2**40, 3])),
                         ("c", pa.array(["x", None]))):  # fmt: skip
        table = pa.table({"text": ["a", "b"], "number": values, "key": values})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    job = make_job(tmp_path / "in", columns=("number",))
    assert run(job).failed == 1
    found = pq.read_table(Path(job.out, "vectors")).sort_by("id")
    assert found["number"].to_pylist() == found["id"].to_pylist()
    assert found["id"].to_pylist() == ["1", str(2**40), "2", "3", "x"]


def write_two(folder: Path, *columns: pa.Array) -> None:
    folder.mkdir()
    for name, column in zip("ab", columns, strict=True):
        count = len(column)
        keys = [f"{name}{n}" for n in range(count)]
        table = pa.table({"text": ["some text"] * count, "key": keys, "value": column})
        pq.write_table(table, folder / f"{name}.parquet")


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (pa.array([2**63 + 7], pa.uint64()), pa.array([-1]), ["9223372036854775815", "-1"]),
        (pa.array([Decimal("123456789012345678.05")]), pa.array([1.5]),
         ["123456789012345678.05", "1.5"]),
        (pa.array([Decimal("1.05")]), pa.array([7]), ["1.05", "7"]),
        (pa.array([["a", None]]), pa.array(["é"]), ['["a", null]', "é"]),
        (pa.array([{"a": 1}]), pa.array([{"a": "é"}]), ['{"a": 1}', '{"a": "é"}']),
        (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), pa.array(["x"]),
         [str(uuid.UUID(int=1)), "x"]),
        (pa.array([timedelta(days=1)]), pa.array(["x"]), ["86400000000 us", "x"]),
        (pa.array([float("nan")]), pa.array(["x"]), ["nan", "x"]),
    ],
)  # fmt: skip
def test_types_that_differ_between_files_change_no_value_and_cost_no_row(
    first: pa.Array, second: pa.Array, kept: list[str], tmp_path: Path, make_job: Make
) -> None:
    write_two(tmp_path / "in", first, second)
    job = make_job(tmp_path / "in", columns=("value",))
    assert run(job).is_complete
    assert pq.read_table(Path(job.out, "vectors")).sort_by("id")["value"].to_pylist() == kept


def test_a_value_that_the_type_of_all_files_cannot_hold_costs_its_row_only(
    tmp_path: Path, make_job: Make
) -> None:
    write_two(tmp_path / "in", pa.array([2**60 + 1, 5]), pa.array([1.5]))
    job = make_job(tmp_path / "in", columns=("value",))
    summary = run(job)
    assert (summary.rows, summary.failed, summary.unread) == (2, 1, ())
    (error,) = pq.read_table(Path(job.out, "errors.parquet")).to_pylist()
    assert (error["id"], error["index"]) == ("a0", 0)
    assert "column 'value' holds a value that is no double" in error["reason"]


def test_an_id_of_a_later_file_that_the_job_cannot_hold_costs_its_row_only(
    tmp_path: Path, make_job: Make
) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["a"], "key": [1]}), tmp_path / "in" / "a.parquet")
    job = make_job(tmp_path / "in", columns=())
    assert run(job).is_complete
    later = pa.table({"text": ["b", "c"], "key": ["2", "x"]})
    pq.write_table(later, tmp_path / "in" / "b.parquet")
    summary = run(job)
    assert (summary.rows, summary.failed, summary.unread) == (1, 1, ())


def test_timestamps_as_spark_writes_them_keep_their_year(tmp_path: Path, make_job: Make) -> None:
    days = [datetime(1, 1, 1), datetime(2024, 1, 1, 0, 0, 0, 1), datetime(9999, 12, 31)]
    table = passages(3).append_column("day", pa.array(days, pa.timestamp("us")))
    pq.write_table(table, tmp_path / "in.parquet", use_deprecated_int96_timestamps=True)
    job = make_job(tmp_path / "in.parquet", columns=("day",))
    assert run(job).is_complete
    assert pq.read_table(Path(job.out, "vectors"))["day"].to_pylist() == days


@pytest.mark.parametrize(
    "column",
    [
        pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["x"])),
        pa.array([pa.MonthDayNano([1, 2, 3]), None]),
        pa.array([{}, None], pa.struct([])),
    ],
)
@pytest.mark.parametrize("place", ["text", "lang"])
def test_a_type_that_parquet_cannot_hold_costs_its_file_only(
    place: str, column: pa.Array, tmp_path: Path, make_job: Make
) -> None:
    (tmp_path / "in").mkdir()
    write(passages(3), tmp_path / "in" / "a.parquet")
    table = passages(3).slice(1)
    table = table.set_column(table.column_names.index(place), place, column)
    write(table, tmp_path / "in" / "b.feather")
    (lost,) = run(make_job(tmp_path / "in")).unread
    assert re.search(r"b\.feather cannot be read: .*to Parquet", str(lost.error))


OFFSETS = pa.array([0, 5, 1, 6], pa.int32()).buffers()[1]
BROKEN = pa.Array.from_buffers(pa.string(), 3, [None, OFFSETS, pa.py_buffer(b"abcdef")])
"""Texts with an offset before the one that it follows."""


@pytest.mark.parametrize(
    ("place", "column"),
    [
        ("text", BROKEN),
        ("lang", BROKEN),
        ("lang", pa.ListArray.from_arrays([0, 1, 2, 3], BROKEN)),
        ("lang", pa.DictionaryArray.from_arrays([0, 1, 9], ["a", "b", "c"], safe=False)),
    ],
)
def test_a_broken_arrow_file_costs_no_other(
    place: str, column: pa.Array, tmp_path: Path, make_job: Make
) -> None:
    (tmp_path / "in").mkdir()
    write(passages(3), tmp_path / "in" / "a.parquet")
    table = passages(3).set_column(passages(3).column_names.index(place), place, column)
    write(table, tmp_path / "in" / "b.feather")
    summary = run(make_job(tmp_path / "in"))
    assert (summary.rows, [each.title for each in summary.unread]) == (3, ["b.feather"])


def test_a_time_that_parquet_cannot_hold_costs_its_file_only(
    tmp_path: Path, make_job: Make
) -> None:
    (tmp_path / "in").mkdir()
    write(passages(3), tmp_path / "in" / "a.parquet")
    times = pa.array([0, 2**62], pa.timestamp("s"))
    write(passages(2).set_column(2, "lang", times), tmp_path / "in" / "b.feather")
    summary = run(make_job(tmp_path / "in"))
    assert (summary.rows, [each.title for each in summary.unread]) == (3, ["b.feather"])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[("a", "x")], None], pa.map_(pa.string_view(), pa.string_view())),
        pa.array(["[1.10]", None], pa.json_()),
    ],
)
def test_views_within_maps_and_lists_and_json_stay(
    column: pa.Array, tmp_path: Path, make_job: Make
) -> None:
    write(passages(2).append_column("value", column), tmp_path / "in.feather")
    job = make_job(tmp_path / "in.feather", columns=("value",))
    assert run(job).is_complete
    assert pq.read_table(Path(job.out, "vectors"))["value"].to_pylist() == column.to_pylist()


CATEGORIES = pa.DictionaryArray.from_arrays(
    pa.array([1, 0, None], pa.uint32()), pa.array(["a", "é"], pa.string_view())
)
"""As Polars writes a Categorical or an Enum."""


@pytest.mark.parametrize(
    "column",
    [
        CATEGORIES,
        pa.ListArray.from_arrays(pa.array([0, 1, 1, 3]), CATEGORIES),
        pa.StructArray.from_arrays([CATEGORIES], names=["of"]),
    ],
)
def test_categories_of_views_stay(column: pa.Array, tmp_path: Path, make_job: Make) -> None:
    write(passages(3).append_column("value", column), tmp_path / "in.feather")
    job = make_job(tmp_path / "in.feather", columns=("value",))
    assert run(job).is_complete
    assert pq.read_table(Path(job.out, "vectors"))["value"].to_pylist() == column.to_pylist()


def test_texts_and_ids_may_be_categories_of_views(tmp_path: Path, make_job: Make) -> None:
    table = pa.table({"key": CATEGORIES, "text": CATEGORIES})
    write(table, tmp_path / "in.feather")
    job = make_job(tmp_path / "in.feather", columns=())
    summary = run(job)
    assert (summary.rows, summary.failed) == (2, 1)
    assert pq.read_table(Path(job.out, "vectors"))["id"].to_pylist() == ["é", "a"]
    batch = EmbedBatch(options=job.options, error_column="error")(table)
    assert [error is None for error in batch["error"].to_pylist()] == [True, True, False]


# Bytes that are no text


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_bytes_that_are_not_utf_8_are_a_bad_row(
    kind: pa.DataType, tmp_path: Path, make_job: Make
) -> None:
    texts = pa.array([b"good", b"caf\xe9", None, "日本".encode()], pa.binary())
    column = pa.Array.from_buffers(kind, 4, texts.buffers())
    table = passages(4).set_column(1, "text", column)
    write(table, tmp_path / "in.parquet")
    job = make_job(tmp_path / "in.parquet")
    summary = run(job)
    assert (summary.rows, summary.failed) == (2, 2)
    errors = pq.read_table(Path(job.out, "errors.parquet")).to_pylist()
    assert "not UTF-8" in errors[0]["reason"]
    batch = EmbedBatch(options=job.options, error_column="error")(table)
    assert [error is None for error in batch["error"].to_pylist()] == [True, False, False, True]


BYTES = pa.Array.from_buffers(
    pa.string(), 3, pa.array([b"a", b"caf\xe9", "é".encode()], pa.binary()).buffers()
)
"""Texts as a writer without checks leaves them; most readers refuse a file that holds these."""


OTHER_BYTES = [
    (BYTES, ["a", "é"]),
    (pa.ListArray.from_arrays([0, 1, 2, 3], BYTES), [["a"], ["é"]]),
    (pa.StructArray.from_arrays([BYTES], names=["of"]), [{"of": "a"}, {"of": "é"}]),
]


@pytest.mark.parametrize(
    ("suffix", "column", "kept"),
    [
        *((suffix, *each) for suffix in (".parquet", ".feather") for each in OTHER_BYTES),
        (".feather", pa.DictionaryArray.from_arrays([0, 1, 2], BYTES), ["a", "é"]),
    ],
)
def test_a_kept_value_of_other_bytes_than_utf_8_costs_its_row(
    suffix: str, column: pa.Array, kept: list[Any], tmp_path: Path, make_job: Make
) -> None:
    write(passages(3).append_column("value", column), tmp_path / f"in{suffix}")
    job = make_job(tmp_path / f"in{suffix}", columns=("value",))
    summary = run(job)
    assert (summary.rows, summary.failed) == (2, 1)
    assert pq.read_table(Path(job.out, "vectors"))["value"].to_pylist() == kept
    (row,) = pq.read_table(Path(job.out, "errors.parquet")).to_pylist()
    assert (row["index"], "column 'value' holds a value that is no" in row["reason"]) == (1, True)


def test_other_bytes_cost_their_row_only_where_files_differ_in_type(
    tmp_path: Path, make_job: Make
) -> None:
    (tmp_path / "in").mkdir()
    column = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), BYTES)
    write(passages(3).append_column("value", column), tmp_path / "in" / "a.parquet")
    table = passages(4).slice(3).append_column("value", pa.array([7]))
    write(table, tmp_path / "in" / "b.parquet")
    job = make_job(tmp_path / "in", columns=("value",))
    summary = run(job)
    assert (summary.rows, summary.failed) == (3, 1)
    values = pq.read_table(Path(job.out, "vectors"))["value"].to_pylist()
    assert values == ['["a"]', '["é"]', "7"]


def test_a_missing_text_of_pandas_is_missing(tmp_path: Path, make_job: Make) -> None:
    table = pa.table({"text": [1.5, float("nan"), None]})
    job = make_job(table, id_column=None, columns=("text",))
    assert run(job).failed == 2
    assert pq.read_table(Path(job.out, "vectors"))["text"].to_pylist() == [1.5]
    batch = EmbedBatch(options=job.options, error_column="error")(table)
    assert [error is None for error in batch["error"].to_pylist()] == [True, False, False]


def test_a_column_that_holds_no_texts_is_named_with_its_type(
    tmp_path: Path, make_job: Make
) -> None:
    table = passages(3).set_column(1, "text", pa.array([["a"], ["b"], None]))
    write(table, tmp_path / "in.parquet")
    (lost,) = run(make_job(tmp_path / "in.parquet")).unread
    assert "column 'text' holds list<" in str(lost.error)


# Reading in order


def test_a_row_group_is_read_once_in_pages(tmp_path: Path, make_job: Make) -> None:
    dice = random.Random(1)
    texts = ["".join(dice.choices("abcdefghij klmnop", k=2_000)) for _ in range(5_000)]
    table = pa.table({"key": range(5_000), "text": texts})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5_000)
    size = (tmp_path / "in.parquet").stat().st_size
    before = _count_read()
    cursor = Cursor(str(tmp_path / "in.parquet"), ["key", "text"])
    for first in range(0, 5_000, 100):
        tables = list(cursor.read(first, 100, 30))
        assert pa.concat_tables(tables)["key"].to_pylist() == list(range(first, first + 100))
    assert _count_read() - before < 1.1 * size
    job = make_job(tmp_path / "in.parquet", columns=(), rows_per_file=100)
    before = _count_read()
    assert run(job).rows == 5_000
    assert _count_read() - before < 1.3 * size + 1_000_000  # imports and our own files


def _count_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@given(
    jumps=st.lists(
        st.tuples(st.integers(0, 99), st.integers(1, 40), st.integers(1, 20)), max_size=9
    )
)
@settings(max_examples=100, deadline=None)
def test_a_cursor_reads_any_run(jumps: list[tuple[int, int, int]], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "cursor.parquet"
    if not path.exists():
        write(pa.table({"n": range(100), "text": map(str, range(100))}), path, group=17)
    cursor = Cursor(str(path), ["n"])
    for first, most, size in jumps:
        rows = min(most, 100 - first)
        tables = list(cursor.read(first, rows, size))
        assert all(0 < table.num_rows <= size for table in tables)
        assert pa.concat_tables(tables)["n"].to_pylist() == list(range(first, first + rows))


def test_a_large_row_group_needs_no_more_memory_than_small_ones(tmp_path: Path) -> None:
    script = """if True:
        import re, sys
        import pyarrow.parquet as pq
        from pathlib import Path
        from shared_engine.bulk.tables import Cursor
        cursor = Cursor(sys.argv[1], ["text"])
        for first in range(0, 60_000, 10_000):
            for table in cursor.read(first, 10_000, 1024):
                pass
        print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    """
    dice = np.random.default_rng(1)
    text = dice.integers(97, 123, (60_000, 1_000), np.uint8)
    table = pa.table({"text": pa.array([row.tobytes().decode() for row in text])})
    peaks = []
    for group in (60_000, 2_000):
        path = tmp_path / f"{group}.parquet"
        pq.write_table(table, path, row_group_size=group, compression="none")
        command = [sys.executable, "-c", script, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[0] < peaks[1] + 20, peaks


def test_empty_cells_of_images_are_missing(tmp_path: Path, make_job: Make) -> None:
    table = pa.table({"text": ["a", "b", None], "image": [b"", None, b""], "key": [1, 2, 3]})
    write(table, tmp_path / "in.parquet")
    job = make_job(tmp_path / "in.parquet", image_column="image", text_column="text", columns=())
    summary = run(job)
    assert (summary.rows, summary.failed) == (2, 1)
    (error,) = pq.read_table(Path(job.out, "errors.parquet")).to_pylist()
    assert error["reason"] == "has no text and no image"


@pytest.mark.parametrize("is_struct", [False, True])
def test_a_path_of_an_image_that_is_not_utf_8_costs_its_row_only(
    is_struct: bool, tmp_path: Path, make_job: Make
) -> None:
    paths = pa.array([b"caf\xe9.png", None], pa.binary())
    images = pa.Array.from_buffers(pa.string(), 2, paths.buffers())
    if is_struct:
        images = pa.StructArray.from_arrays([pa.nulls(2, pa.binary()), images], ["bytes", "path"])
    table = pa.table({"text": ["a", "b"], "key": [1, 2], "image": images})
    write(table, tmp_path / "in.parquet")
    job = make_job(tmp_path / "in.parquet", image_column="image", text_column="text", columns=())
    summary = run(job)
    assert (summary.rows, summary.failed, summary.unread) == (1, 1, ())


def test_a_batch_tells_the_bad_rows_of_both_columns(make_job: Make) -> None:
    paths = pa.array([None, None, b"caf\xe9.png"], pa.binary())
    images = pa.Array.from_buffers(pa.string(), 3, paths.buffers())
    embed = EmbedBatch("text", "image", options=make_job().options, error_column="error")
    told = embed(pa.table({"text": BYTES, "image": images}))["error"].to_pylist()
    assert told[0] is None
    assert [reason.split()[1] for reason in told[1:]] == ["'text'", "'image'"]


def test_ids_and_plans_do_not_stop_at_a_file_that_cannot_be_read(
    tmp_path: Path, make_job: Make
) -> None:
    (tmp_path / "in").mkdir()
    write(passages(50), tmp_path / "in" / "a.parquet")
    pq.write_table(passages(50), tmp_path / "in" / "b.parquet", compression="none")
    with pq.ParquetFile(tmp_path / "in" / "b.parquet") as file:
        start = file.metadata.row_group(0).column(0).data_page_offset
    with (tmp_path / "in" / "b.parquet").open("r+b") as raw:
        raw.seek(start)
        raw.write(b"\xff" * 20)
    job = make_job(tmp_path / "in")
    with begin(job) as work:
        assert len(work.missing) == 4
    summary = run(job)
    assert (summary.rows, len(summary.unread)) == (50, 2)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_kept_columns_get_the_types_that_are_named(
    suffix: str, make_job: Make, tmp_path: Path
) -> None:
    path = tmp_path / f"in{suffix}"
    columns = {
        "text": ["a", "b", "c", "d"],
        "price": ["1.10", None, "n/a", "-2e3"],
        "day": ["2024-02-29", "1999-12-31", "2024-01-01", None],
        "zip": ["00501", "1", "2", "3"],
    }
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        write_rows(rows, path)
    types = {"price": "double", "day": "date32"}
    job = make_job(path, id_column=None, columns=("zip", "price", "day"), types=types)
    summary = run(job)
    assert (summary.rows, summary.failed) == (3, 1)
    found = pq.read_table(tmp_path / "out" / "vectors")
    assert found.schema.field("price").type == pa.float64()
    assert found.schema.field("day").type == pa.date32()
    assert found["zip"].to_pylist() == ["00501", "1", "3"]
    assert found["price"].to_pylist() == [1.1, None, -2000.0]
    assert found["day"].to_pylist() == [date(2024, 2, 29), date(1999, 12, 31), None]
    (error,) = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert error["index"] == 2
    assert "column 'price' holds a value that is no double" in error["reason"]
    with pytest.raises(ConfigurationError, match="was begun with types"):
        run(make_job(path, id_column=None, columns=("zip", "price", "day")))


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("double", pa.array(["1e400", "-1e400", "inf", None, "-Infinity", "nan"])),
        ("float", pa.array([1e39, -1e39, float("inf"), None, float("-inf"), float("nan")])),
    ],
)
def test_a_number_that_its_type_cannot_hold_costs_its_row(
    kind: str, column: pa.Array, tmp_path: Path, make_job: Make
) -> None:
    table = passages(6).append_column("value", column)
    job = make_job(table, columns=("value",), types={"value": kind})
    assert run(job).failed == 2
    found = pq.read_table(Path(job.out, "vectors"))["value"].to_pylist()
    assert str(found) == "[inf, None, -inf, nan]"
    (reason, _) = pq.read_table(Path(job.out, "errors.parquet"))["reason"].to_pylist()
    assert reason == f"column 'value' holds a value that is no {kind}: it is out of range"


def write_rows(rows: list[dict[str, str | None]], path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"lang": "number"}, "'number' of 'lang' is not a type of Arrow; expected int64, double"),
        ({"langs": "double"}, "'langs' is not a kept column; add it to columns"),
    ],
)
def test_types_that_cannot_be_are_refused(
    types: dict[str, str], message: str, make_job: Make
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_job(types=types)
