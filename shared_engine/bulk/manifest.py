"""The folder of results: its files, and the unfinished fragments.

    OUT/run.lock                held by the run that writes into the folder; names it
    OUT/job.json                the job: written first, compared at each resume
    OUT/engine.json             the engine: written by the first process that embeds, compared by
                                all others (cache_key: weights, dtype, role, dimensions, ...)
    OUT/.tables/<name>.parquet  a table converted to Parquet; removed when all of the job is done
    OUT/vectors/<name>.parquet  a finished fragment; its counts and the fingerprint of its source
                                are in the file's metadata
    OUT/errors/<name>.parquet   its rows that failed, if any
    OUT/errors.parquet          all failed rows and unreadable files, written when a run ends

There is no other list: the files are the manifest, and a million of them need no rewriting.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from shared_engine import catalogue
from shared_engine._version import __version__
from shared_engine.bulk import files
from shared_engine.bulk.job import TABLES, Fragment, Job, Unread
from shared_engine.bulk.urls import is_url, open_parquet
from shared_engine.embedder import Embedder
from shared_engine.errors import ConfigurationError, first_line

_log = logging.getLogger("shared_engine")

_READERS = 16
"""Threads that read footers; on a network file system, one takes milliseconds."""
_OPTIONS = (
    "model", "checkpoint", "revision", "dimensions", "embedding_type", "truncate", "max_tokens",
    "max_tiles",
)  # fmt: skip
"""Options that change the vectors and are known without an engine."""
_OF_A_RUN = ("out", "options", "text_column", "strict", "trust_sizes")
"""Fields of a job that its runs need not share, or that are compared in another form."""
_COUNTS = ("rows", "failed", "tokens")
"""Counts in the metadata of a file of vectors."""


@dataclass(frozen=True, slots=True)
class Done:
    """The outcome of a fragment."""

    name: str
    rows: int
    """Rows with a vector."""
    failed: int
    """Rows in the file of errors."""
    tokens: int
    """Tokens embedded; 0 if a NIM does not report them."""


def open_folder(job: Job) -> None:
    """Make the folder of a job, or check that it is the same job's.

    Raises:
        ConfigurationError: it was begun with other inputs, model, role or options; names the first.
        OutputError: it cannot be written.
    """
    with files.writing(job.out):
        for folder in ("vectors", "errors"):
            files.make_folder(os.path.join(job.out, folder))
    remove_leftovers(job)
    if _read_record(job, "job.json") is not None:
        _agree(job, "job.json", _describe_job(job))


def record_schema(job: Job, schema: Any) -> Any:
    """Write `job.json` if there is none; return the schema in it, which all runs share.

    `schema` has names and types of the id and the kept columns.
    """
    text = base64.b64encode(schema.serialize().to_pybytes()).decode()
    _agree(job, "job.json", _describe_job(job), schema=text)
    return read_schema(job)


def _describe_job(job: Job) -> dict[str, Any]:
    """Return the settings that all runs of a job share."""
    settings = {name: getattr(job.options, name) for name in _OPTIONS} | vars(job)
    settings["text_columns"] = job.text_columns
    for name in _OF_A_RUN:
        del settings[name]
    found: dict[str, Any] = json.loads(json.dumps(settings))  # lists for tuples
    return found


def remove_leftovers(job: Job) -> None:
    """Remove the temporary files of processes that were killed; none may be writing now."""
    if is_url(job.out):  # they are in a folder for such files
        return
    with files.writing(job.out):
        for pattern in (".*", "vectors/.*", "errors/.*", f"{TABLES}/.*"):
            for path in Path(job.out).glob(pattern + files.TEMPORARY):
                files.remove(str(path))


def read_schema(job: Job) -> Any:
    """Return the schema in `job.json`.

    Raises:
        ConfigurationError: there is none.
    """
    record = _read_record(job, "job.json")
    if record is None:
        raise ConfigurationError(f"{job.out} has no job.json; call run.begin first")
    return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(record["schema"])))


def describe_engine(job: Job, embedder: Embedder) -> dict[str, str]:
    """Return the metadata of the files of vectors; check that all processes use the same engine.

    Raises:
        ConfigurationError: the folder holds vectors of another model, dtype or the like.
    """
    options = job.options
    cache_key = embedder.cache_key(job.role)  # first, as it asks a server for the model's name
    model = embedder.model or ""
    spec = catalogue.lookup(model)
    facts = {
        "model": model,
        "revision": options.revision or (not options.checkpoint and spec and spec.revision) or "",
        "role": job.role,
        "dimensions": str(embedder.dimensions),
        "embedding_type": options.embedding_type,
        "cache_key": cache_key,
    }
    _agree(job, "engine.json", facts)
    return {**facts, "version": __version__}


def _agree(job: Job, name: str, settings: dict[str, Any], **more: str) -> None:
    """Write a record of settings if there is none yet, and compare with the one that is there.

    Of processes that write it together, the last one wins: call it again before results appear.
    """
    path = os.path.join(job.out, name)
    if (found := _read_record(job, name)) is None:
        with files.writing(path), files.write_atomically(path) as temporary:
            record = {**settings, "version": __version__, **more}
            Path(temporary).write_text(json.dumps(record, indent=1), encoding="utf-8")
        found = _read_record(job, name) or {}
    for key, value in settings.items():
        if found.get(key) != value and not (key == "inputs" and job.trust_sizes):
            moved = ", or --trust-sizes if the data moved" * (key == "inputs")
            raise ConfigurationError(
                f"{job.out} was begun with {key} {found.get(key)!r}, now it is {value!r}; use the "
                f"same value, or another --out{moved}"
            )


def _read_record(job: Job, name: str) -> dict[str, Any] | None:
    """Return a record that `_agree` wrote; None if there is none."""
    path = os.path.join(job.out, name)
    with files.writing(job.out):
        content = files.read_bytes(path)
    try:
        return None if content is None else dict(orjson.loads(content))
    except ValueError as exc:
        raise ConfigurationError(
            f"{path} is damaged ({first_line(exc)}); restore it, or remove it if this command and "
            "its engine are those that began the folder"
        ) from exc


def find_done(job: Job, fragments: Sequence[Fragment]) -> dict[str, Done]:
    """Return the finished fragments by name: those whose files of vectors and errors can be read.

    Others are logged, and are written again.

    Raises:
        ConfigurationError: a source changed or was removed; names it.
    """
    folder = os.path.join(job.out, "vectors")
    with files.writing(job.out):
        found = {name.removesuffix(".parquet") for name in files.list_names(folder)}
    if gone := found - {fragment.name for fragment in fragments}:
        raise ConfigurationError(
            f"{folder} holds {len(gone)} files of inputs that were removed or changed, the first: "
            f"{min(gone)}.parquet; restore these inputs, or remove the files"
        )
    written = [fragment for fragment in fragments if fragment.name in found]
    with ThreadPoolExecutor(_READERS) as pool:
        footers = pool.map(lambda fragment: _read_footer(job, fragment.name), written)
        done = {}
        for fragment, footer in zip(written, footers, strict=True):
            if footer is None:
                continue
            before, now = footer["fingerprint"], fragment.fingerprint
            has_same_size = before.partition("-")[0] == now.partition("-")[0]
            if before != now and not (has_same_size and job.trust_sizes):
                how = "has another modification time" if has_same_size else "changed"
                same = ", or use --trust-sizes if it is the same" * has_same_size
                raise ConfigurationError(
                    f"{fragment.source} {how} since its rows were embedded; restore it, or "
                    f"remove {folder}/{fragment.name[:-12]}*.parquet to embed it again{same}"
                )
            done[fragment.name] = Done(fragment.name, *(int(footer[name]) for name in _COUNTS))
    return done


def _read_footer(job: Job, name: str) -> dict[str, str] | None:
    path = os.path.join(job.out, "vectors", f"{name}.parquet")
    try:
        with open_parquet(path) as file:
            found = file.metadata.metadata
        footer = {key: found[key.encode()].decode() for key in (*_COUNTS, "fingerprint")}
        if int(footer["failed"]):
            path = os.path.join(job.out, "errors", f"{name}.parquet")
            if (count := _read_errors(path).num_rows) != int(footer["failed"]):
                raise ValueError(f"it has {count} rows, expected {footer['failed']}")
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as exc:
        _log.warning("%s cannot be read and is written again: %s", path, exc)
        return None
    return footer


def _read_errors(path: str) -> Any:
    with open_parquet(path) as file:
        table = file.read()
    return table.select(make_error_schema(pa.string()).names)


def make_error_schema(id_type: pa.DataType) -> pa.Schema:
    """Return the columns of the files of errors."""
    texts = dict.fromkeys(("reason", "kind", "source"), pa.string())
    return pa.schema({"id": id_type, **texts, "index": pa.int64()})


def make_error_row(source: str, index: int | None, id_: Any, error: Exception) -> dict[str, Any]:
    """Return a row of a file of errors."""
    # A name of a column that is not UTF-8 has lone surrogates, which no Parquet file can hold.
    reason = str(error).encode("utf-8", "backslashreplace").decode()
    kind = type(error).__name__
    return {"id": id_, "reason": reason, "kind": kind, "source": source, "index": index}


def merge_errors(job: Job, id_type: pa.DataType, unread: Sequence[Unread]) -> int:
    """Write `errors.parquet` from the fragments' errors; return the number of failed rows.

    A file that cannot be read is a row without an index, a fragment one with that of its first row.
    """
    path = os.path.join(job.out, "errors.parquet")
    vectors, errors = (os.path.join(job.out, folder) for folder in ("vectors", "errors"))
    with files.writing(path):
        done = set(files.list_names(vectors))
        parts = [f"{errors}/{name}" for name in files.list_names(errors) if name in done]
        if not parts and not unread:
            files.remove(path)
            return 0
        rows = 0
        schema = make_error_schema(id_type)
        with (
            files.write_atomically(path) as temporary,
            pq.ParquetWriter(temporary, schema) as writer,
        ):
            for part in parts:
                table = _read_errors(part)
                rows += table.num_rows
                writer.write_table(table)
            lost = [make_error_row(each.title, each.first, None, each.error) for each in unread]
            writer.write_table(pa.Table.from_pylist(lost, schema=schema))
    return rows
