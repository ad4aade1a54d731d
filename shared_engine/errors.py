"""All errors that the package raises deliberately; each is also a builtin exception type.

NeMoRetrieverError
├── ConfigurationError (ValueError)       options that cannot work, alone or together
│   ├── CheckpointError                   model files missing or not supported
│   ├── ModelRetiredError (LookupError)   a server no longer runs the model
│   └── UnsupportedDimensionsError        a vector size that the model does not offer
├── MissingExtraError (ImportError)       an optional dependency is not installed
├── InputError (ValueError)               one input is invalid; `index` is its position
│   ├── InputTypeError (TypeError)
│   ├── InputTooLongError
│   ├── UnsupportedModalityError
│   ├── ImageError                        an image cannot be found, fetched or decoded
│   │   └── ImageTooLargeError            it exceeds a limit of bytes, pixels or tokens
│   ├── PageError                         a PDF, or a page of one, cannot be read
│   ├── DeviceMemoryError (MemoryError)   the input does not fit on the device, even alone
│   └── NonFiniteVectorError              the vector holds NaN or infinity
├── EngineError (RuntimeError)            the engine failed; the inputs are valid
├── RemoteError (RuntimeError)            a NIM refused or failed; `status`, `detail`, `request_id`
│   ├── AuthenticationError               401: the key is missing or wrong
│   ├── PermissionDeniedError (PermissionError)   403: the key may not use this model
│   ├── ModelNotFoundError (LookupError)  404: no such model, or no such path
│   ├── InvalidRequestError (ValueError)  400, 422: the server rejects the request
│   ├── PayloadTooLargeError (ValueError) 413: one input is too large, even alone
│   ├── RateLimitError                    429 after every retry; `retry_after`
│   ├── ServerError                       5xx after every retry
│   ├── RequestTimeoutError (TimeoutError)        no reply within `timeout` or `deadline`
│   ├── ConnectionFailedError (ConnectionError)   no connection, or it broke
│   └── MalformedResponseError            an invalid response
├── PartialResultError (RuntimeError)     some inputs failed; it has the other vectors
├── OutputError (OSError)                 results cannot be written: no space, no permission
└── EngineClosedError (RuntimeError)

Errors pickle with their attributes, so they cross process pools unchanged.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from numpy.typing import NDArray


class NeMoRetrieverError(Exception):
    """Base class of all errors of this package."""


class ConfigurationError(NeMoRetrieverError, ValueError):
    """An option, or several together, cannot work."""


class CheckpointError(ConfigurationError):
    """A checkpoint is missing, incomplete, or of an unsupported architecture."""


class ModelRetiredError(ConfigurationError, LookupError):
    """A server, such as NVIDIA's hosted catalogue, no longer runs the model.

    The message has the date and the successor as far as known, and where the model still runs.
    """


class UnsupportedDimensionsError(ConfigurationError):
    """The model has no vectors of the requested size."""


class MissingExtraError(NeMoRetrieverError, ImportError):
    """An optional dependency is not installed; the message contains the pip command."""


class InputError(NeMoRetrieverError, ValueError):
    """One input cannot be embedded."""

    index: int | None
    """Position of the input in the caller's list or stream, from 0. None if the list itself is
    invalid."""

    def __init__(self, reason: str, *, index: int | None = None) -> None:
        """Create the error.

        Args:
            reason: A predicate of the input, such as "has 9000 tokens".
        """
        super().__init__(reason)
        self.index = index

    def __str__(self) -> str:
        reason = super().__str__()
        return reason if self.index is None else f"input {self.index} {reason}"

    def at(self, index: int | None) -> Self:
        """Return a copy of the error for an input at another position."""
        moved = copy.copy(self)
        moved.index = index
        moved.__cause__ = self.__cause__
        return moved


class InputTypeError(InputError, TypeError):
    """An input is of an unsupported type."""


class InputTooLongError(InputError):
    """A text has more tokens than the limit, and `truncate` is "NONE"."""

    tokens: int
    """Length of the input with prefix and special tokens; a lower bound for very long texts."""
    limit: int
    """Maximum number of tokens of an input."""

    def __init__(
        self, reason: str, *, index: int | None = None, tokens: int = 0, limit: int = 0
    ) -> None:
        super().__init__(reason, index=index)
        self.tokens = tokens
        self.limit = limit


class UnsupportedModalityError(InputError):
    """The model does not support inputs of this kind."""


class ImageError(InputError):
    """An image cannot be found, fetched or decoded; the message contains the reason."""


class ImageTooLargeError(ImageError):
    """An image exceeds a limit: bytes of the file, pixels of a side, or tokens of its tiles."""


class PageError(InputError):
    """A PDF or an image file, or one of its pages, cannot be read; the message names it."""


class DeviceMemoryError(InputError, MemoryError):
    """An input does not fit in the device's memory, even alone in a batch."""


class NonFiniteVectorError(InputError):
    """The vector or score of an input is not finite, usually by an overflow in float16."""


class EngineError(NeMoRetrieverError, RuntimeError):
    """The engine failed on a valid input; `__cause__` is the original exception."""


class RemoteError(NeMoRetrieverError, RuntimeError):
    """A server rejected a request or failed."""

    status: int | None
    """HTTP status of the response; None if there was none."""
    detail: str
    """The server's message, shortened; it may quote the input."""
    request_id: str | None
    """The server's id of the request, for its operator."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        detail: str = "",
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail
        self.request_id = request_id


class AuthenticationError(RemoteError):
    """The key is missing or invalid."""


class PermissionDeniedError(RemoteError, PermissionError):
    """The key is valid but lacks permission."""


class ModelNotFoundError(RemoteError, LookupError):
    """The server does not serve this model, or has no such path."""


class InvalidRequestError(RemoteError, ValueError):
    """The server rejects the request; sending it again would not help."""


class PayloadTooLargeError(RemoteError, ValueError):
    """One input is too large, even alone in a request."""


class RateLimitError(RemoteError):
    """The server still limits the rate of requests after the last retry."""

    retry_after: float | None = None
    """Seconds to wait, from the server's Retry-After; None without one."""


class ServerError(RemoteError):
    """The server still fails after the last retry."""


class RequestTimeoutError(RemoteError, TimeoutError):
    """No response within `timeout`, or the call took longer than `deadline`."""


class ConnectionFailedError(RemoteError, ConnectionError):
    """No connection to the server, or it broke, at the last retry too."""


class MalformedResponseError(RemoteError):
    """A response has the wrong shape or invalid values; none of it was used."""


class PartialResultError(NeMoRetrieverError, RuntimeError):
    """Some inputs failed; the vectors or scores of the others are on the error."""

    vectors: NDArray[Any]
    """(n, d), as `Embedder.embed` returns them; the rows of failed inputs are NaN, or 0 in an
    integer type."""
    scores: NDArray[Any]
    """(n,), as `Reranker.score` returns them; those of failed inputs are NaN."""
    errors: dict[int, NeMoRetrieverError]
    """The error of each failed input, by position in the caller's list or stream."""
    offset: int
    """Position of the first row of `vectors`; 0 except in a stream."""

    def __init__(
        self,
        message: str,
        *,
        vectors: NDArray[Any] | None = None,
        scores: NDArray[Any] | None = None,
        errors: dict[int, NeMoRetrieverError] | None = None,
        offset: int = 0,
    ) -> None:
        super().__init__(message)
        self.offset = offset
        if vectors is not None:
            self.vectors = vectors
        if scores is not None:
            self.scores = scores
        self.errors = errors or {}


class EngineClosedError(NeMoRetrieverError, RuntimeError):
    """The engine was closed before this work could start."""


class OutputError(NeMoRetrieverError, OSError):
    """Results cannot be written; results that were finished before are kept."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message.

    >>> first_line(RuntimeError("refused" + chr(10) + "a hundred lines")), first_line(MemoryError())
    ('refused', 'MemoryError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
