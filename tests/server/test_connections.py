"""Slow, stalled and misaddressed clients: real sockets against a real server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from shared_engine import Options
from shared_engine.server.app import create_app
from shared_engine.server.limits import ServerLimits
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.servers import NAME, Running, running, wait_for

SECONDS = 0.4
LIMITS = ServerLimits(
    head_seconds=SECONDS, read_seconds=SECONDS, max_connections=40, max_head_bytes=8192
)
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
    with running(options, limits=LIMITS) as here:
        yield here


def connect(served: Running) -> socket.socket:
    address = httpx.URL(served.url)
    return socket.create_connection((address.host, address.port or 0), timeout=10)


def receive_reply(connection: socket.socket) -> bytes:
    """Return a reply, of which the connection stays open."""
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += connection.recv(65536)
    head, _, body = reply.partition(b"\r\n\r\n")
    (length,) = (
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head


def drip(connection: socket.socket, byte: bytes = b"a") -> float:
    """Send a byte now and then until the other end closes; return after how many seconds."""
    started = time.monotonic()
    connection.settimeout(SECONDS / 10)
    while time.monotonic() - started < 10:
        try:
            connection.sendall(byte)
            if not connection.recv(65536):
                break
        except TimeoutError:
            pass
        except OSError:
            break
    return time.monotonic() - started


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"P",
        b"POST /v1/embed",
        START + b"X: ",
        START + JSON + b"Content-Length: 2\r\n",
        START + JSON + b"Content-Length: 100\r\n\r\n{",
        START + JSON + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        START + b"Content-Length: 1000000\r\n\r\n{",  # answered with 415, its body not read
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_an_incomplete_request_is_disconnected(
    served: Running, sent: bytes, is_first: bool
) -> None:
    with closing(connect(served)) as connection:
        if not is_first:
            connection.sendall(WHOLE)
            assert receive_reply(connection).startswith(b"HTTP/1.1 200")
            sent = sent or b"\r"
        connection.sendall(sent)
        taken = drip(connection)
    assert taken < 3 * SECONDS + 1


def test_a_slow_but_complete_request_is_answered(served: Running) -> None:
    with closing(connect(served)) as connection:
        for _ in range(2):
            for at in range(0, len(WHOLE), 50):
                connection.sendall(WHOLE[at : at + 50])
                time.sleep(SECONDS / 40)
            assert receive_reply(connection).startswith(b"HTTP/1.1 200")
        time.sleep(2 * SECONDS)  # between requests, a connection may rest
        connection.sendall(WHOLE)
        assert receive_reply(connection).startswith(b"HTTP/1.1 200")


def test_half_sent_heads_count_as_connections(served: Running) -> None:
    with ExitStack() as stack:
        heads = [stack.enter_context(closing(connect(served))) for _ in range(100)]
        for connection in heads:
            try:
                connection.sendall(START)
            except OSError:  # it was one too many
                continue
        assert len(served.server.server_state.connections) <= LIMITS.max_connections + 1
        refused = 0
        for connection in heads:
            try:
                refused += connection.recv(100).startswith(b"HTTP/1.1 503")
            except ConnectionResetError:  # closed with what we sent unread
                refused += 1
        assert 0 < refused <= 65
        assert served.post().status_code == 200
    wait_for(lambda: len(served.server.server_state.connections) <= 2, seconds=5)


@pytest.mark.parametrize(
    "head",
    [
        b"X: " + b"a" * 20_000,
        b"".join(b"X%d: a\r\n" % n for n in range(2_000)),
        b"Cookie: a\r\n" * 2_000,
    ],
)
def test_a_large_head_is_refused(served: Running, head: bytes) -> None:
    with closing(connect(served)) as connection:
        try:
            connection.sendall(START + head)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        except ConnectionResetError:
            pass
    assert served.post().status_code == 200


def test_an_unread_reply_is_dropped(options: Options) -> None:
    body = json.dumps({"model": NAME, "input": ["a"] * 8000, "input_type": "query"}).encode()
    with running(options, limits=LIMITS) as here:
        here.server.config.timeout_keep_alive = 0
        with closing(connect(here)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(START + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            here.client.close()
            wait_for(lambda: not here.server.server_state.connections)


def test_a_slowly_read_reply_arrives(options: Options) -> None:
    body = json.dumps({"model": NAME, "input": ["a"] * 4000, "input_type": "query"}).encode()
    with running(options, limits=LIMITS) as here:
        here.server.config.timeout_keep_alive = 0
        with closing(connect(here)) as connection:
            connection.sendall(START + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            reply = b""
            while part := connection.recv(200_000):
                reply += part
                time.sleep(SECONDS / 8)
    assert len(json.loads(reply.partition(b"\r\n\r\n")[2])["data"]) == 4000


# --- names ---------------------------------------------------------------------------------------

ALLOWED = [
    *("localhost", "localhost:8000", "a.localhost", "127.0.0.1", "127.1.2.3:80"),
    *("[::1]", "[::1]:8000", "10.0.0.7:8000", "gpu-box", "gpu-box:80", "a.example.com"),
    *("nas", "nas:8000"),
]
OTHERS = [
    *("", "evil.test", "localhost.evil.test", "127.0.0.1.evil.test", "evil.test:80", "example.com"),
    *("xlocalhost", "gpu-box.evil.test", ":80", "[::1", "2130706433", "evil.test#localhost"),
    *("localhost@evil.test", "evil.test/localhost", "localhost,evil.test"),
    *("evil.test@localhost", "localhost/evil.test", "localhost?evil.test", "localhost#evil.test"),
    *("evil.test:@localhost", "evil.test:localhost", "evil.test@127.0.0.1", "127.0.0.1:evil.test"),
]


def get(served: Running, path: str, host: str, key: str = "") -> httpx.Response:
    headers = {"Host": host} | ({"Authorization": f"Bearer {key}"} if key else {})
    return served.client.get(path, headers=headers)


@pytest.fixture(scope="module")
def named(options: Options) -> Iterator[Running]:
    with running(options, allowed_hosts=("gpu-box", "*.Example.com", "NAS:8000")) as here:
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
