"""Rerankers at servers: the requests of each kind of server, and their replies checked."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httpx
import numpy as np
import pytest

from shared_engine import (
    AuthenticationError,
    ConfigurationError,
    EmbeddingInput,
    InputTooLongError,
    InvalidRequestError,
    MalformedResponseError,
    ModelNotFoundError,
    PartialResultError,
    Reranker,
    RerankOptions,
    ServerError,
    UnsupportedModalityError,
    track_usage,
)
from tests.support.nim import write_models
from tests.support.vl_checkpoints import page

MODEL = "nvidia/llama-nemotron-rerank-vl-1b-v2"
QUERY = "what is it?"
TEXTS = [f"passage {i}" for i in range(100)]


def logit(query: str, document: object) -> float:
    """Return a score that depends on query and document alone, different for each."""
    digest = hashlib.sha256(json.dumps([query, document]).encode()).digest()[:8]
    return np.float32(np.random.default_rng(int.from_bytes(digest, "little")).normal(0, 9)).item()


def logits(texts: Iterable[str], query: str = QUERY) -> list[float]:
    return [logit(query, {"text": text}) for text in texts]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


Answer = Callable[[str, dict[str, Any]], httpx.Response | None]


class Server:
    """A server of rerankers without a socket, which keeps its requests."""

    def __init__(self, kind: str = "nim", answer: Answer | None = None) -> None:
        """Create the server.

        Args:
            kind: "nim", "vllm", "tei", "infinity", "llama.cpp" or "none".
            answer: Called first with path and body; a response that it returns is the reply.
        """
        self.kind, self.answer = kind, answer
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if request.method == "GET":
            is_there = self.kind != "tei"
            return httpx.Response(200 if is_there else 404, content=write_models([MODEL]))
        self.paths.append(path)
        body = json.loads(request.content)
        if self.answer is not None and (given := self.answer(path, body)) is not None:
            return given
        handlers: Mapping[str, Mapping[str, Callable[..., Any]]] = {
            "nim": {"/v1/ranking": self.rank},
            "vllm": {"/v1/rerank": self.cohere, "/rerank": self.cohere},
            "infinity": {"/rerank": self.cohere},
            "llama.cpp": {"/v1/rerank": self.cohere},
            "tei": {"/rerank": self.tei},
            "none": {},
        }
        if (handler := handlers[self.kind].get(path)) is None:
            return httpx.Response(404, json={"detail": "Not Found"})
        return handler(body)

    def rank(self, body: dict[str, Any]) -> httpx.Response:
        if unknown := body.keys() - {"model", "query", "passages", "truncate"}:
            return httpx.Response(400, json={"error": f"unknown field {unknown}, expected one of"})
        if any(each.get("text") == "" for each in body["passages"]):
            return httpx.Response(400, json={"error": "passage text must not be empty"})
        assert len(body["passages"]) <= 512
        self.bodies.append(body)
        scores = [logit(body["query"]["text"], each) for each in body["passages"]]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        tokens = {"prompt_tokens": 7 * len(scores), "total_tokens": 7 * len(scores)}
        rankings = [{"index": i, "logit": scores[i]} for i in order]
        return httpx.Response(200, json={"rankings": rankings, "usage": tokens})

    def cohere(self, body: dict[str, Any]) -> httpx.Response:
        if "documents" not in body:
            return httpx.Response(422, json={"detail": [{"loc": ["body", "documents"]}]})
        self.bodies.append(body)
        activate = float if self.kind == "llama.cpp" else sigmoid
        results = [
            {
                "index": i,
                "document": {"text": each},
                "relevance_score": activate(logit(body["query"], {"text": each})),
            }
            for i, each in enumerate(body["documents"])
        ]
        results.sort(key=lambda result: -result["relevance_score"])
        return httpx.Response(200, json={"results": results[: body["top_n"]]})

    def tei(self, body: dict[str, Any]) -> httpx.Response:
        if len(body["texts"]) > 32:
            error = f"batch size {len(body['texts'])} > maximum allowed batch size 32"
            return httpx.Response(413, json={"error": error, "error_type": "Validation"})
        self.bodies.append(body)
        activate = float if body["raw_scores"] else sigmoid
        scores = [activate(logit(body["query"], {"text": text})) for text in body["texts"]]
        return httpx.Response(200, json=[{"index": i, "score": s} for i, s in enumerate(scores)])

    def reranker(self, **options: Any) -> Reranker:
        options = {"base_url": "http://nim:8000", "model": MODEL, "max_retries": 0, **options}
        transport = httpx.MockTransport(self)
        return Reranker(
            RerankOptions(
                http_client_factory=lambda: httpx.AsyncClient(transport=transport), **options
            )
        )


def of_calls(server: Server) -> list[dict[str, Any]]:
    """Return the bodies of requests that were no question for the form."""
    return [body for body in server.bodies if body["query"] not in ("?", {"text": "?"})]


def test_a_nim_gets_four_fields_and_its_order_does_not_matter():
    server = Server()
    with server.reranker(truncate="END") as reranker, track_usage() as used:
        scores = reranker.score(QUERY, TEXTS)
        assert reranker.score_kind == "logit"
        assert reranker.description == f"{MODEL} at http://nim:8000/v1 (/v1/ranking of a NIM)"
        assert [index for index, _ in reranker.rank(QUERY, TEXTS, 5)] == np.argsort(-scores)[
            :5
        ].tolist()
    np.testing.assert_array_equal(scores, np.float32(logits(TEXTS)))
    assert used.tokens == 2 * 7 * len(TEXTS)
    bodies = of_calls(server)[:4]
    assert [len(body["passages"]) for body in bodies] == [32, 32, 32, 4]
    for body in bodies:
        assert body.keys() == {"model", "query", "passages", "truncate"}
        assert (body["model"], body["query"], body["truncate"]) == (MODEL, {"text": QUERY}, "END")


def test_images_are_sent_as_data_urls_and_never_with_an_empty_text():
    server, picture = Server(), page(1, 40, 30)
    documents = [
        TEXTS[0],
        EmbeddingInput(image=picture),
        EmbeddingInput("a caption", picture),
        EmbeddingInput(" ", picture),
    ]
    with server.reranker() as reranker:
        scores = reranker.score(QUERY, documents)
    sent = [passage for body in of_calls(server) for passage in body["passages"]]
    png = next(passage["image"] for passage in sent if "image" in passage)
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert png.startswith("data:image/png;base64,")
    assert len(base64.b64decode(png.partition(",")[2])) > 100
    passages = [{"text": TEXTS[0]}, {"image": png}, {"text": "a caption", "image": png}]
    expected = [logit(QUERY, passage) for passage in [*passages, {"image": png}]]
    np.testing.assert_array_equal(scores, np.float32(expected))


def test_the_catalogue_has_an_address_for_each_model():
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        passages = json.loads(request.content)["passages"]
        rankings = [{"index": i, "logit": 1.0} for i in range(len(passages))]
        return httpx.Response(200, json={"rankings": rankings})

    client = lambda: httpx.AsyncClient(transport=httpx.MockTransport(answer))  # noqa: E731
    options = RerankOptions(
        model="nvidia/llama-3.2-some-rerank-1b-v2", api_key="nvapi-k", http_client_factory=client
    )
    with Reranker(options) as reranker:
        reranker.score(QUERY, TEXTS[:3])
    (request,) = seen
    url = "https://ai.api.nvidia.com/v1/retrieval/nvidia/llama-3_2-some-rerank-1b-v2/reranking"
    assert str(request.url) == url
    assert request.headers["authorization"] == "Bearer nvapi-k"


@pytest.mark.parametrize(
    ("kind", "name", "score_kind", "probes"),
    [
        ("nim", "/v1/ranking of a NIM", "logit", ["/v1/ranking"]),
        ("vllm", "/v1/rerank of Cohere's form", "probability", ["/v1/ranking", "/v1/rerank"]),
        (
            "tei",
            "/rerank of text-embeddings-inference",
            "logit",
            ["/v1/ranking", "/v1/rerank", "/rerank"],
        ),
        (
            "infinity",
            "/rerank of Cohere's form",
            "probability",
            ["/v1/ranking", "/v1/rerank", "/rerank", "/rerank"],
        ),
        ("llama.cpp", "/v1/rerank of Cohere's form", "logit", ["/v1/ranking", "/v1/rerank"]),
    ],
)
def test_the_form_of_a_server_is_found_once(kind, name, score_kind, probes):
    server = Server(kind)
    with server.reranker(max_batch_size=40) as reranker:
        scores = reranker.score(QUERY, TEXTS)
        np.testing.assert_array_equal(reranker.score(QUERY, TEXTS[:7]), scores[:7])
        assert (reranker.score_kind, reranker.description.partition(" (")[2][:-1]) == (
            score_kind,
            name,
        )
        assert server.paths[: len(probes)] == probes
        assert set(server.paths[len(probes) :]) == {probes[-1]}
        with_sigmoid = reranker.with_options(activation="sigmoid")
        assert with_sigmoid.score_kind == "probability"
        probabilities = with_sigmoid.score(QUERY, TEXTS)
    expected = logits(TEXTS)
    right = expected if score_kind == "logit" else [sigmoid(x) for x in expected]
    np.testing.assert_allclose(scores, right, rtol=1e-6)
    np.testing.assert_allclose(probabilities, [sigmoid(x) for x in expected], rtol=1e-5)


def test_what_a_form_cannot_say_is_refused_by_name():
    with (
        Server("vllm").reranker(truncate="END") as reranker,
        pytest.raises(ConfigurationError, match=r'truncate="END": the server takes /v1/rerank'),
    ):
        reranker.score(QUERY, TEXTS)
    documents = [TEXTS[0], EmbeddingInput(image=page(1, 40, 30))]
    with Server("tei").reranker() as reranker, pytest.raises(PartialResultError) as failed:
        reranker.score(QUERY, documents)
    assert isinstance(failed.value.errors[1], UnsupportedModalityError)
    assert failed.value.scores[0] == np.float32(logits(TEXTS[:1])[0])


def test_a_server_without_a_reranker_is_told():
    with (
        Server("none").reranker() as reranker,
        pytest.raises(ModelNotFoundError, match=r"http://nim:8000/v1 serves no reranker"),
    ):
        reranker.score(QUERY, TEXTS)


@pytest.mark.parametrize("length", [1, 200_000])
def test_a_web_page_at_every_path_is_no_form(length):
    def answer(path: str, body: dict[str, Any]) -> httpx.Response | None:
        return None if path == "/v1/rerank" else httpx.Response(200, text="<html>" * length)

    server = Server("vllm", answer)
    with server.reranker() as reranker:
        np.testing.assert_allclose(
            reranker.score(QUERY, TEXTS[:3]), [sigmoid(x) for x in logits(TEXTS[:3])], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, AuthenticationError), (503, ServerError), (400, InvalidRequestError)],
)
def test_a_refusal_is_no_missing_form(status, error):
    server = Server("nim", lambda *_: httpx.Response(status, json={"error": "not now"}))
    with server.reranker() as reranker, pytest.raises(error, match="not now"):
        reranker.score(QUERY, TEXTS)


Rankings = list[dict[str, Any]]


def broken(change: Callable[[Rankings], object]) -> Answer:
    """Return an answer in which `change` was made to the list of results, in every reply."""

    def answer(path: str, body: dict[str, Any]) -> httpx.Response | None:
        if body["query"]["text"] == "?":
            return None
        rankings = json.loads(Server().rank(body).content)["rankings"]
        changed = change(rankings)
        return httpx.Response(
            200, json={"rankings": rankings if changed is None else changed}, extensions={}
        )

    return answer


FAULTS: dict[str, Callable[[Rankings], object]] = {
    "one missing": lambda rankings: rankings[1:],
    "one twice": lambda rankings: [*rankings[1:], rankings[1]],
    "one more": lambda rankings: [*rankings, rankings[0]],
    "one of another request": lambda rankings: [{**rankings[0], "index": 99}, *rankings[1:]],
    "a negative index": lambda rankings: [{**rankings[0], "index": -1}, *rankings[1:]],
    "an index as text": lambda rankings: [{**rankings[0], "index": "0"}, *rankings[1:]],
    "an index as bool": lambda rankings: [{**rankings[0], "index": False}, *rankings[1:]],
    "no score": lambda rankings: [{"index": rankings[0]["index"]}, *rankings[1:]],
    "a score as text": lambda rankings: [{**rankings[0], "logit": "1"}, *rankings[1:]],
    "a score as bool": lambda rankings: [{**rankings[0], "logit": True}, *rankings[1:]],
    "a huge score": lambda rankings: [{**rankings[0], "logit": 1e39}, *rankings[1:]],
    "null": lambda rankings: [{**rankings[0], "logit": None}, *rankings[1:]],
    "no list": lambda _: {"error": "busy"},
    "a list of lists": lambda rankings: [[each["index"], each["logit"]] for each in rankings],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_reply_is_refused_whole(fault):
    server = Server("nim", broken(FAULTS[fault]))
    with server.reranker() as reranker, pytest.raises(MalformedResponseError):
        reranker.score(QUERY, TEXTS[:9])
    assert len(server.paths) <= 1 + 3


def test_thousands_of_passages_survive_every_fault():
    texts = [f"passage {i}" for i in range(10_000)]
    kinds = [*FAULTS.values()]
    count = 0

    def answer(path: str, body: dict[str, Any]) -> httpx.Response | None:
        nonlocal count
        count += 1
        if body["query"]["text"] == "?":
            return None
        match count % 7:
            case 0:
                return broken(kinds[count // 7 % len(kinds)])(path, body)
            case 2:
                return httpx.Response(503, headers={"retry-after": "0"})
            case 4:
                raise httpx.ReadError("broken")
        return None

    server = Server("nim", answer)
    with server.reranker(max_retries=6) as reranker:
        scores = reranker.score(QUERY, texts)
    np.testing.assert_array_equal(scores, np.float32(logits(texts)))
    assert count <= 10_000 / 32 * 3


def test_a_passage_that_is_too_long_fails_alone():
    def answer(path: str, body: dict[str, Any]) -> httpx.Response | None:
        if any("long" in passage["text"] for passage in body["passages"]):
            error = "Input length 1024 exceeds maximum allowed token size 512"
            return httpx.Response(422, json={"error": error})
        return None

    texts = [*TEXTS[:50], "too long", *TEXTS[50:]]
    with (
        Server("nim", answer).reranker() as reranker,
        pytest.raises(PartialResultError) as failed,
    ):
        reranker.score(QUERY, texts)
    (index,) = failed.value.errors
    error = failed.value.errors[index]
    assert index == 50
    assert isinstance(error, InputTooLongError)
    assert (error.tokens, error.limit) == (1024, 512)
    np.testing.assert_array_equal(np.delete(failed.value.scores, 50), np.float32(logits(TEXTS)))


def test_a_passage_that_the_server_names_fails_alone_in_one_more_request():
    def answer(path: str, body: dict[str, Any]) -> httpx.Response | None:
        bad = [i for i, each in enumerate(body["passages"]) if each["text"] == "bad"]
        if not bad:
            return None
        loc = ["body", "passages", bad[0], "text"]
        return httpx.Response(422, json={"detail": [{"loc": loc, "msg": "not this one"}]})

    server = Server("nim", answer)
    with server.reranker() as reranker, pytest.raises(PartialResultError) as failed:
        reranker.score(QUERY, [*TEXTS[:9], "bad", *TEXTS[9:20]])
    assert list(failed.value.errors) == [9]
    assert "not this one" in str(failed.value.errors[9])
    assert len(server.paths) == 1 + 3  # the form, all, the bad one, the others


async def test_async_calls_share_the_connection():
    with Server().reranker() as reranker:
        ranking = await reranker.arank(QUERY, TEXTS, top_n=3)
        assert ranking == reranker.rank(QUERY, TEXTS)[:3]
        assert (await reranker.ascore(QUERY, [])).shape == (0,)
