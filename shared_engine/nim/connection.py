"""One connection to a NIM, kept from request to request.

h11 writes each request and reads the reply, but for a body whose length is known: that goes from
the socket straight to its place. Read in the pieces in which it comes, as the pool of httpx does,
the half megabyte of fifty vectors cost more than all that is done with it.
"""

from __future__ import annotations

import asyncio
import ssl
import time

import h11
import httpx
import numpy as np

KEEP_ALIVE = 30.0
"""Seconds that an idle connection is kept."""
LONGEST_HEAD = 100 * 1024
CHUNK = 8 * 1024
"""Bytes read at once while h11 reads."""
PIECE = 16 * 1024 * 1024
"""The most bytes that are set aside because the server says that they will come."""


class Connection(httpx.AsyncBaseTransport):
    """Sends over HTTP/1.1, one request at a time, and through no proxy.

    It has no timeouts: the caller says how long the whole takes. Belongs to one event loop.
    """

    def __init__(self, trust: ssl.SSLContext) -> None:
        """Prepare; the first request connects."""
        trust.set_alpn_protocols(["http/1.1"])
        self._trust = trust
        self._origin: tuple[str, bytes, int | None] | None = None
        self._socket: _Socket | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the reply with all its content.

        Raises:
            httpx.TransportError: no connection, a broken one, or one of the sides is not HTTP.
            httpx.DecodingError: the content is not encoded as the reply says.
        """
        content = await request.aread()
        socket = await self._connected(request.url)
        try:
            return await socket.exchange(request, content)
        finally:
            if not socket.is_idle:
                socket.abort()

    async def aclose(self) -> None:
        """Close the connection, if there is one."""
        if self._socket is not None:
            self._socket.abort()
            await self._socket.closed.wait()

    async def _connected(self, url: httpx.URL) -> _Socket:
        origin = (url.scheme, url.raw_host, url.port)
        if self._socket is not None:
            if self._socket.is_idle and self._origin == origin:
                return self._socket
            self._socket.abort()
        is_tls = url.scheme == "https"
        try:
            _, self._socket = await asyncio.get_running_loop().create_connection(
                _Socket,
                url.raw_host.decode("ascii"),
                url.port or (443 if is_tls else 80),
                ssl=self._trust if is_tls else None,
            )
        except (OSError, UnicodeError) as exc:
            raise httpx.ConnectError(str(exc)) from exc
        self._origin = origin
        return self._socket


class _Socket(asyncio.BufferedProtocol):
    """Takes one request at a time and returns its reply."""

    _transport: asyncio.Transport
    _http: h11.Connection
    _head: h11.Response

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self._reply: asyncio.Future[httpx.Response] | None = None
        self._is_free = True
        self._since = time.monotonic()
        self._chunk = memoryview(bytearray(CHUNK))
        self._parts: list[bytes | bytearray | memoryview] = []
        self._missing = memoryview(b"")
        """Where the next bytes of the body go; empty while h11 reads."""
        self._later = 0
        """Bytes of the body after those."""

    @property
    def is_idle(self) -> bool:
        """Whether it can take a request."""
        is_open = self._is_free and not self._transport.is_closing()
        return is_open and time.monotonic() - self._since < KEEP_ALIVE

    def abort(self) -> None:
        """Close without waiting for anything."""
        self._is_free = False
        self._transport.abort()

    async def exchange(self, request: httpx.Request, content: bytes) -> httpx.Response:
        """Send a request and return its reply; see `Connection.handle_async_request`."""
        self._is_free = False
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_HEAD)
        self._parts = []
        try:
            head = h11.Request(
                method=request.method, target=request.url.raw_path, headers=request.headers.raw
            )
            events = (head, h11.Data(data=content), h11.EndOfMessage())
            sent = [self._http.send(event) or b"" for event in events]
        except h11.LocalProtocolError as exc:
            raise httpx.LocalProtocolError(str(exc)) from exc
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(b"".join(sent))
        return await self._reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._missing or self._chunk

    def buffer_updated(self, nbytes: int) -> None:
        if not self._missing:
            self._read(bytes(self._chunk[:nbytes]))
            return
        self._missing = self._missing[nbytes:]
        if self._missing:
            return
        if self._later:
            self._set_aside()
        else:
            self._finish()

    def eof_received(self) -> None:
        if self._missing:
            self._fail(httpx.RemoteProtocolError("the server closed in the middle of a reply"))
        else:
            self._read(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_free = False
        self.closed.set()
        self._fail(httpx.ReadError(f"the connection was lost: {exc}"))

    def _read(self, data: bytes) -> None:
        if self._is_free:  # nobody asked
            self.abort()
            return
        try:
            self._http.receive_data(data)
            # It gives no event, but a type such as NEED_DATA, where it has to wait.
            while not isinstance(event := self._http.next_event(), type):
                if isinstance(event, h11.Response):
                    self._head = event
                    self._later = _length(event)
                elif isinstance(event, h11.Data):
                    self._parts.append(event.data)
                    self._later -= len(event.data)
                    if self._later > 0:
                        return self._set_aside()
                elif isinstance(event, h11.EndOfMessage):
                    return self._finish()
                elif isinstance(event, h11.ConnectionClosed):
                    raise h11.RemoteProtocolError("the server closed without a reply")
        except h11.RemoteProtocolError as exc:
            self._fail(httpx.RemoteProtocolError(str(exc)))

    def _set_aside(self) -> None:
        self._missing = np.empty(min(self._later, PIECE), np.uint8).data
        self._parts.append(self._missing)
        self._later -= len(self._missing)

    def _finish(self) -> None:
        content, self._parts = b"".join(self._parts), []
        headers = list(self._head.headers)
        try:
            response = httpx.Response(self._head.status_code, headers=headers, content=content)
        except httpx.DecodingError as exc:
            self._fail(exc)
            return
        # Not where one side closes, sent more than a reply, or replied before it had it all.
        self._is_free = (
            self._http.our_state is h11.DONE
            and not self._http.trailing_data[0]
            and not self._transport.get_write_buffer_size()
        )
        self._since = time.monotonic()
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(response)

    def _fail(self, error: Exception) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)


def _length(head: h11.Response) -> int:
    """Return the length of the body if the head says it, else 0."""
    headers = dict(head.headers)
    return 0 if b"transfer-encoding" in headers else int(headers.get(b"content-length", 0))
