"""The rows of a fragment, whatever its source: what is kept of them, and what is embedded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from shared_engine.bulk import pages, tables
from shared_engine.bulk.job import Fragment, Job, is_paged
from shared_engine.documents import EmbeddingInput
from shared_engine.errors import ConfigurationError

_PAGES = pa.schema([("path", pa.string()), ("page", pa.int32())])
"""What can be kept of a page; of a picture, the first."""


@dataclass
class Rows:
    """Some consecutive rows."""

    kept: Any
    """A table of the ids, as `id`, and the columns to keep."""
    documents: list[str | EmbeddingInput]
    refused: dict[int, str] = field(default_factory=dict)
    """Why some of them cannot be embedded, by row."""


def find_schema(job: Job, fragment: Fragment) -> Any:
    """Return names and types of the id and the kept columns, as the source of a fragment has them.

    Raises:
        ConfigurationError: it has no such column, or ids of a type that ids are not of.
        InputError: it cannot be read.
    """
    if "vector" in job.columns or ("id" in job.columns and job.id_column != "id"):
        raise ConfigurationError("--columns: the columns id and vector are made here")
    names = [name for name in job.columns if name != "id"]
    if fragment.names or is_paged(fragment):
        found = _PAGES if is_paged(fragment) else pa.schema([_PAGES.field("path")])
        _require(names, found, fragment)
        return pa.schema([("id", pa.string()), *(found.field(name) for name in names)])
    with tables.reading(fragment.source):
        found = tables.find_format(fragment.source).read_schema(fragment.source)
    wanted = [name for name in (job.id_column, *_find_inputs(job)) if name is not None]
    _require([*names, *wanted], found, fragment)
    kind = pa.string()
    if job.id_column is not None and not tables.is_csv(fragment.source):  # 007 is not 7
        kind = found.field(job.id_column).type
        if pa.types.is_integer(kind):
            kind = pa.int64() if kind != pa.uint64() else kind
        elif _is_text(kind):
            kind = pa.string()
        else:
            raise ConfigurationError(
                f"column {job.id_column} of {fragment.title} holds {kind}; an id is an integer or "
                "a text"
            )
    return pa.schema([pa.field("id", kind), *(found.field(name) for name in names)])


def read_rows(job: Job, fragment: Fragment, schema: Any, size: int) -> Iterator[Rows]:
    """Yield the rows of a fragment in windows of `size`, but for the last.

    Raises:
        InputError: they cannot be read.
    """
    if fragment.names or is_paged(fragment):
        for start in range(0, fragment.rows, size):
            yield _read_pages(job, fragment, schema, range(start, min(start + size, fragment.rows)))
        return
    text, image = _find_inputs(job)
    fields = {name: schema.field(name) for name in schema.names if name != "id"}
    if job.id_column is not None:
        fields[job.id_column] = schema.field("id").with_name(job.id_column)
    if text is not None:
        fields[text] = pa.field(text, pa.string())
    if image is not None:
        with tables.reading(fragment.source):
            found = tables.find_format(fragment.source).read_schema(fragment.source)
        _require([image], found, fragment)
        kind = found.field(image).type
        fields[image] = pa.field(image, pa.string() if _is_text(kind) else kind)
    part = tables.Range(fragment.first, fragment.rows, fragment.begin, fragment.end)
    first = fragment.first
    for table in tables.read_batches(fragment.source, part, pa.schema(fields.values()), size):
        yield _from_table(job, fragment, schema, table, first)
        first += table.num_rows


def _from_table(job: Job, fragment: Fragment, schema: Any, table: Any, first: int) -> Rows:
    text, image = _find_inputs(job)
    count = table.num_rows
    refused: dict[int, str] = {}
    if job.id_column is None:
        ids = pa.array([f"{fragment.title}:{first + n}" for n in range(count)], pa.string())
    else:
        ids = table[job.id_column].combine_chunks()
        refused = {
            row: f"has no id in column {job.id_column}"
            for row, is_null in enumerate(ids.is_null().to_pylist())
            if is_null
        }
    nothing = [None] * count
    texts = nothing if text is None else table[text].to_pylist()
    images = nothing if image is None else table[image].to_pylist()
    documents: list[str | EmbeddingInput] = []
    folder = os.path.dirname(fragment.source)
    for row, (given, picture) in enumerate(zip(texts, images, strict=True)):
        words = given if given and not given.isspace() else None
        if words is None and picture is None:
            refused.setdefault(row, "has no text" if image is None else "has no text and no image")
        documents.append(_make_document(words, picture, folder))
    kept = [ids if name == "id" else table[name] for name in schema.names]
    return Rows(pa.table(kept, schema=schema), documents, refused)


def _make_document(text: str | None, image: Any, folder: str) -> str | EmbeddingInput:
    if image is None:
        return EmbeddingInput() if text is None else text
    if isinstance(image, dict):  # as Hugging Face's datasets hold it
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and ":" not in image[:8]:
        image = os.path.join(folder, image)
    return EmbeddingInput(text, image)


def _read_pages(job: Job, fragment: Fragment, schema: Any, numbers: range) -> Rows:
    ids: list[str] = []
    paths: list[str] = []
    documents: list[str | EmbeddingInput] = []
    refused: dict[int, str] = {}
    for row, number in enumerate(numbers):
        if fragment.names:
            name = fragment.names[number]
            paths.append(os.path.join(fragment.source, name))
            ids.append(os.path.normpath(os.path.join(fragment.title, name)))
            page: EmbeddingInput | str = EmbeddingInput(image=paths[-1])
        else:
            paths.append(fragment.source)
            ids.append(f"{fragment.title}#page={fragment.first + number + 1}")
            page = pages.read_page(fragment.source, fragment.first + number, job.pdf)
        if isinstance(page, str):
            refused[row], page = page, EmbeddingInput()
        documents.append(page)
    columns = {
        "id": ids, "path": paths, "page": [fragment.first + n + 1 for n in numbers],
    }  # fmt: skip
    kept = pa.table([columns[name] for name in schema.names], schema=schema)
    return Rows(kept, documents, refused)


def _find_inputs(job: Job) -> tuple[str | None, str | None]:
    """Return the columns of texts and images."""
    text = job.text_column or ("text" if job.image_column is None else None)
    return text, job.image_column


def _require(names: list[str], found: Any, fragment: Fragment) -> None:
    for name in names:
        if name not in found.names:
            raise ConfigurationError(
                f"{fragment.title} has no column {name!r}; it has {', '.join(found.names)}"
            )
        if found.names.count(name) > 1:
            raise ConfigurationError(
                f"{fragment.title} has {found.names.count(name)} columns {name!r}, so it is not "
                "clear which is meant; rename them"
            )


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(kind in (pa.string(), pa.large_string(), pa.string_view()))
