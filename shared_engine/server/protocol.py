"""Request and response bodies of a NIM's POST /v1/embeddings.

Pure functions between bytes and values; HTTP is in `app.py`, error bodies are in `errors.py`.
Source: the reference pages of the NeMo Retriever embedding NIM (2.0 to 2.4).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from shared_engine import images
from shared_engine.documents import EmbeddingInput, Modality, Role
from shared_engine.errors import ImageError
from shared_engine.images.data_urls import split_data_url
from shared_engine.options import Truncate
from shared_engine.server.errors import (
    HTTPRefusal,
    refuse_field,
    refuse_input,
    refuse_model,
    refuse_size,
)
from shared_engine.vectors import EmbeddingType
from shared_engine.wire import INPUT_TYPE, ROLE, split_role_suffix

EncodingFormat = Literal["float", "base64"]

_INPUT_TYPE_MISSING = (
    "'input_type' parameter is required for asymmetric models; send 'query' or 'passage' (in "
    'Python: extra_body={"input_type": "query"}), append -query or -passage to the name of the '
    "model, or start the server with --default-input-type"
)
"""It begins with the words of a NIM, as clients match them."""
_NO_TOKEN_IDS = (
    "send texts, not token ids (langchain-openai: "
    "OpenAIEmbeddings(check_embedding_ctx_length=False))"
)
_SMALL_BODY = 64 * 1024
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A string of JSON, closed or not: the search for the next one starts after it."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


# FailFast: only one violation is reported, and a million of them would cost more than the model.
_Strings = Annotated[list[str], Field(min_length=1), FailFast(), BeforeValidator(_as_list)]


class EmbeddingsRequest(BaseModel):
    """Body of a request. A field is absent or has a value; null is refused, as by a NIM.

    `dimensions` may be null, as some of OpenAI's clients send it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str
    input: _Strings
    input_type: Literal["query", "passage", ""] = ""
    """Empty means absent: NVIDIA's model cards send images with it."""
    modality: _Strings = ["text"]
    encoding_format: EncodingFormat = "float"
    embedding_type: EmbeddingType = "float"
    dimensions: int | None = Field(default=None, gt=0)
    """None: the model's full size."""
    truncate: Truncate = "NONE"
    user: str = ""

    def find_role(self, served: frozenset[str]) -> Role | None:
        """Return the role from `input_type` or from a suffix of `model`; None if neither has one.

        Args:
            served: The accepted names of the model, in lower case.

        Raises:
            HTTPRefusal: the model is not among `served`, or its suffix contradicts `input_type`.
        """
        role = ROLE.get(self.input_type)
        if self.model.lower() in served:
            return role
        name, suffix_role = split_role_suffix(self.model)
        if suffix_role is None or name.lower() not in served:
            raise refuse_model(self.model)
        if role not in (None, suffix_role):
            message = (
                f"Input should be {INPUT_TYPE[suffix_role]!r} or left out, as 'model' ends with it"
            )
            raise refuse_field("value_error", ("input_type",), message, self.input_type)
        return suffix_role

    def read_inputs(self, modalities: frozenset[Modality]) -> list[EmbeddingInput]:
        """Return the inputs; an image is still the data URL from the request.

        Without the field `modality`, and if the model accepts images, it is inferred for each.

        Args:
            modalities: The kinds of input that the model accepts.

        Raises:
            HTTPRefusal: a modality that the model does not accept, or an input of another one.
        """
        if "modality" not in self.model_fields_set:
            if "image" not in modalities:
                return [EmbeddingInput(text) for text in self.input]
            return [_infer_input(text) for text in self.input]
        kinds = self.modality * len(self.input) if len(self.modality) == 1 else self.modality
        if len(kinds) != len(self.input):
            message = f"List should have 1 item, or one for each of the {len(self.input)} inputs"
            raise refuse_field("value_error", ("modality",), message, len(self.modality))
        for kind in kinds:
            if kind not in modalities:
                expected = " or ".join(repr(name) for name in sorted(modalities))
                message = f"Input should be {expected}"
                raise refuse_field("literal_error", ("modality",), message, kind)
        pairs = zip(self.input, kinds, strict=True)
        return [_read_input(text, kind, index) for index, (text, kind) in enumerate(pairs)]

    def check_dimensions(self, dimensions: tuple[int, ...]) -> None:
        """Check the requested vector size against those of the model; empty allows all.

        Raises:
            HTTPRefusal: the model does not offer it.
        """
        if not self.dimensions or not dimensions or self.dimensions in dimensions:
            return
        if len(dimensions) == 1:  # a NIM without dynamic dimensions lacks the field
            message = f"Extra inputs are not permitted: every vector has {dimensions[0]} values"
            raise refuse_field("extra_forbidden", ("dimensions",), message, self.dimensions)
        *others, last = map(str, dimensions)
        message = f"Input should be {', '.join(others)} or {last}"
        raise refuse_field("literal_error", ("dimensions",), message, self.dimensions)


def require_role(
    role: Role | None, inputs: list[EmbeddingInput], default: Role | None = None
) -> Role:
    """Return the role of the inputs; images need none, because they are always documents.

    Args:
        role: The role in the request, if it has one.
        default: The role of texts without one.

    Raises:
        HTTPRefusal: a text without a role, or an image as a query.
    """
    kinds = {item.modality for item in inputs}
    if role is None and "text" in kinds:
        role = default
    if role is None and "text" in kinds:
        raise HTTPRefusal(400, "input_type_missing", _INPUT_TYPE_MISSING)
    if role == "query" and kinds != {"text"}:
        message = "Input should be 'passage', as an image is among the inputs"
        raise refuse_field("value_error", ("input_type",), message, "query")
    return role or "document"


def decode_images(inputs: list[EmbeddingInput], max_image_bytes: int) -> list[EmbeddingInput]:
    """Return the inputs with the bytes of their images; no path or URL of a client is opened.

    Raises:
        ImageError: a data URL is not base64, not an image, or of more than `max_image_bytes`.
    """
    return [
        item if item.image is None else _decode_image(item, index, max_image_bytes)
        for index, item in enumerate(inputs)
    ]


def _decode_image(item: EmbeddingInput, index: int, max_image_bytes: int) -> EmbeddingInput:
    try:
        return replace(item, image=images.decode_data_url(item.image, max_image_bytes))
    except ImageError as exc:
        raise exc.at(index) from exc.__cause__


def _infer_input(text: str) -> EmbeddingInput:
    if (parts := split_data_url(text)) is None:
        return EmbeddingInput(text)
    before, url = parts
    return EmbeddingInput(before if before.strip() else None, url)


def _read_input(text: str, kind: str, index: int) -> EmbeddingInput:
    if kind == "text":
        return EmbeddingInput(text)
    parts = split_data_url(text)
    if parts is None or (kind == "image" and parts[0].strip()):
        form = "a data URL" if kind == "image" else "a text, a space or newline, and a data URL"
        message = f"Input should be {form}, as of modality {kind!r}: data:image/png;base64,..."
        raise refuse_field("value_error", ("input", index), message, text)
    before, url = parts
    if kind == "text_image" and not before.strip():
        raise refuse_input(index, "Text part must be non-empty for text_image modality")
    return EmbeddingInput(before if kind == "text_image" else None, url)


def _check_structure(body: bytes | bytearray, max_inputs: int) -> None:
    """Refuse JSON with far more values than a request needs, before they become objects.

    A body of 60 MB can hold 20 million empty lists, which take 1.4 GB and seconds to parse.

    Raises:
        HTTPRefusal: more strings, or more bytes around them, than any layout of a request needs.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) <= 4 * max_inputs:
        return
    strings = outside = end = 0
    for match in _STRING.finditer(body):
        strings += 1
        outside += match.start() - end
        end = match.end()
        if strings > 4 * max_inputs or outside > 64 * max_inputs:
            break
    outside += len(body) - end
    if strings > 4 * max_inputs or outside > 64 * max_inputs:
        raise refuse_size(
            f"too many inputs or fields; the limit is {max_inputs} inputs. If they are numbers: "
            f"{_NO_TOKEN_IDS}"
        )


def parse_request(body: bytes | bytearray, max_inputs: int = 8192) -> EmbeddingsRequest:
    """Parse a body. The caller must check the exact number of inputs.

    Raises:
        HTTPRefusal: not JSON, not an object, or an invalid field.
    """
    if len(body) > _SMALL_BODY:
        _check_structure(body, max_inputs)
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as exc:
        raise refuse_field("json_invalid", (), f"Invalid JSON: {exc}", None) from None
    for key in content if isinstance(content, dict) else ():
        if key not in EmbeddingsRequest.model_fields:
            message = "Extra inputs are not permitted"
            raise refuse_field("extra_forbidden", (key,), message, content[key])
    try:
        return EmbeddingsRequest.model_validate(content)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        has_ids = error["loc"][:1] == ("input",) and error["type"] == "string_type"
        message = f"{error['msg']}: {_NO_TOKEN_IDS}" if has_ids else error["msg"]
        raise refuse_field(
            error["type"], error["loc"], message, error["input"], error.get("ctx")
        ) from None


def write_reply(
    vectors: NDArray[Any], encoding_format: EncodingFormat, model: str, tokens: int
) -> bytes:
    """Return the body of a response: vectors (n, d) as lists of numbers or as base64.

    Base64 has float32 in little-endian order, other number types as one byte per value.
    """
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    head = b'{"object":"list","data":['
    tail = b'],"model":' + dump_json(model) + b',"usage":' + dump_json(usage) + b"}"
    return head + b",".join(_write_rows(vectors, encoding_format)) + tail


def _write_rows(vectors: NDArray[Any], encoding_format: EncodingFormat) -> Iterator[bytes]:
    # row by row, so that the interpreter can switch to the thread of the event loop in between
    if encoding_format == "base64" and vectors.dtype == np.float32:
        vectors = vectors.astype("<f4", copy=False)
    for index, row in enumerate(vectors):
        if encoding_format == "base64":
            value = b'"' + base64.b64encode(row.tobytes()) + b'"'
        else:
            value = dump_json(row)
        yield b'{"object":"embedding","index":%d,"embedding":%b}' % (index, value)


def dump_json(value: Any) -> bytes:
    """Return a value, or an array of numbers, as JSON."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
