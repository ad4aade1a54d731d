"""Replies of broken or hostile servers: bounded, reported, and printable."""

from __future__ import annotations

import gzip
import json
import pickle
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_engine import (
    AuthenticationError,
    ConnectionFailedError,
    Embedder,
    EngineError,
    InvalidRequestError,
    MalformedResponseError,
    NeMoRetrieverError,
    Options,
    PartialResultError,
    RateLimitError,
    ServerError,
)
from shared_engine.nim.backend import MOST_SENDS
from tests.support import nim
from tests.support.nim import MODEL, Nim, vectors
from tests.support.raw_server import RawServer, head, whole

MODELS = whole(nim.write_models([MODEL]))
FEW_BYTES = 16 * 2**20
"""More than a reply may need, with the buffers of the sockets."""
CHUNK = bytes(64 * 1024)


def body_of(request: bytes) -> dict[str, Any]:
    content = request.partition(b"\r\n\r\n")[2]
    return json.loads(content) if content else {}


def engine_for(server: RawServer, **options: Any) -> Embedder:
    given = {"model": MODEL, "base_url": server.url, "max_retries": 0, "timeout": 20.0, **options}
    return Embedder(Options(prefixes="server", **given))


# Floods


async def chunks() -> AsyncIterator[bytes]:
    yield head(200, "Transfer-Encoding: chunked")
    while True:
        yield b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK)


async def three_gigabytes() -> AsyncIterator[bytes]:
    yield head(length=3 * 2**30)
    while True:
        yield CHUNK


async def until_closed() -> AsyncIterator[bytes]:
    yield head()
    while True:
        yield CHUNK


FLOODS = {"chunks": chunks, "length": three_gigabytes, "until closed": until_closed}


@pytest.mark.parametrize(
    ("flood", "path"),
    [*((name, b"/v1/embeddings") for name in FLOODS), ("chunks", b"/v1/models")],
)
def test_a_flood_is_cut_off_and_other_callers_are_served(flood: str, path: bytes) -> None:
    async def respond(request: bytes, _: int) -> AsyncIterator[bytes]:
        asked = request.split()[1]
        body = body_of(request)
        if asked == path and body.get("input") != ["good"]:
            async for part in FLOODS[flood]():
                yield part
        else:
            yield whole(nim.answer(body)) if body else MODELS

    with RawServer(respond) as server, engine_for(server) as engine:
        if path == b"/v1/embeddings":
            engine.embed(["good"])
            slowest = 0.0
            stop = threading.Event()

            def ask() -> None:
                nonlocal slowest
                while not stop.is_set():
                    begun = time.monotonic()
                    engine.embed(["good"])
                    slowest = max(slowest, time.monotonic() - begun)

            other = threading.Thread(target=ask)
            other.start()
        begun = time.monotonic()
        with pytest.raises(MalformedResponseError, match=r"more than \d+ bytes"):
            engine.embed(["bad"])
        assert time.monotonic() - begun < 15
        if path == b"/v1/embeddings":
            stop.set()
            other.join()
            assert slowest < 5, "another caller waited for the flood"
        assert server.sent < 3 * FEW_BYTES  # a malformed reply is requested three times


@pytest.mark.parametrize(
    ("status", "kind"), [(400, InvalidRequestError), (500, ServerError), (307, InvalidRequestError)]
)
def test_the_beginning_of_an_endless_error_is_reported(status: int, kind: type[Exception]) -> None:
    async def respond(request: bytes, _: int) -> AsyncIterator[bytes]:
        if not body_of(request):
            yield MODELS
            return
        yield head(status, "Transfer-Encoding: chunked")
        while True:
            yield b"%x\r\n%b\r\n" % (4000, b"no way " + b" " * 3993)

    with RawServer(respond) as server, engine_for(server) as engine:
        with pytest.raises(kind, match="no way no way" if status != 307 else "redirects"):
            engine.embed(["a"])
        assert server.sent < FEW_BYTES


@pytest.mark.parametrize("encoding", ["br", "gzip", "deflate"])
@pytest.mark.parametrize(
    ("status", "kind", "sent"),
    [(401, AuthenticationError, 1), (429, RateLimitError, 3), (503, ServerError, 3)],
)
def test_a_compressed_error_counts_by_its_status(
    status: int, kind: type[Exception], sent: int, encoding: str
) -> None:
    async def respond(request: bytes, _: int) -> AsyncIterator[bytes]:
        encoded = f"Content-Encoding: {encoding}"
        yield whole(b"what?", status, encoded, "Retry-After: 0") if body_of(request) else MODELS

    with RawServer(respond) as server:
        with engine_for(server, max_retries=2) as engine, pytest.raises(kind):
            engine.embed(["a"])
        assert server.requests == 1 + sent


@pytest.mark.parametrize("value", ["0.5", True, "NaN", None, [0.5], {}, 1e39, -1e300, 10**400])
def test_a_vector_has_finite_numbers_only(value: object) -> None:
    def answer(request: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if request.method == "GET":
            return None
        content = json.dumps({"data": [{"index": 0, "embedding": [value, value]}]})
        return httpx.Response(200, content=content)

    with Nim(answer).embedder() as engine, pytest.raises(MalformedResponseError):
        engine.embed(["a"])


def test_a_reply_that_a_gateway_compresses_is_read() -> None:
    async def respond(request: bytes, _: int) -> AsyncIterator[bytes]:
        body = body_of(request)
        if not body:
            yield MODELS
            return
        assert b"accept-encoding: identity\r\n" in request.lower()
        content, encoding = nim.answer(body), body["input"][0]
        if encoding == "gzip":
            content = gzip.compress(content)
        yield whole(content, 200, f"Content-Encoding: {encoding}")

    with RawServer(respond) as server, engine_for(server, concurrency=1) as engine:
        for encoding in ("Identity", "gzip"):
            np.testing.assert_allclose(engine.embed([encoding]), vectors([encoding]), atol=1e-6)
        with pytest.raises(MalformedResponseError, match="cannot be decompressed"):
            engine.embed(["deflate"])


def test_a_bomb_is_cut_off() -> None:
    bomb = gzip.compress(b" " * 2**24)

    async def respond(request: bytes, _: int) -> AsyncIterator[bytes]:
        yield whole(bomb, 200, "Content-Encoding: gzip") if body_of(request) else MODELS

    too_large = pytest.raises(MalformedResponseError, match=r"more than \d+ bytes")
    with RawServer(respond) as server, engine_for(server) as engine, too_large:
        engine.embed(["a"])


@pytest.mark.parametrize("values", [2048, 4096])
def test_the_bound_of_a_reply_admits_the_longest_valid_one(values: int) -> None:
    """Floats in their longest JSON form, indented."""

    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if not body:
            return None
        row = [-1.2345678901234567e-123] * values
        data = [{"index": i, "embedding": row} for i in range(len(body["input"]))]
        content = json.dumps({"data": data}, indent=1)
        return httpx.Response(200, text=content)

    with Nim(answer, ("mine",)).embedder(model="mine") as engine:
        assert engine.embed(["a"] * 20).shape == (20, values)


# Connections


def test_a_stale_connection_is_not_a_failure() -> None:
    async def respond(request: bytes, number: int) -> AsyncIterator[bytes]:
        body = body_of(request)
        if number == 0:  # any further request on a connection meets its end
            yield whole(nim.answer(body)) if body else MODELS

    texts = [f"text {i}" for i in range(400)]
    options = {"max_batch_size": 10, "concurrency": 4}
    with RawServer(respond) as server, engine_for(server, **options) as engine:
        for _ in range(3):
            np.testing.assert_allclose(engine.embed(texts), vectors(texts), atol=1e-6)
        assert server.requests <= 2 * (3 * 40 + 1)


@pytest.mark.parametrize("when", ["first", "new", "half"])
def test_any_other_broken_connection_is_a_failure(when: str) -> None:
    async def respond(request: bytes, number: int) -> AsyncIterator[bytes]:
        body = body_of(request)
        if not body:
            yield MODELS
        elif when == "half" and "bad" in body["input"]:
            yield whole(nim.answer(body))[:-9]
            raise ConnectionError
        elif when == "new" and "bad" in body["input"]:
            return  # also on the second connection
        elif when != "first":
            yield whole(nim.answer(body))

    with RawServer(respond) as server, engine_for(server, concurrency=1) as engine:
        if when != "first":
            engine.embed(["good"])
        before = server.requests
        with pytest.raises(ConnectionFailedError):
            engine.embed(["bad"])
        assert server.requests - before <= (1 if when == "half" else 3)


# The content of an error is data


def nested(n: int, opening: str, closing: str) -> str:
    return opening * n + closing * n


BODIES = {
    "nested lists": nested(100_000, "[", "]"),
    "nested details": nested(500, '{"detail":', "}").replace("}", '"x"}', 1),
    "half": '{"error": "',
    "a lone surrogate": '{"error": "\\ud800 what", "message": "\\udfff"}',
    "control characters": '{"error": "\\u0000\\u001b[31mred\\u202e"}',
    "bytes": "\udcff\udcfe",
    "a number": "7",
    "a long number": '{"error": ' + "9" * 5000 + "}",
    "no words": '{"detail": [{"loc": null}, 3, null], "error": {"message": {}}}',
    "an index before the first": '{"error": "bad", "index": -1}',
    "an index after the last": '{"error": "bad", "index": 99}',
    "a long index": '{"error": "bad", "index": ' + "9" * 400 + "}",
    "an index of text": '{"error": "bad", "index": "1"}',
    "a place before the first": '{"detail": [{"loc": ["body", "input", -1], "msg": "bad"}]}',
    "a place after the last": '{"detail": [{"loc": ["body", "input", 2e9], "msg": "bad"}]}',
    "a place of anything": '{"detail": [{"loc": ["body", "input", {"a": []}], "msg": "bad"}]}',
    "a place without an end": '{"detail": [{"loc": ["input"], "msg": "bad"}]}',
    "an error with a code": '{"error": {"code": 1e999, "message": "bad"}}',
    "nan": '{"error": NaN}',
}
HEADERS = (
    {},
    {"location": "http://["},
    {"location": "//\x7f"},
    {"location": "x" * 70_000},
    {"retry-after": "nan"},
    {"retry-after": "-1e999"},
    {"retry-after": "Sat, 21 Nov 99999999999 12:00:07 GMT"},
    {"x-request-id": "\x1b[31m" + "x" * 5000},
    {"content-type": "application/json; charset=rot13"},
)


def check_error(error: BaseException) -> None:
    """Check that an error is ours, printable, and can be sent to another process."""
    assert isinstance(error, NeMoRetrieverError), repr(error)
    assert not isinstance(error, EngineError), repr(error)
    str(error).encode()
    assert str(error).isprintable()
    assert len(str(error)) < 3000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    if isinstance(error, PartialResultError):
        for one in error.errors.values():
            check_error(one)


@pytest.mark.parametrize("status", [200, 204, 307, 400, 413, 422, 429, 500, 529, 599])
@pytest.mark.parametrize("name", BODIES)
def test_any_error_is_reported_after_a_bounded_number_of_requests(name: str, status: int) -> None:
    content = BODIES[name].encode("utf-8", "surrogateescape")
    for headers in HEADERS if name in ("half", "no words") else HEADERS[:1]:
        refusing = Nim(
            lambda r, body, h=headers: (
                httpx.Response(status, content=content, headers=h) if body else None
            )
        )
        with refusing.embedder(concurrency=2, max_batch_size=5) as engine:
            for n in (1, 12):
                refusing.requests.clear()
                with pytest.raises(NeMoRetrieverError) as caught:
                    engine.embed([f"text {i}" for i in range(n)])
                check_error(caught.value)
                assert len(refusing.requests) <= MOST_SENDS * (2 * n - 1) + 2


def test_a_reply_that_is_not_json_is_quoted() -> None:
    async def respond(request: bytes, _: int) -> AsyncIterator[bytes]:
        yield whole(b"<html>\nSign in" + b"." * 999, 200) if body_of(request) else MODELS

    quoted = pytest.raises(MalformedResponseError, match=r"not JSON: '<html> Sign in\.{86}'$")
    with RawServer(respond) as server, engine_for(server) as engine, quoted:
        engine.embed(["a"])


def test_the_message_of_an_error_with_status_200_is_kept() -> None:
    words = {"error": {"message": "model overloaded", "code": 1}}
    answer = Nim(lambda r, body: httpx.Response(200, json=words) if body else None)
    refused = pytest.raises(MalformedResponseError, match="model overloaded")
    with answer.embedder() as engine, refused as caught:
        engine.embed(["a"])
    assert caught.value.detail == "model overloaded"


WORDS = st.sampled_from(
    ["no", "too large", "at most 3 items", "Input length 9 exceeds maximum allowed token size 8",
     "dimensions", "encoding_format", "modality", "must not be empty", ""]
)  # fmt: skip
PLACES = st.lists(
    st.sampled_from(["body", "input", "dimensions", "encoding_format", "modality", -1, 0, 1, 7]),
    max_size=3,
)
ERRORS = st.builds(
    lambda words, place, index, shape: {
        "flat": {"error": words, **({} if index is None else {"index": index})},
        "openai": {"error": {"message": words}},
        "validation": {"detail": [{"loc": place, "msg": words}]},
    }[shape],
    WORDS,
    PLACES,
    st.none() | st.integers(-3, 30),
    st.sampled_from(["flat", "openai", "validation"]),
)
REPLIES = st.none() | st.tuples(
    st.sampled_from([200, 202, 204, 301, 400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 529]),
    ERRORS,
)
"""None stands for a valid reply."""


@pytest.mark.slow
@given(n=st.integers(1, 12), replies=st.lists(REPLIES, min_size=1, max_size=30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_n_inputs_take_a_bounded_number_of_requests(
    n: int, replies: list[tuple[int, dict[str, Any]] | None], data: st.DataObject
) -> None:
    sent = 0

    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        nonlocal sent
        if not body:
            return None
        reply = replies[sent % len(replies)]
        sent += 1
        return None if reply is None else httpx.Response(reply[0], json=reply[1])

    texts = [f"text {i}" for i in range(n)]
    size, places = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    with Nim(answer).embedder(max_batch_size=size, concurrency=places) as engine:
        try:
            np.testing.assert_allclose(engine.embed(texts), vectors(texts), atol=1e-6)
        except PartialResultError as exc:
            check_error(exc)
            good = [row for row in range(n) if row not in exc.errors]
            if good:
                np.testing.assert_allclose(exc.vectors[good], vectors([*texts])[good], atol=1e-6)
        except NeMoRetrieverError as exc:
            check_error(exc)
    assert sent <= MOST_SENDS * (2 * n - 1) + 1


# One bad input among good ones


@given(
    bad=st.sets(st.integers(0, 99))
    | st.builds(lambda a, b: set(range(a, b)), *[st.integers(0, 99)] * 2),
    status=st.sampled_from([400, 403, 406, 409, 413, 415, 422, 431, 451]),
    words=st.sampled_from(["no", "", "cannot read this", "<html>Forbidden</html>"]),
    size=st.sampled_from([1, 7, 50]),
)
@settings(max_examples=40, deadline=None)
def test_exactly_the_bad_inputs_fail_if_the_server_names_none(
    bad: set[int], status: int, words: str, size: int
) -> None:
    def answer(_: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        is_bad = any(text.startswith("bad") for text in body.get("input", ()))
        return httpx.Response(status, text=words) if is_bad else None

    texts = [f"{'bad' if i in bad else 'good'} {i}" for i in range(100)]
    server = Nim(answer)
    with server.embedder(max_batch_size=size, concurrency=3) as engine:
        try:
            out, failed = engine.embed(texts), set()
        except PartialResultError as exc:
            out, failed = exc.vectors, set(exc.errors)
        except NeMoRetrieverError:
            out, failed = np.empty((100, 16)), set(range(100))
    assert failed == bad
    good = sorted(set(range(100)) - bad)
    if good:
        np.testing.assert_allclose(out[good], vectors([texts[i] for i in good]), atol=1e-6)
    assert len(server.requests) <= 2 * 100 + 2


@pytest.mark.parametrize("status", [400, 403, 415, 422])
def test_a_refusal_of_all_requests_is_not_bisected(status: int) -> None:
    server = Nim(lambda _, body: httpx.Response(status, text="never") if body else None)
    with server.embedder(concurrency=2) as engine, pytest.raises(NeMoRetrieverError, match="never"):
        engine.embed([f"text {i}" for i in range(2000)])
    assert len(server.requests) < 10
