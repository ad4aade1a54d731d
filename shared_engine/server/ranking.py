"""Scores of documents: `POST /v1/ranking` of a NIM, and `POST /v1/rerank` of Cohere's form.

Sources: NVIDIA's reference of `POST /v1/ranking` (Text Reranking NIM 2.0 to 2.4), Cohere's of
`POST /v2/rerank`, and vLLM's `entrypoints/pooling/score/protocol.py` for images in that form.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from shared_engine.backend import Backend
from shared_engine.documents import EmbeddingInput
from shared_engine.images.data_urls import is_data_url
from shared_engine.options import RerankTruncate
from shared_engine.reranker import Reranker, rank_scores
from shared_engine.server.endpoint import Endpoint, Work
from shared_engine.server.errors import refuse_field
from shared_engine.server.models import ServedModel
from shared_engine.server.protocol import RequestBody, count_usage, dump_json

_LABEL = "rerank"
"""Value of `input_type` in the metrics."""
_DOCUMENT = (
    'Input should be a text, or {"content": [...]} of at most one {"type": "image_url", '
    '"image_url": {"url": "data:image/png;base64,..."}} and one {"type": "text", "text": "..."}'
)


def _check_query(query: str) -> str:
    if not query.strip():
        raise PydanticCustomError("value_error", "Input should be a query, not a blank text")
    return query


_Query = Annotated[str, AfterValidator(_check_query)]


class Query(BaseModel):
    """The query of a ranking."""

    model_config = RequestBody.model_config

    text: _Query


class Passage(BaseModel):
    """A text, an image, or both."""

    model_config = RequestBody.model_config

    text: str = ""
    image: str = ""

    def to_input(self, index: int) -> EmbeddingInput:
        """Return the passage at `index`; its image is still a data URL.

        Raises:
            HTTPRefusal: it has no text and no image, a blank text with an image, or an image
                that is not a data URL.
        """
        place = ("passages", index)
        if not self.model_fields_set:
            raise refuse_field("missing", place, "expected 'text', 'image' or both", None)
        if "image" not in self.model_fields_set:
            return EmbeddingInput(self.text)
        _check_image(self.image, (*place, "image"))
        if "text" not in self.model_fields_set:
            return EmbeddingInput(None, self.image)
        if not self.text.strip():
            message = "Input should not be blank next to an image; leave 'text' out"
            raise refuse_field("value_error", (*place, "text"), message, self.text)
        return EmbeddingInput(self.text, self.image)


class RankingRequest(RequestBody):
    """Body of a request to /v1/ranking, which has these four fields alone."""

    inputs_field = "passages"

    query: Query
    passages: Annotated[list[Passage], Field(min_length=1), FailFast()]
    truncate: RerankTruncate = "NONE"


def _read_document(value: object) -> EmbeddingInput:
    """Return a text, or the content of a message as vLLM takes it."""
    text = url = None
    match value:
        case str():
            return EmbeddingInput(value)
        case {"content": [_, *_] as parts, **rest} if not rest:
            for part in parts:
                match part:
                    case {"type": "text", "text": str(found), **rest} if text is None and not rest:
                        text = found
                    case {
                        "type": "image_url",
                        "image_url": {"url": str(found), **detail},
                        **rest,
                    } if url is None and not (rest or detail):
                        url = found
                    case _:
                        break
            else:
                return EmbeddingInput(text, url)
    raise PydanticCustomError("document_type", _DOCUMENT)


class RerankRequest(RequestBody):
    """Body of a request to /v1/rerank; `truncate` is an addition, with the words of a NIM."""

    inputs_field = "documents"

    query: _Query
    documents: Annotated[
        list[Annotated[EmbeddingInput, BeforeValidator(_read_document)]],
        Field(min_length=1),
        FailFast(),
    ]
    top_n: int | None = Field(default=None, gt=0)
    return_documents: bool = False
    truncate: RerankTruncate = "NONE"


class RankingEndpoint(Endpoint[RankingRequest]):
    """Answers with the logit of each passage, the highest first."""

    path = "/v1/ranking"
    body = RankingRequest
    max_inputs = 512
    too_long_status = 422  # of a NIM since 1.9.1
    served: ServedModel[Reranker]

    def prepare(self, body: RankingRequest, backend: Backend) -> Work:
        """See `Endpoint.prepare`."""
        self.check_model(body.model)
        inputs = [passage.to_input(index) for index, passage in enumerate(body.passages)]
        reranker = self.served.model.with_options(activation="none", truncate=body.truncate)

        def write(scores: NDArray[Any]) -> bytes:
            rows = [{"index": i, "logit": score} for i, score in rank_scores(scores)]
            return dump_json({"rankings": rows, "usage": count_usage(reranker.usage)})

        return Work(inputs, _LABEL, reranker, partial(reranker.ascore, body.query.text), write)


class RerankEndpoint(Endpoint[RerankRequest]):
    """Answers with the probability of each document, the highest first."""

    path = "/v1/rerank"
    body = RerankRequest
    max_inputs = 1000  # of Cohere
    served: ServedModel[Reranker]

    def prepare(self, body: RerankRequest, backend: Backend) -> Work:
        """See `Endpoint.prepare`."""
        self.check_model(body.model)
        for index, item in enumerate(body.documents):
            if item.image is not None:
                _check_image(item.image, ("documents", index))
        if body.return_documents and any(item.image is not None for item in body.documents):
            message = "Input should be false, as an image is among the documents; use `index`"
            raise refuse_field("value_error", ("return_documents",), message, True)
        reranker = self.served.model.with_options(activation="sigmoid", truncate=body.truncate)

        def write(scores: NDArray[Any]) -> bytes:
            rows: list[dict[str, Any]] = [
                {"index": i, "relevance_score": score}
                for i, score in rank_scores(scores, body.top_n)
            ]
            if body.return_documents:
                for row in rows:
                    row["document"] = {"text": body.documents[row["index"]].text}
            usage = count_usage(reranker.usage)
            return dump_json({"model": self.served.name, "results": rows, "usage": usage})

        compute = partial(reranker.ascore, body.query)
        return Work(body.documents, _LABEL, reranker, compute, write)


def _check_image(url: str, place: tuple[str | int, ...]) -> None:
    if not is_data_url(url):
        message = "Input should be a data URL: data:image/png;base64,..."
        raise refuse_field("value_error", place, message, url)
