"""Format of requests and replies, for each task and kind of server.

| form             | path           | documents     | scores        | servers                      |
|------------------|----------------|---------------|---------------|------------------------------|
| `EmbeddingsForm` | /v1/embeddings | texts, images |               | NIM, NVIDIA's catalogue      |
| with prefixes    | /v1/embeddings | texts         |               | vLLM, Ollama, OpenAI's form  |
| `RankingForm`    | /v1/ranking    | texts, images | logits        | NIM, NVIDIA's catalogue      |
| `CohereForm`     | /v1/rerank     | texts, images | probabilities | vLLM, others                 |
| `TeiForm`        | /rerank        | texts         | logits        | text-embeddings-inference    |
| `RootCohereForm` | /rerank        | texts, images | probabilities | infinity                     |

Sources: NVIDIA's reference of `POST /v1/ranking` (Text Reranking NIM 2.0), vLLM's
`score/protocol.py` and `embed/protocol.py` in `entrypoints/pooling` (0.33.0), and
text-embeddings-inference's `router/src/http/types.rs`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shared_engine import images
from shared_engine.backend import Request, ScoreKind
from shared_engine.documents import EmbeddingInput, Modality, Role
from shared_engine.endpoints import HOSTED_RANKING, is_hosted
from shared_engine.errors import ConfigurationError, UnsupportedModalityError
from shared_engine.nim import protocol
from shared_engine.nim.protocol import Mask, Reply
from shared_engine.options import Truncate
from shared_engine.wire import INPUT_TYPE

_WHITE = (  # a PNG of 64 x 64 pixels
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAS0lEQVR42u3PMQ"
    "0AAAwDoPo33UrYvQQckD4XAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAY"
    "HLAMpT0sIcNbcEAAAAAElFTkSuQmCC"
)
MOST_VALUES = 16_384
"""The most values of a vector whose length is unknown."""
_BYTES_PER_VALUE = 32
"""The most bytes of one value in indented JSON; base64 takes six, but the server chooses."""
_BYTES_QUOTED = 6
"""The most bytes that a byte of a document becomes in a reply that repeats it."""

Fields: TypeAlias = Mapping[str, object]


@dataclass(frozen=True)
class Known:
    """The fields that a batch was sent with, None for none, and a fact about the server."""

    encoding: Literal["base64", "float"]
    modality: Modality | None = None
    truncate: Truncate | None = None
    is_accepted: bool | None = None
    """Whether the server accepts valid inputs of this modality; None if only a probe can show."""


class Form(ABC):
    """The requests and replies of one task at one kind of server."""

    name = ""
    """Name in descriptions."""
    path = ""
    """Path of a request, below the base URL."""
    is_outside_v1 = False
    """Whether the path is below the root of the server instead of `/v1`."""
    score_kind: ScoreKind = "logit"
    """Meaning of its scores."""
    takes_images = True
    """Whether the server takes images."""
    prefixes: Mapping[Role, str] | None = None
    """Prefix of a text in each role, added by the client; None if the server adds it."""
    inputs_field = ""
    """Name of the list of inputs in a request."""
    width = 1
    """The most values of a row of a reply."""

    def find_url(self, base_url: str, model: str) -> str:
        """Return the address of a request."""
        return (base_url.removesuffix("/v1") if self.is_outside_v1 else base_url) + self.path

    def encode_input(
        self,
        document: EmbeddingInput,
        role: Role = "document",
        allow_image_urls: bool = False,
        most_characters: int | None = None,
    ) -> bytes:
        """Return a document as one item of a request, in JSON.

        Opening and converting an image takes up to seconds.

        Args:
            role: Its side of the search.
            allow_image_urls: Whether an image may be fetched over http(s).
            most_characters: The most characters of a data URL; larger images are reduced.

        Raises:
            InputError: the image cannot be opened, or the server takes no images.
        """
        if document.image is not None and not self.takes_images:
            raise UnsupportedModalityError(
                f"has an image, but the server takes only texts ({self.name}); use a NIM"
            )
        prefix = "" if self.prefixes is None else self.prefixes[role]
        if document.image is None:
            return self._build_item(f"{prefix}{document.text or ''}", None)
        url = images.encode_data_url(document.image, allow_image_urls, most_characters)
        return self._build_item(None if document.modality == "image" else document.text, url)

    def build_probe(self, modality: Modality) -> bytes:
        """Return a valid item of a modality."""
        text, url = None if modality == "image" else "?", None if modality == "text" else _WHITE
        return self._build_item(text, url)

    @abstractmethod
    def _build_item(self, text: str | None, url: str | None) -> bytes:
        """Return a text, the data URL of an image, or both as one item of a request, in JSON."""

    def build_body(
        self, request: Request, model: str, inputs: Sequence[bytes], known: Known
    ) -> bytes:
        """Return the body of a request with encoded inputs.

        Raises:
            ConfigurationError: the server has no field for an option of the request.
        """
        fields = self._list_fields(request, model, len(inputs), known)
        name = self.inputs_field.encode()
        return b"".join((dump(fields)[:-1], b',"%b":[' % name, b",".join(inputs), b"]}"))

    @abstractmethod
    def _list_fields(self, request: Request, model: str, n: int, known: Known) -> Fields:
        """Return the other fields of a request with n inputs; those that are None are left out."""

    def bound_reply(self, request: Request, inputs: Sequence[bytes]) -> int:
        """Return the most bytes that a reply may take; some servers repeat the inputs."""
        width = max(self.width, request.dimensions or 0)
        quoted = _BYTES_QUOTED * sum(map(len, inputs))
        return 64 * 1024 + len(inputs) * (1024 + width * _BYTES_PER_VALUE) + quoted

    @abstractmethod
    def parse_reply(self, content: bytes, request: Request, n: int, mask: Mask) -> Reply:
        """Return the rows of a reply to n documents.

        Raises:
            MalformedResponseError: it has not one valid row for each document.
        """


class EmbeddingsForm(Form):
    r"""`POST /v1/embeddings` of a NIM, or with the prefixes of texts, of other servers.

    >>> EmbeddingsForm().encode_input(EmbeddingInput("a\n"))
    b'"a\\n"'
    >>> prefixes = {"query": "query: ", "document": "passage: "}
    >>> EmbeddingsForm(prefixes=prefixes).encode_input(EmbeddingInput("a"), "document")
    b'"passage: a"'
    """

    path = "/embeddings"
    inputs_field = "input"

    def __init__(
        self,
        width: int = MOST_VALUES,
        user: str | None = None,
        prefixes: Mapping[Role, str] | None = None,
    ) -> None:
        """Create the form.

        Args:
            width: The most values of a full vector.
            user: Value of the field `user`.
            prefixes: Prefixes that the client adds to texts, instead of `input_type`.
        """
        self.width, self._user, self.prefixes = width, user, prefixes
        self.takes_images = prefixes is None  # others embed the data URL as a text
        self.name = "roles by input_type"
        if prefixes is not None:
            query, document = prefixes["query"], prefixes["document"]
            self.name = f"prefixes by the client: {query!r}, {document!r}"

    def _build_item(self, text: str | None, url: str | None) -> bytes:
        if url is None:
            return dump(text)
        return dump(url if text is None else f"{text}\n{url}")  # NVIDIA's client separates so

    def _list_fields(self, request: Request, model: str, n: int, known: Known) -> Fields:
        return {
            "model": model,
            "input_type": INPUT_TYPE[request.role] if self.prefixes is None else None,
            "encoding_format": known.encoding,
            "truncate": known.truncate,
            "dimensions": request.dimensions,
            "modality": known.modality,
            "user": self._user,
        }

    def parse_reply(self, content: bytes, request: Request, n: int, mask: Mask) -> Reply:
        """See `Form.parse_reply`."""
        return protocol.parse_reply(content, n, request.dimensions, mask)


class RerankForm(Form):
    """A form of rerankers: a reply is a list of indices and scores."""

    results_field: str | None = None
    """Name of the list in a reply; None if the reply is the list."""
    score_field = ""
    """Name of the score in a result."""

    def parse_reply(self, content: bytes, request: Request, n: int, mask: Mask) -> Reply:
        """See `Form.parse_reply`."""
        return protocol.parse_scores(content, n, self.results_field, self.score_field, mask)


class RankingForm(RerankForm):
    """`POST /v1/ranking` of a NIM, which takes these four fields alone."""

    name = "/v1/ranking of a NIM"
    path = "/ranking"
    inputs_field = "passages"
    results_field = "rankings"
    score_field = "logit"

    def find_url(self, base_url: str, model: str) -> str:
        """Return the address of a request; in NVIDIA's catalogue every model has its own."""
        if not is_hosted(base_url):
            return super().find_url(base_url, model)
        return HOSTED_RANKING.format(model.replace(".", "_"))

    def _build_item(self, text: str | None, url: str | None) -> bytes:
        return dump({"text": text, "image": url})  # a NIM refuses an empty text with an image

    def _list_fields(self, request: Request, model: str, n: int, known: Known) -> Fields:
        return {"model": model, "query": {"text": request.query}, "truncate": request.truncate}


class CohereForm(RerankForm):
    """`POST /v1/rerank` in Cohere's form, with images as vLLM takes them."""

    name = "/v1/rerank of Cohere's form"
    path = "/rerank"
    inputs_field = "documents"
    score_kind = "probability"
    results_field = "results"
    score_field = "relevance_score"

    def _build_item(self, text: str | None, url: str | None) -> bytes:
        if url is None:
            return dump(text)
        content: list[object] = [{"type": "image_url", "image_url": {"url": url}}]
        if text is not None:
            content.append({"type": "text", "text": text})
        return dump({"content": content})

    def _list_fields(self, request: Request, model: str, n: int, known: Known) -> Fields:
        if request.truncate != "NONE":
            raise ConfigurationError(
                f'truncate="{request.truncate}": the server takes {self.name}, which has no field '
                "for it; split long documents, or use a NIM"
            )
        return {"model": model, "query": request.query, "top_n": n}


class RootCohereForm(CohereForm):
    """The same outside of `/v1`, as infinity serves it."""

    name = "/rerank of Cohere's form"
    is_outside_v1 = True


class TeiForm(RerankForm):
    """`POST /rerank` of text-embeddings-inference, outside of `/v1`."""

    name = "/rerank of text-embeddings-inference"
    path = "/rerank"
    inputs_field = "texts"
    is_outside_v1 = True
    takes_images = False
    score_field = "score"

    def _build_item(self, text: str | None, url: str | None) -> bytes:
        return dump(text)

    def _list_fields(self, request: Request, model: str, n: int, known: Known) -> Fields:
        is_truncated = request.truncate == "END"
        return {"query": request.query, "raw_scores": True, "truncate": is_truncated}


RERANK_FORMS: tuple[type[RerankForm], ...] = (RankingForm, CohereForm, TeiForm, RootCohereForm)
"""The forms of rerankers, in the order in which they are tried."""


def dump(value: object) -> bytes:
    """Return a value as JSON; the fields of an object that are None are left out."""
    if isinstance(value, dict):
        value = {name: part for name, part in value.items() if part is not None}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
