"""The callable for `map_batches`: a column of documents in, a column of vectors beside it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shared_engine.backend import Rows
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import (
    ConfigurationError,
    InputError,
    InputTypeError,
    NeMoRetrieverError,
)
from shared_engine.options import Options


class EmbedBatch:
    """Adds a column of vectors to a batch, in a Ray Data pipeline or anywhere else.

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

    Each object has an engine, which loads at the first batch; with two calls at once it goes on
    with one batch while the other is read and stored. Ray lets an actor compute with as many
    threads as `num_cpus` says, and with one where it says nothing. It pickles as its arguments,
    without the key: each node has NVIDIA_API_KEY for itself.
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
        """Take the names of columns: of texts, of images, or of both as one document.

        Without `error_column`, a row that cannot be embedded ends the pipeline. With it the row
        has no vector, and its reason is in this column, which is null in all others.
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
        """Return the batch with its vectors: of the kind that came, and not changed itself.

        An Arrow table gets a fixed-size list, null where a row has no vector; a dict of arrays gets
        an (n, dimensions) array, where such a row is NaN, or 0 where the values are integers.

        Raises:
            PartialResultError: rows cannot be embedded, and there is no `error_column`.
            InputTypeError: the batch is neither of the two kinds.
            ConfigurationError: it has no such column; the options cannot work.
            RemoteError, EngineError: as with `Embedder.embed`, for whatever row.
        """
        if isinstance(batch, pa.Table):
            rows = self._embed(batch.column_names, lambda name: batch[name].to_pylist())
            is_failed = np.isin(np.arange(len(rows)), list(rows.errors))
            table = _put(batch, self._vector_column, to_fixed_size_list(rows.vectors, is_failed))
            if self._error_column is not None:
                reasons = pa.array(_explain(rows), pa.string())
                table = _put(table, self._error_column, reasons)
            return table
        if isinstance(batch, Mapping):
            rows = self._embed(batch, lambda name: list(batch[name]))
            added = {self._vector_column: rows.vectors}
            if self._error_column is not None:
                added[self._error_column] = np.array(_explain(rows), dtype=object)
            return {**batch, **added}
        raise InputTypeError(
            f"expected an Arrow table or a dict of arrays, got a {type(batch).__name__}; "
            'give map_batches batch_format="pyarrow" or "numpy"'
        )

    def _embed(self, names: Iterable[str], read: Callable[[str], list[Any]]) -> Rows:
        """Return the vectors and errors of all rows."""
        wanted = [name for name in (self._text_column, self._image_column) if name is not None]
        if missing := set(wanted) - set(names):
            raise ConfigurationError(
                f"there is no column {', '.join(sorted(missing))}; there are {', '.join(names)}"
            )
        documents: list[Any] = read(wanted[0])
        if self._text_column is None:
            documents = [EmbeddingInput(image=image) for image in documents]
        elif self._image_column is not None:
            documents = list(map(EmbeddingInput, documents, read(self._image_column)))
        size = max(1, len(documents))
        for rows in self._embedder.stream(documents, self._role, size, errors="return"):
            if self._error_column is None or not _are_inputs(rows.errors):
                rows.unwrap()
            return rows
        return Rows(self._embedder.embed([], self._role))


def _explain(rows: Rows) -> list[str | None]:
    """Return the reason of each failed row, without its index, and None for the others."""
    reasons = {row: str(error.args[0]) for row, error in rows.errors.items()}
    return [reasons.get(row) for row in range(len(rows))]


def to_fixed_size_list(found: NDArray[Any], lost: NDArray[np.bool_] | None = None) -> Any:
    """Return vectors (n, d) as an Arrow array of lists of d values, null where `lost` (n,) is."""
    mask = None if lost is None or not lost.any() else pa.array(lost)
    flat = pa.array(np.ascontiguousarray(found).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, found.shape[1], mask=mask)


def _put(table: Any, name: str, column: Any) -> Any:
    """Return a table with a column, in the place of one of the same name."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _are_inputs(errors: Mapping[int, NeMoRetrieverError]) -> bool:
    """Tell whether the rows are at fault, rather than what computes them."""
    return all(isinstance(error, InputError) for error in errors.values())
