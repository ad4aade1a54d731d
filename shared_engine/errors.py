"""Every error the engine raises on purpose. Each is also the builtin kind a caller would guess.

NeMoRetrieverError
├── ConfigurationError (ValueError)       options that cannot work, alone or together
│   ├── CheckpointError                   model files missing, or not what the engine computes
│   └── UnsupportedDimensionsError        a vector size that the model does not offer
├── MissingExtraError (ImportError)       an optional dependency is not installed
├── InputError (ValueError)               one input is at fault; `index` says which
│   ├── InputTypeError (TypeError)
│   ├── InputTooLongError
│   ├── UnsupportedModalityError
│   ├── ImageError                        an image cannot be found, fetched or decoded
│   │   └── ImageTooLargeError            it breaks a limit of bytes, sides or tokens
│   ├── DeviceMemoryError (MemoryError)   this one input does not fit on the device, even alone
│   └── NonFiniteVectorError              the model gave NaN or infinity for this input
├── EngineError (RuntimeError)            the engine failed on inputs that are not at fault
├── RemoteError (RuntimeError)            a NIM refused or failed; `status`, `detail`, `request_id`
│   ├── AuthenticationError               401: the key is missing or wrong
│   ├── PermissionDeniedError (PermissionError)   403: the key may not use this model
│   ├── ModelNotFoundError (LookupError)  404: no such model, or no such path
│   ├── InvalidRequestError (ValueError)  400, 422: the server does not take the request
│   ├── PayloadTooLargeError (ValueError) 413: one input is too large even alone
│   ├── RateLimitError                    429 after every retry; `retry_after`
│   ├── ServerError                       5xx after every retry
│   ├── RequestTimeoutError (TimeoutError)        no reply within `timeout` or `deadline`
│   ├── ConnectionFailedError (ConnectionError)   no connection, or it broke
│   └── MalformedResponseError            a reply that cannot be believed
├── PartialResultError (RuntimeError)     some inputs failed; what succeeded is on the error
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
    """Base of every error this package raises on purpose."""


class ConfigurationError(NeMoRetrieverError, ValueError):
    """An option, or several together, cannot work."""


class CheckpointError(ConfigurationError):
    """A checkpoint is missing, incomplete, or not one the engine computes."""


class UnsupportedDimensionsError(ConfigurationError):
    """The model does not offer vectors of the requested size."""


class MissingExtraError(NeMoRetrieverError, ImportError):
    """An optional dependency is not installed; the message has the pip line."""


class InputError(NeMoRetrieverError, ValueError):
    """One input cannot be embedded."""

    index: int | None
    """Position of the input in the list that the caller passed, from 0; in a stream, from its
    beginning. None where the list itself is at fault."""

    def __init__(self, reason: str, *, index: int | None = None) -> None:
        """Take what is said of the input, as in "has 9000 tokens"."""
        super().__init__(reason)
        self.index = index

    def __str__(self) -> str:
        reason = super().__str__()
        return reason if self.index is None else f"input {self.index} {reason}"

    def at(self, index: int | None) -> Self:
        """Return the same error of an input at another position."""
        moved = copy.copy(self)
        moved.index = index
        moved.__cause__ = self.__cause__
        return moved


class InputTypeError(InputError, TypeError):
    """An input is of a type the engine does not embed."""


class InputTooLongError(InputError):
    """A text has more tokens than the limit and `truncate` is "NONE"."""

    tokens: int
    """Length of the input in tokens, with prefix and special tokens; of a huge text, at least."""
    limit: int
    """The most tokens an input may have."""

    def __init__(
        self, reason: str, *, index: int | None = None, tokens: int = 0, limit: int = 0
    ) -> None:
        super().__init__(reason, index=index)
        self.tokens = tokens
        self.limit = limit


class UnsupportedModalityError(InputError):
    """The model does not take inputs of this kind."""


class ImageError(InputError):
    """An image cannot be found, fetched or decoded; the message says which and why."""


class ImageTooLargeError(ImageError):
    """An image is over a limit: bytes of the file, pixels of a side, or tokens of its tiles."""


class DeviceMemoryError(InputError, MemoryError):
    """One input does not fit in the device's memory, even in a step of its own."""


class NonFiniteVectorError(InputError):
    """The model gave NaN or infinity for an input, most often an overflow in float16."""


class EngineError(NeMoRetrieverError, RuntimeError):
    """The engine failed on an input that is not at fault; the cause is the original exception."""


class RemoteError(NeMoRetrieverError, RuntimeError):
    """A NIM refused a request or failed at it."""

    status: int | None
    """HTTP status of the reply, or None where there was none."""
    detail: str
    """What the server said, shortened; it may quote the input."""
    request_id: str | None
    """The server's name for the request, to quote to its operator."""

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
    """The server wants a key, or another one."""


class PermissionDeniedError(RemoteError, PermissionError):
    """The key is known but may not do this."""


class ModelNotFoundError(RemoteError, LookupError):
    """The server does not serve this model, or nothing at this path."""


class InvalidRequestError(RemoteError, ValueError):
    """The server does not take the request, and would not if it were sent again."""


class PayloadTooLargeError(RemoteError, ValueError):
    """One input makes too large a request even in a request of its own."""


class RateLimitError(RemoteError):
    """The server still wants fewer requests after every retry."""

    retry_after: float | None = None
    """Seconds that the server asked to wait, if it did."""


class ServerError(RemoteError):
    """The server still failed after every retry."""


class RequestTimeoutError(RemoteError, TimeoutError):
    """No reply came within `timeout`, or the work was not done by `deadline`."""


class ConnectionFailedError(RemoteError, ConnectionError):
    """No connection to the server, or it broke, on every retry."""


class MalformedResponseError(RemoteError):
    """A reply has the wrong shape, or values no vector has; nothing of it was used."""


class PartialResultError(NeMoRetrieverError, RuntimeError):
    """Some inputs failed; the vectors of the others are on the error."""

    vectors: NDArray[Any]
    """(n, d), as `Embedder.embed` returns them; the rows of failed inputs are NaN, or 0 in an
    integer type."""
    errors: dict[int, NeMoRetrieverError]
    """The error of each failed input, by position in the caller's list or stream."""
    offset: int
    """Position of the first row of `vectors`; 0 except in a stream."""

    def __init__(
        self,
        message: str,
        *,
        vectors: NDArray[Any] | None = None,
        errors: dict[int, NeMoRetrieverError] | None = None,
        offset: int = 0,
    ) -> None:
        super().__init__(message)
        self.offset = offset
        if vectors is not None:
            self.vectors = vectors
        self.errors = errors or {}


class EngineClosedError(NeMoRetrieverError, RuntimeError):
    """The engine was closed before this work could start."""


class OutputError(NeMoRetrieverError, OSError):
    """Results cannot be written; what was finished before stays as it is."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing.

    >>> first_line(RuntimeError("refused" + chr(10) + "a hundred lines")), first_line(MemoryError())
    ('refused', 'MemoryError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def place_error(error: NeMoRetrieverError, index: int) -> NeMoRetrieverError:
    """Return an error as that of the input at `index`, if it is an input's."""
    return error.at(index) if isinstance(error, InputError) else error
