"""Files that other tools write: data sets, compressed text, other delimiters, patterns."""

from __future__ import annotations

import bz2
import decimal
import gzip
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from shared_engine import Embedder, Options
from shared_engine.bulk.convert import convert
from shared_engine.bulk.job import Job
from shared_engine.cli.main import main
from shared_engine.errors import ConfigurationError, InputError
from shared_engine.evaluate.data import read_folder
from tests.bulk.conftest import passages, run
from tests.support.nim import vectors

Make = Callable[..., Job]


def read(job: Job) -> list[dict]:
    """Return the rows of a job, in the order of their ids, with vectors that were checked."""
    rows = pq.read_table(Path(job.out, "vectors")).to_pylist()
    return sorted(rows, key=lambda row: row["id"])


def check_texts(rows: list[dict], texts: list[str]) -> None:
    np.testing.assert_allclose([row["vector"] for row in rows], vectors(texts), atol=1e-6)


@pytest.mark.parametrize("has_splits", [False, True])
def test_a_data_set_saved_by_hugging_face(has_splits, tmp_path, make_job):
    data = datasets.Dataset(datasets.table.InMemoryTable(passages(20)), fingerprint="0")
    if has_splits:
        data = datasets.DatasetDict({"test": data})
    data.save_to_disk(tmp_path / "in")
    folder = tmp_path / "in" / "test" if has_splits else tmp_path / "in"
    saved = datasets.load_from_disk(str(folder))
    saved.map(dict, new_fingerprint="0")  # leaves a cache in the folder
    assert len(list(folder.glob("*.arrow"))) == 2
    (tmp_path / "in" / "other").mkdir()
    row = {"key": 20, "text": "a state", "lang": "en"}
    (tmp_path / "in" / "other" / "state.json").write_text(json.dumps(row))  # is data
    job = make_job(tmp_path / "in")
    summary = run(job)
    assert (summary.rows, summary.is_complete) == (21, True)
    rows = sorted(read(job), key=lambda row: int(row["id"]))
    check_texts(rows, [*passages(20)["text"].to_pylist(), "a state"])


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress,
            ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True)}  # fmt: skip
TEXTS = {
    ".csv": "key,text\n0,\u00fcber\n\n1,b\n",
    ".tsv": "key\ttext\n0\t\u00fcber\n1\tb\n",
    ".jsonl": '{"key": 0, "text": "\u00fcber"}\n{"key": 1, "text": "b"}',
    ".txt": "\ufeff\u00fcber\r\n \n\nb",
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", TEXTS)
def test_text_may_be_compressed(suffix, compression, parts, tmp_path, make_job):
    """Also in several parts, one after another, as bgzip and parallel compressors write them."""
    raw = TEXTS[suffix].encode()
    cuts = [raw] if parts == 1 else [raw[:9], raw[9:]]
    path = tmp_path / f"in{suffix}{compression.upper()}"
    path.write_bytes(b"".join(COMPRESS[compression](part) for part in cuts))
    job = make_job(path, id_column=None, columns=())
    assert run(job).rows == 2
    rows = read(job)
    assert [row["id"] for row in rows] == [f"{path.name}:{row}" for row in range(2)]
    check_texts(rows, ["\u00fcber", "b"])


def test_a_compressed_file_that_is_cut_off_is_named(tmp_path, make_job):
    path = tmp_path / "in.csv.gz"
    path.write_bytes(gzip.compress(b"key,text\n" + b"0,a\n" * 9)[:-9])
    with pytest.raises(InputError, match=r"in\.csv\.gz cannot be read: Truncated"):
        run(make_job(path, columns=(), strict=True))


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", TEXTS)
def test_utf_16_is_named(suffix, codec, tmp_path, make_job):
    path = tmp_path / f"in{suffix}.gz"
    path.write_bytes(gzip.compress(TEXTS[suffix].lstrip("\ufeff").encode(codec)))
    with pytest.raises(InputError, match="it is UTF-16; convert it first, as by iconv"):
        run(make_job(path, id_column=None, columns=(), strict=True))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"key,text\n0,a\n"), r"gzip; add \.gz"),
        (bz2.compress(b"key,text\n0,a\n"), r"bzip2; add \.bz2"),
        (pa.compress(b"key,text\n0,a\n", "zstd", asbytes=True), r"Zstandard; add \.zst"),
        (b"PK\x03\x04\x14\0\x08\x08", "an Excel or ZIP file; export the sheet as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel file; export the sheet as CSV"),
    ],
    ids=["gzip", "bzip2", "zstd", "xlsx", "xls"],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_of_another_format_is_named_with_what_to_do(suffix, content, said, tmp_path):
    path = tmp_path / f"in{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^in cannot be read: it is (compressed by )?{said}"):
        convert(str(path), "in", str(tmp_path / "out.parquet"), {"key": False}, 9, "", {})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_the_first_line_of_excel_gives_the_delimiter(delimiter, end, tmp_path):
    lines = [f"\ufeffsep={delimiter}", f"key{delimiter}text", f"1{delimiter}a", ""]
    (tmp_path / "in.csv").write_text(end.join(lines), newline="")
    target = str(tmp_path / "out.parquet")
    convert(str(tmp_path / "in.csv"), "in", target, {"key": False, "text": False}, 9, "", {})
    assert pq.read_table(target).select(["key", "text"]).to_pylist() == [{"key": "1", "text": "a"}]


@pytest.mark.parametrize(("given", "delimiter"), [(";", ";"), (r"\t", "\t"), ("|", "|")])
def test_fields_are_cut_at_the_delimiter(given, delimiter, tmp_path, checkpoint, capsys):
    path = tmp_path / "in.csv"
    path.write_text(f'key{delimiter}text\n1{delimiter}"a{delimiter} b", c\n2{delimiter}d, e\n')
    command = ["embed", str(path), "--out", str(tmp_path / "out"), "--model", str(checkpoint),
               "--columns", "text"]  # fmt: skip
    assert main([*command, "--delimiter", given]) == 1, "the text after a closing quote"
    (row,) = pq.read_table(tmp_path / "out" / "vectors").to_pylist()
    assert row["text"] == "d, e"
    assert main(command) == 2
    assert "was begun with delimiter" in capsys.readouterr().err
    assert main([*command, "--delimiter", ";;"]) == 2
    assert "delimiter=';;': expected one character" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_quotation_marks_can_be_text(suffix, tmp_path, checkpoint, capsys):
    tab = "\t" if suffix == ".tsv" else ","
    texts = ['"Yes" he said', '"a', 'b"', 'five inches, 5"', '"whole"', '""']
    path = tmp_path / f"in{suffix}"
    path.write_text(f"key{tab}text\n" + "".join(
        f"{row}{tab}{text.replace(',', '')}\n" for row, text in enumerate(texts)
    ))  # fmt: skip
    command = ["embed", str(path), "--model", str(checkpoint), "--columns", "text", "--out"]
    assert main([*command, str(tmp_path / "out"), "--no-quotes"]) == 0
    rows = pq.read_table(tmp_path / "out" / "vectors").to_pylist()
    assert [row["text"] for row in rows] == [text.replace(",", "") for text in texts]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "was begun with quotes False, now it is True" in capsys.readouterr().err


def test_files_without_a_line_of_names_get_them(tmp_path, checkpoint, capsys):
    """As MS MARCO's, those of Spark and COPY, and a line that is empty."""
    (tmp_path / "in.tsv").write_text('0\t"Yes" he said\tx\n1\ta\t\\N\n\n2\t\\N\tx\n3\tb\n')
    command = ["embed", str(tmp_path / "in.tsv"), "--out", str(tmp_path / "out"), "--no-quotes",
               "--model", str(checkpoint), "--id-column", "id",
               "--columns", "text,note"]  # fmt: skip
    assert main(command) == 2
    told = capsys.readouterr().err
    assert 'it has 0, "Yes" he said, x (--delimiter sets the delimiter, --header the names' in told
    assert main([*command, "--header", "id, text, note"]) == 1
    rows = pq.read_table(tmp_path / "out" / "vectors").to_pylist()
    assert [(row["id"], row["text"], row["note"]) for row in rows] == [
        ("0", '"Yes" he said', "x"), ("1", "a", r"\N"),
    ]  # fmt: skip
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [error["reason"] for error in errors] == ["has no text", "has 2 fields; expected 3"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            rb'1,"he said \"hi\""',
            r"""write \" as "", as Spark does with escape='"'""",
        ),
        (b'1,"he said "hi""', "--no-quotes takes quotation marks as text"),
        (b"1,caf\xe9", "not UTF-8 in column 'text', at 3; convert the file first, as by iconv"),
    ],
)
def test_a_reason_says_how_to_write_the_record(line, reason, tmp_path, make_job):
    (tmp_path / "in.csv").write_bytes(b"key,text\n0,a\n" + line + b"\n")
    job = make_job(tmp_path / "in.csv", columns=())
    assert run(job).failed == 1
    (error,) = pq.read_table(Path(job.out, "errors.parquet")).to_pylist()
    assert reason in error["reason"]


def test_two_quotes_of_two_lines_join_no_records_of_a_tsv(tmp_path, checkpoint, capsys):
    path = tmp_path / "in.tsv"
    path.write_text('key\ttext\n0\t"a\n1\tb"\n2\tc\n3\t"two\nlines"\n')
    out = tmp_path / "out"
    command = ["embed", str(path), "--model", str(checkpoint), "--columns", "text", "--out"]
    assert main([*command, str(out)]) == 1
    assert [row["text"] for row in pq.read_table(out / "vectors").to_pylist()] == [
        'b"', "c", "two\nlines",
    ]  # fmt: skip
    (error,) = pq.read_table(out / "errors.parquet").to_pylist()
    assert error["reason"] == (
        "is not valid CSV: a quoted field holds the start of another record; --no-quotes takes "
        "quotation marks as text"
    )


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.csv", ["a.csv", "b[1].csv"]),
        ("**/*.csv", ["a.csv", "b[1].csv", "sub/c.csv"]),
        ("s*", ["sub/c.csv"]),
        ("**", ["a.csv", "b[1].csv", "sub/c.csv"]),
        ("b[1].csv", ["b[1].csv"]),
        ("[ab]*.csv", ["a.csv", "b[1].csv"]),
        ("_*/*.csv", ["_old/d.csv"]),
        ("**/_o*/*.csv", ["_old/d.csv"]),
        (".h*.csv", [".hidden.csv"]),
        ("_*.csv", ["_e.csv"]),
    ],
)
def test_a_pattern_gives_the_files_of_a_folder(pattern, names, tmp_path, make_job):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "_old").mkdir()
    for name in (
        "a.csv",
        "b[1].csv",
        "sub/c.csv",
        "_old/d.csv",
        ".hidden.csv",
        "_e.csv",
        "notes.md",
    ):
        (tmp_path / "in" / name).write_text("text\na\n")
    job = make_job(tmp_path / "in" / pattern, id_column=None, columns=())
    assert run(job).is_complete
    assert [row["id"] for row in read(job)] == [f"{name}:0" for name in names]
    (tmp_path / "in" / "sub" / "new.csv").write_text("text\na\n")
    assert run(job).rows == (pattern in ("**/*.csv", "s*", "**")), "more files are missing work"


@pytest.mark.parametrize("is_url", [False, True])
@pytest.mark.parametrize("log", ["_delta_log/00.json", "metadata/v1.metadata.json"])
def test_a_delta_or_iceberg_table_is_refused(log, is_url, tmp_path, make_job):
    for name in ("data/part=1/a.csv", "data/" + log):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\na\n")
    job = make_job(tmp_path, id_column=None, columns=())
    if is_url:
        job = replace(job, inputs=(f"local://{tmp_path}",))
    with pytest.raises(ConfigurationError, match="/data is a Delta or Iceberg table"):
        run(job)


def test_a_partition_of_spark_may_begin_with_an_underscore(tmp_path, make_job):
    for folder in ("_day=1", "_temporary"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "a.csv").write_text("text\na\n")
    job = make_job(tmp_path / "in", id_column=None, columns=("_day",))
    assert run(job).rows == 1
    assert [row["_day"] for row in read(job)] == ["1"]


def test_files_of_other_formats_in_a_folder_are_told(tmp_path, make_job, caplog):
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.csv.xz", "c.avro"):
        (tmp_path / "in" / name).write_text("text\na\n")
    assert run(make_job(tmp_path / "in", id_column=None, columns=())).rows == 1
    assert f"2 files of other formats are skipped, the first: {tmp_path}/in/b.csv.xz" in caplog.text


def test_a_pattern_that_no_file_has_is_named(tmp_path, make_job):
    with pytest.raises(ConfigurationError, match=r"\*\.csv does not exist$"):
        run(make_job(tmp_path / "*.csv"))


@pytest.mark.parametrize("given", ["out", "out/*.csv", "out/a.csv", "out/vectors"])
def test_inputs_inside_of_the_folder_of_results_are_named(given, tmp_path, make_job):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.csv").write_text("text\na\n")
    with pytest.raises(ConfigurationError, match=r"is inside --out .*; use another --out"):
        make_job(tmp_path / given)


def test_a_text_file_in_a_folder_is_not_data_unless_it_is_named(tmp_path, make_job):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "LICENSE.txt").write_text("some\nlines")
    with pytest.raises(ConfigurationError, match=r"no files .*\(a \.txt file must be named\)"):
        run(make_job(tmp_path / "in", id_column=None))
    assert run(make_job(tmp_path / "in" / "*.txt", id_column=None, columns=())).rows == 2


def test_ids_may_be_uuids_and_decimals(tmp_path, make_job):
    keys = {
        "uuid": ([uuid.UUID(int=n) for n in range(3)], pa.uuid()),
        "decimal": ([decimal.Decimal(n) / 100 for n in range(3)], pa.decimal128(12, 2)),
        "large": ([decimal.Decimal(n) / 100 for n in range(3)], pa.decimal256(60, 2)),
    }
    for name, (values, kind) in keys.items():
        held = [value.bytes for value in values] if name == "uuid" else values
        table = passages(3).set_column(0, "key", pa.array(held, kind))
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path)
        job = make_job(path, columns=("key",))
        job = Job(**{**vars(job), "out": str(tmp_path / f"out-{name}")})
        assert run(job).rows == 3
        texts = [str(each) if name == "uuid" else f"{each:.2f}" for each in values]
        assert [row["id"] for row in read(job)] == texts
        assert [row["key"] for row in read(job)] == values


def test_bad_lines_of_json_in_a_compressed_file_cost_no_other(tmp_path, make_job):
    lines = [json.dumps({"key": 0, "text": "a"}), "{", json.dumps({"key": 2, "text": "c"})]
    (tmp_path / "in.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    summary = run(make_job(tmp_path / "in.json.gz", columns=()))
    assert (summary.rows, summary.failed) == (2, 1)


def test_a_title_and_a_text_are_the_document_that_evaluate_reads(tmp_path, make_job, nim):
    """Without a title, with blanks at the ends, and with a title alone."""
    rows = [
        {"_id": "a", "title": "T", "text": " t\n"},
        {"_id": "b", "text": "no title\n"},
        {"_id": "c", "title": "alone", "text": ""},
        {"_id": "d", "title": "", "text": " "},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "q"}')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    corpus = read_folder(tmp_path).corpus
    job = make_job(
        tmp_path / "corpus.jsonl", id_column="_id", text_column=("title", "text"), columns=()
    )
    summary = run(job)
    assert (summary.rows, summary.failed) == (3, 1)
    texts = dict(zip(corpus.ids, corpus.texts, strict=True))
    assert texts.pop("d") == "", "evaluate embeds a blank text; embed reports it"
    assert {row["id"] for row in read(job)} == texts.keys()
    check_texts(read(job), list(texts.values()))


def test_the_command_joins_columns_of_texts(tmp_path, checkpoint, capsys):
    (tmp_path / "in.csv").write_text("title,text\nParis,a city\n,no title\n")
    command = ["embed", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out"),
               "--model", str(checkpoint)]  # fmt: skip
    assert main([*command, "--text-column", "title, text"]) == 0
    found = pq.read_table(tmp_path / "out" / "vectors")["vector"].to_pylist()
    with Embedder(Options(model=str(checkpoint))) as embedder:
        np.testing.assert_allclose(found, embedder.embed(["Paris a city", "no title"]), atol=1e-6)
    assert main([*command, "--text-column", "text"]) == 2
    assert "was begun with text_columns ['title', 'text']" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl.gz"])
def test_folders_of_hive_partitions_are_columns(suffix, tmp_path, make_job):
    folders = {"lang=de/day=2024-01-01": ("de", "2024-01-01"),
               "lang=a%20b/day=__HIVE_DEFAULT_PARTITION__": ("a b", None)}  # fmt: skip
    for number, folder in enumerate(folders):
        path = tmp_path / "run=1" / folder / f"part-{number}{suffix}"
        path.parent.mkdir(parents=True)
        table = pa.table({"key": [f"{number}-{row}" for row in range(3)], "text": ["a", "b", "c"]})
        if suffix == ".parquet":
            pq.write_table(table, path)
        elif suffix == ".csv":
            pa.csv.write_csv(table, path)
        else:
            lines = "\n".join(map(json.dumps, table.to_pylist()))
            path.write_bytes(gzip.compress(lines.encode()))
    with pytest.raises(ConfigurationError, match="no column 'run'; it has key, text"):
        run(make_job(tmp_path / "run=1", columns=("run",)))
    job = make_job(tmp_path / "run=1", columns=("day", "text", "lang"))
    assert run(job).rows == 6
    rows = read(job)
    assert [(row["lang"], row["day"]) for row in rows[::3]] == list(folders.values())
    check_texts(rows, ["a", "b", "c"] * 2)


def test_a_partition_that_is_not_utf_8_costs_its_files_only(tmp_path, make_job):
    for folder in ("lang=%ff", "lang=de"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "a.csv").write_text("text\na\n")
    summary = run(make_job(tmp_path / "in", id_column=None))
    assert (summary.rows, [each.title for each in summary.unread]) == (1, ["lang=%ff/a.csv"])


def test_a_column_may_be_a_partition_of_one_file_and_a_number_in_another(tmp_path, make_job):
    (tmp_path / "in" / "year=2024").mkdir(parents=True)
    pq.write_table(passages(2), tmp_path / "in" / "year=2024" / "a.parquet")
    pq.write_table(
        passages(4).slice(2).append_column("year", pa.array([2025, 2026])),
        tmp_path / "in" / "b.parquet",
    )
    job = make_job(tmp_path / "in", columns=("year",))
    assert run(job).rows == 4
    assert [row["year"] for row in read(job)] == ["2024", "2024", "2025", "2026"]


def test_a_partition_that_is_not_of_its_type_costs_its_rows(tmp_path, make_job):
    for day in ("2024-01-01", "x"):
        (tmp_path / "in" / f"day={day}").mkdir(parents=True)
        pq.write_table(passages(2), tmp_path / "in" / f"day={day}" / "a.parquet")
    job = make_job(tmp_path / "in", id_column=None, columns=("day",), types={"day": "date32"})
    summary = run(job)
    assert (summary.rows, summary.failed, summary.unread) == (2, 2, ())
    assert {str(row["day"]) for row in read(job)} == {"2024-01-01"}


@pytest.fixture
def remote() -> Iterator[Any]:
    """A file system in memory, which pyarrow reaches through fsspec."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def write_remote(remote: Any) -> None:
    table = passages(20)
    names = ("a.parquet", "lang=x/b.csv.gz", "c d.arrow", "_old/d.csv.gz", "e.md", "state.json",
             "dataset_info.json")  # fmt: skip
    for name in (f"in/{name}" for name in names):
        remote.makedirs("/bucket/" + name.rpartition("/")[0], exist_ok=True)
        with remote.open(f"/bucket/{name}", "wb") as file:
            if name.endswith(".parquet"):
                pq.write_table(table, file)
            elif name.endswith(".arrow"):
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table)
            else:
                rows = "".join(f'{row["key"]},"{row["key"]}th"\n' for row in table.to_pylist())
                file.write(gzip.compress(("key,text\n" + rows).encode()))


@pytest.mark.parametrize(
    ("url", "titles"),
    [
        ("memory://bucket/in", ["a.parquet", "c d.arrow", "lang=x/b.csv.gz"]),
        ("memory://bucket/in/", ["a.parquet", "c d.arrow", "lang=x/b.csv.gz"]),
        ("memory://bucket/in/a.parquet", ["a.parquet"]),
        ("memory://bucket/in/*.parquet", ["a.parquet"]),
        ("memory://bucket/*/lang=*/b*", ["in/lang=x/b.csv.gz"]),
        ("memory://bucket/in/_o*/*", ["_old/d.csv.gz"]),
    ],
)
def test_tables_of_other_file_systems(url, titles, remote, make_job):
    write_remote(remote)
    job = replace(make_job(passages(1), id_column=None, columns=("text",)), inputs=(url,))
    summary = run(job)
    assert (summary.rows, summary.is_complete) == (20 * len(titles), True)
    rows = read(job)
    assert {row["id"].rpartition(":")[0] for row in rows} == set(titles)
    check_texts(rows, [row["text"] for row in rows])
    assert run(job).skipped == 20 * len(titles)
    if "a.parquet" in titles:
        with remote.open("/bucket/in/a.parquet", "wb") as file:
            pq.write_table(passages(21), file)
        with pytest.raises(ConfigurationError, match=r"memory://bucket/in/a\.parquet changed"):
            run(job)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (["memory://bucket/none"], "memory://bucket/none does not exist"),
        (["memory://bucket/in/*.feather"], "does not exist"),
        (["memory://bucket/in?endpoint=here"], "options after . are not read"),
        (["memory://bucket/in", "{here}"], "inputs are local paths and URLs"),
        (["no-such://bucket/in"], "no-such://bucket cannot be opened"),
        (["memory://bucket/pages"], "copy images and PDFs to a local folder first"),
        (["relative/path"], "expected an absolute path or a URL"),
        (["file://host/path"], "file://host/path: expected an absolute path or a URL"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused(inputs, said, remote, tmp_path, make_job):
    write_remote(remote)
    remote.pipe("/bucket/pages/a.pdf", b"")
    pq.write_table(passages(1), tmp_path / "here.parquet")
    job = make_job()
    inputs = [each.replace("{here}", str(tmp_path / "here.parquet")) for each in inputs]
    with pytest.raises(ConfigurationError, match=said):
        run(replace(job, inputs=tuple(inputs)))


def test_urls_of_local_files_are_paths(tmp_path, checkpoint):
    pq.write_table(passages(3), tmp_path / "an input.parquet")
    url = tmp_path.as_uri()
    command = ["embed", f"{url}/an%20input.parquet", "--model", str(checkpoint), "--out"]
    assert main([*command, f"{url}/an%20output"]) == 0
    assert pq.read_table(tmp_path / "an output" / "vectors").num_rows == 3
    job = Job((f"{url}/an%20input.parquet",), f"{url}/other", Options(model=str(checkpoint)))
    assert (job.inputs, job.out) == ((f"{tmp_path}/an input.parquet",), f"{tmp_path}/other")
    assert run(job).rows == 3


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.pdf", "a.tif", "a.png"])
def test_a_pipe_is_refused_and_not_waited_for(make_job, nim, tmp_path, name):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / name)
    plain = {"id_column": None, "columns": ()}
    nim._models = ("nvidia/llama-nemotron-embed-vl-1b-v2",)
    summary = run(make_job(tmp_path / "in", {"model": nim._models[0]}, **plain))
    assert summary.rows == 0
    assert summary.failed + len(summary.unread) == 1
    (row,) = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert "it is not a regular file" in row["reason"]
