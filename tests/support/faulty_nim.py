"""A NIM on a real socket with faults to order, which keeps its requests and replies."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from time import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tests.support import nim
from tests.support.raw_server import end_connections

FAULTS = ("429", "503", "reset", "slow", "truncated", "missing", "doubled", "nan")


@dataclass
class Seen:
    """One request that the server received."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int


@dataclass
class FaultyNim:
    """A server in its own thread, within `with`."""

    rates: dict[str, float] = field(default_factory=dict)
    """Probability of each of FAULTS; one batch has at most three."""
    latency: float = 0.0
    shuffle: bool = True
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "nvidia/m"}])
    answer: Callable[[dict[str, Any]], tuple[int, dict[str, str], bytes] | None] | None = None
    """Called first with the body; a reply that it returns is sent instead of vectors."""

    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self.seen: list[Seen] = []
        self.answered: Counter[str] = Counter()
        """Number of times that the vector of each text was sent."""
        self.happened: Counter[str] = Counter()
        self.most_in_flight = 0
        self.ready = True
        self.port = 0
        self._in_flight = 0
        self._faults_of: Counter[str] = Counter()
        self._random = random.Random(7)
        self._connections = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._down = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    @property
    def embedded(self) -> list[Seen]:
        """The requests for vectors."""
        return [one for one in self.seen if one.path == "/v1/embeddings"]

    def __enter__(self) -> FaultyNim:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def up(self) -> None:
        """Listen, on the same port as before."""
        asyncio.run_coroutine_threadsafe(self._up(), self._loop).result()

    def down(self) -> None:
        """Stop listening and close all connections; pending requests get no reply."""
        asyncio.run_coroutine_threadsafe(self._die(), self._loop).result()

    async def _up(self) -> None:
        self._down = False
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _die(self) -> None:
        self._down = True
        await end_connections(self._server, self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        self._writers.append(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {
                    name.lower(): value for name, value in (x.split(": ", 1) for x in head[1:] if x)
                }
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                body = json.loads(content) if content else {}
                path = urlsplit(head[0].split()[1]).path  # a whole URL in a request to a proxy
                self.seen.append(Seen(path, headers, body, number))
                self._in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self._in_flight)
                try:
                    await self._reply(writer, self.seen[-1])
                finally:
                    self._in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _reply(self, writer: asyncio.StreamWriter, request: Seen) -> None:
        if request.path == "/v1/models":
            return await _send(writer, 200, {}, nim.write_models(self.models))
        if request.path == "/v1/metadata":
            return await _send(writer, 200, {}, nim.write_metadata())
        if request.path == "/v1/health/ready":
            return await _send(writer, 200 if self.ready else 503, {}, _json({"ready": self.ready}))
        body = request.body
        await asyncio.sleep(self.latency)
        if self.answer and (given := self.answer(body)):
            return await _send(writer, *given)
        fault = self._fault(json.dumps(body["input"]))
        if fault == "slow":
            await asyncio.sleep(0.3)
        if fault == "reset":
            writer.transport.abort()
            raise ConnectionResetError
        if fault == "429":
            after = {"Retry-After": self._random.choice(["0.05", formatdate(time(), usegmt=True)])}
            return await _send(writer, 429, after, _json({"status": 429, "title": "Too Many"}))
        if fault == "503":
            return await _send(writer, 503, {"Retry-After": "0"}, b"<html>busy</html>")
        content = self._content(body, fault)
        if fault == "truncated":
            writer.write(_head(200, {}, len(content)) + content[: len(content) // 2])
            writer.close()
            raise ConnectionResetError
        await _send(writer, 200, {}, content)
        if fault in (None, "slow"):
            self.answered.update(body["input"])

    def _fault(self, batch: str) -> str | None:
        chance = self._random.random()
        for fault in FAULTS:
            chance -= self.rates.get(fault, 0.0)
            if chance < 0:
                self._faults_of[batch] += 1
                # The client sends a request again twice after malformed replies.
                allowed = 3 if fault in FAULTS[:5] else 2
                if self._faults_of[batch] > allowed:
                    return None
                self.happened[fault] += 1
                return fault
        return None

    def _content(self, body: dict[str, Any], fault: str | None) -> bytes:
        rows = nim.embed(body)
        if fault == "nan":
            rows[0][1][0] = np.nan
        if fault == "missing":
            rows = rows[:-1]
        if fault == "doubled":
            rows[-1] = rows[0] if len(rows) > 1 else (1, rows[0][1])
        if self.shuffle:
            self._random.shuffle(rows)
        return nim.answer(body, rows)


def _json(content: object) -> bytes:
    return json.dumps(content).encode()


def _head(status: int, headers: dict[str, str], length: int) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _send(
    writer: asyncio.StreamWriter, status: int, headers: dict[str, str], content: bytes
) -> None:
    writer.write(_head(status, headers, len(content)) + content)
    await writer.drain()
