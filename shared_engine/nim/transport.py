"""How requests to a NIM are sent: retried, and fewer at a time while the server is busy.

    Retrying ─► Limited ─► Traced ─► Sending ─► httpx.AsyncClient

Each is an httpx transport around the next, so the layers above know nothing of retries, and a
request that waits for its next attempt does not count as in flight. All run in one event loop.
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

from shared_engine import spans
from shared_engine.errors import MalformedResponseError

FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
"""Seconds before a retry; LONGEST_WAIT also bounds `Retry-After`."""
TOO_MANY = frozenset({429, 503, 529})
"""Statuses of a server that is too busy for so many requests."""
MOST_BYTES = "most_bytes"
"""Request extension: the most bytes of a successful reply."""
MOST_IN_ERROR = 256 * 1024
"""Bytes kept of an error, in addition to the parts of the request that it may quote."""
_QUOTED = 4
"""Bytes that one byte of the request may take where the server quotes it with escapes."""
_PERMANENT = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
_NO_TLS = "the server has no TLS; use http://"
TLS_ADVICE = {
    "CERTIFICATE_VERIFY_FAILED": "a private CA needs verify_ssl= or SSL_CERT_FILE with its file",
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
}
"""What to do about OpenSSL's errors that no retry helps."""
_CLOSED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)

_log = logging.getLogger("shared_engine")


def is_retried(status: int) -> bool:
    """Whether the same request may get another reply later.

    >>> [is_retried(status) for status in (200, 400, 404, 408, 429, 500, 507, 529)]
    [False, False, False, True, True, True, True, True]
    """
    return status in (408, 429) or status >= 500


def is_transient(error: Exception) -> bool:
    """Whether an error is one of the connection, and a retry may succeed.

    >>> is_transient(httpx.ConnectError("refused")), is_transient(httpx.UnsupportedProtocol("ftp"))
    (True, False)
    """
    if not isinstance(error, (httpx.TransportError, TimeoutError)):
        return False
    is_refused = isinstance(error, httpx.ProxyError) and str(error).startswith("4")  # its status
    is_untrusted = any(words in str(error) for words in TLS_ADVICE)
    return not (isinstance(error, _PERMANENT) or is_refused or is_untrusted)


def wait_before_retry(
    attempt: int, max_retries: int, outcome: httpx.Response | Exception, jitter: float = 1.0
) -> float | None:
    """Return the seconds to wait before the request is sent again, or None to give up.

    Args:
        attempt: Number of the attempt that had this outcome, from 0.
        jitter: A random number in 0..1, which spreads the clients of one server.

    >>> busy = httpx.Response(503)
    >>> [wait_before_retry(n, 4, busy) for n in range(5)], wait_before_retry(0, 4, busy, jitter=0)
    ([0.5, 1.0, 2.0, 4.0, None], 0.25)
    >>> [wait_before_retry(0, 4, httpx.Response(429, headers={"retry-after": seconds}), jitter=0)
    ...  for seconds in ("3", "3600")]
    [3.0, 30.0]
    >>> wait_before_retry(3, 4, httpx.Response(503, headers={"retry-after": "1"}))
    4.0
    >>> wait_before_retry(0, 4, httpx.ReadError("reset")), wait_before_retry(0, 4, ValueError())
    (0.5, None)
    """
    if isinstance(outcome, Exception):
        may_help, retry_after = is_transient(outcome), None
    else:
        may_help, retry_after = is_retried(outcome.status_code), read_retry_after(outcome.headers)
    if attempt >= max_retries or not may_help:
        return None
    backoff = FIRST_WAIT * 2.0**attempt
    if retry_after is None and getattr(outcome, "status_code", None) == 429:
        backoff = 5.0**attempt  # five retries take a minute, as rates are limited per minute
    backoff = min(LONGEST_WAIT, backoff)
    wait = backoff * (0.5 + jitter / 2)
    if retry_after is not None:  # not earlier, and not all clients at the same moment
        asked = retry_after + jitter * min(backoff, retry_after) / 4
        wait = max(wait, asked) if asked else 0.0
    return min(LONGEST_WAIT, wait)


def read_retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds of a `Retry-After` header, which is a number of seconds or a date.

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

    A kept-alive connection that the server has closed is not a failure of the request, which is
    sent again over another connection. Each stale connection had carried a reply before, so there
    are at most as many excess requests as replies.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        timeout: float | None,
        check_peer: Callable[[str], None] | None = None,
    ) -> None:
        """Store the client.

        Args:
            timeout: Seconds for the whole reply; None for no limit.
            check_peer: Called with the IP address of each new connection. An error that it raises
                ends the request before anything is sent.
        """
        self._client = client
        self._timeout = timeout
        self._check_peer = check_peer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request; return a redirect like any other reply, so a key stays at its host."""
        async with asyncio.timeout(self._timeout):  # httpx bounds each read, not their sum
            while True:
                connection = _Connection(self._check_peer)
                request.extensions["trace"] = connection.trace
                try:
                    response = await self._client.send(request, stream=True, follow_redirects=False)
                except _CLOSED:
                    if not connection.is_reused:
                        raise
                    continue
                try:
                    return await _read_reply(response, request)
                finally:
                    await response.aclose()


async def _read_reply(response: httpx.Response, request: httpx.Request) -> httpx.Response:
    """Return a response with its content read.

    Of an error only the beginning is kept, and nothing if it cannot be decompressed, as its status
    decides.

    Raises:
        MalformedResponseError: a successful reply cannot be decompressed, or is longer than
            MOST_BYTES of the request.
        httpx.TransportError: the connection broke.
    """
    most = MOST_IN_ERROR + _QUOTED * len(request.content)
    if response.is_success:
        most = request.extensions[MOST_BYTES]
    parts: list[bytes] = []
    size = 0
    try:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > most:
                break
    except httpx.DecodingError as exc:
        if response.is_success:
            raise MalformedResponseError(f"the reply cannot be decompressed: {exc}") from None
    response.headers.pop("content-encoding", None)
    if size > most and response.is_success:
        raise MalformedResponseError(f"the reply has more than {most} bytes, the most it may need")
    content = b"".join(parts)[:most]
    return httpx.Response(response.status_code, headers=response.headers, content=content)


class Traced(httpx.AsyncBaseTransport):
    """Makes a span of each attempt, and sends its `traceparent`."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request."""
        if (tracer := spans.find_tracer()) is None:
            return await self._inner.handle_async_request(request)
        url = request.url.copy_with(username=None, password=None, query=None, fragment=None)
        facts = {
            "http.request.method": request.method,
            "http.request.resend_count": request.extensions.get("attempt", 0),
            "url.full": str(url),
            **spans.describe_server(str(url)),
        }
        span = spans.start_span(tracer, request.method, "CLIENT", facts)
        spans.write_context(span, request.headers)
        try:
            response = await self._inner.handle_async_request(request)
        except BaseException as exc:
            spans.end_span(span, {}, exc)
            raise
        status = response.status_code
        error = str(status) if status >= 400 else None
        spans.end_span(span, {"http.response.status_code": status}, error)
        return response


class _Connection:
    """The connection that a request is sent over, as httpcore reports it."""

    def __init__(self, check_peer: Callable[[str], None] | None) -> None:
        self.is_reused = False
        self._is_new = False
        self._check_peer = check_peer

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Handle an event of httpcore, such as "connection.connect_tcp.complete"."""
        _, _, step = event.partition(".")
        if step == "connect_tcp.complete":
            self._is_new = True
            stream = info["return_value"]
            peer = stream.get_extra_info("server_addr")
            try:
                if self._check_peer is not None and peer is not None:
                    self._check_peer(str(peer[0]))
            except BaseException:
                await stream.aclose()  # httpcore does not own it yet
                raise
        elif step == "send_request_headers.started":
            self.is_reused = not self._is_new


class Limited(httpx.AsyncBaseTransport):
    """Bounds the requests in flight; urgent requests go first.

    The limit halves on 429, 503 and 529, once for all requests that were in flight together, and
    grows by one, up to `most`, after as many successful replies as it allows in flight.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, most: int) -> None:
        self.most = most
        self._inner = inner
        self._limit = float(most)
        self._in_flight = 0
        self._cuts = 0
        """Times that the limit was halved."""
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []
        """A heap of (not urgent, order of arrival, admission)."""
        self._order = count()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return int(self._limit)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request when the limit admits it."""
        await self._enter(bool(request.extensions.get("urgent")))
        cuts = self._cuts
        try:
            response = await self._inner.handle_async_request(request)
            self._adapt(response, cuts)
            return response
        finally:
            self._leave()

    def _adapt(self, response: httpx.Response, cuts: int) -> None:
        """Change the limit after a reply; `cuts` is the count when its request was sent."""
        if response.is_success:
            self._limit = min(self.most, self._limit + 1 / self._limit)
        elif response.status_code in TOO_MANY and cuts == self._cuts:
            self._cuts += 1
            before, self._limit = self.limit, max(1.0, self._limit / 2)
            if self.limit < before:
                _log.info("the server is busy; at most %d requests in flight", self.limit)

    async def _enter(self, is_urgent: bool) -> None:
        admission: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (not is_urgent, next(self._order), admission))
        self._admit()
        try:
            await admission
        except asyncio.CancelledError:
            if not admission.cancelled():  # admitted in the same step of the loop
                self._leave()
            raise

    def _leave(self) -> None:
        self._in_flight -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._in_flight < self.limit:
            *_, admission = heapq.heappop(self._waiting)
            if not admission.done():  # otherwise it was cancelled
                self._in_flight += 1
                admission.set_result(None)


class Retrying(httpx.AsyncBaseTransport):
    """Sends a request again if `wait_before_retry` returns a time to wait."""

    def __init__(self, inner: httpx.AsyncBaseTransport, max_retries: int) -> None:
        self._inner = inner
        self._max_retries = max_retries

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the last reply, or raise the last error."""
        for attempt in count():
            outcome: httpx.Response | Exception
            request.extensions["attempt"] = attempt
            try:
                outcome = await self._inner.handle_async_request(request)
            except (httpx.TransportError, TimeoutError) as exc:
                outcome = exc
            wait = wait_before_retry(attempt, self._max_retries, outcome, random.random())
            if wait is None:
                break
            _log.info("%s; retry %d in %.1f s", _summarize(outcome), attempt + 1, wait)
            await asyncio.sleep(wait)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _summarize(outcome: httpx.Response | Exception) -> str:
    if isinstance(outcome, httpx.Response):
        return f"the server replied {outcome.status_code}"
    if isinstance(outcome, httpx.ProtocolError):  # its message quotes the reply
        return type(outcome).__name__
    return f"{type(outcome).__name__}: {outcome}"
