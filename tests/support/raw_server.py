"""A server on a real socket that sends any bytes, in its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

Respond = Callable[[bytes, int], AsyncIterator[bytes]]


def head(status: int = 200, *headers: str, length: int | None = None) -> bytes:
    """Return the head of a reply."""
    lines = [f"HTTP/1.1 {status} X", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def whole(content: bytes, status: int = 200, *headers: str) -> bytes:
    """Return a valid reply."""
    return head(status, *headers, length=len(content)) + content


async def end_connections(server: asyncio.Server, writers: list[asyncio.StreamWriter]) -> None:
    """Stop listening and close all connections, as open sockets warn in later tests."""
    server.close()
    # A task that is cancelled before its first step leaves its socket open. From an accepted
    # connection to the first step of its task, the event loop takes four iterations.
    for _ in range(5):
        await asyncio.sleep(0)
    for writer in writers:
        writer.close()  # after sending the buffered bytes, so no counted reply is incomplete
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for writer in writers:
        writer.transport.abort()  # otherwise it waits for the client to read the buffered bytes
    writers.clear()
    await asyncio.sleep(0)


class RawServer:
    """Sends what `respond(request, n)` yields for the n-th request of a connection.

    A connection is kept until `respond` yields nothing, which closes it.
    """

    def __init__(self, respond: Respond) -> None:
        self._respond = respond
        self.requests = 0
        self.connections = 0
        self.sent = 0
        """Bytes that were written to the sockets."""
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> RawServer:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        ending = end_connections(self._server, self._writers)
        asyncio.run_coroutine_threadsafe(ending, self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.connections += 1
        number = 0
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                length = request.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                request += await reader.readexactly(int(length or 0))
                self.requests += 1
                before = self.sent
                async for part in self._respond(request, number):
                    writer.write(part)
                    await writer.drain()
                    self.sent += len(part)
                number += 1
                if self.sent == before:
                    break
        writer.close()
