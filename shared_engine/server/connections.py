"""Connections that nobody can hold for ever: deadlines and a number, which uvicorn has not."""

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
    """Return the protocol that uvicorn runs each connection with, kept within `limits`."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"limits": limits})


class _BoundedProtocol(H11Protocol):
    """Closes a connection whose client neither sends what it began nor reads what it asked for.

    The app itself bounds how long a body takes that it reads. The protocol is that of h11, which
    bounds a head's bytes; the faster httptools does not.
    """

    limits: ClassVar[ServerLimits]
    _deadline: asyncio.TimerHandle | None = None
    """Runs while a head is awaited, or the rest of a body that was refused before its end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the wait for a head, or say that there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.write(_FULL)
            transport.close()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Parse what came; its deadline is over once it is complete, not when a byte comes."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._stop_watching()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection: at once, or when its client has read what it was sent."""
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
