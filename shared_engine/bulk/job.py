"""A job and its fragments: runs of rows that any process can embed alone."""

from __future__ import annotations

import csv
import glob
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow.dataset import get_partition_keys, partitioning
from pyarrow.fs import FileType

from shared_engine.bulk import convert, tables
from shared_engine.bulk.urls import (
    OPTIONS_HINT,
    find_path,
    is_hidden,
    is_url,
    list_remote,
    locate,
    open_parquet,
    skips,
)
from shared_engine.documents import Role
from shared_engine.errors import ConfigurationError, InputError, NeMoRetrieverError, PageError
from shared_engine.images import pages
from shared_engine.options import Options

_log = logging.getLogger("shared_engine")

ROWS_PER_FILE = 10_000
"""Rows of text in a fragment: 80 MB of float32 vectors of 2,048 values."""
IMAGES_PER_FILE = 500
"""Rows with images in a fragment: each takes as long as many texts."""
_TABLES = (".parquet", *convert.SUFFIXES)
"""Suffixes of tables."""
TABLES = ".tables"
"""Folder of the converted tables, in the folder of results."""
_INFO = re.compile(r"dataset_(info|infos|dict)\.json")
_BESIDE_INFO = re.compile(r"state\.json|cache-.*\.arrow")
"""Names of the other files that Hugging Face's `datasets` writes into a folder of tables."""
_LOG = re.compile(r"(.*)/(_delta_log/.*|metadata/[^/]*\.metadata\.json)")
"""Files that list the current ones of a Delta or Iceberg table."""


@dataclass(frozen=True)
class Job:
    """Inputs, options and output folder of an embedding job. A pickle of it has no API key."""

    inputs: tuple[str, ...]
    """Absolute paths of files and folders, patterns of these as `glob` takes them, or URLs of
    tables; a `file:///` URL becomes a path."""
    out: str
    """Absolute path of the folder of results, or the URL of one in an object store."""
    options: Options = field(default_factory=Options)
    role: Role = "document"
    text_column: str | tuple[str, ...] | None = None
    """Column of the texts; None is "text", unless there is an image column. Several, as title and
    text, are joined by `join_title`."""
    image_column: str | None = None
    """Column of images: bytes, paths from the table's folder, data URLs, or base64."""
    id_column: str | None = None
    """Column of unique ids, integers or texts; None: ids are file name and row number."""
    columns: tuple[str, ...] = ()
    """Columns to keep with the vectors."""
    types: dict[str, str] = field(default_factory=dict)
    """Arrow's names of types for kept columns, such as "double"; others keep the type of the file,
    which is text for CSV and JSON."""
    rows_per_file: int | None = None
    """Maximum number of rows in a fragment, and so in a file of vectors; None: by kind of input."""
    delimiter: str | None = None
    """Character between the fields of CSV and TSV files; None is a comma and a tab. A file's first
    line `sep=;`, as Excel reads it, overrides it."""
    quotes: bool = True
    """Whether quotation marks around a field of CSV or TSV are no part of it."""
    header: tuple[str, ...] | None = None
    """Names of the columns of CSV and TSV files that begin with a record; None: the first line."""
    pdf: pages.Layer = "picture"
    """Part of a PDF page to embed."""
    strict: bool = False
    """Whether the first row or file that fails ends the run."""
    trust_sizes: bool = False
    """Whether to resume with inputs at other paths, or with other modification times, if names and
    sizes are the same."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigurationError("no inputs; expected files or folders")
        object.__setattr__(self, "inputs", tuple(map(find_path, self.inputs)))
        object.__setattr__(self, "out", find_path(self.out))
        for path in (*self.inputs, self.out):
            if path.startswith("file:") or not (os.path.isabs(path) or is_url(path)):
                raise ConfigurationError(f"{path}: expected an absolute path or a URL")
        for path in self.inputs:
            if self.has_written(os.path.join(path, "")):
                raise ConfigurationError(
                    f"{path} is inside --out {self.out}, whose files are results and no inputs; "
                    "use another --out, such as a new folder in it"
                )
        if is_url(self.out) and "?" in self.out:
            raise ConfigurationError(f"{self.out}: {OPTIONS_HINT}")
        if "vector" in self.columns or ("id" in self.columns and self.id_column != "id"):
            raise ConfigurationError("columns: id and vector are made here; rename the columns")
        for name, kind in self.types.items():
            if name not in self.kept_columns:
                raise ConfigurationError(f"types: {name!r} is not a kept column; add it to columns")
            try:
                pa.type_for_alias(kind)
            except ValueError:
                raise ConfigurationError(
                    f"types: {kind!r} of {name!r} is not a type of Arrow; expected int64, double, "
                    "bool, date32, timestamp[us], string or the like"
                ) from None
        if self.rows_per_file is not None and self.rows_per_file < 1:
            raise ConfigurationError(f"rows_per_file={self.rows_per_file}: must be 1 or more")
        if self.delimiter is not None and not re.fullmatch(r'[^"\r\n]', self.delimiter):
            raise ConfigurationError(f"delimiter={self.delimiter!r}: expected one character")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns of the texts of tables."""
        if not self.text_column:
            return ("text",) if self.image_column is None else ()
        return (self.text_column,) if isinstance(self.text_column, str) else self.text_column

    @property
    def dialect(self) -> dict[str, Any]:
        """How CSV and TSV differ from others: arguments of `csv.reader`, and `header`."""
        dialect: dict[str, Any] = {} if self.quotes else {"quoting": csv.QUOTE_NONE}
        given = {"delimiter": self.delimiter, "header": self.header}
        return dialect | {name: value for name, value in given.items() if value}

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns to keep apart from `id`, each once."""
        return tuple(dict.fromkeys(name for name in self.columns if name != "id"))

    def has_written(self, path: str) -> bool:
        """Return whether a file is in the folder of results."""
        return path.startswith(os.path.join(self.out, ""))

    def find_columns(self, title: str) -> tuple[dict[str, bool], dict[str, str | None]]:
        """Return the columns to read of a table, and the kept ones that its path gives.

        Each column to read has a flag: whether it is only kept.

        Args:
            title: path of the table; a folder `lang=de` gives a column `lang`, as Hive writes it.

        Raises:
            InputError: the name of a folder is not UTF-8.
        """
        wanted = (self.id_column, *self.text_columns, self.image_column)
        found = dict.fromkeys((name for name in wanted if name is not None), False)
        kept = [name for name in self.kept_columns if name not in found]
        schema = pa.schema([(name, pa.string()) for name in kept])
        with tables.reading(title):
            given = get_partition_keys(partitioning(schema, flavor="hive").parse(title))
        return found | dict.fromkeys((name for name in kept if name not in given), True), given


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some consecutive rows of one source, embedded as a whole or not at all."""

    name: str
    """Name of its files without suffix; the same in every run, independent of other inputs."""
    source: str
    """Absolute path of the table, the PDF or TIFF, or the folder of images."""
    title: str
    """Name of the source in ids and messages."""
    first: int
    """Number of its first row in the source, from 0: a row, a page or an image."""
    rows: int
    fingerprint: str
    """Size and modification time of the source; of a folder, those of its images."""
    table: str = ""
    """Absolute path of the Parquet file of a table: the source, or a conversion of it."""
    names: tuple[str, ...] = ()
    """Paths of its images from the folder."""

    @property
    def is_pdf(self) -> bool:
        """Whether its rows are pages of a PDF."""
        return not self.names and _find_kind(self.source) == "pdf"


class Unread(NamedTuple):
    """A file, or a fragment of one, that cannot be read."""

    title: str
    first: int | None
    """The first row of the fragment; None for the whole file."""
    rows: int
    error: NeMoRetrieverError


class Source(NamedTuple):
    """A table, a PDF, a TIFF of several pages, or a folder with other images."""

    path: str
    title: str
    """Its path from the folder that all inputs share."""
    names: tuple[str, ...] = ()
    """Paths of its images from the folder."""


def list_inputs(
    job: Job, sources: Sequence[Source], folder: str
) -> tuple[list[Fragment], Any, list[Unread]]:
    """Return the fragments of sources, their schema, and the files that cannot be read.

    Tables that are not Parquet are converted first, once, into `folder`. The schema has names and
    types of the id and the kept columns; it is None if no file can be read.

    Raises:
        ConfigurationError: every file that can be read lacks a column.
        InputError: a file cannot be read, with `job.strict` only.
        OutputError: a converted table cannot be written.
    """
    fragments: list[Fragment] = []
    unread: list[Unread] = []
    schema: Any = None
    missing: ConfigurationError | None = None
    for source in sources:
        try:
            found, kinds = _cut_source(job, source, folder)
            schema = kinds if schema is None else _unify(schema, kinds)
            fragments += found
        except (InputError, ConfigurationError) as exc:
            if job.strict:
                raise
            if isinstance(exc, ConfigurationError):
                missing = missing or exc
                exc = InputError(str(exc))
            unread.append(Unread(source.title, None, 0, exc))
    if schema is None and missing is not None:
        raise missing
    return fragments, schema, unread


def take_fingerprint(source: str, names: tuple[str, ...] = ()) -> str:
    """Return an identity of a source: size, "-", modification time; rsync compares the same.

    Raises:
        InputError: it does not exist.
    """
    with tables.reading(source):
        if not names:
            system, path = locate(source)
            found = system.get_file_info(path)
            if not found.is_file:
                is_there = found.type is not FileType.NotFound
                raise ValueError("it is not a regular file" if is_there else "it does not exist")
            return f"{found.size}-{found.mtime_ns}"
        sizes, times = hashlib.sha256(), hashlib.sha256()
        for name in names:
            with suppress(OSError):  # a link to no file: the row will have the error
                picture = os.stat(os.path.join(source, name))
                sizes.update(f"{name} {picture.st_size}\n".encode())
                times.update(f"{picture.st_mtime_ns}\n".encode())
    return f"{sizes.hexdigest()[:16]}-{times.hexdigest()[:16]}"


def find_sources(job: Job) -> list[Source]:
    """Return the tables, PDFs, TIFFs of several pages, and folders with images of a job.

    Raises:
        ConfigurationError: an input does not exist, is inside another one, or of another kind.
    """
    listed = [_list_files(given) for given in job.inputs]
    _refuse_lakes([path for _, files in listed for path in files])
    try:
        root = os.path.commonpath([folder for folder, _ in listed])
    except ValueError:
        raise ConfigurationError(
            f"inputs are local paths and URLs: {', '.join(job.inputs)}; embed them by separate "
            "commands, each with its own --out"
        ) from None
    given_by: dict[str, str] = {}
    kinds: dict[str, str] = {}
    sources: list[Source] = []
    for given, (_, files) in zip(job.inputs, listed, strict=True):
        pictures: list[str] = []
        for path in files:
            kind = _find_kind(path)
            if kind is None and path == given:
                expected = ", ".join(sorted({*_TABLES, ".pdf", *pages.SUFFIXES}))
                raise ConfigurationError(f"{given} cannot be read; expected {expected}")
            if kind is None or job.has_written(path):
                continue
            if os.fsencode(path).decode("utf-8", "replace") != path:
                raise ConfigurationError(
                    f"{path!a}: the name is not UTF-8, so no id can hold it; rename the file"
                )
            key = os.path.normpath(path)
            if key in given_by:
                raise ConfigurationError(f"{path} is given twice: {given_by[key]} and {given}")
            given_by[key] = given
            kinds.setdefault(kind, path)
            if kind == "picture" and not _has_pages(path):
                pictures.append(path)
            else:
                sources.append(Source(path, os.path.relpath(path, root)))
        if pictures:
            folders = set(map(os.path.dirname, pictures))
            folder = given if os.path.isdir(given) else os.path.commonpath(folders)
            names = sorted(os.path.relpath(picture, folder) for picture in pictures)
            sources.append(Source(folder, os.path.relpath(folder, root), tuple(names)))
        if len(kinds) > 1:
            raise ConfigurationError(
                f"inputs are of several kinds: {', '.join(kinds.values())}; embed tables, images "
                "and PDF files by separate commands, each with its own --out"
            )
    _log_skipped(job, [path for _, files in listed for path in files])
    if not kinds:
        raise ConfigurationError(
            f"no files to embed in {', '.join(job.inputs)} (a .txt file must be named)"
        )
    return sources


def _refuse_lakes(files: list[str]) -> None:
    for log in filter(None, map(_LOG.fullmatch, files)):
        raise ConfigurationError(
            f"{log[1]} is a Delta or Iceberg table, whose files also hold removed rows; export it "
            "to Parquet first"
        )


def _log_skipped(job: Job, files: list[str]) -> None:
    skipped = [each for each in files if _find_kind(each) is None and not job.has_written(each)]
    if skipped:
        first = skipped[0]
        _log.warning("%d files of other formats are skipped, the first: %s", len(skipped), first)


def _list_files(given: str) -> tuple[str, list[str]]:
    """Return the folder that the titles of an input start from, and its files."""
    if is_url(given):
        folder, files = list_remote(given)
        for path in files:
            if _find_kind(path) in ("picture", "pdf"):
                raise ConfigurationError(f"{path}: copy images and PDFs to a local folder first")
        return folder, _choose_data(files) if folder == given.rstrip("/") else files
    if os.path.isdir(given):
        return given, _choose_data(list(pages.walk(given, is_hidden)))
    if os.path.exists(given):
        return os.path.dirname(given), [given]
    folder = given
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    found: dict[str, None] = {}
    for path in sorted(glob.glob(given, recursive=True)):
        if not skips(os.path.relpath(given, folder), os.path.relpath(path, folder)):
            found |= dict.fromkeys(_list_files(path)[1])
    if not found:
        raise ConfigurationError(f"{given} does not exist")
    return folder, list(found)


def _choose_data(files: list[str]) -> list[str]:
    """Return the files of a folder without texts and files about data."""
    saved = {os.path.dirname(path) for path in files if path.endswith("/dataset_info.json")}

    def is_data(path: str) -> bool:
        folder, name = os.path.split(path)
        is_beside = folder in saved and _BESIDE_INFO.fullmatch(name)
        return not (is_beside or _INFO.fullmatch(name) or convert.find_suffix(name) == ".txt")

    return list(filter(is_data, files))


def _find_kind(path: str) -> str | None:
    suffix = convert.find_suffix(path)
    if suffix in _TABLES:
        return "table"
    return "pdf" if suffix == ".pdf" else "picture" if suffix in pages.SUFFIXES else None


def _has_pages(path: str) -> bool:
    """Return whether an image file is a TIFF of several pages, whose rows are those of a PDF."""
    if not path.lower().endswith((".tif", ".tiff")):
        return False
    try:
        with pages.open_pages(path) as found:
            return len(found) > 1
    except PageError:  # the row will have the error
        return False


def _cut_source(job: Job, source: Source, folder: str) -> tuple[list[Fragment], Any]:
    """Return the fragments of a source, and the names and types of its id and kept columns."""
    path, title, names = source
    is_table = not names and _find_kind(path) == "table"
    has_images = not is_table or job.image_column is not None
    rows = job.rows_per_file or (IMAGES_PER_FILE if has_images else ROWS_PER_FILE)
    stem = re.sub(r"[*?[]", "_", Path(path).stem[:40]).lstrip("._")  # or readers skip its vectors
    stem += f"-{hashlib.sha256(title.encode()).hexdigest()[:16]}"
    mark = "" if names else take_fingerprint(path)
    table = ""
    if is_table:
        table, count, schema = _open_table(job, source, f"{folder}/{stem}.parquet", rows, mark)
    else:
        schema, count = _find_page_schema(job, title), len(names)
        if not names:
            with pages.open_pages(path, title) as found:
                count = len(found)
    fragments = []
    for first in range(0, count, rows):
        some = names[first : first + rows]
        name, size = f"{stem}-{first:012d}", min(rows, count - first)
        fingerprint = mark or take_fingerprint(path, some)
        fragments.append(Fragment(name, path, title, first, size, fingerprint, table, some))
    return fragments, schema


def _open_table(
    job: Job, source: Source, target: str, rows: int, mark: str
) -> tuple[str, int, pa.Schema]:
    """Return the Parquet file of a table, the number of its rows, and its schema as above."""
    path, title, _ = source
    wanted, given = job.find_columns(title)
    if convert.find_suffix(path) in convert.SUFFIXES:
        convert.convert(path, title, target, wanted, rows, mark, job.dialect)
        path = target
    with tables.reading(title), open_parquet(path) as file:
        found, count = file.schema_arrow, file.metadata.num_rows
    tables.require_columns(wanted, found.names, title)
    for name in job.text_columns:
        tables.require_texts(found.field(name).type, name, title)
    kind = pa.string()
    if job.id_column is not None:
        kind = tables.find_id_type(found.field(job.id_column).type, job.id_column, title)
    kinds = {"id": kind}
    for name in job.kept_columns:
        kinds[name] = pa.string() if name in given else tables.simplify(found.field(name).type)
    kinds |= {name: pa.type_for_alias(alias) for name, alias in job.types.items()}
    return path, count, pa.schema(kinds)


def _find_page_schema(job: Job, title: str) -> Any:
    names = ("text_column", "image_column", "id_column", "types", "delimiter", "header")
    given = {name: getattr(job, name) for name in names} | {"quotes": not job.quotes}
    for name, is_given in given.items():
        if is_given:
            raise ConfigurationError(f"{name}: only for tables; images and PDFs have no columns")
    kinds = {"path": pa.string(), "page": pa.int32()}
    tables.require_columns(job.kept_columns, tuple(kinds), title)
    return pa.schema({"id": pa.string()} | {name: kinds[name] for name in job.kept_columns})


def _unify(first: Any, second: Any) -> Any:
    pairs = zip(first, second, strict=True)
    return pa.schema(
        [field.with_type(tables.unify(field.type, other.type)) for field, other in pairs]
    )
