"""What to embed and how, cut into fragments: pieces of input that any process can do alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared_engine.bulk import pages, tables
from shared_engine.documents import Role
from shared_engine.errors import ConfigurationError, InputError
from shared_engine.options import Options

ROWS_PER_FILE = 10_000
"""Rows of text in a fragment: 80 MB of float32 vectors of 2,048 values."""
IMAGES_PER_FILE = 500
"""The same of rows with images, each of which takes as long as many texts."""


@dataclass(frozen=True)
class Job:
    """What to embed, how, and where to. Pickles without the key, as its options do."""

    inputs: tuple[str, ...]
    """Absolute paths of files and folders."""
    out: str
    """Absolute path of the folder of results."""
    options: Options = field(default_factory=Options)
    role: Role = "document"
    text_column: str | None = None
    """Column of the texts; None is "text" where no image column is named."""
    image_column: str | None = None
    """Column of images: bytes, a path (from the table's folder) or a data URL."""
    id_column: str | None = None
    """Column of ids, integers or texts; None makes ids of the file's name and the row."""
    columns: tuple[str, ...] = ()
    """Columns to keep beside the vectors."""
    rows_per_file: int | None = None
    """The most rows in a fragment, and so in a file of vectors; None suits the kind of input."""
    pdf: pages.Layer = "picture"
    strict: bool = False
    """Whether the first row that cannot be embedded ends the run."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigurationError("no input: name files or folders")
        for path in (*self.inputs, self.out):
            if not os.path.isabs(path):
                raise ConfigurationError(f"{path} is no absolute path")
        if self.rows_per_file is not None and self.rows_per_file < 1:
            raise ConfigurationError(f"rows_per_file is {self.rows_per_file}; expected 1 or more")


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some consecutive rows of one source: what is done as a whole, or not at all."""

    name: str
    """Name of its files without folder and suffix: the same in every run, whatever lies beside."""
    source: str
    """Absolute path of the table, the PDF, or the folder of pictures."""
    title: str
    """The source as ids and messages name it."""
    first: int
    """Number of its first row in the source, from 0: a row, a page or a picture."""
    rows: int
    fingerprint: str
    """Size and time of change of the source; of all its pictures, where those are it."""
    begin: int = 0
    """Bytes of a text file before it."""
    end: int = 0
    """Bytes of a text file up to its end."""
    names: tuple[str, ...] = ()
    """Its pictures, from the folder."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON; `Fragment(**values)` is it again."""
        return asdict(self)


def list_fragments(job: Job) -> list[Fragment]:
    """Return the fragments of a job, the same whenever the inputs are.

    Text files are read once for their line ends, of others only what they say of themselves.

    Raises:
        ConfigurationError: an input that is not there, or files of several kinds.
        InputError: a table that cannot be read.
    """
    return [
        fragment for path, root in _find_sources(job) for fragment in _cut_source(job, path, root)
    ]


def is_paged(fragment: Fragment) -> bool:
    """Whether it is of a PDF."""
    return fragment.source.lower().endswith(".pdf")


def take_fingerprint(source: str, names: tuple[str, ...] = ()) -> str:
    """Return what changes when a source does: size and time of change, as of rsync.

    Raises:
        InputError: it is no more.
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


def _find_sources(job: Job) -> Iterator[tuple[str, str]]:
    """Yield tables and PDFs, and folders with pictures, each with what its title begins after."""
    _check_overlap(job.inputs)
    root = os.path.commonpath(job.inputs)
    root = root if os.path.isdir(root) else os.path.dirname(root)
    kinds: dict[str, str] = {}
    for given in job.inputs:
        if not os.path.exists(given):
            raise ConfigurationError(f"{given} is not there")
        files = pages.walk(given) if os.path.isdir(given) else [given]
        has_pictures = False
        for path in files:
            kind = _find_kind(path)
            if kind is None and path == given:
                expected = ", ".join(sorted({*tables.FORMATS, ".pdf", *pages.SUFFIXES}))
                raise ConfigurationError(f"{given} is of no kind that can be read: {expected}")
            if kind is None or path.startswith(job.out + os.sep):
                continue
            if os.fsencode(path).decode("utf-8", "replace") != path:
                raise ConfigurationError(
                    f"{path!a}: an id cannot hold this name, which is no UTF-8"
                )
            kinds.setdefault(kind, path)
            if kind != "picture":
                yield path, root
            has_pictures |= kind == "picture"
        if has_pictures:
            yield given, root
        if len(kinds) > 1:
            raise ConfigurationError(
                f"inputs are of several kinds: {', '.join(kinds.values())}; embed tables, pictures "
                "and PDF files each into a folder of its own"
            )
    if not kinds:
        raise ConfigurationError(f"nothing to embed in {', '.join(job.inputs)}")


def _check_overlap(inputs: tuple[str, ...]) -> None:
    """Refuse inputs of which one is in another, as its rows would be there twice."""
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
    if suffix in tables.FORMATS:
        return "table"
    return "pdf" if suffix == ".pdf" else "picture" if suffix in pages.SUFFIXES else None


def _cut_source(job: Job, path: str, root: str) -> Iterator[Fragment]:
    title = os.path.relpath(path, root)
    kind = _find_kind(path) or "picture"
    has_images = kind != "table" or job.image_column is not None
    rows = job.rows_per_file or (IMAGES_PER_FILE if has_images else ROWS_PER_FILE)
    stem = f"{Path(path).stem[:40]}-{hashlib.sha256(title.encode()).hexdigest()[:16]}"
    if kind == "picture":
        if os.path.isdir(path):
            folder, found = path, pages.find_pictures(path)
        else:
            folder, found = os.path.dirname(path), [os.path.basename(path)]
            title = os.path.relpath(folder, root)
        for first in range(0, len(found), rows):
            names = tuple(found[first : first + rows])
            mark = take_fingerprint(folder, names)
            name = f"{stem}-{first:012d}"
            yield Fragment(name, folder, title, first, len(names), mark, names=names)
        return
    mark = take_fingerprint(path)
    with tables.reading(path):
        parts = (
            tables.find_format(path).split(path, rows)
            if kind == "table"
            else tables.cut(pages.count_pages(path), rows)
        )
        for part in parts:
            name = f"{stem}-{part.first:012d}"
            yield Fragment(name, path, title, part.first, part.rows, mark, part.begin, part.end)
