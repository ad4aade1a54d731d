"""From documents to vectors on one backend: validate, submit, finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from shared_engine import vectors
from shared_engine.backend import Flow, Request, Rows
from shared_engine.documents import EmbeddingInput, Role, validate
from shared_engine.errors import NonFiniteVectorError, UnsupportedDimensionsError, place_error
from shared_engine.options import Options
from shared_engine.registry import Lease
from shared_engine.usage import TokenCount, count_for

if TYPE_CHECKING:
    from tqdm import tqdm

Documents = Iterable[str | EmbeddingInput]


class Pipeline:
    """The path from documents to vectors under some options. Thread-safe."""

    def __init__(self, lease: Lease, options: Options, used: TokenCount) -> None:
        self.lease = lease
        self.options = options
        self._used = used

    def submit(self, documents: Documents, role: Role, data_urls: bool = False) -> Future[Rows]:
        """Validate all documents, then submit them; pass the result to `finish`.

        Args:
            data_urls: See `documents.validate`.

        Raises:
            InputError: a document is of the wrong type or modality; nothing was submitted.
            ConfigurationError: the options cannot work.
            EngineClosedError: the backend was closed.
        """
        valid = validate(documents, role, self.lease.acquire().modalities, data_urls)
        if not self.options.show_progress:
            return self.submit_valid(valid, role)
        bar = self.open_bar(len(valid))

        def advance(count: int) -> None:
            bar.update(count)
            if bar.n >= len(valid):  # before the caller has the result, so that no line comes late
                bar.close()

        try:
            future = self.submit_valid(valid, role, on_progress=advance)
        except BaseException:
            bar.close()
            raise
        future.add_done_callback(lambda _: bar.close())
        return future

    def submit_valid(
        self,
        documents: list[EmbeddingInput],
        role: Role,
        flow: Flow | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> Future[Rows]:
        """Submit documents that were validated; see `submit`."""
        backend, wanted = self.lease.acquire(), self.options.dimensions
        offered = backend.dimensions
        if wanted is not None and offered and wanted not in offered:
            raise UnsupportedDimensionsError(
                f"dimensions={wanted}, but {backend.model} offers "
                f"{', '.join(map(str, offered))}. For a folder or Hugging Face id, pass the "
                "catalogue's name as model= and the folder as checkpoint="
            )
        request = Request(
            documents,
            role,
            dimensions=wanted,
            truncate=self.options.truncate,
            on_progress=on_progress,
            on_usage=count_for(self._used),
            flow=flow,
        )
        return backend.submit(request)

    def finish(self, rows: Rows) -> Rows:
        """Scale vectors to unit length, convert their number type, and index the errors.

        A vector with NaN or infinity becomes the error of its row. The array of `rows` may be
        overwritten.
        """
        import numpy as np

        out = vectors.unit(rows.vectors)
        errors = dict(rows.errors)
        for row in np.flatnonzero(~np.isfinite(out).all(axis=1)).tolist():
            if row not in errors:
                errors[row] = NonFiniteVectorError(
                    'has a vector with NaN or infinity; use dtype="bfloat16" or "float32"'
                )
        kind = self.options.embedding_type
        if not errors:
            return Rows(vectors.quantize(out, kind), offset=rows.offset)
        failed = list(errors)
        out[failed] = 0
        out = vectors.quantize(out, kind)
        out[failed] = np.nan if kind == "float" else 0
        placed = {row: place_error(error, rows.offset + row) for row, error in errors.items()}
        return Rows(out, placed, rows.offset)

    def find_width(self) -> int:
        """Return the length of a vector; asks a server if only that knows."""
        if self.options.dimensions is not None:
            return self.options.dimensions
        return self.lease.acquire().probe_width()

    @staticmethod
    def open_bar(total: int | None = None) -> tqdm[Any]:
        """Return a progress bar of documents."""
        from tqdm.auto import tqdm

        return tqdm(total=total, unit="doc")
