"""The remote backend: requests, results, keys, sharing and closing."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import (
    AuthenticationError,
    ConfigurationError,
    ConnectionFailedError,
    Embedder,
    EmbeddingInput,
    EngineClosedError,
    InputTooLongError,
    InvalidRequestError,
    MalformedResponseError,
    ModelNotFoundError,
    Options,
    PartialResultError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    Request,
    RequestTimeoutError,
    ServerError,
    UnsupportedDimensionsError,
    track_usage,
)
from shared_engine.endpoints import HOSTED
from shared_engine.nim import NimBackend
from shared_engine.routing import select_backend
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import MODEL, WIDTH, Nim, vectors
from tests.support.nim import answer as write

KEY = "nvapi-this-is-secret"
TEXTS = [f"text {i}" for i in range(230)]


# What is sent


def test_fields_are_sent_only_when_set() -> None:
    nim = Nim()
    with nim.embedder() as engine:
        engine.embed(["a"])
        engine.embed(["b"], "query")
    with nim.embedder(dimensions=8, truncate="END", user="me") as engine:
        out = engine.embed(["c"])
    assert out.shape == (1, 8)
    assert np.linalg.norm(out) == pytest.approx(1)
    usual = {"model": MODEL, "encoding_format": "base64", "truncate": "NONE"}
    assert nim.bodies == [
        {**usual, "input": ["a"], "input_type": "passage"},
        {**usual, "input": ["b"], "input_type": "query"},
        {
            **usual,
            "input": ["c"],
            "input_type": "passage",
            "dimensions": 8,
            "truncate": "END",
            "user": "me",
        },
    ]


def test_texts_arrive_as_they_are() -> None:
    texts = [
        "",
        " \n",
        'a "quoted" \\ text',
        "naïve 日本 🙂",
        "\x00\u2028",
        "data:image/png;base64,AA",
    ]
    nim = Nim()
    with nim.embedder() as engine:
        np.testing.assert_allclose(engine.embed(texts), vectors(texts), atol=1e-6)
    assert nim.bodies[0]["input"] == texts


def test_no_request_before_the_first_use_or_for_no_input() -> None:
    nim = Nim()
    with nim.embedder() as engine:
        assert nim.requests == []
        assert engine.embed([]).shape == (0, 2048)
        assert engine.description == f"{MODEL} at http://nim:8000/v1"
        assert nim.requests == []
        assert engine.dimensions == WIDTH


def test_batches_are_bounded_by_count_and_by_bytes() -> None:
    nim = Nim()
    with nim.embedder(max_batch_size=40) as engine:
        np.testing.assert_allclose(engine.embed(TEXTS), vectors(TEXTS), atol=1e-6)
        assert [len(body["input"]) for body in nim.bodies] == [40] * 5 + [30]
        nim.bodies.clear()
        engine.embed(["x" * 900_000] * 5 + ["y" * 5_000_000])
        assert [len(body["input"]) for body in nim.bodies] == [2, 2, 1, 1]


TOO_MANY_ITEMS = {"detail": [{"loc": ["body", "input"], "msg": "should have at most 16 items"}]}


@pytest.mark.parametrize(
    ("most_bytes", "most_inputs", "refusal"),
    [
        (1200, 999, httpx.Response(413, text="Payload Too Large")),
        (1200, 999, httpx.Response(422, json={"error": "reduce the payload or image size"})),
        (99999, 16, httpx.Response(422, json={"error": "batch size 50 > maximum allowed 16"})),
        (99999, 16, httpx.Response(413, json={"error": "batch size 50 > maximum allowed 16"})),
        (99999, 16, httpx.Response(422, json=TOO_MANY_ITEMS)),
    ],
)
def test_a_batch_that_is_too_large_is_halved_and_the_size_learned(
    most_bytes: int, most_inputs: int, refusal: httpx.Response
) -> None:
    refused = []

    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        inputs = body.get("input", [])
        if len(inputs) <= most_inputs and len("".join(inputs)) <= most_bytes:
            return None
        refused.append(len(inputs))
        return httpx.Response(refusal.status_code, content=refusal.content)

    nim = Nim(answer)
    texts = [f"{i:0100d}" for i in range(200)]
    with nim.embedder(concurrency=1) as engine:
        np.testing.assert_allclose(engine.embed(texts), vectors(texts), atol=1e-6)
        before = len(refused)
        assert 0 < before <= 5
        engine.embed(texts)
        assert len(refused) == before


def test_one_input_that_is_too_large_alone_fails_alone() -> None:
    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        return httpx.Response(413) if "big" in "".join(body.get("input", [])) else None

    with Nim(answer).embedder() as engine, pytest.raises(PartialResultError) as caught:
        engine.embed([*TEXTS, "big", *TEXTS])
    assert {k: type(v) for k, v in caught.value.errors.items()} == {230: PayloadTooLargeError}


def test_floats_are_requested_after_base64_is_refused() -> None:
    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if body.get("encoding_format") == "base64":
            nim.refused += 1
            return httpx.Response(422, json={"detail": [{"loc": ["body", "encoding_format"]}]})
        return None

    nim = Nim(answer)
    nim.refused = 0
    with nim.embedder() as engine:
        np.testing.assert_allclose(engine.embed(TEXTS), vectors(TEXTS), atol=1e-6)
        engine.embed(TEXTS)
    assert 1 <= nim.refused <= 5  # the batches that were in flight before the first reply


# Model names


@pytest.mark.parametrize(
    ("model", "listed", "sent"),
    [
        (MODEL, [MODEL, "other"], MODEL),
        ("llama-nemotron-embed-1b-v2", [MODEL, "other"], MODEL),
        (MODEL, ["nvidia/llama-3.2-nv-embedqa-1b-v2"], "nvidia/llama-3.2-nv-embedqa-1b-v2"),
        (MODEL, [], MODEL),
        ("ours/custom", ["ours/custom", "b"], "ours/custom"),
        (None, [MODEL, "other"], MODEL),
        (None, ["prod-embed"], "prod-embed"),
        (None, ["prod-embed", "prod-embed-query", "prod-embed-passage"], "prod-embed"),
        (None, ["nvidia/llama-nemotron-embed-vl-1b-v2"], "nvidia/llama-nemotron-embed-vl-1b-v2"),
        (None, [], MODEL),
    ],
)
def test_the_served_name_is_found_at_first_use(
    model: str | None, listed: list[str], sent: str
) -> None:
    nim = Nim(models=(*listed, *listed))  # the catalogue lists some twice
    given = {} if model is None else {"model": model}
    with Embedder(
        Options(base_url="http://nim", http_client_factory=nim.client, **given)
    ) as engine:
        engine.embed(["a"])
        engine.embed(["a"])
    assert [body["model"] for body in nim.bodies] == [sent, sent]
    asked = [request.url.path for request in nim.requests if request.method == "GET"]
    assert asked == ["/v1/models", "/v1/metadata"]


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        (MODEL, ["prod-embed"]),
        (MODEL, ["a", "b"]),
        (MODEL, ["nvidia/llama-3.2-nemoretriever-300m-embed-v2"]),
        ("ours/custom", ["served-as"]),
        (None, ["a", "b"]),
    ],
)
def test_a_model_that_is_not_served_is_not_replaced(model: str | None, listed: list[str]) -> None:
    nim = Nim(models=tuple(listed))
    given = {} if model is None else {"model": model}
    engine = Embedder(Options(base_url="http://nim", http_client_factory=nim.client, **given))
    with engine, pytest.raises(ModelNotFoundError, match=", ".join(listed)):
        engine.embed(["a"])
    assert nim.bodies == []


def test_without_a_model_the_servers_only_one_is_used() -> None:
    served = "nvidia/llama-nemotron-embed-vl-1b-v2"
    keys = []
    for models in ((served,), ("prod-embed",), (MODEL,)):
        nim = Nim(models=models)
        options = Options(base_url="http://nim", http_client_factory=nim.client, dimensions=WIDTH)
        with Embedder(options) as engine:
            assert "image" in engine.modalities
            keys.append(engine.cache_key("document"))
            assert engine.description.startswith(models[0])
            assert ("image" in engine.modalities) is (models[0] != MODEL)
            engine.embed(["a"])
            assert ("modality" in nim.bodies[0]) is (models[0] != MODEL)
    assert len(set(keys)) == 3


def test_a_model_by_name_does_not_share_an_engine_that_takes_any() -> None:
    nim = Nim(models=("prod-embed",))
    options = Options(base_url="http://nim", http_client_factory=nim.client)
    with Embedder(options) as any_model, Embedder(options.replace(model=MODEL)) as named:
        any_model.embed(["a"])
        with pytest.raises(ModelNotFoundError, match="prod-embed"):
            named.embed(["a"])


def test_the_server_lists_its_models() -> None:
    nim = Nim(models=(MODEL, "other"))
    backend = NimBackend(Options(http_client_factory=nim.client), "http://nim/v1")
    assert [model.id for model in backend.list_models()] == [MODEL, "other"]
    backend.close()
    backend.close()
    with pytest.raises(EngineClosedError):
        backend.list_models()
    refusing = Nim(lambda r, _: httpx.Response(403, json={"detail": "not you"}))
    backend = NimBackend(Options(http_client_factory=refusing.client), "http://nim/v1")
    with pytest.raises(PermissionDeniedError, match="not you"):
        backend.list_models()
    backend.close(wait=False)
    backend.close(cancel=True)


def test_a_listed_root_names_the_model() -> None:
    listing = {"data": [{"id": "x", "root": "y"}, {"id": "mine", "root": MODEL}]}

    def answer(request: httpx.Request, _: dict[str, Any]) -> httpx.Response | None:
        return httpx.Response(200, json=listing) if request.method == "GET" else None

    nim = Nim(answer)
    with nim.embedder() as engine:
        engine.embed(["a"])
    assert nim.bodies[0]["model"] == "mine"


def test_a_server_that_lists_no_models_gets_the_name_unchanged() -> None:
    nim = Nim(lambda r, _: httpx.Response(404) if r.method == "GET" else None)
    with nim.embedder() as engine:
        engine.embed(["a"])
    assert nim.bodies[0]["model"] == MODEL


@pytest.mark.parametrize("model", [None, MODEL])
def test_a_server_that_starts_after_its_client_is_asked_for_its_model_again(
    model: str | None,
) -> None:
    listing = {"data": [{"id": "served", "root": MODEL}]}
    replies = [httpx.Response(503), httpx.Response(200, json=listing)]
    nim = Nim(lambda r, _: replies.pop(0) if r.url.path == "/v1/models" else None)
    with nim.embedder(model=model) as engine:
        with pytest.raises(ServerError, match="503"):
            engine.embed(["a"])
        engine.embed(["a"])
    assert nim.bodies[0]["model"] == "served"


def test_control_characters_of_a_servers_names_are_replaced() -> None:
    listing = {"data": [{"id": "\x1b[2J\nmine"}, {"id": "yours"}]}
    nim = Nim(lambda r, _: httpx.Response(200, json=listing) if r.method == "GET" else None)
    with nim.embedder() as engine, pytest.raises(ModelNotFoundError) as caught:
        engine.embed(["a"])
    assert "serves \N{REPLACEMENT CHARACTER}[2J mine, yours, not" in str(caught.value)


def test_a_suffix_fixes_the_role() -> None:
    nim = Nim()
    with nim.embedder(model=f"{MODEL}-passage") as engine:
        engine.embed(["a"])
        assert (nim.bodies[0]["model"], nim.bodies[0]["input_type"]) == (MODEL, "passage")
        assert engine.dimensions == WIDTH
        with pytest.raises(ConfigurationError, match="only as document, not as query"):
            engine.embed(["a"], "query")


# What goes wrong


def long_text(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
    for text in body.get("input", []):
        if "long" in text:
            words = f"Input length {len(text)} exceeds maximum allowed token size 512"
            return httpx.Response(400, json={"error": words})
    return None


def test_long_texts_are_found_by_index_and_the_others_embedded() -> None:
    texts = [*TEXTS]
    texts[7], texts[8], texts[201] = "long" * 200, "long" * 300, "long " * 180
    nim = Nim(long_text)
    with nim.embedder() as engine, pytest.raises(PartialResultError) as caught:
        engine.embed(texts)
    errors = caught.value.errors
    assert sorted(errors) == [7, 8, 201]
    assert all(isinstance(error, InputTooLongError) for error in errors.values())
    assert [(e.index, e.tokens, e.limit) for _, e in sorted(errors.items())] == [
        (7, 800, 512),
        (8, 1200, 512),
        (201, 900, 512),
    ]
    good = [row for row in range(len(texts)) if row not in errors]
    expected = vectors([texts[row] for row in good])
    np.testing.assert_allclose(caught.value.vectors[good], expected, atol=1e-6)
    sent = [text for body in nim.bodies for text in body["input"]]
    assert len(sent) == len(set(sent)) == len(good), "an input was embedded twice"


def test_one_long_text_alone_raises_its_own_error() -> None:
    with Nim(long_text).embedder() as engine, pytest.raises(InputTooLongError):
        engine.embed(["long"], "query")


def test_the_server_may_name_the_input_at_fault() -> None:
    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        for at, text in enumerate(body.get("input", [])):
            if not text:
                detail = [{"loc": ["body", "input", at], "msg": "must not be empty"}]
                return httpx.Response(422, json={"detail": detail})
        return None

    nim = Nim(answer)
    texts = [*TEXTS[:40], "", *TEXTS[40:]]
    with nim.embedder() as engine, pytest.raises(PartialResultError) as caught:
        engine.embed(texts)
    assert {k: type(v) for k, v in caught.value.errors.items()} == {40: InvalidRequestError}
    assert len(nim.bodies) == 5


def test_a_failed_request_fails_alone_if_later_ones_succeeded() -> None:
    good = [f"good {i}" for i in range(20)]
    answered: list[str] = []
    are_others_answered, has_failed = asyncio.Event(), asyncio.Event()

    async def reply(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(404)
        body = json.loads(request.content)
        if body["input"] == ["bad"]:
            await are_others_answered.wait()  # requests that were sent after this one
            has_failed.set()
            return httpx.Response(500)
        if len(answered) >= 9:
            are_others_answered.set()
            await has_failed.wait()
        answered.extend(body["input"])
        return httpx.Response(200, content=write(body))

    nim = Nim()
    nim.client = lambda: httpx.AsyncClient(transport=httpx.MockTransport(reply))
    one_by_one = nim.embedder(max_batch_size=1, concurrency=2, prefixes="server")
    with one_by_one as engine, pytest.raises(PartialResultError) as caught:
        engine.embed(["bad", *good])
    assert {row: type(error) for row, error in caught.value.errors.items()} == {0: ServerError}
    np.testing.assert_allclose(caught.value.vectors[1:], vectors(good), atol=1e-6)
    assert sorted(answered) == sorted(good)


@pytest.mark.parametrize("dimensions", [None, WIDTH])
@pytest.mark.parametrize("words", ["dimensions of a parcel", "modality", "encoding_format"])
def test_a_quoted_input_is_not_mistaken_for_a_field(words: str, dimensions: int | None) -> None:
    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        for text in body.get("input", []):
            if words in text:
                return httpx.Response(400, json={"error": f"cannot embed {text!r}"})
        return None

    nim = Nim(answer)
    texts = [*TEXTS[:40], f"the {words}", *TEXTS[40:]]
    with nim.embedder(dimensions=dimensions) as engine, pytest.raises(PartialResultError) as caught:
        engine.embed(texts)
    assert {k: type(v) for k, v in caught.value.errors.items()} == {40: InvalidRequestError}
    good = [row for row in range(len(texts)) if row != 40]
    expected = vectors([texts[row] for row in good])
    np.testing.assert_allclose(caught.value.vectors[good], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"title": "Unauthorized"}, AuthenticationError),
        (400, {"error": "dimensions must be positive"}, UnsupportedDimensionsError),
        (429, {"title": "Too Many Requests"}, RateLimitError),
    ],
)
def test_a_refused_request_is_raised_and_ends_the_call(
    status: int, body: object, kind: type[Exception]
) -> None:
    nim = Nim(lambda r, _: httpx.Response(status, json=body) if r.method == "POST" else None)
    with nim.embedder(concurrency=2) as engine, pytest.raises(kind):
        engine.embed(TEXTS * 20)
    assert len(nim.requests) < 10, "it continued to send requests that had to fail"


def test_the_server_decides_on_dimensions_and_the_reply_is_checked() -> None:
    with Nim().embedder(dimensions=10) as engine:  # not in the catalogue
        assert engine.embed(["a"]).shape == (1, 10)

    def ignoring(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        body.pop("dimensions", None)
        return None

    asked = Nim(ignoring).embedder(dimensions=10)
    with asked as engine, pytest.raises(MalformedResponseError, match="expected vectors of 10"):
        engine.embed(["a"])


def test_a_deadline_keeps_finished_vectors() -> None:
    with FaultyNim() as nim:
        engine = Embedder(Options(model="nvidia/m", base_url=nim.url, deadline=1.0, concurrency=2))
        requests = itertools.count()

        def answer(_: object) -> None:
            if next(requests) >= 4:
                time.sleep(0.2)  # blocks the server

        nim.answer = answer
        start = time.monotonic()
        with engine, pytest.raises(PartialResultError) as caught:
            engine.embed(TEXTS * 20)
        assert time.monotonic() - start < 2
    kinds = {type(error) for error in caught.value.errors.values()}
    assert kinds == {RequestTimeoutError}
    assert 0 < len(caught.value.errors) < len(TEXTS) * 20


def test_no_server_and_no_reply_are_different_errors() -> None:
    with FaultyNim(latency=5) as nim:
        options = {"model": "nvidia/m", "base_url": nim.url, "max_retries": 0}
        with Embedder(Options(timeout=0.2, **options)) as engine, pytest.raises(TimeoutError):
            engine.embed(["a"])
    with Embedder(Options(**options)) as engine, pytest.raises(ConnectionFailedError):
        engine.embed(["a"])


def test_a_slow_list_of_models_is_a_timeout_with_the_address() -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        return httpx.Response(200)

    nim = Nim()
    nim.client = lambda: httpx.AsyncClient(transport=httpx.MockTransport(never))
    silent = nim.embedder(timeout=0.05)
    with silent as engine, pytest.raises(RequestTimeoutError, match=r"within timeout=0.05 s"):
        engine.embed(["a"])


def test_readiness_is_waited_for() -> None:
    with FaultyNim() as nim, Embedder(Options(model="m", base_url=nim.url)) as engine:
        nim.ready = False
        with pytest.raises(RequestTimeoutError, match="503"):
            engine.wait_until_ready(0.2)
        timer = threading.Timer(0.2, lambda: setattr(nim, "ready", True))
        timer.start()
        engine.wait_until_ready(10)
        timer.join()


# The key


def test_which_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_backend(Options()).base_url is None
    assert select_backend(Options(api_key=KEY)).base_url == HOSTED
    assert select_backend(Options(nvidia_api_key=KEY)).base_url == HOSTED
    assert select_backend(Options(api_key=KEY, base_url="http://nim")).base_url == "http://nim/v1"
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)
    assert select_backend(Options()).base_url is None, (
        "a key in the environment alone selects nothing"
    )
    assert select_backend(Options(base_url=HOSTED)).api_key.get_secret_value() == KEY
    monkeypatch.setenv("NVIDIA_BASE_URL", "http://env:1")
    assert select_backend(Options()).base_url == "http://env:1/v1"
    chosen = select_backend(
        Options(base_url="http://a", nvidia_base_url="http://b", api_key="a", nvidia_api_key="b")
    )
    assert (chosen.base_url, chosen.api_key.get_secret_value()) == ("http://b/v1", "b")


def test_the_catalogue_needs_a_key() -> None:
    with pytest.raises(ConfigurationError, match="NVIDIA_API_KEY"):
        select_backend(Options(base_url=HOSTED))


@pytest.mark.parametrize("kind", [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding])
def test_the_key_is_in_no_repr_dump_or_pickle(
    kind: type[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = kind(base_url="https://nim", nvidia_api_key=KEY, default_headers={"x": "hunter2"})
    for shown in (
        repr(options),
        str(options),
        str(options.model_dump()),
        options.model_dump_json(),
    ):
        assert KEY not in shown
        assert "hunter2" not in shown
    engine = options.embedder if hasattr(options, "embedder") else Embedder(options)
    assert KEY not in repr(engine)
    for thing in (options, engine):
        content = pickle.dumps(thing)
        assert KEY.encode() not in content
        copied = pickle.loads(content)
        again = copied.options if isinstance(copied, Embedder) else copied
        with pytest.raises(ConfigurationError, match="Pickled options leave it out"):
            select_backend(again)
        monkeypatch.setenv("NVIDIA_API_KEY", "another")
        assert select_backend(again).api_key.get_secret_value() == "another"
        monkeypatch.delenv("NVIDIA_API_KEY")
    assert copy.deepcopy(options).api_key.get_secret_value() == KEY
    assert options.model_copy().api_key.get_secret_value() == KEY


def test_a_key_in_the_wrong_option_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="nvidia_key") as caught:
        Options(nvidia_key=KEY)
    assert KEY not in str(caught.value)


def test_the_key_is_in_no_log_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    words = {"error": f"the key {KEY} is wrong"}
    nim = Nim(lambda r, _: httpx.Response(401, json=words) if r.method == "POST" else None)
    refused = pytest.raises(AuthenticationError, match=r"the key \*\*\* is wrong")
    with nim.embedder(base_url="https://nim", api_key=KEY) as engine, refused as caught:
        engine.embed(["a"])
    assert nim.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    seen: BaseException | None = caught.value
    while seen is not None:
        assert KEY not in repr(seen) + repr(vars(seen)) + repr(pickle.dumps(seen))
        seen = seen.__cause__ or seen.__context__
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://nim.example.com", True),
        ("http://localhost:8000", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:8000", True),
        ("http://10.1.2.3", True),
        ("http://nim", True),
        ("http://nim.team.svc.cluster.local", True),
        ("http://nim.example.com", False),
        ("http://8.8.8.8", False),
        ("http://localhost.example.com", False),
    ],
)
def test_the_key_travels_encrypted_or_to_private_hosts_only(
    url: str, sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nim = Nim()
    for given in ({"api_key": KEY}, {"default_headers": {"Authorization": f"Bearer {KEY}"}}):
        with nim.embedder(base_url=url, **given) as engine:
            if sent:
                engine.embed(["a"])
            else:
                with pytest.raises(ConfigurationError, match="unencrypted"):
                    engine.embed(["a"])
    assert {"authorization" in request.headers for request in nim.requests} <= {sent}
    with nim.embedder(base_url=url, api_key=KEY, allow_insecure_key=True) as engine:
        engine.embed(["a"])
    assert nim.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)
    with nim.embedder(base_url=url) as engine:  # a key of the environment is left out
        engine.embed(["a"])
    assert ("authorization" in nim.requests[-1].headers) is sent


@pytest.mark.parametrize("target", ["https://evil.example/v1/embeddings?x=1", "/elsewhere"])
def test_no_redirect_is_followed_with_the_key(target: str) -> None:
    def answer(request: httpx.Request, _: dict[str, Any]) -> httpx.Response | None:
        return httpx.Response(307, headers={"location": target})

    nim = Nim(answer)
    following = Options(
        base_url="https://nim",
        api_key=KEY,
        http_client_factory=lambda: httpx.AsyncClient(
            transport=httpx.MockTransport(nim), follow_redirects=True
        ),
    )
    with Embedder(following) as engine, pytest.raises(InvalidRequestError, match="redirects"):
        engine.embed(["a"])
    assert {request.url.host for request in nim.requests} == {"nim"}


def test_the_catalogue_is_polled_after_202() -> None:
    def answer(request: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if request.url.host == "integrate.api.nvidia.com":
            owed.append(body)
            return httpx.Response(202, headers={"nvcf-reqid": "a/b"})
        assert str(request.url) == "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status/a%2Fb"
        assert request.headers["authorization"] == f"Bearer {KEY}"
        polls = sum(one.method == "GET" for one in nim.requests)
        if polls > 1:
            return httpx.Response(200, content=write(owed[0]))
        return httpx.Response(202, headers={"nvcf-reqid": "a/b"})

    owed: list[dict[str, Any]] = []
    nim = Nim(answer)
    live = "nvidia/nemotron-3-embed-1b"
    with nim.embedder(base_url=HOSTED, api_key=KEY, model=live) as engine:
        np.testing.assert_allclose(engine.embed(["a"]), vectors(["a"]), atol=1e-6)
    assert owed[0]["model"] == live
    nim = Nim(lambda r, _: httpx.Response(202, headers={"nvcf-reqid": "a"}))
    with nim.embedder(api_key=KEY) as engine, pytest.raises(MalformedResponseError):
        engine.embed(["a"])
    assert {request.url.host for request in nim.requests} == {"nim"}


# Threads, loops, processes


def test_tokens_are_counted_by_object_and_by_call() -> None:
    with Nim().embedder() as engine:
        with track_usage() as outer:
            engine.embed(["a", "b"])
            with track_usage() as inner:
                asyncio.run(engine.aembed(["c"]))
        engine.embed(["d"])
        assert (outer.tokens, inner.tokens, engine.usage) == (3, 1, 4)


@pytest.mark.parametrize("kind", [NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding])
def test_the_adapters_change_nothing_but_their_arguments(kind: type[Any]) -> None:
    nim = Nim()
    made = kind(model=MODEL, base_url="http://nim:8000", http_client_factory=nim.client)
    is_langchain = kind is NeMoRetrieverEmbeddings
    embed = made.embed_documents if is_langchain else made.get_text_embedding_batch
    query = made.embed_query if is_langchain else made.get_query_embedding
    aquery = made.aembed_query if is_langchain else made.aget_query_embedding
    np.testing.assert_allclose(embed(["a", "b"]), vectors(["a", "b"]), atol=1e-6)
    np.testing.assert_allclose(query("q"), vectors(["q"], "query")[0], atol=1e-6)
    np.testing.assert_allclose(asyncio.run(aquery("q")), query("q"), atol=1e-6)
    made.embedder.close()


def test_many_threads_and_event_loops_share_the_connections() -> None:
    with FaultyNim(latency=0.01) as nim:
        options = Options(model="nvidia/m", base_url=nim.url, concurrency=4, max_batch_size=5)
        wrong: list[object] = []

        def work(number: int) -> None:
            texts = [f"{number} {text}" for text in TEXTS[:40]]
            engine = Embedder(options)
            for _ in range(2):  # two event loops in each thread
                out = asyncio.run(engine.aembed(texts)) if number % 2 else engine.embed(texts)
                if not np.allclose(out, vectors(texts), atol=1e-6):
                    wrong.append(number)

        first = Embedder(options)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first.close()
        gc.collect()
        assert wrong == []
        assert len({request.connection for request in nim.seen}) <= 4
        assert nim.most_in_flight <= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_its_own_connections() -> None:
    with FaultyNim() as nim, Embedder(Options(model="nvidia/m", base_url=nim.url)) as engine:
        expected = engine.embed(TEXTS)
        before = {request.connection for request in nim.seen}
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            good = np.allclose(engine.embed(TEXTS), expected, atol=1e-6)
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        after = {request.connection for request in nim.seen[7:]}
        assert after
        assert not after & before
        np.testing.assert_allclose(engine.embed(TEXTS), expected, atol=1e-6)


async def test_cancelling_stops_unsent_requests() -> None:
    with FaultyNim(latency=0.05) as nim:
        options = Options(model="nvidia/m", base_url=nim.url, concurrency=2, max_batch_size=10)
        with Embedder(options) as engine:
            task = asyncio.create_task(engine.aembed(TEXTS))
            while not nim.embedded:  # noqa: ASYNC110 - the server is in another thread
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.3)
            assert len(nim.embedded) <= 4
            assert (await engine.aembed(["a"])).shape == (1, WIDTH)


@pytest.mark.parametrize("cancel", [False, True])
def test_close_finishes_or_cancels_accepted_requests(cancel: bool) -> None:
    others = set(threading.enumerate())  # of tests before, whose engines may still be there
    with FaultyNim(latency=0.05) as nim:  # a second at least, so that it is closed in the middle
        options = Options(model="nvidia/m", base_url=nim.url, concurrency=2, max_batch_size=10)
        engine = Embedder(options)
        outcome: list[object] = []

        def work() -> None:
            try:
                outcome.append(engine.embed(TEXTS * 2).shape)
            except BaseException as exc:
                outcome.append(type(exc).__name__)

        thread = threading.Thread(target=work)
        thread.start()
        while not nim.embedded:
            time.sleep(0.005)
        engine.close(cancel=cancel)
        thread.join(10)
        assert outcome == (["EngineClosedError"] if cancel else [(460, WIDTH)])
        with pytest.raises(EngineClosedError):
            engine.embed(["a"])
        begun = set(threading.enumerate()) - others
        assert "nemoretriever-nim" not in {thread.name for thread in begun}


@pytest.mark.parametrize("wait", ["list_models", "wait_until_ready", "fingerprint"])
def test_closing_ends_a_call_that_waits_for_the_server(wait: str) -> None:
    started = threading.Event()

    async def never(_: httpx.Request) -> httpx.Response:
        started.set()
        await asyncio.sleep(60)
        return httpx.Response(200)

    options = Options(
        http_client_factory=lambda: httpx.AsyncClient(transport=httpx.MockTransport(never))
    )
    backend = NimBackend(options, "http://nim/v1")
    calls = {
        "list_models": backend.list_models,
        "wait_until_ready": lambda: backend.wait_until_ready(60),
        "fingerprint": lambda: backend.fingerprint,
    }
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(calls[wait])
        assert started.wait(30)
        backend.close(cancel=True)
        with pytest.raises(EngineClosedError):
            call.result(30)


def test_the_remote_path_needs_no_torch() -> None:
    code = """
import sys, httpx
from shared_engine import Embedder, Options, ConnectionFailedError
try:
    Embedder(Options(model="m", base_url="http://127.0.0.1:9", max_retries=0)).embed(["a"])
except ConnectionFailedError:
    print(sorted({"torch", "transformers", "tokenizers"} & set(sys.modules)))
"""
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (out.stdout.strip(), out.stderr) == ("[]", "")


def test_a_client_is_created_by_a_function() -> None:
    with pytest.raises(ValueError, match="a function that returns a client"):
        Options(http_client_factory=httpx.AsyncClient())
    engine = Embedder(Options(base_url="http://nim", http_client_factory=dict))
    with engine, pytest.raises(ConfigurationError, match="returned a dict"):
        engine.embed(["a"])


def test_invalid_tls_and_proxy_options_are_errors() -> None:
    for wrong in ({"verify_ssl": "/no/such.pem"}, {"proxy": "gopher://proxy"}):
        engine = Embedder(Options(base_url="https://nim", **wrong))
        with engine, pytest.raises(ConfigurationError):
            engine.embed(["a"])


def test_a_server_without_tls_is_not_retried() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"https://127.0.0.1:{server.server_port}"
        try:
            with Embedder(Options(model="nvidia/m", base_url=url, max_retries=5)) as engine:
                start = time.monotonic()
                with pytest.raises(ConnectionFailedError, match=r"WRONG_VERSION|RECORD_LAYER"):
                    engine.embed(["a"])
                assert time.monotonic() - start < 10, "it was retried"
        finally:
            server.shutdown()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_certificates_are_verified(tmp_path: Path) -> None:
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*make, *subject, *files], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with FaultyNim(tls=tls) as nim:
        for trust in (tmp_path / "cert.pem", False):
            options = Options(model="nvidia/m", base_url=nim.url, verify_ssl=trust, api_key=KEY)
            with Embedder(options) as engine:
                np.testing.assert_allclose(engine.embed(["a"]), vectors(["a"]), atol=1e-6)
        seen = len(nim.seen)
        with Embedder(Options(model="nvidia/m", base_url=nim.url, api_key=KEY)) as engine:
            start = time.monotonic()
            with pytest.raises(ConnectionFailedError, match="CERTIFICATE_VERIFY_FAILED"):
                engine.embed(["a"])
            assert time.monotonic() - start < 2, "it was retried"
        assert len(nim.seen) == seen


@pytest.mark.parametrize("name", ["on_progress", "on_usage"])
def test_an_error_of_a_callback_is_logged_and_loses_no_vector(caplog, name):
    def fail(_: int) -> None:
        raise OSError("standard error is closed")

    with Nim().embedder() as embedder:
        expected = embedder.embed(TEXTS)
        request = Request([EmbeddingInput(text) for text in TEXTS], "document", **{name: fail})
        got = embedder.load().submit(request).result(30).vectors
    assert np.abs(got - expected).max() <= 1e-6
    assert "standard error is closed" in caplog.text
