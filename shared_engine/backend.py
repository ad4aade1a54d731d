"""The contract with a backend: a request of the public objects in, a future of `Rows` out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from shared_engine.catalogue import AvailableModel
from shared_engine.documents import EmbeddingInput, Modality, Role
from shared_engine.errors import InputError, NeMoRetrieverError, PartialResultError
from shared_engine.options import Truncate

if TYPE_CHECKING:  # numpy takes longer to import than all of this package
    from numpy.typing import NDArray

ScoreKind = Literal["logit", "probability"]
"""Meaning of a score: a logit of any size, or its sigmoid, from 0 to 1."""

_log = logging.getLogger("shared_engine")


class Flow:
    """Identity of a stream, for fair queueing: its requests share one place. Carries no state."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True)
class Request:
    """A list of validated documents, and how to embed or score them."""

    documents: list[EmbeddingInput]
    role: Role
    query: str | None = None
    """The text that a reranker scores the documents for; None for an embedding model."""
    dimensions: int | None = None
    """Length of the vectors; None is the model's full size."""
    truncate: Truncate = "NONE"
    on_progress: Callable[[int], object] | None = None
    """Called from another thread with the number of documents that were just finished."""
    on_usage: Callable[[int], object] | None = None
    """Called from another thread with the number of tokens that were just computed."""
    flow: Flow | None = None
    """Shared by the requests of one stream; None is a separate flow."""

    @property
    def is_search(self) -> bool:
        """Whether a user waits for it: a query, or the candidates of a search."""
        return self.role == "query" or self.query is not None

    @property
    def has_full_vectors(self) -> bool:
        """Whether the result is vectors of the model's full size."""
        return self.query is None and self.dimensions is None

    def report_progress(self, documents: int) -> None:
        """Call `on_progress`; log its error, as the calling thread also serves other requests."""
        _call(self.on_progress, documents)

    def report_usage(self, tokens: int) -> None:
        """Call `on_usage`; see `report_progress`."""
        _call(self.on_usage, tokens)


def _call(callback: Callable[[int], object] | None, count: int) -> None:
    try:
        if callback is not None:
            callback(count)
    except Exception:
        _log.exception("a callback of a request raised; its vectors are not lost")


@dataclass(frozen=True)
class Rows:
    """The outcome of some consecutive inputs: a vector or an error for each."""

    vectors: NDArray[Any]
    """(n, d): float32, or integers after quantization. Failed rows are NaN, or 0 in integers. From
    the backend of a reranker, (n, 1): the scores; (n,) when they are finished."""
    errors: Mapping[int, NeMoRetrieverError] = field(default_factory=dict)
    """Errors of the failed rows, by row of `vectors`."""
    offset: int = 0
    """Position of the first row in the caller's list or stream."""

    def __len__(self) -> int:
        return len(self.vectors)

    def unwrap(self) -> NDArray[Any]:
        """Return the vectors or scores if every row has one.

        Raises:
            PartialResultError: rows failed; it holds the others, and the errors by position in the
                caller's list or stream.
        """
        if not self.errors:
            return self.vectors
        errors = {self.offset + row: self.errors[row] for row in sorted(self.errors)}
        position, first = next(iter(errors.items()))
        reason = str(first) if isinstance(first, InputError) else f"input {position}: {first}"
        kind = "vectors" if self.vectors.ndim == 2 else "scores"
        raise PartialResultError(
            f"{len(errors)} of {len(self)} inputs failed, the first: {reason}; this error has the "
            f"other {kind} in `{kind}` and every error in `errors`",
            **{kind: self.vectors},
            errors=errors,
            offset=self.offset,
        )


@dataclass
class StepStats:
    """Counts of a device since it started."""

    max_batch_tokens: int
    """The most tokens in one step."""
    steps: int = 0
    tokens: int = 0
    """Cost of those steps in tokens; full steps would cost `steps * max_batch_tokens`."""
    started_requests: int = 0
    """Requests with an input in one of those steps."""
    wait_seconds: float = 0.0
    """Seconds from the acceptance of those requests to their first step, together."""


class Backend(ABC):
    """Turns documents into vectors or scores, in this process or at a server.

    `submit` is all that a backend must implement; the other members state facts, with a default.
    """

    base_url: str | None = None
    """Address of the server; None in this process."""
    dimensions: tuple[int, ...] = ()
    """Vector sizes, ascending; the last is the full size. Empty if only a server knows. (1,) for a
    reranker: a score."""
    failure: Exception | None = None
    """The error that ended the engine for good, as of its device; None while it works."""

    @property
    def model(self) -> str | None:
        """Name of the model; None while only a server knows it."""
        return None

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input that it takes."""
        return frozenset({"text"})

    @property
    def score_kind(self) -> ScoreKind:
        """Meaning of the scores of a reranker."""
        return "logit"

    @property
    def step_stats(self) -> StepStats | None:
        """Counts of the device; None if the backend does not compute in steps."""
        return None

    @property
    def gpu_memory(self) -> Mapping[str, int]:
        """Bytes of each GPU, by its name, that the allocator of this process holds."""
        return {}

    @property
    def description(self) -> str:
        """Model, device or server, and the reasons for them, in one line."""
        return type(self).__name__

    @property
    def fingerprint(self) -> str:
        """Identity of the vectors: equal for two backends only if their vectors are equal."""
        return self.description

    @abstractmethod
    def submit(self, request: Request) -> Future[Rows]:
        """Accept a request and return immediately.

        Row i of the result belongs to document i. Vectors are float32, cut to size and not yet of
        unit length. A row's own failure (a text over the limit, an image that cannot be decoded)
        is in `Rows.errors`; the future fails only for a reason that is true of all rows.
        Cancelling the future drops what has not started. Thread-safe.

        Raises:
            EngineClosedError: the backend was closed.
        """

    def probe_width(self) -> int:
        """Return the length of a full vector; asks the server if only that knows.

        Raises:
            RemoteError: the server does not answer with a vector.
        """
        return self.dimensions[-1]

    def list_models(self) -> list[AvailableModel]:
        """Return the models that a server serves; none in this process.

        Raises:
            RemoteError: the server does not list them.
        """
        return []

    def wait_until_ready(self, timeout: float) -> None:  # noqa: B027 - an optional method
        """Return when the backend can compute.

        Raises:
            RequestTimeoutError: it could not within `timeout` seconds.
        """

    def close(self, cancel: bool = False, wait: bool = True) -> None:  # noqa: B027 - as above
        """Stop.

        Args:
            cancel: Drop the work that has not started, instead of finishing all accepted work.
            wait: Return when it has stopped.
        """
