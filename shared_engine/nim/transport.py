"""How requests to a NIM are sent: again where that can help, and fewer at once when asked to.

    Retrying ─► Limited ─► Sending ─► httpx.AsyncClient

Each is an httpx transport around the next, so nothing above knows of retries, and a request that
waits for its next attempt holds none of the places in flight. All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

import httpx

from shared_engine.nim.reading import read_reply

FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
"""Seconds; also the most that a `Retry-After` may ask for."""
TOO_MANY = frozenset({429, 503, 529})
_NEVER_BETTER = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
_CLOSED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)

_log = logging.getLogger("shared_engine")


def is_retried(status: int) -> bool:
    """Whether the same request may get another reply later.

    >>> [is_retried(status) for status in (200, 400, 404, 408, 429, 500, 507, 529)]
    [False, False, False, True, True, True, True, True]
    """
    return status in (408, 429) or status >= 500


def wait_before_retry(
    attempt: int,
    max_retries: int,
    outcome: int | Exception,
    retry_after: float | None = None,
    chance: float = 1.0,
) -> float | None:
    """Return the seconds to wait before the request is sent again, or None to give up.

    `attempt` counts from 0, `outcome` is the status or the transport's error, and `chance` in 0..1
    spreads the clients of one server apart.

    >>> [wait_before_retry(n, 4, 503) for n in range(5)]
    [0.5, 1.0, 2.0, 4.0, None]
    >>> wait_before_retry(0, 4, 503, chance=0.0)
    0.25
    >>> wait_before_retry(0, 4, 429, retry_after=3.0, chance=0.0), wait_before_retry(0, 4, 400)
    (3.0, None)
    >>> wait_before_retry(0, 4, httpx.ReadError("reset")), wait_before_retry(0, 4, 429, 3600.0)
    (0.5, 30.0)
    """
    if attempt >= max_retries:
        return None
    if isinstance(outcome, Exception):
        again = isinstance(outcome, (httpx.TransportError, TimeoutError))
        again = again and not isinstance(outcome, _NEVER_BETTER)
        again = again and "CERTIFICATE_VERIFY_FAILED" not in str(outcome)
        is_refused = isinstance(outcome, httpx.ProxyError) and str(outcome).startswith("4")
        again = again and not is_refused  # by a status of the proxy
    else:
        again = is_retried(outcome)
    if not again:
        return None
    backoff = min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt)
    if retry_after is None:
        return backoff * (0.5 + chance / 2)
    # Never earlier than asked, and not all clients at the same moment.
    return min(LONGEST_WAIT, retry_after + chance * min(backoff, retry_after) / 4)


def read_retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds of a `Retry-After` header, given as seconds or as a date.

    >>> read_retry_after(httpx.Headers({"retry-after": "1.5"}))
    1.5
    >>> at = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
    >>> read_retry_after(httpx.Headers({"retry-after": "Sat, 21 Nov 2026 12:00:07 GMT"}), at)
    7.0
    >>> read_retry_after(httpx.Headers({"retry-after": "soon"})) is None
    True
    """
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None


class Sending(httpx.AsyncBaseTransport):
    """Sends through a client, and reads the whole reply within `timeout` seconds.

    A kept connection that turns out to be closed is no failure of the request: it is sent again
    over another, until a new one. Each such connection had brought a reply before, so at most as
    many requests are sent in excess as got one.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        timeout: float | None,
        check_peer: Callable[[str], None] | None = None,
    ) -> None:
        """Take the client; `check_peer` is given the address of each new connection.

        What it raises ends the request before anything was sent.
        """
        self._client = client
        self._timeout = timeout
        self._check_peer = check_peer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send; a redirect is a reply like any other, so a key goes to no other host."""
        async with asyncio.timeout(self._timeout):  # httpx bounds each read, not their sum
            while True:
                connection = _Connection(self._check_peer)
                request.extensions["trace"] = connection.follow
                try:
                    response = await self._client.send(request, stream=True, follow_redirects=False)
                except _CLOSED:
                    if not connection.is_reused:
                        raise
                    continue
                try:
                    return await read_reply(response, request)
                finally:
                    await response.aclose()


class _Connection:
    """What httpcore tells of the connection that a request goes over."""

    def __init__(self, check_peer: Callable[[str], None] | None) -> None:
        self.is_reused = False
        self._is_new = False
        self._check_peer = check_peer

    async def follow(self, event: str, info: Mapping[str, Any]) -> None:
        """Take an event of httpcore's: "connection.connect_tcp.complete" and its kind."""
        _, _, step = event.partition(".")
        if step == "connect_tcp.complete":
            self._is_new = True
            stream = info["return_value"]
            peer = stream.get_extra_info("server_addr")
            try:
                if self._check_peer is not None and peer is not None:
                    self._check_peer(str(peer[0]))
            except BaseException:
                await stream.aclose()  # nobody else has it yet
                raise
        elif step == "send_request_headers.started":
            self.is_reused = not self._is_new


class Limited(httpx.AsyncBaseTransport):
    """Lets `limit` requests be in flight; urgent ones go first.

    The limit halves when the server says that they are too many, once for each set in flight, and
    grows by one with each set that went well.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, most: int) -> None:
        self._inner = inner
        self._most = most
        self._limit = float(most)
        self._in_flight = 0
        self._cuts = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self._order = count()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return int(self._limit)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send when there is a place."""
        await self._enter(0 if request.extensions.get("urgent") else 1)
        cuts = self._cuts
        try:
            response = await self._inner.handle_async_request(request)
            if response.status_code in TOO_MANY:
                self._shrink(cuts)
            elif response.is_success:
                self._limit = min(self._most, self._limit + 1 / self._limit)
            return response
        finally:
            self._in_flight -= 1
            self._admit()

    def _shrink(self, cuts_at_start: int) -> None:
        if cuts_at_start == self._cuts:  # else it was sent before the last cut could help
            self._cuts += 1
            self._limit = max(1.0, self._limit / 2)
            _log.info("the server is busy; at most %d requests in flight", self.limit)

    async def _enter(self, priority: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._order), turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # admitted and cancelled at once
                self._in_flight -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting and self._in_flight < self.limit:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)


class Retrying(httpx.AsyncBaseTransport):
    """Sends a request again where `wait_before_retry` says so."""

    def __init__(self, inner: httpx.AsyncBaseTransport, max_retries: int) -> None:
        self._inner = inner
        self._max_retries = max_retries

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the last reply, or raise the last error, when there is no use in going on."""
        for attempt in count():
            outcome: httpx.Response | Exception
            try:
                outcome = await self._inner.handle_async_request(request)
            except (httpx.TransportError, TimeoutError) as exc:
                outcome = exc
            wait = self._wait(attempt, outcome)
            if wait is None:
                break
            _log.info("%s; attempt %d follows in %.1f s", _summarize(outcome), attempt + 2, wait)
            await asyncio.sleep(wait)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _wait(self, attempt: int, outcome: httpx.Response | Exception) -> float | None:
        chance = random.random()
        if isinstance(outcome, Exception):
            return wait_before_retry(attempt, self._max_retries, outcome, chance=chance)
        asked = read_retry_after(outcome.headers)
        status = outcome.status_code
        return wait_before_retry(attempt, self._max_retries, status, asked, chance)


def _summarize(outcome: httpx.Response | Exception) -> str:
    if isinstance(outcome, httpx.Response):
        return f"the server replied {outcome.status_code}"
    if isinstance(outcome, httpx.ProtocolError):  # its words quote what the server sent
        return type(outcome).__name__
    return f"{type(outcome).__name__}: {outcome}"
