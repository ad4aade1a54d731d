"""Limits of simultaneous work: bytes of bodies, and inputs without a response."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request

from shared_engine.server.errors import HTTPRefusal, refuse_size
from shared_engine.server.limits import ServerLimits


class Admission:
    """The inputs and bytes of all requests that are in progress, and their limits."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self.waiting = 0
        """Accepted inputs without an answer."""
        self.last_seconds = 1.0
        """Duration of the last answered request."""
        self._held_bytes = 0  # of bodies without an answer

    def require_space(self) -> None:
        """Refuse a request while the queue is full."""
        if self.waiting >= self._limits.max_waiting:
            raise self._refuse_load(f"{self.waiting} inputs are waiting")

    @contextmanager
    def admit(self, inputs: int) -> Iterator[None]:
        """Count inputs as waiting; refuse them if there are too many."""
        # an empty queue accepts any request, however small the limit is
        if self.waiting and self.waiting + inputs > self._limits.max_waiting:
            raise self._refuse_load(f"{self.waiting} inputs are waiting")
        self.waiting += inputs
        try:
            yield
        finally:
            self.waiting -= inputs

    @contextmanager
    def hold_bytes(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes of a request as held until it is answered."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            self._held_bytes += size
            if self._held_bytes > 8 * self._limits.max_body_bytes:
                raise self._refuse_load(f"unanswered requests hold {self._held_bytes} bytes")

        try:
            yield hold
        finally:
            self._held_bytes -= held

    async def read_body(self, request: Request, hold: Callable[[int], None]) -> bytearray:
        """Return the body of a request, checked while it arrives.

        Args:
            hold: Called with the bytes of each part; see `hold_bytes`.

        Raises:
            HTTPRefusal: the body is not plain JSON, is too large, or arrives too slowly.
        """
        limits = self._limits
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # a page of another site cannot send it unasked
            message = "the body must be JSON, with Content-Type: application/json"
            raise HTTPRefusal(415, "media_type", message)
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            message = "the body must not be compressed; remove Content-Encoding"
            raise HTTPRefusal(415, "content_encoding", message, headers={"Accept-Encoding": ""})
        if int(request.headers.get("content-length", 0)) > limits.max_body_bytes:
            raise self._refuse_body()
        content = bytearray()
        try:
            async with asyncio.timeout(limits.read_seconds):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > limits.max_body_bytes:
                        raise self._refuse_body()
                    hold(len(chunk))
        except TimeoutError:
            message = f"the body did not arrive within {limits.read_seconds:g} s"
            headers = {"Connection": "close"}
            raise HTTPRefusal(408, "read_timeout", message, headers=headers) from None
        return content

    def _refuse_load(self, reason: str) -> HTTPRefusal:
        # the last request waited in the same queue, so it predicts the wait of a new one
        seconds = min(30, max(1, math.ceil(self.last_seconds)))
        message = f"{reason}; try again later"
        body = {"status": 429, "title": "Too Many Requests", "detail": message}
        return HTTPRefusal(429, "too_busy", message, body, {"Retry-After": str(seconds)})

    def _refuse_body(self) -> HTTPRefusal:
        limit = self._limits.max_body_bytes
        return refuse_size(f"the body is larger than {limit} bytes; send fewer inputs in a request")
