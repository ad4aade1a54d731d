"""Shared by the bodies of all paths: their base class, the parser, and images.

Pure functions between bytes and values; HTTP is in `app.py`, error bodies are in `errors.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from shared_engine import images
from shared_engine.documents import EmbeddingInput
from shared_engine.errors import ImageError
from shared_engine.server.errors import refuse_field, refuse_size

SMALL_BODY = 64 * 1024
"""Bytes of a body that is parsed on the event loop; larger ones go to a thread."""


class RequestBody(BaseModel):
    """Body of a request. A field is absent or has a value; null is refused, as by a NIM."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    inputs_field: ClassVar[str]
    """Name of the list of inputs."""
    advice: ClassVar[str] = ""
    """End of the message about inputs that are token ids."""

    model: str

    @property
    def count(self) -> int:
        """Number of inputs."""
        return len(getattr(self, self.inputs_field))


BodyT = TypeVar("BodyT", bound=RequestBody)


def parse_request(kind: type[BodyT], content: bytes | bytearray, max_inputs: int = 8192) -> BodyT:
    """Parse a body.

    Raises:
        HTTPRefusal: not JSON, not an object, an invalid field, or too many inputs.
    """
    try:
        body = kind.model_validate_json(content)
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
        unknown = (e for e in errors if e["type"] == "extra_forbidden" and len(e["loc"]) == 1)
        error = next(unknown, errors[0])  # a wrong name explains a field that is missing
        place, message = error["loc"], error["msg"]
        if error["type"] == "extra_forbidden" and len(place) == 1:
            message = f"unknown field, expected one of {', '.join(kind.model_fields)}"
        elif place[:1] == (kind.inputs_field,) and _is_tokens(error["input"]):
            message += kind.advice
        raise refuse_field(
            error["type"], place, message, error["input"], error.get("ctx")
        ) from None
    if body.count > max_inputs:
        raise refuse_size(
            f"{body.count} inputs in one request; the limit is {max_inputs}. Send several requests"
        )
    return body


def _is_tokens(value: object) -> bool:
    """Return whether a value is a token id or a list of them.

    >>> _is_tokens(7), _is_tokens([7, 8]), _is_tokens(["a"]), _is_tokens(None)
    (True, True, False, False)
    """
    tokens = value if isinstance(value, list) and value else [value]
    return all(type(token) is int for token in tokens)


def decode_images(inputs: list[EmbeddingInput], max_image_bytes: int) -> list[EmbeddingInput]:
    """Return the inputs with the bytes of their images; no path or URL of a client is opened.

    Raises:
        ImageError: a data URL is not base64, not an image, or of more than `max_image_bytes`.
    """
    decoded = list(inputs)
    for index, item in enumerate(inputs):
        if item.image is not None:
            try:
                image = images.decode_data_url(item.image, max_image_bytes)
            except ImageError as exc:
                raise exc.at(index) from exc.__cause__
            decoded[index] = replace(item, image=image)
    return decoded


def count_usage(tokens: int) -> dict[str, int]:
    """Return the usage of a request, as replies have it."""
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def dump_json(value: Any) -> bytes:
    """Return a value, or an array of numbers, as JSON."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
