"""Tables and folders as they come from elsewhere: how they are cut, and what is said of others."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_engine.bulk import tables
from shared_engine.errors import ConfigurationError, InputError
from tests.bulk.conftest import passages, run


def write(path: Path) -> None:
    pyarrow.csv.write_csv(passages(3), path)


_bare = st.text('a"', max_size=4)
_quoted = st.builds(
    lambda inner, tail: '"' + inner.replace('"', '""') + '"' + tail,
    st.text('a",\n', max_size=9),
    _bare,
)
_field = _bare.filter(lambda field: not field.startswith('"')) | _quoted
_record = st.builds("{},{}\n".format, _field, _field)


@given(text=st.lists(_record, max_size=9).map("".join) | st.text('a",\n', max_size=60))
@settings(max_examples=300, deadline=None)
def test_a_csv_is_cut_between_the_records_that_arrow_sees(text, tmp_path_factory):
    """A quote in the middle of a field is a letter, and one at its start goes on over line ends."""
    path = tmp_path_factory.mktemp("csv") / "in.csv"
    path.write_text(f"one,two\n{text}")
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    convert = pyarrow.csv.ConvertOptions(column_types={"one": pa.string(), "two": pa.string()})
    try:
        whole = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid:  # not two columns everywhere
        return
    split = tables.find_format(str(path)).split
    try:
        parts = list(split(str(path), 1))
    except ValueError:  # a quote is not closed, which Arrow closes at the end
        path.write_text(f'one,two\n{text}"')
        assert list(split(str(path), 1))
        return
    assert [part.rows for part in parts] == [1] * whole.num_rows
    rows = [
        table for part in parts for table in tables.read_batches(str(path), part, whole.schema, 1)
    ]
    assert pa.concat_tables([whole.slice(0, 0), *rows]).equals(whole)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.csv", "key,text\r0,a\r1,b\r", "lines end with CR alone"),
        ("in.json", '[{"key": 0, "text": "a"}]', "expected JSON Lines"),
        ("in.json", '[\n{"key": 0, "text": "a"},\n{"key": 1, "text": "b"}\n]', "JSON Lines"),
        ("in.json", '{\n  "key": 0,\n  "text": "a"\n}\n', "JSON Lines"),
        ("in.csv", "key,text,text\n0,a,b\n", "2 columns 'text'"),
        ("in.csv", "key,text,key\n0,a,1\n", "2 columns 'key'"),
    ],
)
def test_a_file_that_is_laid_out_in_another_way_is_told_what_is_expected(
    name, content, said, tmp_path, make_job
):
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises((InputError, ConfigurationError), match=said):
        run(make_job(tmp_path / name, columns=()))


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
        with pytest.raises(ConfigurationError, match=r"twice|given too"):
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
