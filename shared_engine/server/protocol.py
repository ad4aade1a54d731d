"""Shared by the bodies of all paths: their base class, the parser, and images.

Pure functions between bytes and values; HTTP is in `app.py`, error bodies are in `errors.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from shared_engine import images
from shared_engine.documents import EmbeddingInput
from shared_engine.errors import ImageError
from shared_engine.server.errors import refuse_field, refuse_size

SMALL_BODY = 64 * 1024
"""Bytes that are parsed without a check before, on the event loop."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A string of JSON, closed or not: the search for the next one starts after it."""
_NOT_AN_OBJECT = "Input should be an object"


class RequestBody(BaseModel):
    """Body of a request. A field is absent or has a value; null is refused, as by a NIM."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    inputs_field: ClassVar[str]
    """Name of the list of inputs."""
    most_strings: ClassVar[int]
    """The most strings of JSON for one input, names of fields included."""
    most_bytes: ClassVar[int]
    """The most bytes of JSON around the strings of one input, indentation included."""
    advice: ClassVar[str] = ""
    """End of the messages about too many inputs, and about inputs that are token ids."""

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
    if len(content) > SMALL_BODY:
        _check_structure(kind, content, max_inputs)
    try:
        found = from_json(content, allow_inf_nan=False)
    except ValueError as exc:
        raise refuse_field("json_invalid", (), f"Invalid JSON: {exc}", None) from None
    if not isinstance(found, dict):
        raise refuse_field("dict_type", (), _NOT_AN_OBJECT, found)
    for key in found:
        if key not in kind.model_fields:
            message = f"unknown field, expected one of {', '.join(kind.model_fields)}"
            raise refuse_field("extra_forbidden", (key,), message, found[key])
    try:
        body = kind.model_validate(found)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        place, message = error["loc"], error["msg"]
        if error["type"] == "model_type":  # pydantic's message has the name of our class
            message = _NOT_AN_OBJECT
        elif place[0] == kind.inputs_field and _is_tokens(error["input"]):
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


def _check_structure(kind: type[RequestBody], content: bytes | bytearray, max_inputs: int) -> None:
    """Refuse JSON with far more values than a request needs, before they become objects.

    A body of 60 MB can hold 20 million empty lists, which take 1.4 GB and seconds to parse.

    Raises:
        HTTPRefusal: more strings, or more bytes around them, than any layout of a request needs.
    """
    most_strings, most_bytes = kind.most_strings * max_inputs, kind.most_bytes * max_inputs
    if sum(map(content.count, (b",", b"[", b"{"))) <= most_strings:
        return
    strings = outside = end = 0
    for match in _STRING.finditer(content):
        strings += 1
        outside += match.start() - end
        end = match.end()
        if strings > most_strings or outside > most_bytes:
            break
    outside += len(content) - end
    if strings > most_strings or outside > most_bytes:
        raise refuse_size(
            f"too many inputs or fields; the limit is {max_inputs} inputs{kind.advice}"
        )


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
