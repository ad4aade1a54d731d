"""What a NIM's POST /v1/embeddings takes and gives: the request, the reply, the error bodies.

Pure functions between bytes and values; `server.py` does the HTTP. Source: the reference pages of
the NeMo Retriever embedding NIM (2.0 to 2.4), and error bodies that users captured.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from shared_engine import images
from shared_engine.documents import Document, Modality, Role
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
from shared_engine.options import Truncate
from shared_engine.vectors import EmbeddingType
from shared_engine.wire import split_role_suffix

EncodingFormat = Literal["float", "base64"]

_INPUT_TYPES: dict[str, Role] = {"query": "query", "passage": "document"}
_INPUT_ERRORS: tuple[tuple[type[InputError], int, str], ...] = (
    (InputTooLongError, 400, "input_too_long"),
    (DeviceMemoryError, 413, "device_memory"),
    (NonFiniteVectorError, 422, "non_finite"),
    (ImageTooLargeError, 413, "image_too_large"),
    (ImageError, 400, "image"),
    (InputError, 400, "invalid_input"),
)
"""Status and kind of an input's error; the first row that fits."""
_TAG_OPENS = re.compile(r"""<img\s+src=(['"])\Z""")
_TAG_CLOSES = re.compile(r"""(['"])\s*/?>\Z""")
_LONGEST_TAG = 64
_SEPARATORS = (" ", "\n")


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """What one client, or all of them together, may ask of the server."""

    max_body_bytes: int = _limit(
        64 * 2**20,
        "A larger request gets 413, while it is being read; eight times as much is held for all.",
    )
    max_inputs: int = _limit(8192, "A request with more inputs gets 413.")
    max_images: int = _limit(256, "A request with more images gets 413.")
    max_image_bytes: int = _limit(25_000_000, "A larger file of an image gets 413.")
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
    input_type: Literal["query", "passage", ""] = ""
    """Empty is as good as left out: NVIDIA's cards show images with it so."""
    modality: _Strings = ["text"]
    encoding_format: EncodingFormat = "float"
    embedding_type: EmbeddingType = "float"
    dimensions: int = Field(default=0, gt=0)
    """0 where it was left out: the model's full size."""
    truncate: Truncate = "NONE"
    user: str = ""

    def kinds(self, modalities: frozenset[Modality]) -> list[str]:
        """Return the modality of each input, as said or, for a model that takes images, as seen."""
        if "modality" in self.model_fields_set:
            return self.modality * len(self.input) if len(self.modality) == 1 else self.modality
        if "image" not in modalities:
            return ["text"] * len(self.input)
        return [_kind(given) for given in self.input]

    def role(self, served: frozenset[str], kinds: list[str]) -> Role:
        """Return the side of the search that `input_type`, or a suffix of `model`, names.

        Raises:
            Refusal: the model is not among `served`, or the role is missing or contradictory.
        """
        said = _INPUT_TYPES.get(self.input_type)
        if self.model.lower() in served:
            if said is None and "text" in kinds:  # an image has no other side
                raise Refusal(
                    400,
                    "input_type_missing",
                    {"error": "'input_type' parameter is required for asymmetric models"},
                )
            return said or "document"
        name, role = split_role_suffix(self.model)
        if role is not None and name.lower() in served:
            if said not in (None, role):
                suffix = self.model.removeprefix(f"{name}-")
                message = f"Input should be {suffix!r} or left out, as 'model' says"
                raise violation("value_error", ("input_type",), message, self.input_type)
            return role
        message = f"The model {_brief(self.model)!r} does not exist; /v1/models lists what is here"
        body = {"object": "error", "message": message, "detail": {}, "type": "model_not_found"}
        raise Refusal(404, "model_not_found", body)

    def check(
        self,
        kinds: list[str],
        role: Role,
        modalities: frozenset[Modality],
        dimensions: tuple[int, ...],
    ) -> None:
        """Refuse what this model does not offer.

        Raises:
            Refusal: a modality or a vector size that the model does not have, or an image as a
                query.
        """
        if len(kinds) != len(self.input):
            message = f"List should have 1 item, or one for each of the {len(self.input)} inputs"
            raise violation("value_error", ("modality",), message, len(self.modality))
        for modality in kinds:
            if modality not in modalities:
                expected = " or ".join(repr(name) for name in sorted(modalities))
                message = f"Input should be {expected}"
                raise violation("literal_error", ("modality",), message, modality)
        if role == "query" and set(kinds) != {"text"}:
            message = "Input should be 'passage', as an image is among the inputs"
            raise violation("value_error", ("input_type",), message, "query")
        if self.dimensions and dimensions and self.dimensions not in dimensions:
            if len(dimensions) == 1:  # a model without dynamic dimensions has no such field
                message = f"Extra inputs are not permitted: every vector has {dimensions[0]} values"
                raise violation("extra_forbidden", ("dimensions",), message, self.dimensions)
            *others, last = map(str, dimensions)
            message = f"Input should be {', '.join(others)} or {last}"
            raise violation("literal_error", ("dimensions",), message, self.dimensions)

    def documents(self, kinds: list[str], max_image_bytes: int) -> list[Document]:
        """Return the inputs, with the images as bytes: nothing that a client names is opened.

        Raises:
            Refusal: an input is not of its modality.
            ImageError: what follows `data:` is no base64, or an image of too many bytes.
        """
        return [
            _document(given, kind, index, max_image_bytes)
            for index, (given, kind) in enumerate(zip(self.input, kinds, strict=True))
        ]


def _kind(given: str) -> Modality:
    if (parts := parted(given)) is None:
        return "text"
    return "image" if not parts[0].strip() else "text_image"


def _document(given: str, kind: str, index: int, max_image_bytes: int) -> Document:
    if kind == "text":
        return Document(given)
    parts = parted(given)
    if parts is None or (kind == "image" and parts[0].strip()):
        wanted = "a data URL" if kind == "image" else "a text, a space or newline, and a data URL"
        message = f"Input should be {wanted}, as of modality {kind!r}: data:image/png;base64,..."
        raise violation("value_error", ("input", index), message, given)
    text, url = parts
    if kind == "text_image" and not text.strip():
        message = "Text part must be non-empty for text_image modality"
        raise Refusal(400, "invalid_input", {"error": message, "index": index})
    image = images.decode_data_url(url, max_image_bytes)
    return Document(text if kind == "text_image" else None, image)


def parted(given: str) -> tuple[str, str] | None:
    r"""Return the text and the data URL of an input that ends with one, alone or in an <img> tag.

    >>> parted("a cat\ndata:image/png;base64,AAAA")
    ('a cat', 'data:image/png;base64,AAAA')
    >>> parted("a cat <img src='data:image/png;base64,AAAA'/>")
    ('a cat', 'data:image/png;base64,AAAA')
    >>> parted("data:image/png;base64,AAAA")
    ('', 'data:image/png;base64,AAAA')
    >>> parted("data:image/png;base64,AAAA is a data URL") is None
    True
    """
    start = given.rfind("data:image/")
    if start < 0:
        return None
    text, url = given[:start], given[start:].rstrip()
    opens = _TAG_OPENS.search(text[-_LONGEST_TAG:])
    closes = _TAG_CLOSES.search(url[-_LONGEST_TAG:])
    if opens and closes and opens[1] == closes[1]:
        text, url = text.removesuffix(opens[0]), url.removesuffix(closes[0])
    elif text and text[-1] not in _SEPARATORS:
        return None
    if not images.is_data_url(url):
        return None
    return text[:-1] if text[-1:] in _SEPARATORS else text, url


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
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


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
