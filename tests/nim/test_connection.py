"""Replies in every form that HTTP/1.1 has, whole and in pieces, from a server that sends bytes."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from shared_engine.nim import connection as nim_connection
from shared_engine.nim.connection import Connection

BODY = bytes(range(256)) * 400
OK = b"HTTP/1.1 200 OK\r\n"
TRUST = ssl.create_default_context()
CLOSE = b"close"  # in a script: close the connection


def sized(body: bytes = BODY, *headers: bytes) -> bytes:
    lines = [b"Content-Length: %d" % len(body), *headers]
    return OK + b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(body: bytes = BODY, size: int = 999) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


class Server:
    """Answers the n-th request with the n-th script: bytes to send one after the other."""

    def __init__(self, *scripts: Sequence[bytes]) -> None:
        self.scripts = list(scripts)
        self.connections = 0
        self.requests: list[bytes] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def _start(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.append(asyncio.create_task(self._until_closed(reader, writer)))

    async def _until_closed(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await self.serve(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self.requests.append(head + await reader.readexactly(int(length or 0)))
            for part in self.scripts.pop(0):
                if part == CLOSE:
                    return
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.001)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        server = await asyncio.start_server(self._start, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        transport = Connection(TRUST)
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            yield client
        server.close()
        await asyncio.gather(*self.tasks)


@pytest.mark.parametrize("size", [1 << 20, 1000, 1])
@pytest.mark.parametrize("piece", [nim_connection.PIECE, 30_000])
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (sized(), BODY),
        (chunked(), BODY),
        (sized(b"a"), b"a"),
        (sized(b""), b""),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + sized(), BODY),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", b"busy"),
        (b"HTTP/1.1 204 None\r\n\r\n", b""),
    ],
)
async def test_replies_in_any_pieces_leave_the_connection_open(
    reply: bytes, expected: bytes, piece: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nim_connection, "PIECE", piece)
    if size == 1:  # all of a head, and the first of a body
        parts = [bytes([byte]) for byte in reply[:200]] + [reply[200:]]
    else:
        parts = [reply[start : start + size] for start in range(0, len(reply), size)]
    server = Server([part for part in parts if part], [sized(b"next")])
    async with server.client() as client:
        response = await client.post("/v1/x?y=1", content=b"question", headers={"X-A": "b"})
        assert response.content == expected
        assert (await client.get("/")).content == b"next"
    assert server.connections == 1
    head, _, content = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\n")
    assert b"\r\nX-A: b" in head
    assert content == b"question"


@pytest.mark.parametrize(
    "script",
    [
        [OK + b"\r\n" + BODY, CLOSE],  # its end is that of the connection
        [b"HTTP/1.0 200 OK\r\n\r\n" + BODY, CLOSE],
        [sized(BODY, b"Connection: close")],
        [sized(), CLOSE],
        [sized() + b"more than was asked for"],
        [chunked() + b"more than was asked for"],
        [sized(), b"HTTP/1.1 408 Request Timeout\r\n\r\n"],
    ],
)
async def test_a_connection_that_is_not_clean_is_not_used_again(script: Sequence[bytes]) -> None:
    server = Server(script, [sized(b"next")])
    async with server.client() as client:
        assert (await client.post("/", content=b"x")).content == BODY
        await asyncio.sleep(0.02)
        assert (await client.post("/", content=b"x")).content == b"next"
    assert server.connections == 2


@pytest.mark.parametrize(
    "script",
    [
        [CLOSE],
        [b"HTTP/1.1 200", CLOSE],
        [sized()[:-1], CLOSE],
        [sized()[:100], CLOSE],
        [chunked()[:-1], CLOSE],
        [b"<html>what?</html>\r\n\r\n"],
        [OK + b"Content-Length: -1\r\n\r\n"],
        [OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n12"],
        [OK + b"X: " + b"x" * 200_000],
        [sized(gzip.compress(BODY), b"Content-Encoding: gzip")[:-9], CLOSE],
    ],
)
async def test_a_broken_reply_is_an_error_and_the_next_is_not(script: Sequence[bytes]) -> None:
    server = Server(script, [sized()])
    async with server.client() as client:
        with pytest.raises(httpx.TransportError) as caught:
            await client.post("/", content=b"x")
        assert str(caught.value)
        assert (await client.post("/", content=b"x")).content == BODY
    assert server.connections == 2


async def test_what_is_encoded_is_decoded() -> None:
    good = sized(gzip.compress(BODY), b"Content-Encoding: gzip")
    bad = sized(BODY, b"Content-Encoding: gzip")
    async with Server([good], [bad]).client() as client:
        assert (await client.get("/")).content == BODY
        with pytest.raises(httpx.DecodingError):
            await client.get("/")


async def test_a_reply_to_head_has_no_body() -> None:
    server = Server([OK + b"Content-Length: 9\r\n\r\n"], [sized()])
    async with server.client() as client:
        assert (await client.head("/")).headers["content-length"] == "9"
        assert (await client.get("/")).content == BODY


async def test_a_reply_before_all_was_sent_is_a_reply() -> None:
    class Hasty(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")
            await asyncio.sleep(0.05)

    server = Hasty()
    async with server.client() as client:
        for _ in range(2):
            response = await client.post("/", content=b"x" * 30_000_000)
            assert response.status_code == 413
    assert server.connections == 2


async def test_cancelling_closes_the_connection() -> None:
    server = Server([sized()[:5000]], [sized()])
    async with server.client() as client:
        task = asyncio.create_task(client.get("/"))
        while not server.requests:  # noqa: ASYNC110 - it is told by bytes, not by an event
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await client.get("/")).content == BODY
    assert server.connections == 2


async def test_an_idle_connection_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nim_connection, "KEEP_ALIVE", 0.0)
    server = Server([sized()], [sized()])
    async with server.client() as client:
        for _ in range(2):
            await client.get("/")
    assert server.connections == 2


async def test_what_cannot_be_sent_is_not() -> None:
    server = Server([sized()])
    async with server.client() as client:
        with pytest.raises(httpx.LocalProtocolError):
            await client.get("/", headers={"X": "a\r\nY: b"})
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:9")
        assert (await client.get("/")).content == BODY
    assert len(server.requests) == 1
