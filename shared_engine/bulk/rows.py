"""The rows of a fragment from any source: inputs, and errors of rows without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from shared_engine.bulk.convert import REASON, TEXT, find_suffix
from shared_engine.bulk.job import Fragment, Job
from shared_engine.bulk.tables import Cursor, Cursors, cast_rows, read_texts, reading, simplify
from shared_engine.documents import EmbeddingInput, join_title
from shared_engine.errors import PageError


class Window(NamedTuple):
    """Some consecutive rows of a source."""

    kept: Any
    """A table of the rows to embed: their numbers in the source, ids, columns to keep."""
    documents: list[str | EmbeddingInput]
    """The documents of these rows."""
    refused: list[tuple[int, Any, str]]
    """The other rows: number in the source, id, and the reason."""


def read_windows(
    job: Job, fragment: Fragment, schema: Any, size: int, cursors: Cursors
) -> Iterator[Window]:
    """Yield the rows of a fragment, at most `size` at a time.

    Args:
        schema: names and types of the id and the kept columns.
        cursors: holds the file open for the fragment that follows.

    Raises:
        InputError: the source cannot be read.
    """
    if not fragment.table:
        fields = pa.schema([pa.field("", pa.int64()), *schema])
        pages = _read_pages(job, fragment, cursors)
        while some := list(islice(pages, size)):
            refused = [(row[""], row["id"], why) for row, why in some if isinstance(why, str)]
            good = [each for each in some if not isinstance(each[1], str)]
            kept = pa.Table.from_pylist([row for row, _ in good], schema=fields)
            yield Window(kept, [document for _, document in good], refused)
        return
    cursor = open_table(job, fragment, cursors)
    first = fragment.first
    for table in cursor.read(first, fragment.rows, size):
        with reading(f"{fragment.title}, rows {first:,} to {first + table.num_rows - 1:,},"):
            window = _from_table(job, fragment, schema, table, first)
        yield window
        first += table.num_rows


def open_table(job: Job, fragment: Fragment, cursors: Cursors) -> Cursor:
    """Return a cursor of the columns to read of a fragment's table.

    Raises:
        InputError: the file cannot be read.
    """
    wanted, _ = job.find_columns(fragment.title)
    is_text = find_suffix(fragment.source) in TEXT
    return cursors.open(fragment.table, [*wanted, REASON] if is_text else list(wanted))


def _from_table(job: Job, fragment: Fragment, schema: Any, table: Any, first: int) -> Window:
    reasons: dict[int, str] = {}
    if REASON in table.column_names:
        reasons = {row: why for row, why in enumerate(table[REASON].to_pylist()) if why}

    def note(name: str, wrong: dict[int, str]) -> None:
        for row, why in wrong.items():
            reasons.setdefault(row, f"column {name!r} {why}")

    def read(name: str, kind: pa.DataType) -> pa.ChunkedArray:
        """Return a column as this type; rows whose value is not of it get a reason."""
        values, wrong = cast_rows(table[name], kind)
        note(name, wrong)
        return values

    count = table.num_rows
    ids: list[Any] = [f"{fragment.title}:{first + row}" for row in range(count)]
    if job.id_column is not None:
        ids = read(job.id_column, schema.field("id").type).to_pylist()
        for row, id_ in enumerate(ids):
            if id_ in (None, ""):
                ids[row] = None
                reasons.setdefault(row, f"has no id in column {job.id_column}")
    texts: list[str | None] | None = None
    for name in job.text_columns:
        found, wrong = read_texts(table[name])
        note(name, wrong)
        texts = found if texts is None else list(map(join_title, texts, found))
    images = None
    if (image := job.image_column) is not None:
        images = read(image, simplify(table[image].type)).to_pylist()
    for name, value in job.find_columns(fragment.title)[1].items():
        table = table.append_column(name, pa.array([value] * count, pa.string()))
    columns = [read(field.name, field.type) for field in list(schema)[1:]]
    documents: list[str | EmbeddingInput] = []
    good: list[int] = []
    nothing = [None] * count
    for row, (text, picture) in enumerate(zip(texts or nothing, images or nothing, strict=True)):
        document = make_document(text, picture, os.path.dirname(fragment.source))
        if document is None:
            reasons.setdefault(row, "has no text" if image is None else "has no text and no image")
        elif row not in reasons:
            documents.append(document)
            good.append(row)
    kept = [
        pa.array([first + row for row in good], pa.int64()),
        pa.array([ids[row] for row in good], schema.field("id").type),
        *(column.take(pa.array(good, pa.int64())) for column in columns),
    ]
    refused = [(first + row, ids[row], reasons[row]) for row in sorted(reasons)]
    return Window(pa.table(kept, names=["", *schema.names]), documents, refused)


def make_document(text: str | None, image: Any, folder: str = "") -> str | EmbeddingInput | None:
    """Return the document of a row; None if it has neither a text nor an image.

    Args:
        folder: where paths of images start; default: the working directory.
    """
    if text is None or not str(text).strip():
        text = None
    if isinstance(image, dict):  # as Hugging Face's datasets hold it
        image = image.get("bytes") or image.get("path")
    if image is None or (isinstance(image, (bytes, str)) and not image):
        return text
    if isinstance(image, str) and ":" not in image[:8]:
        path = os.path.join(folder, image)
        is_base64 = "." not in image and not os.path.lexists(path)  # that has no dot
        image = f"data:;base64,{image}" if is_base64 else path
    return EmbeddingInput(text, image)


def _read_pages(
    job: Job, fragment: Fragment, cursors: Cursors
) -> Iterator[tuple[dict[str, Any], EmbeddingInput | str]]:
    """Yield the columns of each page or image, and its input or the reason why there is none."""
    for number, name in enumerate(fragment.names, fragment.first):
        path = os.path.join(fragment.source, name)
        id_ = os.path.normpath(os.path.join(fragment.title, name))
        row = {"": number, "id": id_, "path": path, "page": 1}
        yield row, EmbeddingInput(image=path)
    if fragment.names:
        return
    layer = job.pdf if fragment.is_pdf else "picture"
    pages = cursors.open_pages(fragment.source, fragment.title)
    for number in range(fragment.first, fragment.first + fragment.rows):
        place = pages.places[number]
        part = f"&part={place.part}" if place.part else ""
        document: EmbeddingInput | str = "has no text: its text layer is empty"
        try:
            _, picture, text = pages.read(number, layer)
            if picture is not None or text:
                document = EmbeddingInput(text, picture)
        except PageError as exc:
            document = str(exc)
        id_ = f"{fragment.title}#page={place.page}{part}"
        yield {"": number, "id": id_, "path": fragment.source, "page": place.page}, document
