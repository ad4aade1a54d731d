"""Connection limits and read deadlines, which uvicorn lacks."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared_engine.server.limits import ServerLimits

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: 0\r\n\r\n"
)


def bound_connections(limits: ServerLimits) -> type[H11Protocol]:
    """Return the protocol class of uvicorn's connections, with these limits."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"limits": limits})


class _BoundedProtocol(H11Protocol):
    """Closes a connection whose client stops sending a request or reading a response.

    The app limits the time for a body that it reads. The parser is h11, because it limits the bytes
    of a head; the faster httptools does not.
    """

    limits: ClassVar[ServerLimits]
    _deadline: asyncio.TimerHandle | None = None
    """Runs while waiting for a head, or for the rest of a body that was already refused."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first head, or answer 503 if there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.write(_FULL)
            transport.close()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Parse the data; only a complete head or body ends its deadline."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        self._stop_watching()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close the connection when no accepted request is on it; a half-sent one is none."""
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()
        else:
            super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, after the client has read the rest of a response."""
        super().timeout_keep_alive_handler()
        self._abort_if_stalled(None)

    def _watch(self) -> None:
        state = self.conn.their_state
        is_refused = self.cycle is not None and self.cycle.response_complete
        if state is not h11.IDLE and not (state is h11.SEND_BODY and is_refused):
            self._stop_watching()
        elif self._deadline is None:
            limits = self.limits
            seconds = limits.head_seconds if state is h11.IDLE else limits.read_seconds
            self._deadline = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _abort_if_stalled(self, before: int | None) -> None:
        left = self.transport.get_write_buffer_size()
        if left and left == before:
            self.transport.abort()
        elif left:
            self.loop.call_later(self.limits.read_seconds, self._abort_if_stalled, left)
