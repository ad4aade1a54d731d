"""Roles at servers that honour `input_type`, ignore it or refuse it."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from shared_engine import (
    AuthenticationError,
    ConfigurationError,
    Embedder,
    EmbeddingInput,
    InvalidRequestError,
    MalformedResponseError,
    ModelNotFoundError,
    NeMoRetrieverError,
    Options,
    PartialResultError,
    RequestTimeoutError,
    RerankOptions,
    ServerError,
    UnsupportedModalityError,
)
from shared_engine.cli.main import main
from shared_engine.documents import Role
from tests.support.checkpoints import PROMPTS, Shape, build_checkpoint
from tests.support.vl_checkpoints import page

MODEL = "nvidia/llama-nemotron-embed-1b-v2"
VL = "nvidia/llama-nemotron-embed-vl-1b-v2"
TEXTS = ["How do I return a product?", "", "query: a text with a prefix", "日本の首都", "?"]
ROLES: tuple[Role, ...] = ("query", "document")
OPENAI_FIELDS = {"model", "input", "encoding_format", "dimensions", "user"}
PREFIXES: dict[Role, str] = {"query": "query: ", "document": "passage: "}

Vectors = NDArray[np.float32]
Answer = Callable[[httpx.Request, dict[str, Any]], httpx.Response | None]


def post_vectors(request: httpx.Request, body: dict[str, Any], rows: Vectors) -> httpx.Response:
    """Return the reply of `POST /v1/embeddings`."""
    is_base64 = body.get("encoding_format") == "base64"
    values = [
        base64.b64encode(row.astype("<f4").tobytes()).decode() if is_base64 else row.tolist()
        for row in rows
    ]
    data = [{"index": i, "embedding": value} for i, value in enumerate(values)]
    tokens = {"prompt_tokens": 3, "total_tokens": 3}
    return httpx.Response(200, json={"object": "list", "data": data, "usage": tokens})


class Models:
    """The model of a checkpoint, with its prefixes and without, and a count of its texts."""

    def __init__(self, folder: Path) -> None:
        without = {"query": "", "document": ""}
        self._ours = Embedder(
            Options(model=str(build_checkpoint(folder / "a", Shape(prompts=PROMPTS))))
        )
        self._bare = Embedder(
            Options(model=str(build_checkpoint(folder / "b", Shape(prompts=without))))
        )

    def ours(self, texts: list[str], role: Role) -> Vectors:
        """Return the vectors of this process."""
        return self._ours.embed(texts, role)

    def bare(self, texts: list[str]) -> Vectors:
        """Return the vectors of texts without a prefix."""
        return self._bare.embed(texts)

    def close(self) -> None:
        self._ours.close()
        self._bare.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("roles"))
    yield made
    made.close()


class Server:
    """A server of a kind, without a socket, which keeps its requests.

    Sources: vLLM's `entrypoints`, text-embeddings-inference's `router/src/http`, Ollama's
    `openai/openai.go`, and refusals of OpenAI's and Mistral's API that users have published.
    """

    def __init__(
        self, models: Models, kind: str, model: str = MODEL, answer: Answer | None = None
    ) -> None:
        """Create the server.

        Args:
            kind: "nim", "gateway" (a NIM whose /v1/metadata cannot be reached), "symmetric" (a NIM
                whose model has no roles), "vllm", "tei", "ollama", "openai" or "strict".
            answer: Called first; a response that it returns is the reply.
        """
        self.kind, self.models, self.model, self.answer = kind, models, model, answer
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    @property
    def probes(self) -> list[dict[str, Any]]:
        """The requests that asked for the effect of a role."""
        return [body for body in self.bodies if body["input"] == ["?"]]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        self.paths.append(request.url.path)
        if self.answer is not None and (given := self.answer(request, body)) is not None:
            return given
        return self.embed(request, body) if body else self.tell(request.url.path)

    def tell(self, path: str) -> httpx.Response:
        """Answer a question about the server."""
        row = {"id": self.model, "object": "model", "created": 0}
        owners = {"vllm": "vllm", "ollama": "library", "openai": "system", "strict": "mistralai"}
        owner = owners.get(self.kind, "organization-owner")
        answers: dict[str, object] = {
            "/v1/models": {"object": "list", "data": [{**row, "owned_by": owner}]}
        }
        match self.kind:
            case "nim" | "symmetric":
                answers["/v1/metadata"] = {"version": "1.13.0", "modelInfo": [{"shortName": "m"}]}
            case "vllm":
                answers["/version"], answers["/health"] = {"version": "0.33.0"}, ""
            case "tei":
                answers = {"/info": {"model_id": self.model, "version": "1.9.3"}, "/health": ""}
            case "ollama":
                answers["/api/version"] = {"version": "0.20.0"}
        if path in answers:
            return httpx.Response(200, json=answers[path])
        return httpx.Response(404, json={"detail": "Not Found"})

    def embed(self, request: httpx.Request, body: dict[str, Any]) -> httpx.Response:
        """Answer a request for vectors."""
        unknown = sorted(body.keys() - OPENAI_FIELDS)
        if self.kind == "openai" and unknown:
            message = f"Unrecognized request arguments supplied: {', '.join(unknown)}"
            error = {"message": message, "type": "invalid_request_error", "param": None}
            return httpx.Response(400, json={"error": error})
        if self.kind == "strict" and unknown:
            detail = [
                {"type": "extra_forbidden", "loc": ["body", field], "msg": "Extra inputs"}
                for field in unknown
            ]
            return httpx.Response(422, json={"object": "error", "message": {"detail": detail}})
        if self.kind in ("nim", "gateway", "symmetric") and "input_type" not in body:
            error = "'input_type' parameter is required for asymmetric models"
            return httpx.Response(400, json={"error": error})
        self.bodies.append(body)
        return post_vectors(request, body, self.compute(body))

    def compute(self, body: dict[str, Any]) -> Vectors:
        """Return the vectors of a request."""
        if self.kind in ("nim", "gateway"):
            role: Role = "query" if body["input_type"] == "query" else "document"
            return self.models.ours(body["input"], role)
        return self.models.bare(body["input"])

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self))

    def embedder(self, **options: Any) -> Embedder:
        given = {"base_url": "http://server:8000", "model": self.model, "max_retries": 0, **options}
        return Embedder(Options(http_client_factory=self.client, **given))


@pytest.mark.parametrize(
    ("kind", "most_probes", "name"),
    [
        ("nim", 0, "roles by input_type"),
        ("gateway", 2, "roles by input_type"),
        ("vllm", 2, "prefixes by the client: 'query: ', 'passage: '"),
        ("tei", 2, "prefixes by the client: 'query: ', 'passage: '"),
        ("ollama", 2, "prefixes by the client: 'query: ', 'passage: '"),
        ("openai", 2, "prefixes by the client: 'query: ', 'passage: '"),
        ("strict", 2, "prefixes by the client: 'query: ', 'passage: '"),
    ],
)
def test_vectors_are_those_of_this_process_in_both_roles(
    models: Models, kind: str, most_probes: int, name: str
) -> None:
    server = Server(models, kind)
    with server.embedder() as engine:
        found = {role: engine.embed([*TEXTS, "one more"], role) for role in ROLES}
        assert engine.description == f"{MODEL} at http://server:8000/v1 ({name})"
        assert engine.usage == 2 * 3, "probes are not counted"
        for role in ROLES:
            expected = models.ours([*TEXTS, "one more"], role)
            np.testing.assert_allclose(found[role], expected, atol=1e-6)
        cosines = (found["query"] * found["document"]).sum(axis=1)
        assert cosines.max() < 0.999
    assert len(server.probes) <= most_probes
    assert server.paths.count("/v1/metadata") == 1


@pytest.mark.parametrize("kind", ["vllm", "tei", "ollama", "openai", "strict"])
def test_unknown_prefixes_are_refused_until_they_are_stated(models: Models, kind: str) -> None:
    server = Server(models, kind, model="ours/custom")
    with (
        server.embedder() as engine,
        pytest.raises(ConfigurationError, match=r"ignores input_type.*of ours/custom are unknown"),
    ):
        engine.embed(TEXTS)
    assert all(body["input"] == ["?"] for body in server.bodies), "no text was sent"

    other: dict[Role, str] = {"query": "passage: ", "document": "query: "}
    server = Server(models, kind, model="ours/custom")
    with server.embedder(prefixes=other) as engine:
        for role in ROLES:
            swapped: Role = "query" if role == "document" else "document"
            expected = models.ours(TEXTS, swapped)
            np.testing.assert_allclose(engine.embed(TEXTS, role), expected, atol=1e-6)
        assert "(prefixes by the client: 'passage: ', 'query: ')" in engine.description
    assert not server.probes
    assert not any("input_type" in body for body in server.bodies)

    server = Server(models, kind, model="ours/custom")
    with server.embedder(prefixes={"query": "", "document": ""}) as engine:
        np.testing.assert_allclose(engine.embed(TEXTS[2:]), models.bare(TEXTS[2:]), atol=1e-6)


def test_a_listed_root_names_the_prefixes(models: Models) -> None:
    def answer(request: httpx.Request, _: dict[str, Any]) -> httpx.Response | None:
        if request.url.path != "/v1/models":
            return None
        return httpx.Response(200, json={"data": [{"id": "mine", "root": MODEL}]})

    for model in ("mine", MODEL, None):
        server = Server(models, "vllm", answer=answer)
        with server.embedder(model=model) as engine:
            np.testing.assert_allclose(
                engine.embed(TEXTS, "query"), models.ours(TEXTS, "query"), atol=1e-6
            )
        assert {body["model"] for body in server.bodies} == {"mine"}


def test_a_nim_may_have_a_model_without_roles(models: Models) -> None:
    server = Server(models, "symmetric", model="baai/bge-m3")
    with server.embedder() as engine:
        np.testing.assert_allclose(engine.embed(TEXTS), models.bare(TEXTS), atol=1e-6)
    assert not any(body["input"] == ["?"] for body in server.bodies)


def test_stated_roles_of_the_server_are_believed(models: Models) -> None:
    server = Server(models, "gateway")
    with server.embedder(prefixes="server") as engine:
        np.testing.assert_allclose(engine.embed(TEXTS), models.ours(TEXTS, "document"), atol=1e-6)
    assert server.paths == ["/v1/models", "/v1/embeddings"]


def test_prefixes_of_the_client_are_part_of_the_identity(models: Models) -> None:
    def key(kind: str, **options: Any) -> str:
        with Server(models, kind).embedder(dimensions=8, **options) as engine:
            return engine.cache_key("document")

    found = key("vllm")
    assert found == key("vllm") == key("vllm", prefixes=PREFIXES) == key("tei")
    others = [
        key("nim"),
        key("vllm", prefixes={"query": "", "document": ""}),
        key("vllm", prefixes={"query": "query: ", "document": "text: "}),
    ]
    assert len({found, *others}) == 4
    assert key("nim") == key("gateway") == key("nim", prefixes="server")


ENCODINGS: dict[str, Callable[[Vectors], bytes]] = {
    "float64": lambda row: row.astype("<f8").tobytes(),
    "float16": lambda row: row.astype("<f2").tobytes(),
    "big-endian float32": lambda row: row.astype(">f4").tobytes(),
    "int8": lambda row: (row * 127).astype(np.int8).tobytes(),
    "three bytes": lambda row: b"abc",
}


@pytest.mark.parametrize("kind", ["gateway", "vllm"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_base64_of_another_number_type_is_not_used(
    models: Models, encoding: str, kind: str
) -> None:
    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if body.get("encoding_format") != "base64":
            return None
        rows = [base64.b64encode(ENCODINGS[encoding](row)) for row in server.compute(body)]
        data = [{"index": i, "embedding": row.decode()} for i, row in enumerate(rows)]
        return httpx.Response(200, json={"data": data})

    server = Server(models, kind, answer=answer)
    with server.embedder() as engine:
        for role in ROLES:
            expected = models.ours(TEXTS, role)
            np.testing.assert_allclose(engine.embed(TEXTS, role), expected, atol=1e-6)
        assert engine.dimensions == expected.shape[1]


def test_images_are_refused_where_their_data_url_would_be_a_text(models: Models) -> None:
    documents = ["a text", EmbeddingInput(image=page(1, 40, 30))]
    server = Server(models, "vllm", model=VL)
    with server.embedder() as engine, pytest.raises(PartialResultError) as failed:
        engine.embed(documents)
    assert list(failed.value.errors) == [1]
    assert isinstance(failed.value.errors[1], UnsupportedModalityError)
    assert "takes only texts (prefixes by the client" in str(failed.value.errors[1])
    expected = models.ours(["a text"], "document")
    np.testing.assert_allclose(failed.value.vectors[:1], expected, atol=1e-6)
    assert not any("data:" in text for body in server.bodies for text in body["input"])


def test_truncate_is_left_out_only_if_nothing_is_to_be_cut(models: Models) -> None:
    server = Server(models, "strict")
    with server.embedder() as engine:
        engine.embed(TEXTS)
        with pytest.raises(InvalidRequestError, match="Extra inputs"):
            engine.with_options(truncate="END").embed(TEXTS)
        np.testing.assert_allclose(engine.embed(TEXTS), models.ours(TEXTS, "document"), atol=1e-6)
    assert not any("truncate" in body for body in server.bodies)


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, AuthenticationError), (404, ModelNotFoundError), (503, ServerError)],
)
def test_a_failure_of_a_probe_is_that_of_the_call_and_is_not_kept(
    models: Models, status: int, error: type[NeMoRetrieverError]
) -> None:
    statuses = [status]

    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if body and statuses:
            return httpx.Response(statuses.pop(), json={"error": "not now"})
        return None

    server = Server(models, "vllm", answer=answer)
    with server.embedder() as engine:
        with pytest.raises(error, match="not now"):
            engine.embed(TEXTS)
        np.testing.assert_allclose(engine.embed(TEXTS), models.ours(TEXTS, "document"), atol=1e-6)


def test_a_reply_without_vectors_is_no_effect_of_a_role(models: Models) -> None:
    def page_of_html(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        return httpx.Response(200, text="<html></html>") if body else None

    server = Server(models, "vllm", answer=page_of_html)
    with server.embedder() as engine, pytest.raises(MalformedResponseError):
        engine.embed(TEXTS)


async def test_a_probe_ends_with_its_call_and_the_next_call_probes_again(models: Models) -> None:
    server, has_begun, may_answer = Server(models, "vllm"), threading.Event(), threading.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.content and not may_answer.is_set():
            has_begun.set()
            await asyncio.Event().wait()
        return server(request)

    server.client = lambda: httpx.AsyncClient(transport=httpx.MockTransport(answer))  # type: ignore[method-assign]
    timeout = pytest.raises(RequestTimeoutError, match=r"deadline=0\.05")
    with server.embedder(deadline=0.05) as engine, timeout:
        engine.embed(TEXTS)
    has_begun.clear()
    with server.embedder() as engine:
        first = asyncio.create_task(engine.aembed(TEXTS))
        second = asyncio.create_task(engine.aembed(TEXTS))
        await asyncio.to_thread(has_begun.wait)
        first.cancel()
        second.cancel()
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
        may_answer.set()
        expected = models.ours(TEXTS, "document")
        for found in await asyncio.gather(*(engine.aembed(TEXTS) for _ in range(8))):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(server.probes) == 2


def test_a_server_without_the_path_of_a_nim_is_asked_for_its_health(models: Models) -> None:
    for kind in ("vllm", "tei"):
        server = Server(models, kind)
        with server.embedder() as engine:
            engine.wait_until_ready(5)
        assert server.paths == ["/v1/health/ready", "/health"]
    with Server(models, "openai").embedder() as engine, pytest.raises(ModelNotFoundError):
        engine.wait_until_ready(5)


def test_the_option_has_a_prefix_for_both_roles() -> None:
    with pytest.raises(ValidationError, match="a prefix for each of query, document"):
        Options(prefixes={"query": "query: "})
    with pytest.raises(ValidationError):
        Options(prefixes={**PREFIXES, "passage": "passage: "})
    with pytest.raises(ValidationError):
        Options(prefixes="client")
    with pytest.raises(ValidationError):
        RerankOptions(prefixes="server")


def test_the_command_line_states_prefixes_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Options] = []

    class Unreachable(Embedder):
        def __init__(self, options: Options) -> None:
            seen.append(options)
            raise ModelNotFoundError("no server")

    monkeypatch.setattr("shared_engine.cli.check.Embedder", Unreachable)
    address = ["check", "--base-url", "http://127.0.0.1:9/v1"]
    for text in ('{"query": "q: ", "document": ""}', "server"):
        assert main([*address, "--served-name", "m", "--prefixes", text]) == 1
    assert [options.prefixes for options in seen] == [{"query": "q: ", "document": ""}, "server"]
