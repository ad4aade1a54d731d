"""What a NIM's POST /v1/embeddings takes and gives: the request, the reply, the error bodies.

Pure functions between bytes and values; `server.py` does the HTTP. Source: the reference pages of
the NeMo Retriever embedding NIM (2.0 to 2.4), and error bodies that users captured.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from shared_engine.documents import Role
from shared_engine.errors import (
    DeviceMemoryError,
    EngineClosedError,
    InputError,
    InputTooLongError,
    NeMoRetrieverError,
    NonFiniteVectorError,
    PartialResultError,
)
from shared_engine.options import Truncate
from shared_engine.vectors import EmbeddingType

try:
    import orjson
except ModuleNotFoundError:  # the standard library's json says the same, more slowly
    orjson = None  # type: ignore[assignment]

EncodingFormat = Literal["float", "base64"]

_SUFFIXES: tuple[tuple[str, Role], ...] = (("-query", "query"), ("-passage", "document"))
_INPUT_TYPES: dict[str, Role] = {"query": "query", "passage": "document"}
_INPUT_ERRORS: tuple[tuple[type[InputError], int, str], ...] = (
    (InputTooLongError, 400, "input_too_long"),
    (DeviceMemoryError, 413, "device_memory"),
    (NonFiniteVectorError, 422, "non_finite"),
    (InputError, 400, "invalid_input"),
)
"""Status and kind of an input's error; the first row that fits."""


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """What one client, or all of them together, may ask of the server."""

    max_body_bytes: int = _limit(32 * 2**20, "A larger request gets 413, while it is being read.")
    max_inputs: int = _limit(8192, "A request with more inputs gets 413.")
    max_waiting: int = _limit(
        16_384, "Inputs accepted and not answered; what comes on top gets 429 and Retry-After."
    )
    read_seconds: float = _limit(60.0, "A body that has not arrived by then gets 408.")


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is answered with an error."""

    def __init__(
        self, status: int, kind: str, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(kind)
        self.status = status
        self.kind = kind
        """A short name for the metrics."""
        self.body = body
        self.headers = headers or {}


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


# One violation is reported; a million of them would cost more than the model.
_Strings = Annotated[list[str], Field(min_length=1), FailFast(), BeforeValidator(_listed)]


class EmbeddingsRequest(BaseModel):
    """The body of a request; a field is left out or has a value, null is refused as a NIM does."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str
    input: _Strings
    input_type: Literal["query", "passage"] = "passage"
    modality: _Strings = ["text"]
    encoding_format: EncodingFormat = "float"
    embedding_type: EmbeddingType = "float"
    dimensions: int = Field(default=0, gt=0)
    """0 where it was left out: the model's full size."""
    truncate: Truncate = "NONE"
    user: str = ""

    def role(self, served: frozenset[str]) -> Role:
        """Return the side of the search that `input_type`, or a suffix of `model`, names.

        Raises:
            Refusal: the model is not among `served`, or the role is missing or contradictory.
        """
        said = _INPUT_TYPES[self.input_type] if "input_type" in self.model_fields_set else None
        if self.model.lower() in served:
            if said is None:
                raise Refusal(
                    400,
                    "input_type_missing",
                    {"error": "'input_type' parameter is required for asymmetric models"},
                )
            return said
        for suffix, role in _SUFFIXES:
            if self.model.endswith(suffix) and self.model.removesuffix(suffix).lower() in served:
                if said not in (None, role):
                    message = f"Input should be {suffix[1:]!r} or left out, as 'model' says"
                    raise violation("value_error", ("input_type",), message, self.input_type)
                return role
        message = f"The model {_brief(self.model)!r} does not exist; /v1/models lists what is here"
        body = {"object": "error", "message": message, "detail": {}, "type": "model_not_found"}
        raise Refusal(404, "model_not_found", body)

    def check(self, modalities: frozenset[str], dimensions: tuple[int, ...]) -> None:
        """Refuse what this model does not offer.

        Raises:
            Refusal: a modality or a vector size that the model does not have.
        """
        if len(self.modality) not in (1, len(self.input)):
            message = f"List should have 1 item, or one for each of the {len(self.input)} inputs"
            raise violation("value_error", ("modality",), message, len(self.modality))
        for modality in self.modality:
            if modality not in modalities:
                expected = " or ".join(repr(name) for name in sorted(modalities))
                message = f"Input should be {expected}"
                raise violation("literal_error", ("modality",), message, modality)
        if self.dimensions and dimensions and self.dimensions not in dimensions:
            if len(dimensions) == 1:  # a model without dynamic dimensions has no such field
                message = f"Extra inputs are not permitted: every vector has {dimensions[0]} values"
                raise violation("extra_forbidden", ("dimensions",), message, self.dimensions)
            *others, last = map(str, dimensions)
            message = f"Input should be {', '.join(others)} or {last}"
            raise violation("literal_error", ("dimensions",), message, self.dimensions)


def parsed(body: bytes) -> EmbeddingsRequest:
    """Return the request that a body holds.

    Raises:
        Refusal: not JSON, not an object, or not the fields of a request.
    """
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as exc:
        raise violation("json_invalid", (), f"Invalid JSON: {exc}", None) from None
    for key in content if isinstance(content, dict) else ():
        if key not in EmbeddingsRequest.model_fields:
            message = "Extra inputs are not permitted"
            raise violation("extra_forbidden", (key,), message, content[key])
    try:
        return EmbeddingsRequest.model_validate(content)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        context = error.get("ctx")
        raise violation(
            error["type"], error["loc"], error["msg"], error["input"], context
        ) from None


def violation(
    kind: str,
    place: tuple[str | int, ...],
    message: str,
    value: object,
    context: dict[str, Any] | None = None,
) -> Refusal:
    """Return the refusal of a field, in the words a NIM has for it."""
    detail: dict[str, Any] = {
        "type": kind,
        "loc": ["body", *(_brief(part) for part in place)],
        "msg": message,
        "input": _brief(value),
    }
    if context:
        detail["ctx"] = {key: _brief(item) for key, item in context.items()}
    body = {
        "object": "error",
        "message": "Your request cannot be validated, it is incorrect.",
        "detail": detail,
        "type": "request_validation_error",
    }
    return Refusal(400, "invalid_request", body)


def refusal(error: NeMoRetrieverError) -> Refusal:
    """Return what a client is told about an error of the engine."""
    if isinstance(error, PartialResultError) and error.errors:
        return refusal(error.errors[min(error.errors)])
    if isinstance(error, EngineClosedError):
        return unavailable("the server is stopping")
    if not isinstance(error, InputError):
        return Refusal(500, "engine", {"error": str(error)})
    status, kind = next(row[1:] for row in _INPUT_ERRORS if isinstance(error, row[0]))
    message = str(error)
    if isinstance(error, InputTooLongError):  # clients look for these words
        message = f"Input length {error.tokens} exceeds maximum allowed token size {error.limit}"
    return Refusal(status, kind, {"error": message, "index": error.index})


def too_large(message: str) -> Refusal:
    """Return the refusal of a request that is larger than the server takes."""
    return Refusal(413, "too_large", {"error": message})


def too_busy(message: str, seconds: int) -> Refusal:
    """Return the refusal of a request that finds the queue full."""
    body = {"status": 429, "title": "Too Many Requests", "detail": message}
    return Refusal(429, "too_busy", body, {"Retry-After": str(seconds)})


def unavailable(message: str) -> Refusal:
    """Return the refusal of a request that comes before the model or after the end."""
    return Refusal(503, "unavailable", {"error": message}, {"Retry-After": "1"})


def reply(vectors: NDArray[Any], encoding_format: EncodingFormat, model: str, tokens: int) -> bytes:
    """Return the body of a reply: vectors (n, d) as lists of numbers or as base64.

    base64 carries float32 in little-endian order; the other number types one byte a value.
    """
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    head = b'{"object":"list","data":['
    tail = b'],"model":' + dumps(model) + b',"usage":' + dumps(usage) + b"}"
    return head + b",".join(_rows(vectors, encoding_format)) + tail


def _rows(vectors: NDArray[Any], encoding_format: EncodingFormat) -> Iterator[bytes]:
    # Row by row, so that the interpreter can switch to the event loop's thread in between.
    if encoding_format == "base64" and vectors.dtype == np.float32:
        vectors = vectors.astype("<f4", copy=False)
    for index, row in enumerate(vectors):
        if encoding_format == "base64":
            value = b'"' + base64.b64encode(row.tobytes()) + b'"'
        else:
            value = dumps(row)
        yield b'{"object":"embedding","index":%d,"embedding":%b}' % (index, value)


def dumps(value: Any) -> bytes:
    """Return a value, or an array of numbers, as JSON."""
    if orjson is not None:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _brief(value: object) -> Any:
    """Return a value that is safe to send back: short, and in every JSON library's range."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if len(value) <= 100 else value[:100] + "..."
    if isinstance(value, int) and abs(value) < 2**53:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    return f"({type(value).__name__})"
