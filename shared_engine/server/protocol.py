"""What a NIM's POST /v1/embeddings takes and gives: the request and the reply.

Pure functions between bytes and values; `app.py` does the HTTP, `errors.py` has the refusals.
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
from shared_engine.documents import EmbeddingInput, Modality, Role, is_data_url
from shared_engine.errors import ImageError
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

_TAG_OPENS = re.compile(r"""<img\s+src=(['"])\Z""")
_TAG_CLOSES = re.compile(r"""(['"])\s*/?>\Z""")
_LONGEST_TAG = 64
_SMALL_BODY = 64 * 1024
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A string of JSON, closed or not, so that a search for the next one goes on behind it."""
_SEPARATORS = (" ", "\n")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


# One violation is reported; a million of them would cost more than the model.
_Strings = Annotated[list[str], Field(min_length=1), FailFast(), BeforeValidator(_as_list)]


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

    def find_role(self, served: frozenset[str]) -> Role | None:
        """Return the role that `input_type`, or a suffix of `model`, names.

        Raises:
            HTTPRefusal: the model is not among `served`, or its suffix contradicts `input_type`.
        """
        said = ROLE.get(self.input_type)
        if self.model.lower() in served:
            return said
        name, role = split_role_suffix(self.model)
        if role is None or name.lower() not in served:
            raise refuse_model(self.model)
        if said not in (None, role):
            message = f"Input should be {INPUT_TYPE[role]!r} or left out, as 'model' says"
            raise refuse_field("value_error", ("input_type",), message, self.input_type)
        return role

    def read_inputs(self, modalities: frozenset[Modality]) -> list[EmbeddingInput]:
        """Return the inputs as documents; an image is still the data URL that the client sent.

        Their modalities are those said or, for a model that takes images, those seen.

        Raises:
            HTTPRefusal: a modality that the model does not have, or an input that is not of it.
        """
        if "modality" not in self.model_fields_set:
            if "image" not in modalities:
                return [EmbeddingInput(given) for given in self.input]
            return [_infer_document(given) for given in self.input]
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
        return [_read_document(given, kind, index) for index, (given, kind) in enumerate(pairs)]

    def check_dimensions(self, dimensions: tuple[int, ...]) -> None:
        """Refuse a vector size that is not among `dimensions`; none there is any.

        Raises:
            HTTPRefusal: the model does not offer it.
        """
        if not self.dimensions or not dimensions or self.dimensions in dimensions:
            return
        if len(dimensions) == 1:  # a model without dynamic dimensions has no such field
            message = f"Extra inputs are not permitted: every vector has {dimensions[0]} values"
            raise refuse_field("extra_forbidden", ("dimensions",), message, self.dimensions)
        *others, last = map(str, dimensions)
        message = f"Input should be {', '.join(others)} or {last}"
        raise refuse_field("literal_error", ("dimensions",), message, self.dimensions)


def require_role(role: Role | None, documents: list[EmbeddingInput]) -> Role:
    """Return the role of some documents; an image, which has no other, is a document unsaid.

    Raises:
        HTTPRefusal: a text needs a role and none was said, or an image is asked for as a query.
    """
    kinds = {document.modality for document in documents}
    if role is None and "text" in kinds:
        message = "'input_type' parameter is required for asymmetric models"
        raise HTTPRefusal(400, "input_type_missing", message)
    if role == "query" and kinds != {"text"}:
        message = "Input should be 'passage', as an image is among the inputs"
        raise refuse_field("value_error", ("input_type",), message, "query")
    return role or "document"


def decode_images(documents: list[EmbeddingInput], max_image_bytes: int) -> list[EmbeddingInput]:
    """Return documents with the bytes of their images: nothing that a client names is opened.

    Raises:
        ImageError: what follows `data:` is no base64, no image, or one of too many bytes.
    """
    return [
        document if document.image is None else _decode_image(document, index, max_image_bytes)
        for index, document in enumerate(documents)
    ]


def _decode_image(document: EmbeddingInput, index: int, max_image_bytes: int) -> EmbeddingInput:
    try:
        return replace(document, image=images.decode_data_url(document.image, max_image_bytes))
    except ImageError as exc:
        raise exc.at(index) from exc.__cause__


def _infer_document(given: str) -> EmbeddingInput:
    if (parts := split_data_url(given)) is None:
        return EmbeddingInput(given)
    text, url = parts
    return EmbeddingInput(text if text.strip() else None, url)


def _read_document(given: str, kind: str, index: int) -> EmbeddingInput:
    if kind == "text":
        return EmbeddingInput(given)
    parts = split_data_url(given)
    if parts is None or (kind == "image" and parts[0].strip()):
        wanted = "a data URL" if kind == "image" else "a text, a space or newline, and a data URL"
        message = f"Input should be {wanted}, as of modality {kind!r}: data:image/png;base64,..."
        raise refuse_field("value_error", ("input", index), message, given)
    text, url = parts
    if kind == "text_image" and not text.strip():
        raise refuse_input(index, "Text part must be non-empty for text_image modality")
    return EmbeddingInput(text if kind == "text_image" else None, url)


def split_data_url(given: str) -> tuple[str, str] | None:
    r"""Return the text and the data URL of an input that ends with one, alone or in an <img> tag.

    >>> split_data_url("a cat\ndata:image/png;base64,AAAA")
    ('a cat', 'data:image/png;base64,AAAA')
    >>> split_data_url("a cat <img src='data:image/png;base64,AAAA'/>")
    ('a cat', 'data:image/png;base64,AAAA')
    >>> split_data_url("data:image/png;base64,AAAA")
    ('', 'data:image/png;base64,AAAA')
    >>> split_data_url("data:image/png;base64,AAAA is a data URL") is None
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
    if not is_data_url(url):
        return None
    return text[:-1] if text[-1:] in _SEPARATORS else text, url


def _check_structure(body: bytes | bytearray, max_inputs: int) -> None:
    """Refuse JSON of far more values than a request has, before there is an object for each.

    A body of 60 MB holds 20 million empty lists, which are 1.4 GB and take a parser's every second.

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
        raise refuse_size(f"too many inputs or fields; the limit is {max_inputs} inputs")


def parse_request(body: bytes | bytearray, max_inputs: int = 8192) -> EmbeddingsRequest:
    """Return the request that a body holds; the caller has to count its inputs.

    Raises:
        HTTPRefusal: not JSON, not an object, or not the fields of a request.
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
        context = error.get("ctx")
        raise refuse_field(
            error["type"], error["loc"], error["msg"], error["input"], context
        ) from None


def write_reply(
    vectors: NDArray[Any], encoding_format: EncodingFormat, model: str, tokens: int
) -> bytes:
    """Return the body of a reply: vectors (n, d) as lists of numbers or as base64.

    base64 carries float32 in little-endian order; the other number types one byte per value.
    """
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    head = b'{"object":"list","data":['
    tail = b'],"model":' + dump_json(model) + b',"usage":' + dump_json(usage) + b"}"
    return head + b",".join(_write_rows(vectors, encoding_format)) + tail


def _write_rows(vectors: NDArray[Any], encoding_format: EncodingFormat) -> Iterator[bytes]:
    # Row by row, so that the interpreter can switch to the event loop's thread in between.
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
