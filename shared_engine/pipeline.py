"""Documents to vectors on one backend: check, submit, finish. `Embedder` and `Stream` only wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, Protocol

from shared_engine import vectors
from shared_engine.backend import Backend, Flow, Remote, Request
from shared_engine.documents import EmbeddingInput, Role, validate
from shared_engine.errors import (
    EngineClosedError,
    NeMoRetrieverError,
    NonFiniteVectorError,
    PartialResultError,
    UnsupportedDimensionsError,
    combine_errors,
)
from shared_engine.options import Options
from shared_engine.threads import raise_closed
from shared_engine.usage import TokenCount, count_for

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Documents = Iterable[str | EmbeddingInput]

SMALL = 64 * 2048
"""Values that an event loop may finish by itself, in well under a millisecond."""


class HasBackend(Protocol):
    """Where a pipeline gets its backend from, at each call; the first may load a model."""

    @property
    def backend(self) -> Backend:
        """The backend, or EngineClosedError."""


class Pipeline:
    """What `options` ask of a backend, for any number of callers at once."""

    def __init__(self, source: HasBackend, options: Options, used: TokenCount) -> None:
        self._source = source
        self.options = options
        self._used = used

    @property
    def backend(self) -> Backend:
        """The backend; the first access loads the model."""
        return self._source.backend

    def submit(self, documents: Documents, role: Role) -> Future[NDArray[np.float32]]:
        """Check all documents, then accept them; the future's vectors are for `finish`.

        Raises:
            InputError: a document is of the wrong type or modality; nothing was submitted.
            ConfigurationError: the options cannot work.
            EngineClosedError: the backend was closed.
        """
        valid = validate(documents, role, self.backend.modalities)
        if not self.options.show_progress:
            return self.submit_valid(valid, role)
        from tqdm.auto import tqdm

        bar = tqdm(total=len(valid), unit="doc")

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
    ) -> Future[NDArray[np.float32]]:
        """Do as `submit` does with documents that were checked."""
        backend, wanted = self.backend, self.options.dimensions
        offered = backend.dimensions
        if wanted is not None and offered and wanted not in offered:
            raise UnsupportedDimensionsError(
                f"dimensions={wanted}, but {self.options.model} offers "
                f"{', '.join(map(str, offered))}. For a folder or Hugging Face id, give "
                "the catalogue's name as `model` and the folder as `checkpoint`"
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
        try:
            return backend.submit(request)
        except EngineClosedError as exc:
            raise_closed(str(exc))

    def finish(self, future: Future[NDArray[np.float32]]) -> NDArray[Any]:
        """Wait for the vectors (n, d) of `submit`; return them in unit length and number type.

        Raises:
            PartialResultError: some documents failed; the vectors of the others, float32 of unit
                length, are on it.
            NeMoRetrieverError: what made all of them fail, or the only one.
            EngineClosedError: the engine was closed before the work was done.
        """
        import numpy as np

        errors: dict[int, NeMoRetrieverError] = {}
        try:
            pooled = future.result()
        except CancelledError:
            raise_closed("the engine was closed before this work was done")
        except PartialResultError as exc:
            pooled, errors = exc.vectors, dict(exc.errors)
        finally:
            del future  # an error's frames would hold it, and it the error
        out = vectors.unit(pooled)
        not_finite = NonFiniteVectorError(
            'gave a vector with NaN or infinity; try dtype="bfloat16" or "float32"'
        )
        for row in np.flatnonzero(~np.isfinite(out).all(axis=1)).tolist():
            errors.setdefault(row, not_finite)
        if errors:
            out[list(errors)] = np.nan
            raise combine_errors(out, errors)
        return vectors.quantize(out, self.options.embedding_type)

    def find_width(self) -> int:
        """Return the length of a vector; asks for one where only a NIM knows."""
        if self.options.dimensions is not None:
            return self.options.dimensions
        if offered := self.backend.dimensions:
            return offered[-1]
        backend = self.backend
        assert isinstance(backend, Remote)
        return backend.probe_width()
