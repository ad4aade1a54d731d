"""The callable for `map_batches`: adds a column of vectors to a batch of documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shared_engine.backend import Rows
from shared_engine.bulk.rows import make_document
from shared_engine.bulk.tables import (
    cast_rows,
    read_texts,
    require_columns,
    require_texts,
    simplify,
)
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import InputError, InputTypeError
from shared_engine.options import Options


class EmbedBatch:
    """Adds a column of vectors to a batch: for Ray Data's `map_batches`, or any other pipeline.

        dataset.map_batches(
            EmbedBatch,
            fn_constructor_kwargs={"text_column": "passage", "options": Options(truncate="END")},
            batch_format="pyarrow",
            batch_size=1024,
            num_gpus=1,
            compute=ActorPoolStrategy(
                size=4, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
        )

    Each object has an engine, which loads at the first batch. With two concurrent calls it embeds
    one batch while Ray reads and stores another. Ray limits an actor's threads to its `num_cpus`,
    and to one by default. It pickles as its arguments, without the API key: set NVIDIA_API_KEY on
    every node.
    """

    def __init__(
        self,
        text_column: str | None = None,
        image_column: str | None = None,
        *,
        options: Options | None = None,
        role: Role = "document",
        vector_column: str = "vector",
        error_column: str | None = None,
    ) -> None:
        """Create the callable; the engine loads later.

        Args:
            text_column: column of texts; default: "text", unless there is an image column.
            image_column: column of images, as `nemoretriever embed` takes them; with a text column,
                both are one document.
            vector_column: name of the new column.
            error_column: name of a column for the reasons of rows that fail, null in the others.
                Without it, such a row ends the pipeline.
        """
        if text_column is None and image_column is None:
            text_column = "text"
        self._text_column = text_column
        self._image_column = image_column
        self._role = role
        self._vector_column = vector_column
        self._error_column = error_column
        self._embedder = Embedder(options)

    def __call__(self, batch: Any) -> Any:
        """Return a copy of the batch with its vectors, of the same kind.

        An Arrow table gets a fixed-size list, null in failed rows; a dict of arrays gets an
        (n, dimensions) array, which is NaN in such rows, or 0 if its values are integers.

        Raises:
            PartialResultError: rows cannot be embedded, and there is no `error_column`.
            InputTypeError: the batch is neither of the two kinds.
            InputError: a column has a type that holds no texts.
            ConfigurationError: a column is missing; the options cannot work.
            RemoteError, EngineError: as with `Embedder.embed`, for any row.
        """
        if isinstance(batch, pa.Table):
            rows = self._embed(batch, batch.column_names)
            batch = _put(batch, self._vector_column, _make_vectors(rows))
            if self._error_column is not None:
                batch = _put(batch, self._error_column, pa.array(_explain(rows), pa.string()))
            return batch
        if isinstance(batch, Mapping):
            rows = self._embed(batch, list(batch))
            added = {self._vector_column: rows.vectors}
            if self._error_column is not None:
                added[self._error_column] = np.array(_explain(rows), dtype=object)
            return {**batch, **added}
        raise InputTypeError(
            f"expected an Arrow table or a dict of arrays, got a {type(batch).__name__}; "
            'pass batch_format="pyarrow" or "numpy" to map_batches'
        )

    def _embed(self, batch: Any, names: Sequence[str]) -> Rows:
        """Return the vectors and errors of all rows."""
        wanted = [name for name in (self._text_column, self._image_column) if name is not None]
        require_columns(wanted, names, "the batch")
        wrong: dict[int, str] = {}
        columns: list[list[Any]] = []
        for name in wanted:
            column = batch[name]
            if isinstance(column, pa.ChunkedArray):
                if name == self._text_column:
                    require_texts(column.type, name, "the batch")
                    column, reasons = read_texts(column)
                else:
                    images, reasons = cast_rows(column, simplify(column.type))
                    column = images.to_pylist()
                wrong |= {row: f"column {name!r} {why}" for row, why in reasons.items()}
            columns.append(list(column))
        documents = columns[-1]
        if self._image_column is not None:
            texts = columns[0] if self._text_column is not None else [None] * len(documents)
            documents = [
                make_document(*row) or EmbeddingInput()
                for row in zip(texts, documents, strict=True)
            ]
        size = max(1, len(documents))
        for rows in self._embedder.stream(documents, self._role, size, errors="return"):
            bad = {row: InputError(reason, index=row) for row, reason in wrong.items()}
            found = Rows(rows.vectors, {**rows.errors, **bad})
            are_inputs = all(isinstance(error, InputError) for error in found.errors.values())
            if self._error_column is None or not are_inputs:
                found.unwrap()
            return found
        return Rows(self._embedder.embed([], self._role))


def _explain(rows: Rows) -> list[str | None]:
    """Return the reason of each failed row, without its index, and None for the others."""
    reasons = {row: str(error.args[0]) for row, error in rows.errors.items()}
    return [reasons.get(row) for row in range(len(rows))]


def _make_vectors(rows: Rows) -> pa.FixedSizeListArray:
    """Return vectors as lists of one size, null in failed rows."""
    is_failed = np.isin(np.arange(len(rows)), list(rows.errors))
    flat = pa.array(np.ascontiguousarray(rows.vectors).reshape(-1))
    mask = pa.array(is_failed) if rows.errors else None
    return pa.FixedSizeListArray.from_arrays(flat, rows.vectors.shape[1], mask=mask)


def _put(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """Return a table with a column, in the place of one of the same name."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)
