"""What to embed and how, cut into fragments: runs of rows that any process can embed alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shared_engine.bulk import convert, tables
from shared_engine.documents import Role
from shared_engine.errors import ConfigurationError, InputError, NeMoRetrieverError, PageError
from shared_engine.images import pages
from shared_engine.options import Options

ROWS_PER_FILE = 10_000
"""Rows of text in a fragment: 80 MB of float32 vectors of 2,048 values."""
IMAGES_PER_FILE = 500
"""Rows with images in a fragment: each takes as long as many texts."""
TABLES = ".tables"
"""Folder of the converted tables, in the folder of results."""
TABLE_SUFFIXES = frozenset({".parquet", *convert.CONVERTED})
_HIDDEN = "._"
"""First characters of hidden names; Spark and Hive begin those of their own files with _."""


@dataclass(frozen=True)
class Job:
    """What to embed, how, and where to. Its pickle has no API key, as that of its options."""

    inputs: tuple[str, ...]
    """Absolute paths of files and folders."""
    out: str
    """Absolute path of the folder of results."""
    options: Options = field(default_factory=Options)
    role: Role = "document"
    text_column: str | None = None
    """Column of the texts; None is "text", unless there is an image column."""
    image_column: str | None = None
    """Column of images: bytes, paths from the table's folder, or data URLs."""
    id_column: str | None = None
    """Column of unique ids, integers or texts; None: ids are file name and row number."""
    columns: tuple[str, ...] = ()
    """Columns to keep with the vectors."""
    rows_per_file: int | None = None
    """Maximum number of rows in a fragment, and so in a file of vectors; None: by kind of input."""
    pdf: pages.Layer = "picture"
    """Part of a PDF page to embed."""
    strict: bool = False
    """Whether the first row or file that fails ends the run."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigurationError("no inputs; expected files or folders")
        for path in (*self.inputs, self.out):
            if not os.path.isabs(path):
                raise ConfigurationError(f"{path}: expected an absolute path")
        if "vector" in self.columns or ("id" in self.columns and self.id_column != "id"):
            raise ConfigurationError("columns: id and vector are made here; rename the columns")
        if self.rows_per_file is not None and self.rows_per_file < 1:
            raise ConfigurationError(f"rows_per_file={self.rows_per_file}: must be 1 or more")

    @property
    def input_columns(self) -> tuple[str | None, str | None]:
        """Columns of texts and of images, of tables."""
        text = self.text_column or ("text" if self.image_column is None else None)
        return text, self.image_column

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns to keep apart from `id`, each once."""
        return tuple(dict.fromkeys(name for name in self.columns if name != "id"))

    @property
    def read_columns(self) -> list[str]:
        """Columns of a table that are read, each once."""
        wanted = (self.id_column, *self.input_columns, *self.kept_columns)
        return list(dict.fromkeys(name for name in wanted if name is not None))


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some consecutive rows of one source, embedded as a whole or not at all."""

    name: str
    """Name of its files without suffix; the same in every run, whatever other inputs there are."""
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
    def kind(self) -> Literal["table", "pdf", "picture"]:
        """Kind of its source."""
        if self.table:
            return "table"
        return "picture" if self.names or _find_kind(self.source) == "picture" else "pdf"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `Fragment(**values)` makes an equal one."""
        return asdict(self)


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
    root: str
    """The folder that its title starts from."""
    pictures: tuple[str, ...] = ()
    """Paths of its images."""


class Inputs(NamedTuple):
    """The inputs of a job."""

    fragments: list[Fragment]
    schema: Any
    """Names and types of the id and the kept columns; None if no file can be read."""
    unread: list[Unread]


def list_fragments(job: Job) -> list[Fragment]:
    """Return the fragments of a job, the same whenever the inputs are; see `list_inputs`."""
    return list_inputs(job).fragments


def list_inputs(
    job: Job, folder: str | None = None, sources: Sequence[Source] | None = None
) -> Inputs:
    """List the fragments of a job. Tables that are not Parquet are converted first, once.

    Args:
        job: what to embed.
        folder: where the converted tables are; default: hidden in the folder of results.
        sources: the result of `find_sources`, if that was called before.

    Raises:
        ConfigurationError: an input does not exist, files are of several kinds, or every file that
            can be read lacks a column.
        InputError: a file cannot be read, with `job.strict` only.
        OutputError: a converted table cannot be written.
    """
    fragments: list[Fragment] = []
    unread: list[Unread] = []
    schema: Any = None
    missing: ConfigurationError | None = None
    for source in find_sources(job) if sources is None else sources:
        try:
            found, kinds = _cut_source(job, source, folder or os.path.join(job.out, TABLES))
            schema = kinds if schema is None else _unify(schema, kinds)
            fragments += found
        except (InputError, ConfigurationError) as exc:
            if job.strict:
                raise
            if isinstance(exc, ConfigurationError):
                missing = missing or exc
                exc = InputError(str(exc))
            unread.append(Unread(os.path.relpath(source.path, source.root), None, 0, exc))
    if schema is None and missing is not None:
        raise missing
    return Inputs(fragments, schema, unread)


def take_fingerprint(source: str, names: tuple[str, ...] = ()) -> str:
    """Return an identity of a source: size and modification time, as rsync compares.

    Raises:
        InputError: it does not exist.
    """
    try:
        if not names:
            found = os.stat(source)
            return f"{found.st_size}-{found.st_mtime_ns}"
        digest = hashlib.sha256()
        for name in names:
            found = os.stat(os.path.join(source, name))
            digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    except OSError as exc:
        raise InputError(f"{exc.filename} cannot be read: {exc.strerror}") from exc
    return digest.hexdigest()[:16]


def find_sources(job: Job) -> list[Source]:
    """Return the tables, PDFs, TIFFs of several pages, and folders with images of a job.

    Raises:
        ConfigurationError: an input does not exist, is inside another one, or of another kind.
    """
    _check_overlap(job.inputs)
    root = os.path.commonpath(job.inputs)
    root = root if os.path.isdir(root) else os.path.dirname(root)
    kinds: dict[str, str] = {}
    sources: list[Source] = []
    for given in job.inputs:
        if not os.path.exists(given):
            raise ConfigurationError(f"{given} does not exist")
        files = pages.walk(given, _HIDDEN) if os.path.isdir(given) else [given]
        pictures: list[str] = []
        for path in files:
            kind = _find_kind(path)
            if kind is None and path == given:
                expected = ", ".join(sorted({*TABLE_SUFFIXES, ".pdf", *pages.SUFFIXES}))
                raise ConfigurationError(f"{given} cannot be read; expected {expected}")
            if kind is None or path.startswith(job.out + os.sep):
                continue
            if os.fsencode(path).decode("utf-8", "replace") != path:
                raise ConfigurationError(
                    f"{path!a}: the name is not UTF-8, so no id can hold it; rename the file"
                )
            kinds.setdefault(kind, path)
            if kind == "picture" and not _has_pages(path):
                pictures.append(path)
            else:
                sources.append(Source(path, root))
        if pictures:
            sources.append(Source(given, root, tuple(pictures)))
        if len(kinds) > 1:
            raise ConfigurationError(
                f"inputs are of several kinds: {', '.join(kinds.values())}; embed tables, images "
                "and PDF files by separate commands, each with its own --out"
            )
    if not kinds:
        raise ConfigurationError(f"no files to embed in {', '.join(job.inputs)}")
    return sources


def _check_overlap(inputs: tuple[str, ...]) -> None:
    """Refuse an input inside another one: its rows would be embedded twice."""
    given: set[str] = set()
    for path in map(os.path.normpath, inputs):
        if path in given:
            raise ConfigurationError(f"{path} is given twice")
        given.add(path)
    for path in given:
        folder = path
        while folder != (folder := os.path.dirname(folder)):
            if folder in given:
                raise ConfigurationError(f"{path} is in {folder}, which is given too")


def _find_kind(path: str) -> str | None:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in TABLE_SUFFIXES:
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
    """Return the fragments of a source, and names and types of its id and kept columns."""
    path, root, pictures = source
    title = os.path.relpath(path, root)
    is_table = not pictures and _find_kind(path) == "table"
    has_images = not is_table or job.image_column is not None
    rows = job.rows_per_file or (IMAGES_PER_FILE if has_images else ROWS_PER_FILE)
    stem = f"{Path(path).stem[:40]}-{hashlib.sha256(title.encode()).hexdigest()[:16]}"
    if pictures:
        if not os.path.isdir(path):
            path = os.path.dirname(path)
            title = os.path.relpath(path, root)
        names = sorted(os.path.relpath(picture, path) for picture in pictures)
        fragments = []
        for first in range(0, len(names), rows):
            some = tuple(names[first : first + rows])
            name, mark = f"{stem}-{first:012d}", take_fingerprint(path, some)
            fragments.append(Fragment(name, path, title, first, len(some), mark, names=some))
        return fragments, _find_page_schema(job, title)
    mark = take_fingerprint(path)
    table = ""
    if is_table:
        table, count, schema = _open_table(job, path, title, f"{folder}/{stem}.parquet", rows, mark)
    else:
        schema = _find_page_schema(job, title)
        with pages.open_pages(path, title) as found:
            count = len(found)
    return [
        Fragment(
            f"{stem}-{first:012d}", path, title, first, min(rows, count - first), mark, table=table
        )
        for first in range(0, count, rows)
    ], schema


def _open_table(  # noqa: PLR0917
    job: Job, path: str, title: str, target: str, rows: int, mark: str
) -> tuple[str, int, Any]:
    """Return the Parquet file of a table, the number of its rows, and the schema of what is kept.

    The schema has the ids, as `id`, and the kept columns.
    """
    wanted = job.read_columns
    if is_converted := os.path.splitext(path)[1].lower() in convert.CONVERTED:
        convert.convert(path, title, target, wanted, rows, mark)
    path = target if is_converted else path
    with tables.reading(title), pq.ParquetFile(path) as file:
        found, count = file.schema_arrow, file.metadata.num_rows
    tables.require_columns(wanted, found.names, title)
    text, _ = job.input_columns
    if text is not None:
        tables.require_texts(found.field(text).type, text, title)
    kind = pa.string()
    if job.id_column is not None:
        kind = tables.find_id_type(found.field(job.id_column).type, job.id_column, title)
    kept = [(name, tables.simplify(found.field(name).type)) for name in job.kept_columns]
    return path, count, pa.schema([("id", kind), *kept])


def _find_page_schema(job: Job, title: str) -> Any:
    kinds = {"path": pa.string(), "page": pa.int32()}
    tables.require_columns(job.kept_columns, tuple(kinds), title)
    return pa.schema([("id", pa.string()), *((name, kinds[name]) for name in job.kept_columns)])


def _unify(first: Any, second: Any) -> Any:
    pairs = zip(first, second, strict=True)
    return pa.schema(
        [field.with_type(tables.unify(field.type, other.type)) for field, other in pairs]
    )
