"""Tables and folders as they come from elsewhere: how they are cut, and what is said of others."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared_engine.bulk import convert as convert_
from shared_engine.bulk.run import begin
from shared_engine.errors import ConfigurationError, InputError
from tests.bulk.conftest import passages, run
from tests.support.nim import vectors


def write(path: Path) -> None:
    pyarrow.csv.write_csv(passages(3), path)


_field = st.one_of(st.none(), st.text(max_size=9), st.sampled_from(["00501", "1.10", r"\N", " x "]))
_table = st.lists(st.tuples(_field, _field), max_size=8).map(
    lambda rows: pa.table({"a": [row[0] for row in rows], "b, \"c\"": [row[1] for row in rows]},
                          schema=pa.schema([("a", pa.string()), ("b, \"c\"", pa.string())]))
)  # fmt: skip


def convert(path: Path, columns: list[str], rows: int = 5) -> pa.Table:
    target = path.with_name("target.parquet")
    convert_.convert(
        str(path), path.name, str(target), dict.fromkeys(columns, True), rows, "mark", {}
    )
    return pq.read_table(target)


@given(table=_table, newline=st.sampled_from(["\n", "\r\n", "\r"]), tab=st.booleans())
@settings(max_examples=300, deadline=None)
def test_texts_of_a_csv_stay_and_empty_ones_are_null(table, newline, tab, tmp_path_factory):
    cells = [value or "" for column in table.columns for value in column.to_pylist()]
    assume(not (tab and any("\t" in cell and len(cell.splitlines()) > 1 for cell in cells)))
    path = tmp_path_factory.mktemp("csv") / ("in.tsv" if tab else "in.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        quoting = {"delimiter": "\t" if tab else ",", "lineterminator": newline}
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, **quoting)
        writer.writerow(table.column_names)
        writer.writerows([value or "" for value in row.values()] for row in table.to_pylist())
    found = convert(path, table.column_names)
    assert found[convert_.REASON].null_count == table.num_rows
    expected = [{n: value or None for n, value in row.items()} for row in table.to_pylist()]
    assert found.drop_columns(convert_.REASON).to_pylist() == expected


_quoted = st.builds(
    lambda inner: '"' + inner.replace('"', '""') + '"', st.text('a",\n', min_size=1, max_size=9)
)
_record = st.lists(st.text("a", min_size=1, max_size=3) | _quoted, min_size=2, max_size=2)


@given(records=st.lists(_record, min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_a_csv_has_the_records_that_arrow_sees(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "in.csv"
    path.write_text("".join(",".join(record) + "\n" for record in [["one", "two"], *records]))
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    kinds = pyarrow.csv.ConvertOptions(column_types={"one": pa.string(), "two": pa.string()})
    expected = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=kinds)
    assert convert(path, ["one", "two"]).drop_columns(convert_.REASON).equals(expected)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), _json), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_values_of_json_lines_stay_as_texts(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"a": 1, "b": 1, "c": 1}, *rows])))
    found = convert(path, ["a", "b", "c"]).slice(1).to_pylist()
    assert len(found) == len(rows)
    for ours, theirs in zip(found, rows, strict=True):
        for name in "abc":
            value, text = theirs.get(name), ours[name]
            if value is None:
                assert text is None
            elif isinstance(value, str):
                assert text == value
            elif isinstance(value, list | dict):
                assert json.loads(text) == value
            else:
                assert text == json.dumps(value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("NaN", "has no {}"),
        ('["a", "b"]', "holds a list in column '{}'; expected a text"),
        ('{"de": "x"}', "holds a dict in column '{}'; expected a text"),
        ("true", "holds a bool in column '{}'; expected a text"),
    ],
)
def test_texts_and_ids_of_json_lines_are_texts_or_numbers(value, reason, tmp_path, make_job):
    rows = [('"a"', '"text"', value), ('"b"', value, "1"), (value, '"text"', "1"),
            (value, '"text"', "1")]  # fmt: skip
    lines = ['{{"id": {}, "text": {}, "lang": {}}}\n'.format(*row) for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    job = make_job(tmp_path / "in.jsonl", id_column="id")
    assert run(job).failed == 3
    (kept,) = pq.read_table(Path(job.out, "vectors")).to_pylist()
    assert (kept["id"], kept["lang"].replace(":", ": ").replace(",", ", ")) == ("a", value)
    reasons = pq.read_table(Path(job.out, "errors.parquet"))["reason"].to_pylist()
    assert reasons[0] == reason.format("text")
    assert all(each.startswith(reason.format("id")) for each in reasons[1:])


def test_digits_of_json_numbers_stay(tmp_path):
    path = tmp_path / "in.jsonl"
    numbers = ["1.10", "1e400", "12345678901234567890123", "-0.0"]
    path.write_text("\n".join(f'{{"n": {number}, "deep": [{number}]}}' for number in numbers))
    found = convert(path, ["n", "deep"])
    assert found["n"].to_pylist() == numbers
    assert found["deep"].to_pylist() == [f"[{number}]" for number in numbers]


def test_a_column_that_is_empty_for_a_megabyte_may_be_filled_later(tmp_path, make_job):
    for name, line, last in (
        ("a.csv", "{0},text {0},\n", "last,text,2024-01-01\n"),
        ("b.jsonl", '{{"key": {0}, "text": "text {0}", "lang": null}}\n',
         '{"key": "last", "text": "text", "lang": "2024-01-01"}\n'),
    ):  # fmt: skip
        head = "key,text,lang\n" if name == "a.csv" else ""
        (tmp_path / name).write_text(head + "".join(map(line.format, range(60_000))) + last)
        found = convert(tmp_path / name, ["key", "lang"], 10_000)
        assert found["lang"].null_count == 60_000
        assert found.slice(60_000).to_pylist()[0]["lang"] == "2024-01-01"


BAD_LINES = {
    "latin-1": (b"%d,caf\xe9,x", b'{"key": %d, "text": "caf\xe9", "lang": "x"}', "not UTF-8"),
    "too few": (b"%d", b"[%d]", "has 1 fields; expected 3|is not a JSON object"),
    "too many": (b"%d,a,b,c", b'{"key": %d, "text": ', "has 4 fields|is not a JSON object"),
    "open quote": (b'%d,"a,x', b'{"key": %d, "text": "a}', "not valid CSV|not a JSON object"),
    "quote inside": (b'%d,"a "b" c",x', b'"%d"', "not valid CSV|not a JSON object"),
    "empty text": (b"%d,,x", b'{"key": %d, "text": "", "lang": "x"}', "has no text"),
    "blank text": (b'%d," ",x', b'{"key": %d, "text": " ", "lang": "x"}', "has no text"),
    "no text": (b'%d,"",x', b'{"key": %d, "lang": "x"}', "has no text"),
    "no id": (b",a,x", b'{"text": "a", "lang": "x"}', "has no id in column key"),
    "surrogate": (b"%d,\xff,x", b'{"key": %d, "text": "\\ud800"}', "not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_bad_record_costs_no_other(suffix, kind, tmp_path, make_job):
    csv_line, json_line, reason = BAD_LINES[kind]
    bad_line = csv_line if suffix == ".csv" else json_line
    lines = []
    for row in passages(100).to_pylist():
        if row["key"] in (0, 41, 42, 99):
            lines.append(bad_line.replace(b"%d", str(row["key"]).encode()))
        elif suffix == ".csv":
            text = row["text"].replace('"', '""')
            lines.append(f'{row["key"]},"{text}",{row["lang"]}'.encode())
        else:
            lines.append(json.dumps(row).encode())
    path = tmp_path / f"in{suffix}"
    path.write_bytes(b"\n".join([b"key,text,lang"] * (suffix == ".csv") + lines))
    job = make_job(path)
    summary = run(job)
    assert (summary.rows, summary.failed, summary.unread) == (96, 4, ())
    good = [n for n in range(100) if n not in (0, 41, 42, 99)]
    found = pq.read_table(Path(job.out, "vectors")).to_pylist()
    assert sorted(int(row["id"]) for row in found) == good
    assert all(row["lang"] == passages(100)["lang"][int(row["id"])].as_py() for row in found)
    for row in found:
        text = passages(100)["text"][int(row["id"])].as_py()
        np.testing.assert_allclose(row["vector"], vectors([text])[0], atol=1e-6)
    errors = pq.read_table(Path(job.out, "errors.parquet")).to_pylist()
    assert [row["index"] for row in errors] == [0, 41, 42, 99]
    assert all(re.search(reason, row["reason"]) for row in errors), errors


def test_a_converted_table_is_reused_while_its_source_is_unchanged(tmp_path, make_job, nim):
    write(tmp_path / "in.csv")
    job = make_job(tmp_path / "in.csv")
    with begin(job):
        pass
    (table,) = Path(job.out, ".tables").iterdir()
    before = table.stat().st_ino
    with begin(job):
        pass
    assert table.stat().st_ino == before
    os.utime(tmp_path / "in.csv", ns=(1, 1))
    with begin(job):
        pass
    assert table.stat().st_ino != before
    assert run(job).rows == 3
    assert not table.parent.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.json", '[{"key": 0, "text": "a"}]', "expected JSON Lines"),
        ("in.json", '[\n{"key": 0, "text": "a"},\n{"key": 1, "text": "b"}\n]', "JSON Lines"),
        ("in.json", '{\n  "key": 0,\n  "text": "a"\n}\n', "JSON Lines"),
        ("in.csv", "key,text,text\n0,a,b\n", "2 columns 'text'"),
        ("in.csv", "key,text,key\n0,a,1\n", "2 columns 'key'"),
    ],
)
def test_a_file_with_another_layout_is_an_error_that_says_what_is_expected(
    name, content, said, tmp_path, make_job
):
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises((InputError, ConfigurationError), match=said):
        run(make_job(tmp_path / name, columns=(), strict=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "key,té\n0,a\n".encode("latin-1")), ("a.jsonl", b'{"key": 0, "te\\ud800": "a"}\n')],
)
def test_a_file_whose_names_of_columns_are_not_utf_8_costs_no_other(
    name, content, tmp_path, make_job
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    write(tmp_path / "in" / "b.csv")
    job = make_job(tmp_path / "in", columns=())
    summary = run(job)
    assert (summary.rows, len(summary.unread)) == (3, 1)
    (error,) = pq.read_table(Path(job.out, "errors.parquet")).to_pylist()
    assert error["source"] == name
    assert "no column 'text'" in error["reason"]


def test_lines_may_end_with_cr_alone(tmp_path, make_job):
    (tmp_path / "in.csv").write_text("key,text\r0,a\r1,b\r", newline="")
    assert run(make_job(tmp_path / "in.csv", columns=())).rows == 2


def test_blank_lines_before_the_names_of_columns_are_none(tmp_path, make_job):
    (tmp_path / "in.csv").write_text("\n\r\nkey,text\n0,a\n\n1,b\n")
    assert run(make_job(tmp_path / "in.csv", columns=())).rows == 2


@pytest.mark.parametrize("second", [("in",), ("in", "a.csv"), ("in", "sub"), ("in", "..", "in")])
def test_an_input_within_another_would_be_there_twice(second, tmp_path, make_job):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for folder in ("in", "in/sub"):
        write(tmp_path / folder / "a.csv")
    job = make_job(tmp_path / "in", id_column=None)
    assert run(job).rows == 6
    both = replace(job, inputs=(*job.inputs, str(tmp_path.joinpath(*second))))
    for inputs in (both.inputs, both.inputs[::-1]):
        with pytest.raises(ConfigurationError, match="twice"):
            run(replace(both, inputs=inputs))


def test_a_name_that_is_no_utf_8_cannot_be_in_an_id(tmp_path, make_job):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "caf\u00e9 \u3000.csv")
    job = make_job(tmp_path / "in", id_column=None)
    assert run(job).rows == 3
    broken = os.path.join(os.fsencode(tmp_path / "in"), b"caf\xe9.csv")
    Path(os.fsdecode(broken)).write_text("key,text\n0,a\n")
    with pytest.raises(ConfigurationError, match=r"caf\\udce9\.csv.*UTF-8"):
        run(job)
