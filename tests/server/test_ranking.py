"""A reranker over real sockets, next to an embedding model: NIM's and Cohere's protocols."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared_engine import (
    ConfigurationError,
    EmbeddingInput,
    ImageError,
    InputTooLongError,
    ModelNotFoundError,
    Options,
    PartialResultError,
    Reranker,
    RerankOptions,
)
from shared_engine.cli.main import main
from shared_engine.local import LocalBackend
from shared_engine.server.app import create_app
from shared_engine.server.limits import ServerLimits
from shared_engine.server.protocol import RequestBody
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.image_files import with_sides
from tests.support.rerankers import build_reranker, build_vl_reranker, score_float64
from tests.support.servers import (
    NAME,
    QUERY,
    RERANKER,
    TEXTS,
    Running,
    check_probes_during,
    running,
    vectors,
    wait_for,
)
from tests.support.vl_checkpoints import page

LONG = "word " * 30_000  # over the tiny checkpoints' limits
SLOW = [{"text": "some words of a long document " * 60}] * 200
PATHS = ("/ranking", "/rerank")
INPUTS = {"/ranking": "passages", "/rerank": "documents"}


def saved(*arguments: int) -> bytes:
    file = io.BytesIO()
    page(*arguments).save(file, "PNG")
    return file.getvalue()


PNG, OTHER = saved(1, 90, 60), saved(2, 50, 120)


def url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def content(*, text: str | None = None, image: str | None = None) -> dict[str, Any]:
    """Return a document as vLLM takes it."""
    parts: list[Any] = []
    if image is not None:
        parts.append({"type": "image_url", "image_url": {"url": image}})
    if text is not None:
        parts.append({"type": "text", "text": text})
    return {"content": parts}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = build_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["sentence-transformers"])
    return Options(model=str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rerank_options(tmp_path_factory: pytest.TempPathFactory) -> RerankOptions:
    folder = build_vl_reranker(tmp_path_factory.mktemp("reranker"))
    return RerankOptions(model=str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def text_options(tmp_path_factory: pytest.TempPathFactory) -> RerankOptions:
    folder = build_reranker(tmp_path_factory.mktemp("text-reranker"))
    return RerankOptions(model=str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def served(options: Options, rerank_options: RerankOptions) -> Iterator[Running]:
    with running(options, rerank_options=rerank_options, rerank_served_name=RERANKER) as here:
        yield here


@pytest.fixture(scope="module")
def local(rerank_options: RerankOptions) -> Iterator[Reranker]:
    with Reranker(rerank_options) as reranker:
        yield reranker


def scores(response: httpx.Response, n: int) -> NDArray[Any]:
    """Return the scores in the order of the request, after a look at the rest of the reply."""
    assert response.status_code == 200, response.text
    body = response.json()
    is_nim = "rankings" in body
    assert set(body) == ({"rankings", "usage"} if is_nim else {"model", "results", "usage"})
    assert body.get("model", RERANKER) == RERANKER
    rows = body["rankings" if is_nim else "results"]
    field = "logit" if is_nim else "relevance_score"
    assert all(set(row) == {"index", field} for row in rows)
    assert [row[field] for row in rows] == sorted((row[field] for row in rows), reverse=True)
    assert sorted(row["index"] for row in rows) == list(range(n))
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
    found = np.empty(n)
    found[[row["index"] for row in rows]] = [row[field] for row in rows]
    return found


def assert_close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)


def sigmoid(values: NDArray[Any]) -> NDArray[Any]:
    return 1 / (1 + np.exp(-values.astype(np.float64)))


# --- what it gives -------------------------------------------------------------------------------


def test_scores_are_those_of_the_engine(served: Running, local: Reranker) -> None:
    expected = local.score(QUERY, TEXTS)
    exact = score_float64(Path(str(local.options.model)), QUERY, TEXTS)
    assert_close(expected, exact)
    assert_close(scores(served.rank(), len(TEXTS)), expected)
    assert_close(scores(served.rank("/rerank"), len(TEXTS)), sigmoid(expected))


def test_images_and_texts(served: Running, local: Reranker) -> None:
    items = [EmbeddingInput("a page", PNG), EmbeddingInput(image=OTHER), EmbeddingInput("a text")]
    expected = local.score(QUERY, items)
    passages = [{"text": "a page", "image": url(PNG)}, {"image": url(OTHER)}, {"text": "a text"}]
    assert_close(scores(served.rank(passages=passages), 3), expected)
    documents = [content(text="a page", image=url(PNG)), content(image=url(OTHER)), "a text"]
    got = scores(served.rank("/rerank", documents=documents), 3)
    assert_close(got, sigmoid(expected))


def test_top_n_and_return_documents(served: Running, local: Reranker) -> None:
    best = [index for index, _ in local.rank(QUERY, TEXTS, top_n=3)]
    for more in ({}, {"return_documents": False}, {"return_documents": True}):
        rows = served.rank("/rerank", top_n=3, **more).json()["results"]
        assert [row["index"] for row in rows] == best
        texts = [row.get("document", {}).get("text") for row in rows]
        returned = more.get("return_documents")
        assert texts == [TEXTS[index] if returned else None for index in best]
    for top_n in (100, None):
        response = served.rank("/rerank", top_n=top_n)
        assert len(response.json()["results"]) == len(TEXTS)


@pytest.mark.parametrize("path", PATHS)
def test_truncate_cuts_long_documents(
    served: Running, rerank_options: RerankOptions, path: str
) -> None:
    given = [{"text": "short"}, {"text": LONG}] if path == "/ranking" else ["short", LONG]
    got = scores(served.rank(path, truncate="END", **{INPUTS[path]: given}), 2)
    kind: Any = "none" if path == "/ranking" else "sigmoid"
    with Reranker(rerank_options.replace(truncate="END", activation=kind)) as reranker:
        assert_close(got, reranker.score(QUERY, ["short", LONG]))


class WithoutRanking(httpx.AsyncBaseTransport):
    """Answers 404 in place of the server's /v1/ranking."""

    def __init__(self) -> None:
        self.inner = httpx.AsyncHTTPTransport()
        self.paths: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        if request.url.path == "/v1/ranking":
            return httpx.Response(404)
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


@pytest.mark.parametrize("form", PATHS)
def test_our_client_reads_both_forms(served: Running, local: Reranker, form: str) -> None:
    transport = WithoutRanking()
    more: dict[str, Any] = {}
    if form == "/rerank":
        more = {"http_client_factory": lambda: httpx.AsyncClient(transport=transport)}
    there = Reranker(RerankOptions(model=RERANKER, base_url=served.url, max_batch_size=3, **more))
    items = [*TEXTS, EmbeddingInput("a page", PNG), EmbeddingInput(image=OTHER)]
    bad = [*items[:4], EmbeddingInput(image=PNG[:60]), *items[4:6], LONG, *items[6:]]
    expected = local.score(QUERY, items)
    with there:
        got = there.score(QUERY, items)
        assert there.score_kind == ("logit" if form == "/ranking" else "probability")
        with pytest.raises(PartialResultError) as caught:
            there.score(QUERY, bad)
        with pytest.raises(InputTooLongError):
            there.score(QUERY, [LONG])
        assert there.usage > 0
        asynchronous = asyncio.run(there.arank(QUERY, items, top_n=2))
    expected = expected if form == "/ranking" else sigmoid(expected)
    assert_close(got, expected)
    assert_close(np.delete(caught.value.scores, [4, 7]), expected)
    found = {row: type(error) for row, error in caught.value.errors.items()}
    assert found == {4: ImageError, 7: InputTooLongError}
    assert [row.index for row in asynchronous] == np.argsort(-expected)[:2].tolist()
    assert not transport.paths or "/v1/rerank" in transport.paths


def test_models_metadata_and_the_page_name_both(served: Running, local: Reranker) -> None:
    listed = served.client.get("/models").json()["data"]
    assert [row["id"] for row in listed] == [NAME, f"{NAME}-query", f"{NAME}-passage", RERANKER]
    for name in (RERANKER, "tiny-rerank", RERANKER.upper()):
        assert served.client.get(f"/models/{name}").json() == listed[3]
    assert served.client.get(f"/models/{RERANKER}-query").status_code == 404
    facts = served.client.get("/metadata").json()
    assert facts["id"] == NAME
    infos = {info["task"]: info for info in facts["modelInfo"]}
    assert infos["embed"]["dimensions"] == facts["dimensions"] == [16, 32, 64]
    assert infos["rerank"]["shortName"] == RERANKER
    assert infos["rerank"]["modalities"] == ["image", "text", "text_image"]
    assert infos["rerank"]["fingerprint"] == local.load().fingerprint
    page = httpx.get(served.url.removesuffix("/v1")).text
    assert f'"model": "{NAME}"' in page
    assert page.count(f'"model": "{RERANKER}"') == 2


async def test_a_catalogue_name_answers_to_its_aliases(text_options: RerankOptions) -> None:
    app = create_app(
        rerank_options=RerankOptions(
            model="nvidia/llama-3.2-nv-rerankqa-1b-v2", checkpoint=text_options.model
        )
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for name in ("llama-nemotron-rerank-1b-v2", "nvidia/llama-3_2-nv-rerankqa-1b-v2"):
            found = (await client.get(f"/v1/models/{name}")).json()
            assert found["id"] == "nvidia/llama-nemotron-rerank-1b-v2"


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "kind", "place"),
    [
        ("/ranking", {"top_k": 3}, "extra_forbidden", ["top_k"]),
        ("/ranking", {"user": "me"}, "extra_forbidden", ["user"]),
        ("/ranking", {"query": "a text"}, "model_type", ["query"]),
        ("/ranking", {"query": {}}, "missing", ["query", "text"]),
        ("/ranking", {"query": {"text": ""}}, "value_error", ["query", "text"]),
        ("/ranking", {"query": {"text": " \n"}}, "value_error", ["query", "text"]),
        ("/ranking", {"query": {"text": "a", "image": "b"}}, "extra_forbidden", ["query", "image"]),
        ("/ranking", {"query": ...}, "missing", ["query"]),
        ("/ranking", {"model": ...}, "missing", ["model"]),
        ("/ranking", {"passages": ...}, "missing", ["passages"]),
        ("/ranking", {"passages": []}, "too_short", ["passages"]),
        ("/ranking", {"passages": ["a text"]}, "model_type", ["passages", 0]),
        ("/ranking", {"passages": [{"text": "a"}, {}]}, "missing", ["passages", 1]),
        ("/ranking", {"passages": [{"text": None}]}, "string_type", ["passages", 0, "text"]),
        ("/ranking", {"passages": [{"title": "a"}]}, "extra_forbidden", ["passages", 0, "title"]),
        (
            "/ranking",
            {"passages": [{"text": "", "image": url(PNG)}]},
            "value_error",
            ["passages", 0, "text"],
        ),
        (
            "/ranking",
            {"passages": [{"text": "a"}, {"image": "https://example.com/a.png"}]},
            "value_error",
            ["passages", 1, "image"],
        ),
        ("/ranking", {"truncate": "START"}, "literal_error", ["truncate"]),
        ("/rerank", {"max_tokens_per_doc": 3}, "extra_forbidden", ["max_tokens_per_doc"]),
        ("/rerank", {"query": {"text": "a"}}, "string_type", ["query"]),
        ("/rerank", {"query": " "}, "value_error", ["query"]),
        ("/rerank", {"documents": "a text"}, "list_type", ["documents"]),
        ("/rerank", {"documents": []}, "too_short", ["documents"]),
        ("/rerank", {"top_n": 0}, "greater_than", ["top_n"]),
        ("/rerank", {"top_n": "3"}, "int_type", ["top_n"]),
        ("/rerank", {"truncate": "START"}, "literal_error", ["truncate"]),
        (
            "/rerank",
            {"documents": [content(image=url(PNG))], "return_documents": True},
            "value_error",
            ["return_documents"],
        ),
        (
            "/rerank",
            {"documents": ["a", content(image="file:///etc/passwd")]},
            "value_error",
            ["documents", 1],
        ),
        *(
            ("/rerank", {"documents": ["a", wrong]}, "document_type", ["documents", 1])
            for wrong in (
                1,
                None,
                {"text": "a"},
                content(),
                {"content": "a"},
                {"content": [{"type": "text"}]},
                {"content": [{"type": "text", "text": "a"}] * 2},
                {"content": [{"type": "image_url", "image_url": {"url": url(PNG)}}] * 2},
                {"content": [{"type": "video_url", "video_url": {"url": "a"}}]},
                content(text="a") | {"role": "user"},
            )
        ),
    ],
)
def test_a_violation_has_a_place(
    served: Running, path: str, fields: dict[str, Any], kind: str, place: list[Any]
) -> None:
    response = served.rank(path, **fields)
    body = response.json()
    assert response.status_code == 400, response.text
    assert body["type"] == "request_validation_error"
    assert (body["detail"]["type"], body["detail"]["loc"]) == (kind, ["body", *place])
    assert "instance of" not in body["detail"]["msg"]
    if kind == "extra_forbidden" and len(place) == 1:
        names = "model, query, (passages|documents), .*truncate"
        assert re.fullmatch(f"unknown field, expected one of {names}", body["detail"]["msg"])


@pytest.mark.parametrize("path", PATHS)
def test_errors_have_the_fields_of_a_nim_and_of_openai(served: Running, path: str) -> None:
    found = served.rank(path, model="another").json()
    assert found.keys() == {"object", "message", "detail", "type", "error"}
    assert found["error"]["code"] == "model_not_found"
    assert found["error"]["message"] == found["message"]


@pytest.mark.parametrize("path", PATHS)
def test_another_model_is_told_which_one_serves_the_path(served: Running, path: str) -> None:
    for name in (NAME, "another"):
        response = served.rank(path, model=name)
        assert (response.status_code, response.json()["type"]) == (404, "model_not_found")
        message = f"{name!r} does not exist at /v1{path}, which serves {RERANKER!r}"
        assert message in response.json()["message"]
    response = served.post(model=RERANKER)
    assert f"at /v1/embeddings, which serves {NAME!r}" in response.json()["message"]
    for name in ("TINY-RERANK", RERANKER):
        assert served.rank(path, model=name).status_code == 200


@pytest.mark.parametrize(("path", "status"), [("/ranking", 422), ("/rerank", 400)])
def test_too_long(served: Running, path: str, status: int) -> None:
    given = [{"text": "a"}, {"text": LONG}] if path == "/ranking" else ["a", LONG]
    response = served.rank(path, **{INPUTS[path]: given})
    assert (response.status_code, response.json()["index"]) == (status, 1)
    words = r"Input length \d+ exceeds maximum allowed token size \d+"
    assert re.fullmatch(words, response.json()["message"])
    query = {"text": LONG} if path == "/ranking" else LONG
    response = served.rank(path, query=query, truncate="END")
    assert response.status_code == status
    assert "index" not in response.json()
    tokens = re.fullmatch(words.replace(r"\d+", r"(\d+)", 1), response.json()["message"])
    assert tokens
    assert int(tokens[1]) < LONG.count(" ")  # only its beginning was tokenized


@pytest.mark.parametrize("path", PATHS)
def test_a_broken_image_has_its_index(served: Running, path: str) -> None:
    too_wide = with_sides(PNG, 65_000, 65_000)
    for broken, status in ((PNG[:60], 400), (b"", 400), (too_wide, 413)):
        given: list[Any] = [{"text": "a"}, {"image": url(broken)}]
        if path == "/rerank":
            given = ["a", content(image=url(broken))]
        response = served.rank(path, **{INPUTS[path]: given})
        assert (response.status_code, response.json()["index"]) == (status, 1)


def test_a_text_model_refuses_images(options: Options, text_options: RerankOptions) -> None:
    with running(None, served=None, rerank_options=text_options) as here:
        name = Path(str(text_options.model)).name
        assert [row["id"] for row in here.client.get("/models").json()["data"]] == [name]
        for path, item in (("/ranking", {"image": url(PNG)}), ("/rerank", content(image=url(PNG)))):
            assert here.rank(path, model=name).status_code == 200
            response = here.rank(path, model=name, **{INPUTS[path]: [item]})
            assert (response.status_code, response.json()["index"]) == (400, 0)
            assert "accepts only text" in response.json()["message"]


def test_paths_of_a_model_that_is_not_served(options: Options, text_options: RerankOptions) -> None:
    with running(None, served=None, rerank_options=text_options) as here:
        response = here.post()
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_served")
        assert "start the server with --model MODEL" in response.json()["message"]
    with running(options) as here:
        for path in PATHS:
            assert "--rerank-model MODEL" in here.rank(path).json()["message"]
        name = 'nemoretriever_requests_total{path="/v1/ranking",status="404"}'
        assert here.metric(name) == 1
        there = Reranker(RerankOptions(model=NAME, base_url=here.url, max_retries=0))
        with there, pytest.raises(ModelNotFoundError, match="serves no reranker"):
            there.score(QUERY, TEXTS)


def test_invalid_arguments(options: Options, rerank_options: RerankOptions) -> None:
    both: dict[str, Any] = {"options": options, "rerank_options": rerank_options}
    for wrong, said in (
        ({"rerank_options": rerank_options, "served_name": "a"}, "served_name="),
        ({"rerank_options": rerank_options, "default_input_type": "query"}, "default_input_type="),
        ({"options": options, "rerank_served_name": "a"}, "rerank_served_name="),
        ({**both, "served_name": "A", "rerank_served_name": "a"}, "both models have the name 'a'"),
        ({"rerank_options": RerankOptions(base_url="http://127.0.0.1:9")}, "base_url= is given"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            create_app(**wrong)


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "most"), [("/ranking", 512), ("/rerank", 1000)])
def test_too_many_inputs(rerank_options: RerankOptions, path: str, most: int) -> None:
    arguments = {"rerank_options": rerank_options, "rerank_served_name": RERANKER}
    with running(None, served=None, **arguments) as here:
        item: Any = {"text": "a"} if path == "/ranking" else "a"
        assert here.rank(path, **{INPUTS[path]: [item] * most}).status_code == 200
        response = here.rank(path, **{INPUTS[path]: [item] * (most + 1)})
        assert response.status_code == 413
        assert f"{most + 1} inputs in one request; the limit is {most}" in response.text


def test_limits_of_bodies_and_images(rerank_options: RerankOptions) -> None:
    limits = ServerLimits(max_body_bytes=20_000, max_image_bytes=len(PNG))
    arguments = {"rerank_options": rerank_options, "rerank_served_name": RERANKER}
    with running(None, served=None, **arguments, limits=limits) as here:
        for path in PATHS:
            image: Any = {"image": url(PNG)} if path == "/ranking" else content(image=url(PNG))
            large = saved(3, 200, 200)
            larger = {"image": url(large)} if path == "/ranking" else content(image=url(large))
            inputs = INPUTS[path]
            assert here.rank(path, **{inputs: [image] * 2}).status_code == 200
            response = here.rank(path, **{inputs: [image, larger]})
            assert (response.status_code, response.json()["index"]) == (413, 1)
            response = here.rank(path, query="x" * 20_001)
            assert response.status_code == 413
            assert "20000 bytes" in response.json()["message"]
            response = here.client.post(path, content=b"{}", headers={"Content-Type": "text/plain"})
            assert response.status_code == 415


def test_a_full_queue_is_one_of_all_paths(options: Options, rerank_options: RerankOptions) -> None:
    arguments = {"rerank_options": rerank_options, "rerank_served_name": RERANKER}
    with (
        running(options, **arguments, limits=ServerLimits(max_waiting=5)) as here,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(here.rank, passages=SLOW)  # more than the queue holds, but alone
        wait_for(lambda: here.metric("nemoretriever_queue_inputs") == len(SLOW))
        for response in (here.post(), here.rank(), here.rank("/rerank")):
            assert response.status_code == 429
            assert 1 <= int(response.headers["retry-after"]) <= 30
        assert first.result().status_code == 200
        assert here.metric("nemoretriever_queue_inputs") == 0


def test_a_disconnected_client_cancels_its_work(rerank_options: RerankOptions) -> None:
    arguments = {"rerank_options": rerank_options, "rerank_served_name": RERANKER}
    with running(None, served=None, **arguments) as here:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{here.url}/ranking",
                json={"model": RERANKER, "query": {"text": QUERY}, "passages": SLOW * 2},
                timeout=httpx.Timeout(10, read=0.2),
            )
        wait_for(lambda: here.metric("nemoretriever_queue_inputs") == 0)
        assert here.metric('nemoretriever_errors_total{kind="disconnected"}') == 1
        assert here.rank().status_code == 200


@pytest.mark.parametrize("fields", [{"query": {"text": LONG}}, {"passages": [{"text": LONG}]}])
def test_a_refused_request_is_released_without_a_garbage_collection(
    served: Running, fields: dict[str, Any]
) -> None:
    def count() -> int:
        return sum(issubclass(type(item), RequestBody) for item in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        assert served.rank(**fields).status_code == 422
        assert served.post(input=LONG).status_code == 400
        wait_for(lambda: count() == 0)
    finally:
        gc.enable()


def test_an_incomplete_body_gets_408(rerank_options: RerankOptions) -> None:
    arguments = {"rerank_options": rerank_options, "limits": ServerLimits(read_seconds=0.2)}
    head = "POST /v1/ranking HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(None, served=None, **arguments) as here:
        address = httpx.URL(here.url)
        with socket.create_connection((address.host, address.port or 0), timeout=10) as connection:
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(("arguments", "status"), [({"api_key": "a secret"}, 401), ({}, 421)])
async def test_a_key_and_hosts_protect_all_paths(
    rerank_options: RerankOptions, arguments: dict[str, Any], status: int
) -> None:
    transport = httpx.ASGITransport(create_app(rerank_options=rerank_options, **arguments))
    base = "http://elsewhere.test/v1"
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
        for path in PATHS:
            assert (await client.post(path, json={})).status_code == status


# --- both models ---------------------------------------------------------------------------------


def test_many_requests_of_all_paths_keep_their_rows(served: Running, local: Reranker) -> None:
    texts = [f"text number {n} " * (1 + n % 7) for n in range(60)]
    embedded = served.expected(texts)
    logits = local.score(QUERY, texts)

    async def ask(client: httpx.AsyncClient, n: int) -> None:
        texts_of = texts[n : n + 3]
        bodies: dict[str, dict[str, Any]] = {
            "/embeddings": {"model": NAME, "input": texts_of, "input_type": "passage"},
            "/ranking": {"query": {"text": QUERY}, "passages": [{"text": t} for t in texts_of]},
            "/rerank": {"query": QUERY, "documents": texts_of},
        }
        replies = await asyncio.gather(
            *(client.post(path, json={"model": RERANKER} | body) for path, body in bodies.items())
        )
        assert_close(vectors(replies[0]), embedded[n : n + 3])
        assert_close(scores(replies[1], len(texts_of)), logits[n : n + 3])
        assert_close(scores(replies[2], len(texts_of)), sigmoid(logits[n : n + 3]))

    async def ask_all() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            await asyncio.gather(*(ask(client, n) for n in range(len(texts))))

    asyncio.run(ask_all())


def test_probes_are_answered_during_large_requests(served: Running) -> None:
    check_probes_during(
        lambda: served.rank("/rerank", documents=["some words of a document"] * 1000), served
    )


def test_metrics_count(options: Options, rerank_options: RerankOptions) -> None:
    arguments = {"rerank_options": rerank_options, "rerank_served_name": RERANKER}
    with running(options, **arguments) as here:
        tokens = here.rank().json()["usage"]["total_tokens"]
        tokens += here.rank("/rerank").json()["usage"]["total_tokens"]
        here.rank(passages=[{"image": url(PNG)}])
        here.rank("/rerank", top_n=0)
        here.post()
        for path, status, count in (
            ("ranking", 200, 2),
            ("rerank", 200, 1),
            ("rerank", 400, 1),
            ("embeddings", 200, 1),
        ):
            labels = f'path="/v1/{path}",status="{status}"'
            assert here.metric(f"nemoretriever_requests_total{{{labels}}}") == count
        assert here.metric('nemoretriever_errors_total{kind="invalid_request"}') == 1
        inputs = here.metric('nemoretriever_inputs_total{input_type="rerank"}')
        assert inputs == 2 * len(TEXTS) + 1
        assert here.metric('nemoretriever_tokens_total{input_type="rerank"}') > tokens
        assert here.metric('nemoretriever_inputs_by_modality_total{modality="image"}') == 1
        assert here.metric('nemoretriever_request_seconds_count{input_type="rerank"}') == 3
        for task in ("embed", "rerank"):
            steps, computed, full, fill = (
                here.metric(f'nemoretriever_{name}{{task="{task}"}}')
                for name in (
                    "steps_total",
                    "step_tokens_total",
                    "step_tokens_max",
                    "batch_fill_ratio",
                )
            )
            assert fill == pytest.approx(computed / steps / full)


def test_a_server_is_ready_when_both_models_are(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = RuntimeError("an illegal memory access")
    for task, status in ((None, 200), ("embed", 503), ("rerank", 503)):

        def failure(self: LocalBackend, task: str | None = task) -> Exception | None:
            is_reranker = self.dimensions == (1,)
            return broken if task == ("rerank" if is_reranker else "embed") else None

        with monkeypatch.context() as patched:
            patched.setattr(LocalBackend, "failure", property(failure), raising=False)
            response = served.client.get("/health/ready")
        assert (response.status_code, response.json()["ready"]) == (status, status == 200)


async def test_requests_get_503_until_the_model_is_loaded(
    options: Options, rerank_options: RerankOptions
) -> None:
    app = create_app(options, rerank_options=rerank_options, rerank_served_name=RERANKER)
    transport = httpx.ASGITransport(app)  # without a lifespan it never loads
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost/v1") as client:
        assert (await client.get("/health/ready")).status_code == 503
        for path in PATHS:
            response = await client.post(path, json={})
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")


def test_serve_exits_if_the_reranker_cannot_be_loaded(
    options: Options, capfd: pytest.CaptureFixture[str]
) -> None:
    assert options.model is not None
    command = ["serve", "--model", options.model, "--port", "0"]
    assert main([*command, "--rerank-model", "/nowhere"]) == 1
    assert "/nowhere" in capfd.readouterr().err
    assert main([*command, "--rerank-model", options.model]) == 2  # one name for two models
    assert "both models have the name" in capfd.readouterr().err
    assert main([*command, "--rerank-checkpoint", "/nowhere"]) == 2
    assert "--rerank-model" in capfd.readouterr().err
    swapped = ["--rerank-model", options.model, "--rerank-served-name", "other"]
    assert main([*command, *swapped]) == 1
    assert "does not score documents" in capfd.readouterr().err


# --- other people's clients ----------------------------------------------------------------------


def test_langchain_nvidia_reranks(served: Running, local: Reranker) -> None:
    module = pytest.importorskip("langchain_nvidia_ai_endpoints")
    documents = pytest.importorskip("langchain_core.documents")
    model = module.NVIDIARerank(base_url=served.url, model=RERANKER, top_n=3)
    given = [documents.Document(page_content=text) for text in TEXTS if text]
    found = model.compress_documents(given, QUERY)
    texts = [document.page_content for document in given]
    best = local.rank(QUERY, texts, top_n=3)
    assert [document.page_content for document in found] == [texts[row.index] for row in best]
    got = [document.metadata["relevance_score"] for document in found]
    assert_close(got, [row.score for row in best])


# --- anything at all -----------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
_text = st.text(max_size=40)
_query = _text.filter(lambda text: bool(text.strip()))
_truncate = st.sampled_from(["NONE", "END"])
_passage = st.fixed_dictionaries({"text": _text}) | st.just({"image": url(PNG)})
_document = _text | st.just(content(image=url(PNG))) | st.builds(lambda t: content(text=t), _text)
_fields: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/ranking": {
        "query": st.fixed_dictionaries({"text": _query}),
        "passages": st.lists(_passage, min_size=1, max_size=4),
    },
    "/rerank": {"query": _query, "documents": st.lists(_document, min_size=1, max_size=4)},
}
_optional: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/ranking": {"truncate": _truncate},
    "/rerank": {"truncate": _truncate, "top_n": st.none() | st.integers(1, 10)},
}
_fuzz = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _valid(path: str) -> st.SearchStrategy[tuple[str, Any]]:
    model = {"model": st.just(RERANKER)}
    body = st.fixed_dictionaries(model | _fields[path], optional=_optional[path])
    return st.tuples(st.just(path), body)


def _any(path: str) -> st.SearchStrategy[tuple[str, Any]]:
    both = {"model": st.just(RERANKER)} | _fields[path] | _optional[path]
    fields = {name: strategy | _json for name, strategy in both.items()}
    passages = st.lists(st.dictionaries(st.sampled_from(["text", "image", "content"]), _json))
    fields[INPUTS[path]] |= passages
    body = st.fixed_dictionaries({}, optional=fields) | st.dictionaries(_text, _json) | _json
    return st.tuples(st.just(path), body)


def _post(served: Running, path: str, body: Any) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return served.client.post(path, content=json.dumps(body).encode(), headers=headers)


@_fuzz
@given(st.sampled_from(PATHS).flatmap(_valid))
def test_every_valid_request_is_answered(served: Running, drawn: tuple[str, Any]) -> None:
    path, body = drawn
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate is not JSON that anybody can read
        return
    response = _post(served, path, body)
    assert response.status_code == 200, response.text
    n = len(body[INPUTS[path]])
    rows = response.json()["rankings" if path == "/ranking" else "results"]
    assert len(rows) == min(n, body.get("top_n") or n)


@_fuzz
@given(st.sampled_from(PATHS).flatmap(_any))
def test_any_json_gets_a_response(served: Running, drawn: tuple[str, Any]) -> None:
    response = _post(served, *drawn)
    assert response.status_code in (200, 400, 404), response.text
    assert isinstance(response.json(), dict)
