"""A job on one machine: what comes out, what is resumed, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from shared_engine import Embedder
from shared_engine.bulk import manifest
from shared_engine.bulk.fragment import embed_fragment
from shared_engine.bulk.job import Job
from shared_engine.bulk.run import begin, find_work, run_local
from shared_engine.errors import (
    ConfigurationError,
    ConnectionFailedError,
    InputError,
    ModelNotFoundError,
    OutputError,
    ServerError,
)
from tests.bulk.conftest import passages, run
from tests.support.nim import MODEL, Nim, encode_vector, vector, vectors, write_reply


def read(job: Job) -> pa.Table:
    return pq.read_table(Path(job.out, "vectors"))


def read_errors(job: Job) -> list[dict]:
    return pq.read_table(Path(job.out, "errors.parquet")).to_pylist()


def read_vectors(table: pa.Table) -> np.ndarray:
    return np.stack(table["vector"].to_numpy(zero_copy_only=False))


def check_rows(job: Job, table: pa.Table, rows: Iterable[int]) -> None:
    """Check that the files have these rows of the table, each once and with its own vector."""
    found = read(job).sort_by([("lang", "ascending")])
    keys = [int(key) for key in found["id"].to_pylist()]
    assert sorted(keys) == list(rows)
    texts = [table["text"][key].as_py() for key in keys]
    np.testing.assert_allclose(read_vectors(found), vectors(texts), atol=1e-6)
    assert found["lang"].to_pylist() == [table["lang"][key].as_py() for key in keys]


def texts_of(nim: Nim) -> list[str]:
    return [text for body in nim.bodies for text in body["input"] if text != "?"]  # a probe


# Every format


def write(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=37)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix in (".feather", ".arrow"):
        pyarrow.feather.write_feather(table, path, chunksize=23)
    else:
        lines = [json.dumps(row) for row in table.to_pylist()]
        path.write_text("\n\n".join(lines[:50]) + "\r\n" + "\n".join(lines[50:]))


SUFFIXES = [".parquet", ".csv", ".feather", ".arrow", ".jsonl", ".ndjson"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("rows_per_file", [1, 29, 30, 100, 1000])
def test_every_row_of_every_format_gets_its_vector_once(suffix, rows_per_file, tmp_path, make_job):
    table = passages(100 if rows_per_file > 1 else 10)
    write(table, tmp_path / f"input{suffix}")
    job = make_job(tmp_path / f"input{suffix}", rows_per_file=rows_per_file)
    summary = run(job)
    assert (summary.rows, summary.failed, summary.skipped) == (table.num_rows, 0, 0)
    assert summary.is_complete
    check_rows(job, table, range(table.num_rows))


def test_a_file_says_how_its_vectors_were_made(make_job):
    job = make_job(options={"dimensions": 8}, role="query")
    run(job)
    schema = read(job).schema
    assert schema.field("vector").type == pa.list_(pa.field("item", pa.float32(), False), 8)
    told = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert told["cache_key"] == Embedder(job.options).cache_key("query")
    assert (told["role"], told["dimensions"], told["embedding_type"]) == ("query", "8", "float")
    assert {"model", "revision", "version"} < told.keys()


@pytest.mark.parametrize(
    ("kind", "value", "width"),
    [("int8", pa.int8(), 16), ("uint8", pa.uint8(), 16), ("binary", pa.int8(), 2),
     ("ubinary", pa.uint8(), 2)],
)  # fmt: skip
def test_vectors_are_of_the_type_asked_for_also_beside_bad_rows(kind, value, width, make_job):
    table = passages(100)
    broken = table.set_column(1, "text", pa.array([None, *table["text"].to_pylist()[1:]]))
    job = make_job(broken, options={"embedding_type": kind})
    run(job)
    found = read(job).sort_by("id")
    kinds = found.schema.field("vector").type
    assert (kinds.value_type, kinds.list_size) == (value, width)
    texts = table["text"].to_pylist()[1:]
    expected = Embedder(job.options).embed(texts)
    np.testing.assert_array_equal(read_vectors(found), expected)


@pytest.mark.parametrize(
    ("kind", "size"), [("float", 64), ("int8", 16), ("uint8", 16), ("binary", 2), ("ubinary", 2)]
)
def test_a_vector_takes_as_many_bytes_as_its_type_has(kind, size, make_job):
    """A plan, and the choice of a type, are of bytes; Parquet itself has integers of four."""
    rows = 4_096
    job = make_job(passages(rows), {"embedding_type": kind}, rows_per_file=rows)
    run(job)
    (path,) = Path(job.out, "vectors").iterdir()
    footer = pq.read_metadata(path)
    groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
    columns = [group.column(footer.num_columns - 1) for group in groups]
    assert {column.path_in_schema for column in columns} == {"vector.list.element"}
    taken = sum(column.total_compressed_size for column in columns)
    ends_of_lists = rows * size / 8 if kind != "float" else rows * 16 / 8
    table = 0 if kind == "float" else 256 * 4 * len(groups)
    assert size * rows <= taken <= 1.15 * (size * rows + ends_of_lists + table) + 200 * len(groups)


def test_a_folder_gives_all_its_tables_and_ids_say_which(tmp_path, make_job):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write(passages(5), tmp_path / "in" / "a.parquet")
    write(passages(5), tmp_path / "in" / "sub" / "a.csv")
    write(passages(5), tmp_path / "in" / ".hidden.csv")
    job = make_job(tmp_path / "in", id_column=None, columns=())
    run(job)
    expected = [f"{title}:{row}" for title in ("a.parquet", "sub/a.csv") for row in range(5)]
    assert sorted(read(job)["id"].to_pylist()) == expected


def test_leading_zeros_of_an_id_in_a_csv_stay(tmp_path, make_job):
    (tmp_path / "in.csv").write_text("key,text\n007,a\n8,b\n")
    job = make_job(tmp_path / "in.csv", columns=())
    run(job)
    assert sorted(read(job)["id"].to_pylist()) == ["007", "8"]


def test_fragments_and_jobs_pickle_and_are_the_same_in_every_run(make_job):
    job = make_job()
    fragments = find_work(job).fragments
    assert find_work(pickle.loads(pickle.dumps(job))).fragments == fragments
    assert pickle.loads(pickle.dumps(fragments)) == fragments == find_work(job).fragments


# Resume


def test_the_same_command_again_does_what_is_missing_and_only_that(make_job, nim):
    job = make_job()
    run(job)
    before = read(job)
    lost = sorted(Path(job.out, "vectors").iterdir())[1]
    lost.unlink()
    nim.bodies.clear()
    summary = run(job)
    assert (summary.rows, summary.skipped) == (30, 70)
    assert sorted(texts_of(nim)) == sorted(passages(100)["text"].to_pylist()[30:60])
    assert read(job).equals(before)


def test_new_files_in_a_folder_are_missing_work(tmp_path, make_job):
    (tmp_path / "in").mkdir()
    write(passages(5), tmp_path / "in" / "b.parquet")
    run(make_job(tmp_path / "in", id_column=None))
    write(passages(7), tmp_path / "in" / "a.parquet")
    summary = run(make_job(tmp_path / "in", id_column=None))
    assert (summary.rows, summary.skipped) == (7, 5)


@pytest.mark.parametrize("how", ["cut", "garbage", "empty"])
def test_a_half_written_file_is_made_again(how, make_job, caplog):
    job = make_job()
    run(job)
    before = read(job)
    path = sorted(Path(job.out, "vectors").iterdir())[2]
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"x" * 99, "empty": b""}[how])
    assert run(job).rows == 30
    assert read(job).equals(before)
    assert path.name in caplog.text


def test_what_a_killed_run_left_beside_is_removed(make_job):
    job = make_job()
    run(job)
    left = Path(job.out, "vectors", ".x.parquet.12.tmp")
    left.write_bytes(b"half")
    run(job)
    assert not left.exists()


def test_done_twice_is_the_same(make_job):
    job = make_job()
    embedder = Embedder(job.options)
    with begin(job) as work:
        first = embed_fragment(job, embedder, work.missing[0])
        table = read(job)
        again = embed_fragment(job, embedder, work.missing[0])
    assert (first.rows, first.tokens) == (again.rows, again.tokens)
    assert read(job).equals(table)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"role": "query"}, {}, "role 'document'"),
        ({}, {"dimensions": 8}, "dimensions None"),
        ({}, {"embedding_type": "int8"}, "embedding_type 'float'"),
        ({}, {"truncate": "END"}, "truncate 'NONE'"),
        ({}, {"model": "nvidia/llama-nemotron-embed-300m-v2"}, "model"),
        ({"rows_per_file": 31}, {}, "rows_per_file 30"),
        ({"columns": ()}, {}, "columns"),
        ({"id_column": None}, {}, "id_column 'key'"),
    ],
)
def test_another_job_in_the_same_folder_is_refused_and_says_what_differs(
    changes, options, said, make_job
):
    job = make_job()
    run(job)
    sorted(Path(job.out, "vectors").iterdir())[0].unlink()  # there is work left
    before = read(job)
    with pytest.raises(ConfigurationError, match=said):
        run(make_job(options=options, **changes))
    assert read(job).equals(before)


def test_a_job_resumes_at_a_nim_that_has_moved(make_job, nim):
    run(make_job())
    job = make_job(options={"base_url": "http://other:8000"})
    sorted(Path(job.out, "vectors").iterdir())[0].unlink()
    assert run(job).rows == 30
    assert {request.url.host for request in nim.requests} == {"nim", "other"}
    check_rows(job, pq.read_table(job.inputs[0]), range(100))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"model": "other"},
            "replied with model 'other' after 'nvidia/llama-nemotron-embed-1b-v2'",
        ),
        ({"width": 32}, "replied with vectors of 32 values after 16"),
    ],
)
def test_a_server_that_gets_another_model_ends_the_run(make_job, nim, change, match):
    def reply(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        texts = body.get("input", [])
        if not any(text.startswith("passage 50") for text in texts):
            return None
        rows = [vector(text, width=change.get("width", 16)) for text in texts]
        values = [(index, encode_vector(row)) for index, row in enumerate(rows)]
        return httpx.Response(200, content=write_reply(values, change.get("model", MODEL)))

    nim._answer = reply
    job = make_job()
    with pytest.raises(ModelNotFoundError, match=match):
        run(job)
    kept = {path.stem[-3:] for path in Path(job.out, "vectors").iterdir()}
    assert "030" not in kept  # the fragment of these rows; others may have been finished
    nim._answer = None
    run(job)
    check_rows(job, pq.read_table(job.inputs[0]), range(100))


def test_a_source_that_changed_is_noticed(make_job):
    job = make_job()
    run(job)
    with pytest.raises(
        ConfigurationError, match=r"input\.parquet changed .*remove .*vectors/input-"
    ):
        run(make_job(passages(101)))
    os.unlink(job.inputs[0])
    with pytest.raises(ConfigurationError, match="does not exist"):
        run(job)


@pytest.mark.parametrize(
    "other",
    [
        {"role": "query"}, {"id_column": None}, {"columns": ()}, {"rows_per_file": 31},
        {"delimiter": ";"}, {"pdf": "text"}, {"image_column": "text"}, {"text_column": "lang"},
        {"types": {"lang": "binary"}}, {"quotes": False}, {"header": ("key", "text")},
    ],
)  # fmt: skip
def test_each_setting_of_a_job_is_that_of_all_its_runs(other, make_job):
    run(make_job())
    (name,) = other
    shown = {"text_column": "text_columns"}.get(name, name)
    with pytest.raises(ConfigurationError, match=rf"was begun with {shown}\b"):
        run(make_job(text_column=other.pop("text_column", "text"), **other))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_data_that_moved_and_lost_its_times_goes_on_when_told(suffix, tmp_path, make_job):
    (tmp_path / "in").mkdir()
    for name in "ab":
        write(passages(50), tmp_path / "in" / f"{name}{suffix}")
    run(make_job(tmp_path / "in", id_column=None))
    for path in sorted(Path(make_job().out, "vectors").iterdir())[1:]:
        path.unlink()
    (tmp_path / "in").rename(tmp_path / "moved")
    job = make_job(tmp_path / "moved", id_column=None)
    with pytest.raises(ConfigurationError, match=r"begun with inputs .*--trust-sizes if the data"):
        run(job)
    for name in "ab":
        os.utime(tmp_path / "moved" / f"{name}{suffix}", ns=(1, 1))
    (tmp_path / "moved").rename(tmp_path / "in")
    with pytest.raises(ConfigurationError, match=r"has another modification time .*--trust-sizes"):
        run(make_job(tmp_path / "in", id_column=None))
    (tmp_path / "in").rename(tmp_path / "moved")
    job = replace(job, trust_sizes=True)
    assert (run(job).rows, run(job).skipped) == (70, 100)
    keys = sorted(read(job)["id"].to_pylist())
    assert keys == sorted(f"{name}{suffix}:{row}" for name in "ab" for row in range(50))
    write(passages(49), tmp_path / "moved" / f"a{suffix}")
    with pytest.raises(ConfigurationError, match=rf"a\{suffix} changed since"):
        run(job)


def test_a_source_that_is_no_more_is_noticed(tmp_path, make_job):
    (tmp_path / "in").mkdir()
    for name in "ab":
        write(passages(5), tmp_path / "in" / f"{name}.parquet")
    job = make_job(tmp_path / "in", id_column=None)
    run(job)
    (tmp_path / "in" / "a.parquet").unlink()
    with pytest.raises(ConfigurationError, match="inputs that were removed"):
        run(job)


@pytest.mark.parametrize("when", ["before it is read", "after it was read"])
def test_a_source_that_changes_meanwhile_gives_no_file(when, make_job):
    job = make_job()
    with begin(job) as work:
        fragment = work.missing[0]

    def change() -> None:
        os.utime(job.inputs[0], ns=(1, 1))

    if is_before := when == "before it is read":
        change()
    with pytest.raises(InputError, match="changed since it was listed"):
        embed_fragment(job, Embedder(job.options), fragment, on_read=None if is_before else change)
    assert list(Path(job.out, "vectors").iterdir()) == []


# Bad rows


BAD = {3: None, 40: "", 41: " \n", 99: None}


def with_bad_rows(count: int = 100) -> pa.Table:
    table = passages(count)
    texts = [BAD.get(n, text) for n, text in enumerate(table["text"].to_pylist())]
    return table.set_column(1, "text", pa.array(texts, pa.string()))


def test_bad_rows_are_named_and_the_rest_goes_on(make_job):
    job = make_job(with_bad_rows())
    summary = run(job)
    assert (summary.rows, summary.failed, summary.is_complete) == (96, 4, False)
    check_rows(job, with_bad_rows(), (n for n in range(100) if n not in BAD))
    errors = read_errors(job)
    assert [(row["id"], row["index"]) for row in errors] == [(n, n) for n in BAD]
    assert {row["reason"] for row in errors} == {"has no text"}
    again = run(job)
    assert (again.rows, again.failed, again.skipped) == (0, 4, 96)
    assert again.is_complete  # they were reported once
    assert read_errors(job) == errors


def test_a_row_without_an_id_is_a_bad_row(make_job):
    table = passages(10).set_column(0, "key", pa.array([None, *range(1, 10)], pa.int64()))
    job = make_job(table)
    assert run(job).failed == 1
    assert read_errors(job)[0]["reason"] == "has no id in column key"


def test_a_window_of_bad_rows_alone(make_job):
    job = make_job(passages(40).set_column(1, "text", pa.array([None] * 40, pa.string())))
    assert (run(job).rows, len(read_errors(job))) == (0, 40)
    assert read(job).num_rows == 0


def test_strict_stops_at_the_first_and_loses_nothing(make_job):
    job = make_job(with_bad_rows(), strict=True, rows_per_file=10)
    with pytest.raises(InputError, match=r"input\.parquet, row 3, id 3: has no text"):
        run(job)
    whole = make_job(passages(100), strict=True, rows_per_file=10)
    for path in Path(job.out).rglob("*.parquet"):
        path.unlink()
    assert run(whole).rows == 100


def refuse(text_of_the_row: str, status: int):
    def answer(request, body):
        if any(text_of_the_row in text for text in body.get("input", [])):
            return httpx.Response(status, json={"detail": "not this one"})
        return None

    return answer


@pytest.mark.parametrize("count", [1, 100])
def test_a_row_that_the_nim_refuses_is_a_bad_row_also_alone(count, make_job):
    nim = Nim(refuse("passage 0,", 422))
    job = make_job(passages(count))
    embedder = nim.embedder()
    summary = run_local(job, embedder, show_progress=False)
    assert (summary.rows, summary.failed) == (count - 1, 1)
    assert read_errors(job)[0]["kind"] == "InvalidRequestError"
    if count > 1:
        check_rows(job, passages(count), range(1, count))


@pytest.mark.parametrize("fault", ["some", "all", "connection"])
def test_what_is_no_rows_fault_ends_the_run_and_is_resumed(fault, make_job):
    is_down = True

    def answer(request, body):
        if not is_down or request.method == "GET":
            return None
        if fault == "connection":
            raise httpx.ConnectError("no way", request=request)
        if fault == "all" or any("passage 77," in text for text in body["input"]):
            return httpx.Response(500)
        return None

    nim = Nim(answer)
    job = make_job(options={"max_batch_size": 5, "dimensions": 16})
    embedder = nim.embedder(max_batch_size=5, dimensions=16)
    with pytest.raises((ServerError, ConnectionFailedError)):
        run_local(job, embedder, show_progress=False)
    assert not list(Path(job.out, "errors").iterdir())
    is_down = False
    run_local(job, embedder, show_progress=False)
    assert sorted(read(job)["id"].to_pylist()) == list(range(100))


# Ids


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.large_string()])
def test_an_id_that_is_there_twice_is_named_with_both_rows(kind, make_job, nim):
    keys = [*range(95), 7, *range(96, 100)]
    table = passages(100).set_column(0, "key", pa.array(keys).cast(kind))
    with pytest.raises(ConfigurationError, match=r"id '?7'? .*row 7, and input.parquet, row 95"):
        run(make_job(table))
    assert nim.bodies == []  # nothing was embedded for it


def test_equal_hashes_of_other_ids_are_no_matter(make_job, monkeypatch):
    monkeypatch.setattr("shared_engine.bulk.ids._hash", lambda ids: np.zeros(len(ids), np.uint64))
    assert run(make_job()).rows == 100


def test_many_files_of_hashes_find_the_same(make_job, monkeypatch):
    monkeypatch.setattr("shared_engine.bulk.ids._AT_ONCE", 8)
    keys = [*range(99), 50]
    with pytest.raises(ConfigurationError, match="id 50 occurs twice"):
        run(make_job(passages(100).set_column(0, "key", pa.array(keys))))
    assert run(make_job(passages(100))).rows == 100


# What cannot be read or written


def test_a_fragment_that_cannot_be_read_leaves_the_others(tmp_path, make_job):
    path = tmp_path / "in.parquet"
    pq.write_table(passages(100), path, row_group_size=10, compression="none")
    with pq.ParquetFile(path) as file:
        start = file.metadata.row_group(4).column(1).data_page_offset
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(b"\xff" * 20)
    job = make_job(path, columns=())
    summary = run(job)
    assert (summary.rows, summary.is_complete) == (70, False)
    (lost,) = summary.unread
    assert (lost.title, lost.first, lost.rows) == ("in.parquet", 30, 30)
    assert "in.parquet, rows 30 to 59, cannot be read" in str(lost.error)
    (error,) = read_errors(job)
    assert (error["source"], error["index"], error["id"]) == ("in.parquet", 30, None)
    assert run(job).skipped == 70  # and it is tried again


def test_files_that_cannot_be_read_or_lack_the_column_leave_the_others(tmp_path, make_job):
    (tmp_path / "in").mkdir()
    for name in ("a.parquet", "z.csv"):
        write(passages(20), tmp_path / "in" / name)
    write(passages(20).drop_columns("text"), tmp_path / "in" / "b.parquet")
    write(passages(20).drop_columns("text"), tmp_path / "in" / "c.csv")
    write(passages(20).drop_columns("lang"), tmp_path / "in" / "d.jsonl")
    (tmp_path / "in" / "e.arrow").write_bytes(b"nothing of that kind")
    job = make_job(tmp_path / "in", id_column=None)
    summary = run(job)
    assert (summary.rows, summary.failed, summary.is_complete) == (40, 0, False)
    errors = {row["source"]: row["reason"] for row in read_errors(job)}
    assert list(errors) == ["b.parquet", "c.csv", "d.jsonl", "e.arrow"]
    assert "has no column 'text'; it has key, lang" in errors["b.parquet"]
    assert "has no column 'lang'; it has key, text" in errors["d.jsonl"]
    assert "cannot be read" in errors["e.arrow"]
    write(passages(20), tmp_path / "in" / "b.parquet")
    again = run(job)
    assert (again.rows, again.skipped, len(again.unread)) == (20, 40, 3)
    for name in ("c.csv", "d.jsonl", "e.arrow"):
        write(passages(20), tmp_path / "in" / name)
    assert run(job).is_complete
    assert not Path(job.out, "errors.parquet").exists()
    assert not list(Path(job.out).glob("**/.*"))


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".csv", ".jsonl"])
def test_a_file_that_cannot_be_read_at_all_is_named_and_tried_again(suffix, tmp_path, make_job):
    path = tmp_path / f"in{suffix}"
    path.write_bytes(
        "key,text\n1,a\n".encode("utf-16") if suffix == ".csv" else b"not of that kind"
    )
    job = make_job(path)
    summary = run(job)
    assert (summary.rows, summary.failed, summary.is_complete) == (0, 0, False)
    (error,) = read_errors(job)
    assert error["source"] == path.name
    assert f"in{suffix} cannot be read" in error["reason"]
    with pytest.raises(InputError, match=rf"in{suffix} cannot be read"):
        run(make_job(path, strict=True))
    write(passages(10), path)
    assert run(job).rows == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_column": "body"}, "no column 'body'; it has key, text, lang"),
        ({"id_column": "no"}, "no column 'no'"),
        ({"columns": ("no",)}, "no column 'no'"),
        ({"columns": ("vector",)}, "made here"),
    ],
)
def test_a_column_that_is_not_there_is_said_with_those_that_are(changes, said, make_job):
    with pytest.raises(ConfigurationError, match=said):
        run(make_job(**changes))


def test_kinds_are_not_mixed(tmp_path, make_job):
    (tmp_path / "in").mkdir()
    write(passages(3), tmp_path / "in" / "a.csv")
    (tmp_path / "in" / "b.png").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"several kinds: .*a\.csv, .*b\.png"):
        run(make_job(tmp_path / "in"))
    (tmp_path / "c.docx").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="cannot be read; expected"):
        run(make_job(tmp_path / "c.docx"))


def test_a_file_that_may_not_grow_is_an_output_error_and_resumed(make_job):
    job = make_job(rows_per_file=100)
    with begin(job):
        pass
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(OutputError, match="Finished results are kept"):
            run(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(Path(job.out, "vectors").iterdir()) == []
    assert run(job).rows == 100


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path, make_job):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    try:
        job = make_job(passages(3000), rows_per_file=500)
        job = Job(**{**vars(job), "out": str(small / "out")})
        with pytest.raises(OutputError, match="No space left"):
            run(job)
        done = read(job).num_rows
        assert done % 500 == 0
        assert done > 0
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert run(job).skipped == done
        assert sorted(read(job)["id"].to_pylist()) == list(range(3000))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_next_fragment_begins_before_the_last_is_done(make_job, monkeypatch):
    """Else the engine would wait for work at every border."""
    begun, ended, overlaps = set(), set(), 0

    def watched(job, embedder, fragment, **more):
        nonlocal overlaps
        begun.add(fragment.name)
        overlaps += len(begun) - len(ended) > 1
        done = embed_fragment(job, embedder, fragment, **more)
        ended.add(fragment.name)
        return done

    monkeypatch.setattr("shared_engine.bulk.run.embed_fragment", watched)
    run(make_job(rows_per_file=10))
    assert overlaps > 0


def test_a_folder_without_a_job_is_an_error_that_says_what_to_call(make_job):
    job = make_job()
    with pytest.raises(ConfigurationError, match=r"call run\.begin first"):
        manifest.read_schema(job)
