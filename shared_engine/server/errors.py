"""Error responses, with the messages and bodies of a NIM.

Source: error bodies of NIMs, captured by users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shared_engine.errors import (
    DeviceMemoryError,
    EngineClosedError,
    ImageError,
    ImageTooLargeError,
    InputError,
    InputTooLongError,
    NeMoRetrieverError,
    NonFiniteVectorError,
    PartialResultError,
)
from shared_engine.wire import build_error

_INPUT_ERRORS: tuple[tuple[type[InputError], int, str], ...] = (
    (InputTooLongError, 400, "input_too_long"),
    (DeviceMemoryError, 413, "device_memory"),
    (NonFiniteVectorError, 422, "non_finite"),
    (ImageTooLargeError, 413, "image_too_large"),
    (ImageError, 400, "image"),
    (InputError, 400, "invalid_input"),
)
"""Status and kind of an input's error: the first row that matches."""


class HTTPRefusal(Exception):  # noqa: N818 - a response, not a failure
    """A request to answer with an error."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        body: Mapping[str, object] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        """Label in the metrics, and `error.code`."""
        self.body = build_error(message) if body is None else body
        self.headers = headers or {}


def refuse_field(
    kind: str,
    place: tuple[str | int, ...],
    message: str,
    value: object,
    context: dict[str, Any] | None = None,
) -> HTTPRefusal:
    """Return the refusal of a field, in the form of a NIM; `kind` is pydantic's error type."""
    detail: dict[str, Any] = {
        "type": kind,
        "loc": ["body", *(shorten(part) for part in place)],
        "msg": message,
        "input": shorten(value),
    }
    if context:
        detail["ctx"] = {key: shorten(item) for key, item in context.items()}
    body = {
        "object": "error",
        "message": "Your request cannot be validated, it is incorrect.",
        "detail": detail,
        "type": "request_validation_error",
    }
    where = ".".join(str(shorten(part)) for part in place) or "body"
    return HTTPRefusal(400, "invalid_request", f"{where}: {message}", body)


def refuse_for(error: NeMoRetrieverError, too_long_status: int = 400) -> HTTPRefusal:
    """Return the refusal for an error of the engine."""
    if isinstance(error, PartialResultError) and error.errors:
        return refuse_for(error.errors[min(error.errors)], too_long_status)
    if isinstance(error, EngineClosedError):
        return refuse_for_now("the server is stopping", 1)
    if not isinstance(error, InputError):
        return HTTPRefusal(500, "engine", str(error))
    status, kind = next(row[1:] for row in _INPUT_ERRORS if isinstance(error, row[0]))
    message = str(error)
    if isinstance(error, InputTooLongError):  # clients match this text
        status = too_long_status
        message = f"Input length {error.tokens} exceeds maximum allowed token size {error.limit}"
    return refuse_input(error.index, message, status, kind)


def refuse_input(
    index: int | None, message: str, status: int = 400, kind: str = "invalid_input"
) -> HTTPRefusal:
    """Return the refusal of the input at `index`."""
    return HTTPRefusal(status, kind, message, build_error(message, index))


def refuse_model(model: str, place: str = "") -> HTTPRefusal:
    """Return the refusal of an unknown model; `place` is where it is unknown."""
    message = f"The model {shorten(model)!r} does not exist{place}; see /v1/models"
    body = {"object": "error", "message": message, "detail": {}, "type": "model_not_found"}
    return HTTPRefusal(404, "model_not_found", message, body)


def refuse_size(message: str) -> HTTPRefusal:
    """Return the refusal of a request that exceeds a limit."""
    return HTTPRefusal(413, "too_large", message)


def refuse_for_now(message: str, seconds: int) -> HTTPRefusal:
    """Return the refusal of a request before the model is loaded or during shutdown."""
    return HTTPRefusal(503, "unavailable", message, headers={"Retry-After": str(seconds)})


def shorten(value: object) -> Any:
    """Return a value that is safe to echo: short, and in the range of every JSON library."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if len(value) <= 100 else value[:100] + "..."
    if isinstance(value, int) and abs(value) < 2**53:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    return f"({type(value).__name__})"
