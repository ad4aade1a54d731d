"""Connections, names and encodings of clients: real sockets against a real server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from shared_engine import Options
from shared_engine.server.app import create_app
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.servers import NAME, Running, running

START = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
BODY = json.dumps({"model": NAME, "input": "a", "input_type": "query"}).encode()
WHOLE = START + JSON + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = build_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["sentence-transformers"])
    return Options(model=str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def served(options: Options) -> Iterator[Running]:
    with running(options) as here:
        yield here


def connect(served: Running) -> socket.socket:
    address = httpx.URL(served.url)
    return socket.create_connection((address.host, address.port or 0), timeout=10)


def test_hundreds_of_connections_are_answered(served: Running) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(connect(served))) for _ in range(600)]
        for connection in connections:
            connection.sendall(WHOLE)
        for connection in connections:
            assert connection.recv(12) == b"HTTP/1.1 200"


# --- names ---------------------------------------------------------------------------------------

ALLOWED = [
    *("localhost", "localhost:8000", "a.localhost", "127.0.0.1", "127.1.2.3:80"),
    *("[::1]", "[::1]:8000", "10.0.0.7:8000", "gpu-box", "gpu-box:80", "a.example.com"),
    *("nas.home", "nas.home:8000", "nemoretriever", "nemoretriever:8000"),
]
OTHERS = [
    *("", "evil.test", "localhost.evil.test", "127.0.0.1.evil.test", "evil.test:80", "example.com"),
    *("gpu-box.evil.test", ":80", "[::1", "evil.test#localhost"),
    *("localhost@evil.test", "evil.test/localhost", "localhost,evil.test"),
    *("evil.test@localhost", "localhost/evil.test", "localhost?evil.test", "localhost#evil.test"),
    *("evil.test:@localhost", "evil.test:localhost", "evil.test@127.0.0.1", "127.0.0.1:evil.test"),
]


def get(served: Running, path: str, host: str, key: str = "") -> httpx.Response:
    headers = {"Host": host} | ({"Authorization": f"Bearer {key}"} if key else {})
    return served.client.get(path, headers=headers)


@pytest.fixture(scope="module")
def named(options: Options) -> Iterator[Running]:
    with running(options, allowed_hosts=("*.Example.com", "NAS.home:8000")) as here:
        yield here


@pytest.mark.parametrize("host", ALLOWED)
def test_an_allowed_host_is_served(named: Running, host: str) -> None:
    for path in ("/models", "/metadata", "/metrics"):
        assert get(named, path, host).status_code == 200


async def test_a_star_allows_every_host(options: Options) -> None:
    transport = httpx.ASGITransport(create_app(options, allowed_hosts=["*"]))
    async with httpx.AsyncClient(transport=transport, base_url="http://evil.test") as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("host", OTHERS)
def test_another_host_is_refused(named: Running, host: str) -> None:
    for path in ("/models", "/metadata", "/metrics", "/nowhere"):
        response = get(named, path, host)
        assert response.status_code == 421
        assert "--allowed-host" in response.json()["message"]
    fields: Any = {"model": NAME, "input": "a", "input_type": "query"}
    response = named.client.post("/embeddings", json=fields, headers={"Host": host})
    assert response.status_code == 421
    assert get(named, "/health/live", host).status_code in (200, 400)  # a load balancer's probe


def test_two_host_headers_are_refused(named: Running) -> None:
    for hosts in ((b"localhost", b"evil.test"), (b"evil.test", b"localhost")):
        with closing(connect(named)) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: %b\r\nHost: %b\r\n\r\n" % hosts)
            assert connection.recv(12) == b"HTTP/1.1 400"


def test_any_host_is_served_with_the_key(options: Options) -> None:
    with running(options, api_key="a secret") as here:
        assert get(here, "/models", "evil.test").status_code == 401
        assert get(here, "/models", "evil.test", key="a secret").status_code == 200


# --- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "x", ""])
def test_a_compressed_body_is_refused(served: Running, encoding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    for content in (BODY, b"\x1f\x8b" + b"\0" * 1000):
        response = served.client.post("/embeddings", content=content, headers=headers)
        assert response.status_code == (415 if encoding else response.status_code)
        assert response.json()["message"]
    headers["Content-Encoding"] = "Identity"
    assert served.client.post("/embeddings", content=BODY, headers=headers).status_code == 200
