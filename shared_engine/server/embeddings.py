"""`POST /v1/embeddings` of a NIM: its request, its reply, and the vectors.

Source: the reference pages of the NeMo Retriever embedding NIM (2.0 to 2.4).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, FailFast, Field

from shared_engine.backend import Backend
from shared_engine.documents import EmbeddingInput, Modality, Role
from shared_engine.embedder import Embedder
from shared_engine.images.data_urls import split_data_url
from shared_engine.options import Truncate
from shared_engine.server.endpoint import Endpoint, Work
from shared_engine.server.errors import HTTPRefusal, refuse_field, refuse_input
from shared_engine.server.models import ServedModel
from shared_engine.server.protocol import RequestBody, count_usage, dump_json
from shared_engine.vectors import EmbeddingType
from shared_engine.wire import INPUT_TYPE, ROLE

EncodingFormat = Literal["float", "base64"]

_INPUT_TYPE_MISSING = (
    "'input_type' parameter is required for asymmetric models; send 'query' or 'passage' (in "
    'Python: extra_body={"input_type": "query"}), append -query or -passage to the name of the '
    "model, or start the server with --default-input-type"
)
"""It begins with the words of a NIM, as clients match them."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


# FailFast: only one violation is reported, and a million of them would cost more than the model.
_Strings = Annotated[list[str], Field(min_length=1), FailFast(), BeforeValidator(_as_list)]


class EmbeddingsRequest(RequestBody):
    """Body of a request; `dimensions` may be null, as some of OpenAI's clients send it."""

    inputs_field = "input"
    advice = (
        "; send texts, not token ids (langchain-openai: "
        "OpenAIEmbeddings(check_embedding_ctx_length=False))"
    )

    input: _Strings
    input_type: Literal["query", "passage", ""] = ""
    """Empty means absent: NVIDIA's model cards send images with it."""
    modality: _Strings = Field(default=["text"])
    encoding_format: EncodingFormat = "float"
    embedding_type: EmbeddingType = "float"
    dimensions: int | None = Field(default=None, gt=0)
    """None: the model's full size."""
    truncate: Truncate = "NONE"
    user: str = ""

    def find_role(self, suffix_role: Role | None) -> Role | None:
        """Return the role from `input_type` or from a suffix of `model`; None if neither has one.

        Raises:
            HTTPRefusal: the suffix contradicts `input_type`.
        """
        role = ROLE.get(self.input_type)
        if suffix_role is not None and role not in (None, suffix_role):
            message = (
                f"Input should be {INPUT_TYPE[suffix_role]!r} or left out, as 'model' ends with it"
            )
            raise refuse_field("value_error", ("input_type",), message, self.input_type)
        return suffix_role or role

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
            message = f"List should have 1 item, or one for each input: {len(self.input)}"
            raise refuse_field("value_error", ("modality",), message, len(self.modality))
        for kind in kinds:
            if kind not in modalities:
                expected = " or ".join(repr(name) for name in sorted(modalities))
                message = f"Input should be {expected}"
                raise refuse_field("literal_error", ("modality",), message, kind)
        pairs = zip(self.input, kinds, strict=True)
        return [_read_input(text, kind, index) for index, (text, kind) in enumerate(pairs)]

    def check_dimensions(self, dimensions: tuple[int, ...]) -> None:
        """Refuse a vector size that is none of the model's; empty `dimensions` allow all."""
        if not self.dimensions or not dimensions or self.dimensions in dimensions:
            return
        if len(dimensions) == 1:  # a NIM without dynamic dimensions lacks the field
            message = f"Extra inputs are not permitted: every vector has {dimensions[0]} values"
            raise refuse_field("extra_forbidden", ("dimensions",), message, self.dimensions)
        *others, last = map(str, dimensions)
        message = f"Input should be {', '.join(others)} or {last}"
        raise refuse_field("literal_error", ("dimensions",), message, self.dimensions)


class EmbeddingsEndpoint(Endpoint[EmbeddingsRequest]):
    """Answers with the vector of each input."""

    path = "/v1/embeddings"
    body = EmbeddingsRequest
    served: ServedModel[Embedder]

    def __init__(self, served: ServedModel[Embedder], default_role: Role | None = None) -> None:
        super().__init__(served)
        self._default_role = default_role
        """The role of texts without one; None refuses them."""

    def prepare(self, body: EmbeddingsRequest, backend: Backend) -> Work:
        """See `Endpoint.prepare`."""
        suffix = self.check_model(body.model)
        given_role = body.find_role(ROLE.get(suffix.removeprefix("-")))
        inputs = body.read_inputs(backend.modalities)
        role = _require_role(given_role, inputs, self._default_role)
        body.check_dimensions(backend.dimensions)
        embedder = self.served.model.with_options(
            dimensions=body.dimensions,
            embedding_type=body.embedding_type,
            truncate=body.truncate,
        )

        def write(vectors: NDArray[Any]) -> bytes:
            return write_reply(vectors, body.encoding_format, self.served.name, embedder.usage)

        compute = partial(embedder.aembed, role=role)
        return Work(inputs, INPUT_TYPE[role], embedder, compute, write)


def _require_role(role: Role | None, inputs: list[EmbeddingInput], default: Role | None) -> Role:
    """Return the role of the inputs; images need none, because they are always documents."""
    kinds = {item.modality for item in inputs}
    if role is None and "text" in kinds:
        role = default
    if role is None and "text" in kinds:
        raise HTTPRefusal(400, "input_type_missing", _INPUT_TYPE_MISSING)
    if role == "query" and kinds != {"text"}:
        message = "Input should be 'passage', as an image is among the inputs"
        raise refuse_field("value_error", ("input_type",), message, "query")
    return role or "document"


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


def write_reply(
    vectors: NDArray[Any], encoding_format: EncodingFormat, model: str, tokens: int
) -> bytes:
    """Return the body of a response: vectors (n, d) as lists of numbers or as base64.

    Base64 has float32 in little-endian order, other number types as one byte per value.
    """
    head = b'{"object":"list","data":['
    tail = b'],"model":' + dump_json(model) + b',"usage":' + dump_json(count_usage(tokens)) + b"}"
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
