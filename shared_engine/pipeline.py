"""From documents to vectors or scores on one backend: validate, submit, finish."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

from shared_engine import spans, vectors
from shared_engine.backend import Backend, Flow, Request, Rows
from shared_engine.documents import EmbeddingInput, Role, validate
from shared_engine.errors import (
    ConfigurationError,
    InputError,
    NeMoRetrieverError,
    NonFiniteVectorError,
    UnsupportedDimensionsError,
)
from shared_engine.options import EngineOptions, Options, RerankOptions
from shared_engine.registry import Lease
from shared_engine.usage import TokenCount, count_for

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from opentelemetry.trace import Tracer
    from tqdm import tqdm

Documents = Iterable[str | EmbeddingInput]

OptionsT = TypeVar("OptionsT", bound=EngineOptions)


class Pipeline(ABC, Generic[OptionsT]):
    """The path of requests to a backend under some options. Thread-safe."""

    def __init__(self, lease: Lease, options: OptionsT, used: TokenCount) -> None:
        self.lease = lease
        self.options = options
        self._used = used

    def submit(
        self,
        documents: Documents,
        role: Role = "document",
        data_urls: bool = False,
        show_progress: bool = False,
        query: str | None = None,
    ) -> Future[Rows]:
        """Validate all documents, then submit them; pass the result to `finish`.

        Args:
            data_urls: See `documents.validate`.
            show_progress: Show a progress bar, as the option does.
            query: The query that a reranker scores the documents for.

        Raises:
            InputError: a document is of the wrong type or modality; nothing was submitted.
            ConfigurationError: the options cannot work.
            EngineClosedError: the backend was closed.
        """
        valid = validate(documents, role, self.lease.acquire().modalities, data_urls)
        if not (show_progress or self.options.show_progress):
            return self.submit_valid(valid, role, query=query)
        bar = self.open_bar(len(valid))

        def advance(count: int) -> None:
            bar.update(count)
            if bar.n >= len(valid):  # before the caller has the result, so that no line comes late
                bar.close()

        try:
            future = self.submit_valid(valid, role, query=query, on_progress=advance)
        except BaseException:
            bar.close()
            raise
        future.add_done_callback(lambda _: bar.close())
        return future

    def submit_valid(
        self,
        documents: list[EmbeddingInput],
        role: Role = "document",
        flow: Flow | None = None,
        on_progress: Callable[[int], object] | None = None,
        query: str | None = None,
    ) -> Future[Rows]:
        """Submit documents that were validated; see `submit`."""
        if role not in get_args(Role):
            raise ConfigurationError(f'role={role!r}: expected "query" or "document"')
        backend = self.lease.acquire()
        tokens = TokenCount()
        request = Request(
            documents,
            role,
            query=query,
            dimensions=self._find_dimensions(backend),
            truncate=self.options.truncate,
            on_progress=on_progress,
            on_usage=count_for(self._used, tokens),
            flow=flow,
        )
        if (tracer := spans.find_tracer()) is None:
            return backend.submit(request)
        return self._submit_in_span(tracer, backend, request, tokens)

    def _submit_in_span(
        self, tracer: Tracer, backend: Backend, request: Request, tokens: TokenCount
    ) -> Future[Rows]:
        operation = "embeddings" if request.query is None else "rerank"
        span = spans.start_span(
            tracer,
            f"{operation} {backend.model or ''}".rstrip(),
            "INTERNAL" if backend.base_url is None else "CLIENT",
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "nvidia",
                "gen_ai.request.model": backend.model,
                **spans.describe_server(backend.base_url),
            },
        )

        def end(future: Future[Rows]) -> None:
            error: BaseException | str | None = "cancelled"
            facts: dict[str, Any] = {"gen_ai.request.model": backend.model}
            if not future.cancelled() and (error := future.exception()) is None:
                rows = future.result()
                facts["gen_ai.usage.input_tokens"] = tokens.tokens or None
                if request.query is None:
                    facts["gen_ai.embeddings.dimension.count"] = rows.vectors.shape[1]
                error = next(iter(rows.errors.values()), None)
            spans.end_span(span, facts, error)

        try:
            with spans.make_current(span):
                future = backend.submit(request)
        except BaseException as exc:
            spans.end_span(span, {}, exc)
            raise
        future.add_done_callback(end)
        return future

    def _find_dimensions(self, backend: Backend) -> int | None:
        return None

    @abstractmethod
    def finish(self, rows: Rows) -> Rows:
        """Return rows in the form of the options, with the errors indexed.

        A row with NaN or infinity becomes an error. The array of `rows` may be overwritten.
        """

    @staticmethod
    def open_bar(total: int | None = None) -> tqdm[Any]:
        """Return a progress bar of documents."""
        from tqdm.auto import tqdm

        return tqdm(total=total, unit="doc")


class EmbeddingPipeline(Pipeline[Options]):
    """The path from documents to vectors."""

    def _find_dimensions(self, backend: Backend) -> int | None:
        offered, wanted = backend.dimensions, self.options.dimensions
        if wanted is not None and offered and wanted not in offered:
            raise UnsupportedDimensionsError(
                f"dimensions={wanted}, but {backend.model} offers "
                f"{', '.join(map(str, offered))}. For a folder or Hugging Face id, pass the "
                "catalogue's name as model= and the folder as checkpoint="
            )
        return wanted

    def finish(self, rows: Rows) -> Rows:
        """Scale vectors to unit length, and convert their number type; see `Pipeline.finish`."""
        import numpy as np

        out = vectors.unit(rows.vectors)
        errors = _list_errors(out, rows, "a vector with NaN or infinity")
        kind = self.options.embedding_type
        if not errors:
            return Rows(vectors.quantize(out, kind), offset=rows.offset)
        failed = list(errors)
        out[failed] = 0
        out = vectors.quantize(out, kind)
        out[failed] = np.nan if kind == "float" else 0
        return Rows(out, errors, rows.offset)

    def find_width(self) -> int:
        """Return the length of a vector; asks a server if only that knows."""
        if self.options.dimensions is not None:
            return self.options.dimensions
        return self.lease.acquire().probe_width()


class ScoringPipeline(Pipeline[RerankOptions]):
    """The path from a query and documents to scores."""

    def finish(self, rows: Rows) -> Rows:
        """Return the scores as (n,), after the activation; see `Pipeline.finish`."""
        import numpy as np

        errors = _list_errors(rows.vectors, rows, "a score that is NaN or infinite")
        scores = rows.vectors[:, 0]  # (n,)
        if self.options.activation == "sigmoid" and self.lease.acquire().score_kind == "logit":
            with np.errstate(over="ignore"):
                scores = 1 / (1 + np.exp(-scores))
        scores[list(errors)] = np.nan
        return Rows(scores, errors, rows.offset)


def _list_errors(values: NDArray[Any], rows: Rows, fault: str) -> dict[int, NeMoRetrieverError]:
    """Return the errors of rows, and one for each row of `values` (n, d) that is not finite.

    Their indexes are positions in the caller's list.
    """
    import numpy as np

    errors = dict(rows.errors)
    for row in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
        if row not in errors:
            errors[row] = NonFiniteVectorError(f'has {fault}; use dtype="bfloat16" or "float32"')
    return {
        row: error.at(rows.offset + row) if isinstance(error, InputError) else error
        for row, error in errors.items()
    }
