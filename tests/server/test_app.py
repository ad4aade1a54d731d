"""The server over real sockets: what a NIM's clients send, what they get, and what it survives."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared_engine import ConfigurationError, EmbeddingInput, Options
from shared_engine._version import __version__
from shared_engine.cli.main import main
from shared_engine.local import LocalBackend
from shared_engine.server.app import create_app
from shared_engine.server.embeddings import EmbeddingsRequest
from shared_engine.server.errors import HTTPRefusal
from shared_engine.server.limits import ServerLimits
from shared_engine.server.protocol import parse_request
from shared_engine.server.run import serve
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.servers import (
    NAME,
    TEXTS,
    Running,
    check_probes_during,
    running,
    vectors,
    wait_for,
)

HEAD = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
STEPS, STEP_TOKENS = (f'nemoretriever_step{end}_total{{task="embed"}}' for end in ("s", "_tokens"))
LONG = "word " * 3000  # over the tiny checkpoint's 2048 tokens
SLOW = ["some words of a long document " * 60] * 40  # about a second of work


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["sentence-transformers"])


@pytest.fixture(scope="module")
def options(checkpoint: Path) -> Options:
    return Options(model=str(checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def served(options: Options) -> Iterator[Running]:
    with running(options) as here:
        yield here


# --- what it gives -------------------------------------------------------------------------------


@pytest.mark.parametrize(("input_type", "role"), [("query", "query"), ("passage", "document")])
def test_vectors_are_those_of_the_engine(served: Running, input_type: str, role: str) -> None:
    got = vectors(served.post(input_type=input_type))
    np.testing.assert_allclose(got, served.expected(role=role), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dimensions", [16, 32, 64])
def test_base64_is_little_endian_float32(served: Running, dimensions: int) -> None:
    encoded = vectors(served.post(encoding_format="base64", dimensions=dimensions))
    got = np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in encoded])
    assert got.shape == (len(TEXTS), dimensions)
    np.testing.assert_allclose(got, served.expected(dimensions=dimensions), atol=1e-6, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("embedding_type", ["int8", "uint8", "binary", "ubinary"])
def test_packed_types_come_as_integers_or_bytes(served: Running, embedding_type: str) -> None:
    expected = served.expected(embedding_type=embedding_type)
    got = vectors(served.post(embedding_type=embedding_type))
    np.testing.assert_array_equal(got, expected)
    encoded = vectors(served.post(embedding_type=embedding_type, encoding_format="base64"))
    raw = [np.frombuffer(base64.b64decode(row), expected.dtype) for row in encoded]
    np.testing.assert_array_equal(np.stack(raw), expected)


def test_a_suffix_of_the_model_is_an_input_type(served: Running) -> None:
    for suffix, role in (("-query", "query"), ("-passage", "document"), ("-QUERY", "query")):
        got = vectors(served.post(model=NAME + suffix, input_type=...))
        np.testing.assert_allclose(got, served.expected(role=role), atol=1e-7, rtol=0)
    assert served.post(model=NAME + "-query", input_type="query").status_code == 200
    assert served.post(model=NAME + "-query", input_type="passage").status_code == 400


@pytest.mark.parametrize("truncate", ["START", "END"])
def test_truncate_cuts_long_inputs(served: Running, truncate: str) -> None:
    response = served.post(input=["short", LONG], truncate=truncate)
    expected = served.expected(["short", LONG], truncate=truncate)
    np.testing.assert_allclose(vectors(response), expected, atol=1e-7, rtol=0)
    assert response.json()["usage"]["total_tokens"] > 2048


def test_usage_counts_the_tokens_that_were_embedded(served: Running) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(served.options.model) / "tokenizer.json"))
    expected = sum(len(tokenizer.encode("passage: " + text).ids) for text in TEXTS)
    assert served.post().json()["usage"]["total_tokens"] == expected


def test_optional_fields_are_taken(served: Running) -> None:
    for fields in ({"user": "someone"}, {"modality": "text"}, {"modality": ["text"]}):
        assert served.post(**fields).status_code == 200
    assert served.post(modality=["text"] * len(TEXTS)).status_code == 200


def test_models_health_metadata(served: Running) -> None:
    listed = served.client.get("/models").json()["data"]
    assert [model["id"] for model in listed] == [NAME, f"{NAME}-query", f"{NAME}-passage"]
    assert {(model["object"], model["root"]) for model in listed} == {("model", NAME)}
    for name in (NAME, NAME.upper(), "tiny", NAME.replace("/", "%2F")):
        assert served.client.get(f"/models/{name}").json() == listed[0]
    assert served.client.get(f"/models/{NAME}-query").json() == listed[1]
    for name in ("another", "nvidia", f"{NAME}/more", "%00", "%E2%82%AC"):
        response = served.client.get(f"/models/{name}")
        assert (response.status_code, response.json()["type"]) == (404, "model_not_found")
    assert served.client.get("/health/live").json()["live"] is True
    ready = served.client.get("/health/ready").json()
    assert ready == {"object": "health.response", "message": "ready", "ready": True}
    metadata = served.client.get("/metadata").json()
    assert metadata["dimensions"] == [16, 32, 64]
    assert metadata["modalities"] == ["text"]


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "place"),
    [
        ({"encoding_format": None}, "literal_error", ["encoding_format"]),
        ({"input_type": None}, "literal_error", ["input_type"]),
        ({"user": None}, "string_type", ["user"]),
        ({"modality": None}, "list_type", ["modality"]),
        ({"truncate": "end"}, "literal_error", ["truncate"]),
        ({"input": []}, "too_short", ["input"]),
        ({"input": ["a", 1]}, "string_type", ["input", 1]),
        ({"input": 1}, "list_type", ["input"]),
        ({"input": ...}, "missing", ["input"]),
        ({"model": ...}, "missing", ["model"]),
        ({"messages": []}, "extra_forbidden", ["messages"]),
        ({"modality": "image"}, "literal_error", ["modality"]),
        ({"modality": ["text", "text"]}, "value_error", ["modality"]),
        ({"dimensions": 17}, "literal_error", ["dimensions"]),
        ({"dimensions": -1}, "greater_than", ["dimensions"]),
        ({"dimensions": True}, "int_type", ["dimensions"]),
        ({"dimensions": 10**30}, "literal_error", ["dimensions"]),
        ({"embedding_type": "float16"}, "literal_error", ["embedding_type"]),
    ],
)
def test_a_violation_has_the_envelope_of_a_nim(
    served: Running, fields: dict[str, Any], kind: str, place: list[Any]
) -> None:
    response = served.post(**fields)
    body = response.json()
    assert response.status_code == 400
    assert (body["object"], body["type"]) == ("error", "request_validation_error")
    assert body["message"] == "Your request cannot be validated, it is incorrect."
    assert (body["detail"]["type"], body["detail"]["loc"]) == (kind, ["body", *place])
    assert body["detail"]["msg"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"a": NaN}', b"\xff", b"[" * 9999]
)
def test_an_invalid_body_is_refused(served: Running, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = served.client.post("/embeddings", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["type"] == "request_validation_error"
    assert "EmbeddingsRequest" not in response.json()["error"]["message"]


def test_errors_have_the_messages_that_clients_match(served: Running) -> None:
    response = served.post(input_type=...)
    assert response.status_code == 400
    words = "'input_type' parameter is required for asymmetric models"
    assert response.json()["message"].startswith(words)
    response = served.post(input=["short", LONG])
    assert response.status_code == 400
    words = r"Input length \d+ exceeds maximum allowed token size 2048"
    assert re.fullmatch(words, response.json()["message"])
    assert response.json()["index"] == 1


@pytest.mark.parametrize(
    ("fields", "status", "code", "words"),
    [
        ({}, 400, "input_type_missing", "extra_body=.*-query or -passage .*--default-input-type"),
        ({"model": f"{NAME}-query", "input": LONG}, 400, "input_too_long", "Input length"),
        ({"model": "another"}, 404, "model_not_found", "does not exist"),
        ({"dimensions": 17}, 400, "input_type_missing", "input_type"),
        ({"input": 1.5}, 400, "invalid_request", "input: Input should be a valid array"),
        ({"input": ["a", 7]}, 400, "invalid_request", "not token ids"),
        ({"input": [7, 8]}, 400, "invalid_request", "check_embedding_ctx_length=False"),
        ({"input": [[7, 8], [9]]}, 400, "invalid_request", "check_embedding_ctx_length=False"),
        ({"input": ["a", None]}, 400, "invalid_request", r"^input\.1: .* valid string$"),
        ({"input": [["a"]]}, 400, "invalid_request", r"^input\.0: .* valid string$"),
        ({"input": [[]]}, 400, "invalid_request", r"^input\.0: .* valid string$"),
        ({"input": [True]}, 400, "invalid_request", r"^input\.0: .* valid string$"),
        ({"input": [[123_456] * 99_000]}, 400, "invalid_request", "not token ids"),
    ],
)
def test_errors_for_openais_clients_have_the_next_step(
    served: Running, fields: dict[str, Any], status: int, code: str, words: str
) -> None:
    body = {"model": NAME, "input": "a text", **fields}
    response = served.client.post("/embeddings", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert re.search(words, error["message"])


@pytest.mark.parametrize("word", ["query", "passage"])
def test_texts_without_input_type_get_the_default(
    options: Options, word: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "shared_engine")
    role = {"query": "query", "passage": "document"}
    other = {"query": "passage", "passage": "query"}[word]
    with running(options, default_input_type=word) as here:
        assert f"texts without input_type are embedded as {word}" in caplog.text
        for fields, used in (
            ({"input_type": ...}, word),
            ({"input_type": other}, other),
            ({"input_type": ..., "model": f"{NAME}-{other}"}, other),
        ):
            expected = here.expected(role=role[used])
            np.testing.assert_allclose(vectors(here.post(**fields)), expected, atol=1e-7, rtol=0)


def test_health_metrics_and_a_description_are_served_outside_of_v1(options: Options) -> None:
    with running(options, api_key="a secret") as here:
        root = here.url.removesuffix("/v1")
        key = {"Authorization": "Bearer a secret"}
        assert httpx.get(f"{root}/health").json()["ready"] is True
        page = httpx.get(root, headers=key)
        assert page.headers["content-type"] == "text/plain; charset=utf-8"
        assert f'"model": "{NAME}"' in page.text
        metrics = httpx.get(f"{root}/metrics", headers=key).text
        assert "nemoretriever_queue_inputs 0.0" in metrics
        version = httpx.get(f"{root}/v1/version", headers=key).json()
        assert version == {"release": __version__, "api": "v1"}
        for path in ("/", "/metrics", "/v1/version"):
            assert httpx.get(f"{root}{path}").status_code == 401


def test_wrong_paths_and_methods(served: Running) -> None:
    assert served.post(model="nvidia/another").status_code == 404
    assert served.post(model="nvidia/another").json()["type"] == "model_not_found"
    assert served.client.post("/embeddings/", json={}).status_code == 404
    response = served.client.get("/embeddings")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["message"] == "GET /v1/embeddings: expected the method POST"
    response = served.client.post(
        "/embeddings", content="{}", headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 415


@pytest.mark.parametrize(
    "path", ["/embeddings", "/embed", "/v1", "/v1/v1/embeddings", "//v1/embeddings", "/v1/chat"]
)
def test_a_wrong_path_is_named_with_where_the_paths_are(served: Running, path: str) -> None:
    root = served.url.removesuffix("/v1")
    response = httpx.post(root + path, json={"model": NAME, "input": "a"})
    advice = "no such path; the paths of the API begin with /v1, and GET / lists them"
    assert response.status_code == 404
    assert response.json()["message"] == f"POST {path}: {advice}"
    assert response.json()["error"]["message"] == f"POST {path}: {advice}"


@pytest.mark.parametrize(
    ("path", "fields", "code"),
    [
        ("/embeddings", {"model": f"{NAME}-query"}, "invalid_request"),  # in prepare
        ("/embeddings", {"dimensions": 17}, "invalid_request"),
        ("/embeddings", {"truncate": "end"}, "invalid_request"),  # in the parser
        ("/embeddings", {"model": "another"}, "model_not_found"),
        ("/embeddings", {"input": LONG}, "input_too_long"),
        ("/embeddings", {"input": ["a"] * 9000}, "too_large"),
        ("/ranking", {}, "not_served"),
        ("/nowhere", {}, "route"),
    ],
)
def test_every_refusal_has_the_same_fields(
    served: Running, path: str, fields: dict[str, Any], code: str
) -> None:
    body = {"model": NAME, "input": "a", "input_type": "passage", **fields}
    found = served.client.post(path, json=body).json()
    assert found["message"]
    error = found["error"]
    assert error.pop("message")
    assert error == {"type": "invalid_request_error", "code": code, "param": None}


def test_a_model_without_dynamic_dimensions_forbids_the_field(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "fixed")
    with running(Options(model=str(folder), device="cpu")) as here:
        response = here.post(dimensions=32)
        assert response.status_code == 400
        assert response.json()["detail"]["type"] == "extra_forbidden"
        assert response.json()["detail"]["loc"] == ["body", "dimensions"]


def test_a_catalogue_name_answers_to_its_aliases(tmp_path: Path) -> None:
    name = "nvidia/llama-3.2-nemoretriever-300m-embed-v2"
    folder = build_checkpoint(
        tmp_path / "weights", hidden_size=2048, num_hidden_layers=9, intermediate_size=64
    )
    with running(Options(model=name, checkpoint=str(folder), device="cpu"), served=None) as here:
        model, *_ = here.client.get("/models").json()["data"]
        assert (model["id"], model["root"]) == (name, name)
        for alias in (name, "llama-nemotron-embed-300m-v2", name.upper()):
            response = here.post(model=f"{alias}-query", input_type=..., dimensions=384)
            assert response.status_code == 200
            assert response.json()["model"] == name


def test_white_space_around_the_key_is_ignored(options: Options) -> None:
    with running(options, api_key=" a secret\n") as here:
        for key, status in (("a secret", 200), ("a secre", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert here.client.get("/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"api_key": ""}, "key is blank"),
        ({"api_key": " \n"}, "key is blank"),
        ({"allowed_hosts": "gpu-box"}, r"\['gpu-box'\]"),
        ({"allowed_hosts": ["gpu-*"]}, r"'gpu-\*'; expected a host name"),
        ({"allowed_hosts": ["*example.com"]}, r"'\*example\.com'; expected a host name"),
        ({"allowed_hosts": [""]}, "''; expected a host name"),
    ],
)
def test_invalid_keys_and_hosts_are_refused(
    options: Options, wrong: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("shared_engine.server.run.build_server")  # it must not come so far
    for use in (create_app, serve):
        with pytest.raises(ConfigurationError, match=said):
            use(options, **wrong)


def test_the_key(options: Options) -> None:
    body = {"model": NAME, "input": "a", "input_type": "query"}
    with running(options, api_key="a secret") as here:
        assert here.client.get("/health/live").status_code == 200
        for key in (
            b"",
            b"Bearer",
            b"Bearer other",
            b"Basic a secret",
            b"Bearer \xff",
            b"a secret",
        ):
            headers = [(b"Authorization", key)]
            response = here.client.post("/embeddings", json=body, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["title"] == "Unauthorized"
            for path in ("/metrics", "/models", "/nowhere"):
                assert here.client.get(path, headers=headers).status_code == 401
        headers = [(b"Authorization", b"bearer a secret")]
        assert here.client.post("/embeddings", json=body, headers=headers).status_code == 200


async def test_requests_get_503_until_the_model_is_loaded(options: Options) -> None:
    app = create_app(options, served_name=NAME)  # without a lifespan it never loads
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost/v1") as client:
        assert (await client.get("/health/live")).status_code == 200
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        body = {"model": NAME, "input": "a", "input_type": "query"}
        response = await client.post("/embeddings", json=body)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert (await client.get("/metrics")).status_code == 200


def test_a_server_with_a_dead_device_is_not_ready(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failure, status in ((None, 200), (RuntimeError("an illegal memory access"), 503)):
        monkeypatch.setattr(LocalBackend, "failure", failure, raising=False)
        response = served.client.get("/health/ready")
        assert (response.status_code, response.json()["ready"]) == (status, status == 200)
        assert served.client.get("/health/live").status_code == 200
    assert "device has failed" in response.json()["message"]


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_large_body_is_refused_while_it_arrives(options: Options, http: str) -> None:
    pytest.importorskip(http)

    def chunks() -> Iterator[bytes]:
        yield b'{"model": "nvidia/tiny", "input": "'
        for _ in range(300):
            yield b"x" * 1000

    headers = {"Content-Type": "application/json"}
    with running(options, http=http, limits=ServerLimits(max_body_bytes=100_000)) as here:
        for _ in range(3):  # with and without Content-Length, on one connection
            assert here.post(input=["x" * 100_001]).status_code == 413
            assert here.client.post("/embeddings", content=chunks(), headers=headers).is_error
            response = here.client.post("/embeddings", content=chunks(), headers=headers)
            assert response.status_code == 413
            assert "100000 bytes" in response.json()["message"]
        assert here.post().status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"model": NAME, "input": [1] * 200_000},
        {"model": NAME, "input": "a", "modality": [1] * 200_000},
    ],
)
def test_many_violations_cost_no_more_than_one(body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    tracemalloc.start()
    try:
        with pytest.raises(HTTPRefusal):
            parse_request(EmbeddingsRequest, content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20  # an error for each would be 100 MB


@pytest.mark.parametrize("truncate", ["END", "NONE"])
def test_a_huge_text_is_released_after_its_answer(served: Running, truncate: str) -> None:
    """No thread that waits for the next request holds it."""
    text = "word " * 2_000_000
    status = 200 if truncate == "END" else 400
    assert served.post(input=text, truncate=truncate).status_code == status

    def is_released() -> bool:
        gc.collect()
        inputs = [item for item in gc.get_objects() if type(item) is EmbeddingInput]
        texts = [item.text for item in inputs if isinstance(item.text, str)]
        return all(len(text) < 5_000_000 for text in texts)

    wait_for(is_released)


def test_too_many_inputs(options: Options) -> None:
    with running(options, limits=ServerLimits(max_inputs=4)) as here:
        assert here.post(input=["a"] * 4).status_code == 200
        response = here.post(input=["a"] * 5)
        assert response.status_code == 413
        assert "5 inputs" in response.json()["message"]


def test_an_incomplete_body_gets_408(options: Options) -> None:
    with running(options, limits=ServerLimits(read_seconds=0.2)) as here:
        address = httpx.URL(here.url)
        with socket.create_connection((address.host, address.port or 0), timeout=10) as connection:
            connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_incomplete_bodies_share_one_limit(options: Options) -> None:
    part = f"{HEAD}Content-Length: 1000\r\n\r\n".encode() + b"x" * 950
    with running(options, limits=ServerLimits(max_body_bytes=1000)) as here, ExitStack() as stack:
        address = httpx.URL(here.url)

        def upload() -> socket.socket:
            made = socket.create_connection((address.host, address.port or 0), timeout=10)
            stack.enter_context(made)
            made.sendall(part)
            return made

        started = [upload() for _ in range(8)]
        refused, reply = upload(), b""
        while b"}" not in reply:
            reply += refused.recv(1000)
        assert reply.startswith(b"HTTP/1.1 429")
        assert re.search(rb"unanswered requests hold \d{4} bytes; try again later", reply)
        for connection in started:
            connection.sendall(b"x" * 50)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
        assert here.post(input="a").status_code == 200


def test_a_nim_is_not_served(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="base_url= is given"):
        create_app(Options(base_url="http://127.0.0.1:9"))
    monkeypatch.setenv("NVIDIA_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="NVIDIA_BASE_URL"):
        create_app(Options())
    create_app(Options(backend="local"))
    create_app(options)


def test_a_full_queue_gets_429_with_retry_after(options: Options) -> None:
    with running(options, limits=ServerLimits(max_waiting=5)) as here, ThreadPoolExecutor() as pool:
        first = pool.submit(here.post, input=SLOW)  # more than the queue holds, but alone
        wait_for(lambda: here.metric("nemoretriever_queue_inputs") == len(SLOW))
        response = here.post()
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 30
        assert response.json()["status"] == 429
        assert first.result().status_code == 200
        assert here.metric("nemoretriever_queue_inputs") == 0
        assert here.post().status_code == 200
        assert here.metric('nemoretriever_errors_total{kind="too_busy"}') == 1


def test_a_disconnected_client_cancels_its_work(options: Options) -> None:
    with running(options) as here:
        before = here.metric(STEP_TOKENS)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{here.url}/embeddings",
                json={"model": NAME, "input": SLOW * 10, "input_type": "passage"},
                timeout=httpx.Timeout(10, read=0.5),
            )
        wait_for(lambda: here.metric("nemoretriever_queue_inputs") == 0, seconds=5)
        assert here.metric('nemoretriever_errors_total{kind="disconnected"}') == 1
        computed = here.metric(STEP_TOKENS) - before
        tokens = here.post(input=SLOW[:1]).json()["usage"]["total_tokens"]
        assert computed < tokens * len(SLOW) * 10 / 2


def test_shutdown_finishes_accepted_requests(options: Options) -> None:
    with running(options) as here, ThreadPoolExecutor() as pool:
        expected = here.expected(SLOW[:1])
        answers = [pool.submit(here.post, input=SLOW) for _ in range(3)]
        wait_for(lambda: here.metric("nemoretriever_queue_inputs") == 3 * len(SLOW))
        here.server.should_exit = True
        for answer in answers:
            got = vectors(answer.result())
            np.testing.assert_allclose(got, np.repeat(expected, len(SLOW), 0), atol=1e-6, rtol=0)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{here.url}/health/live")


# --- many at once --------------------------------------------------------------------------------


def test_concurrent_requests_share_steps_and_keep_their_rows(served: Running) -> None:
    texts = [f"text number {n} " * (1 + n % 7) for n in range(300)]
    expected = served.expected(texts)
    before = served.metric(STEPS)

    async def ask(client: httpx.AsyncClient, n: int) -> None:
        body = {"model": NAME, "input": [texts[n]], "input_type": "passage"}
        got = vectors(await client.post("/embeddings", json=body))
        np.testing.assert_allclose(got[0], expected[n], atol=1e-6, rtol=0)

    async def ask_all() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            await asyncio.gather(*(ask(client, n) for n in range(len(texts))))

    asyncio.run(ask_all())
    assert served.metric(STEPS) - before < len(texts) / 2


def test_probes_are_answered_during_large_requests(served: Running) -> None:
    check_probes_during(lambda: served.post(input=["a b c"] * 8000), served)


def test_metrics_count(options: Options) -> None:
    with running(options) as here:
        tokens = here.post().json()["usage"]["total_tokens"]
        here.post(input_type="query", input=["a"])
        here.post(input=[])
        text = here.client.get("/metrics")
        assert text.headers["content-type"].startswith("text/plain")
        assert here.metric('nemoretriever_requests_total{path="/v1/embeddings",status="200"}') == 2
        assert here.metric('nemoretriever_requests_total{path="/v1/embeddings",status="400"}') == 1
        assert here.metric('nemoretriever_errors_total{kind="invalid_request"}') == 1
        assert here.metric('nemoretriever_inputs_total{input_type="passage"}') == len(TEXTS)
        assert here.metric('nemoretriever_tokens_total{input_type="passage"}') == tokens
        assert here.metric('nemoretriever_request_seconds_count{input_type="query"}') == 1
        assert here.metric("nemoretriever_queue_inputs") == 0
        steps = here.metric(STEPS)
        assert steps >= 3  # two requests and the first one, of the server itself
        fill = here.metric(STEP_TOKENS) / steps
        fill /= here.metric('nemoretriever_step_tokens_max{task="embed"}')
        assert here.metric('nemoretriever_batch_fill_ratio{task="embed"}') == pytest.approx(fill)
        for name in ("inputs_total", "tokens_total", "request_seconds_count", "steps_total"):
            end = ',input_type="query"' if name != "steps_total" else ""
            assert here.metric(f'nemoretriever_{name}{{model="{NAME}"{end}}}') > 0
        labels = f'{{task="embed",model="{NAME}"}}'
        assert (
            here.metric(f"nemoretriever_queue_wait_seconds_count{labels}") >= 3
        )  # the engine is shared
        assert 0 < here.metric(f"nemoretriever_queue_wait_seconds_sum{labels}") < 30
        assert here.metric(f'nemoretriever_build_info{{version="{__version__}"}}') == 1
        assert here.metric("process_resident_memory_bytes") > 2**20
        assert here.metric("process_cpu_seconds_total") > 0
        assert here.metric("process_open_fds") > 3
        assert abs(time.time() - here.metric("process_start_time_seconds")) < 86_400


def test_memory_of_gpus_is_a_metric(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalBackend, "gpu_memory", {"cuda:0": 2**30})
    with running(options) as here:
        assert here.metric('nemoretriever_gpu_memory_bytes{device="cuda:0"}') == 2**30


# --- other people's clients ----------------------------------------------------------------------


def test_openai_client(served: Running) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=served.url, api_key="any", max_retries=0) as client:
        create = client.embeddings.create
        got = create(model=NAME + "-passage", input=TEXTS)  # it asks for base64 by itself
        expected = served.expected()
        np.testing.assert_allclose([x.embedding for x in got.data], expected, atol=1e-6, rtol=0)
        assert got.usage.prompt_tokens > len(TEXTS)
        one = create(
            model=NAME, input=TEXTS[0], encoding_format="float", extra_body={"input_type": "query"}
        )
        assert one.data[0].embedding == pytest.approx(
            served.expected(TEXTS[:1], "query")[0].tolist(), abs=1e-6
        )
        assert len(create(model=NAME + "-query", input="a", dimensions=32).data[0].embedding) == 32
        for fields, words in (
            ({"input": "a", "dimensions": 33}, "dimensions: Input should be 16, 32 or 64"),
            ({"input": LONG}, "Input length .* exceeds maximum allowed token size"),
            ({"input": "a", "model": NAME}, "'input_type' parameter is required"),
            ({"input": ["a"] * 9000}, "9000 inputs in one request"),
        ):
            with pytest.raises(openai.APIStatusError, match=words):
                create(**{"model": NAME + "-query"} | fields)
        create(model=NAME + "-query", input=LONG, extra_body={"truncate": "END"})
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            create(model="another", input="a")
        assert create(model=NAME + "-query", input="a", dimensions=None)
        with pytest.raises(openai.BadRequestError) as caught:
            create(model=NAME, input="a")
        assert (caught.value.code, caught.value.type) == (
            "input_type_missing",
            "invalid_request_error",
        )
        names = [NAME, f"{NAME}-query", f"{NAME}-passage"]
        assert [model.id for model in client.models.list()] == names
        assert client.models.retrieve(NAME).id == NAME
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.models.retrieve("another/model")
        with pytest.raises(openai.NotFoundError, match="GET /v1/files: no such path"):
            client.files.list()


def test_langchain_nvidia(served: Running) -> None:
    module = pytest.importorskip("langchain_nvidia_ai_endpoints")
    model = module.NVIDIAEmbeddings(base_url=served.url, model=NAME)
    np.testing.assert_allclose(model.embed_documents(TEXTS), served.expected(), atol=1e-6, rtol=0)
    query = served.expected(TEXTS[:1], "query")[0]
    np.testing.assert_allclose(model.embed_query(TEXTS[0]), query, atol=1e-6, rtol=0)
    got = asyncio.run(model.aembed_documents(TEXTS))
    np.testing.assert_allclose(got, served.expected(), atol=1e-6, rtol=0)
    with pytest.raises(Exception, match="exceeds maximum allowed token size"):
        model.embed_documents([LONG])
    cut = module.NVIDIAEmbeddings(base_url=served.url, model=NAME, dimensions=16, truncate="END")
    expected = served.expected([LONG], dimensions=16, truncate="END")
    np.testing.assert_allclose(cut.embed_documents([LONG]), expected, atol=1e-6, rtol=0)
    found = module.NVIDIAEmbeddings.get_available_models(base_url=served.url, model=NAME)
    assert [model.id for model in found] == [NAME, f"{NAME}-query", f"{NAME}-passage"]


async def test_llama_index_nvidia(served: Running) -> None:
    pytest.importorskip("llama_index.embeddings.nvidia")
    from llama_index.embeddings.nvidia import NVIDIAEmbedding

    async with httpx.AsyncClient() as client:  # its own is never closed
        common = {"base_url": served.url, "model": NAME, "api_key": "any", "max_retries": 0}
        model = NVIDIAEmbedding(**common, async_http_client=client)
        got = model.get_text_embedding_batch(TEXTS)
        np.testing.assert_allclose(got, served.expected(), atol=1e-6, rtol=0)
        got = await model.aget_text_embedding_batch(TEXTS)
        np.testing.assert_allclose(got, served.expected(), atol=1e-6, rtol=0)
        query = served.expected(TEXTS[:1], "query")[0]
        got = await model.aget_query_embedding(TEXTS[0])
        np.testing.assert_allclose(got, query, atol=1e-6, rtol=0)
        with pytest.raises(Exception, match="Error code: 400"):
            model.get_text_embedding(LONG)
        cut = NVIDIAEmbedding(**common, dimensions=16, truncate="END", async_http_client=client)
        expected = served.expected([LONG], dimensions=16, truncate="END")[0]
        np.testing.assert_allclose(cut.get_text_embedding(LONG), expected, atol=1e-6, rtol=0)


# --- the command ---------------------------------------------------------------------------------


def test_serve_finishes_requests_after_a_signal(checkpoint: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "shared_engine.cli", "serve", "--model", str(checkpoint)]
    command += ["--port", str(port), "--api-key-env", "A_KEY", "--served-name", NAME]
    command += ["--default-input-type", "passage", "--access-log", "--log-format", "json"]
    environment = os.environ | {"A_KEY": "k"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        url = f"http://127.0.0.1:{port}/v1"
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}) as client:

            def ready() -> bool:
                try:
                    return client.get("/health/ready").status_code == 200
                except httpx.ConnectError:
                    return False

            wait_for(ready, seconds=60)
            body = {"model": NAME, "input": SLOW}
            with ThreadPoolExecutor() as pool:
                answer = pool.submit(client.post, "/embeddings", json=body, timeout=30)
                wait_for(lambda: f"queue_inputs {len(SLOW)}.0" in client.get("/metrics").text)
                process.send_signal(signal.SIGTERM)
                assert len(answer.result().json()["data"]) == len(SLOW)
        _, said = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in said
    entries = [json.loads(line) for line in said.splitlines()]
    assert "texts without input_type are embedded as passage" in [e["message"] for e in entries]
    assert [e["inputs"] for e in entries if e["logger"] == "shared_engine.access"] == [len(SLOW)]
    assert any("Uvicorn running on" in e["message"] for e in entries)


def test_serve_exits_if_the_model_cannot_be_loaded(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_BASE_URL", "http://127.0.0.1:9")  # of another program
    assert main(["serve", "--model", "/nowhere", "--port", "0"]) == 1
    assert "/nowhere" in capfd.readouterr().err
    assert main(["serve", "--max-tokens", "0", "--port", "0"]) == 2
    assert main(["serve", "--api-key-env", "NOT_SET_ANYWHERE"]) == 2
    monkeypatch.setenv("A_BLANK_KEY", " \n")
    assert main(["serve", "--api-key-env", "A_BLANK_KEY"]) == 2
    assert os.environ["NVIDIA_BASE_URL"] == "http://127.0.0.1:9"


# --- anything at all -----------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
_valid: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just(NAME),
    "input": st.text(max_size=50) | st.lists(st.text(max_size=50), min_size=1, max_size=5),
    "input_type": st.sampled_from(["query", "passage"]),
}
_optional: dict[str, st.SearchStrategy[Any]] = {
    "modality": st.sampled_from(["text", ["text"]]),
    "encoding_format": st.sampled_from(["float", "base64"]),
    "embedding_type": st.sampled_from(["float", "int8", "uint8", "binary", "ubinary"]),
    "dimensions": st.sampled_from([16, 32, 64]),
    "truncate": st.sampled_from(["NONE", "START", "END"]),
    "user": st.text(max_size=10),
}
_anything = {name: strategy | _json for name, strategy in (_valid | _optional).items()}
_fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_fuzz
@given(st.fixed_dictionaries(_valid, optional=_optional))
def test_every_valid_request_is_answered(served: Running, fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    if b"\\ud" in body:  # a lone surrogate is not JSON that anybody can read
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return
    headers = {"Content-Type": "application/json"}
    response = served.client.post("/embeddings", content=body, headers=headers)
    assert response.status_code == 200, response.text
    asked = fields["input"]
    assert len(response.json()["data"]) == (1 if isinstance(asked, str) else len(asked))


@_fuzz
@given(st.fixed_dictionaries({}, optional=_anything) | st.dictionaries(st.text(), _json) | _json)
def test_any_json_gets_a_response(served: Running, body: Any) -> None:
    content = json.dumps(body).encode()
    response = served.client.post(
        "/embeddings", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code in (200, 400, 404), response.text
    assert isinstance(response.json(), dict)


@_fuzz
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    st.sampled_from(["/embeddings", "/models", "/metrics", "/health/ready", "/x", "/%00", "//"]),
    st.binary(max_size=200),
    st.sampled_from(["application/json", "application/json; charset=utf-7", "text/plain", ""]),
)
def test_any_bytes_get_a_response(
    served: Running, method: str, path: str, content: bytes, kind: str
) -> None:
    headers = {"Content-Type": kind}
    response = served.client.request(method, path, content=content, headers=headers)
    assert response.status_code < 500
