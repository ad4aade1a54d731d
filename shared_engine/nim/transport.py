"""How requests to a NIM are sent: again where that can help, and fewer at once when asked to.

    Retrying ─► Balanced ─┬► Address ─► Sending ─► httpx.AsyncClient
                          └► Address ─► ...           one for each address of `base_url`

Each is an httpx transport around the next, so nothing above knows of retries, and a request that
waits for its next attempt holds none of the places in flight. All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

import httpx

from shared_engine.nim.reading import read_reply

FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
"""Seconds; also the most that a `Retry-After` may ask for."""
FIRST_REST = 0.5
LONGEST_REST = 10.0
"""Seconds that an address rests after it failed, if its `Retry-After` does not ask for more."""
TOO_MANY = frozenset({429, 503, 529})
DOWN = frozenset({502, 503, 504})
"""Statuses of an address that cannot serve now, or of a gateway that cannot reach it."""
_NEVER_BETTER = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
_UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
"""What OpenSSL says of a certificate that it does not trust, and of a server without TLS."""
_CLOSED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)

_log = logging.getLogger("shared_engine")


def is_retried(status: int) -> bool:
    """Whether the same request may get another reply later.

    >>> [is_retried(status) for status in (200, 400, 404, 408, 429, 500, 507, 529)]
    [False, False, False, True, True, True, True, True]
    """
    return status in (408, 429) or status >= 500


def may_pass(error: Exception) -> bool:
    """Whether an error is one of the connection, and not there to stay.

    >>> may_pass(httpx.ConnectError("refused")), may_pass(httpx.UnsupportedProtocol("ftp"))
    (True, False)
    """
    if not isinstance(error, (httpx.TransportError, TimeoutError)):
        return False
    is_refused = isinstance(error, httpx.ProxyError) and str(error).startswith("4")  # its status
    is_untrusted = any(words in str(error) for words in _UNTRUSTED)
    return not (isinstance(error, _NEVER_BETTER) or is_refused or is_untrusted)


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
    again = may_pass(outcome) if isinstance(outcome, Exception) else is_retried(outcome)
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


class _Place:
    """One address: how many requests may be in flight there, how many are, and how it fares."""

    def __init__(self, inner: httpx.AsyncBaseTransport, most: int) -> None:
        self.inner = inner
        self.in_flight = 0
        self.last_turn = -1
        """Number of the request that went there last."""
        self.cuts = 0
        self.rests = 0
        self.failures = 0
        """Rests since the last reply; 0 is an address that is well."""
        self.rests_until = 0.0
        self._most = most
        self._limit = float(most)

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return int(self._limit)

    def is_due(self, now: float) -> bool:
        """Whether it is well, or may show that it is: one request does at a time."""
        return not self.failures or (now >= self.rests_until and not self.in_flight)

    def learn(self, outcome: httpx.Response | Exception, cuts: int, rests: int) -> float:
        """Take what a request came to, sent when there had been so many; return seconds of rest.

        What was sent before the last cut or rest says nothing about the time after it.
        """
        if isinstance(outcome, httpx.Response):
            if outcome.status_code in TOO_MANY and cuts == self.cuts:
                self.cuts += 1
                self._limit = max(1.0, self._limit / 2)
                _log.info("the server is busy; at most %d requests in flight", self.limit)
            elif outcome.is_success:
                self._limit = min(self._most, self._limit + 1 / self._limit)
        if rests != self.rests:
            return 0.0
        if not _is_down(outcome):
            self.failures = 0
            return 0.0
        rest = min(LONGEST_REST, FIRST_REST * 2.0**self.failures)
        if isinstance(outcome, httpx.Response):
            rest = max(rest, min(LONGEST_WAIT, read_retry_after(outcome.headers) or 0.0))
        self.rests += 1
        self.failures += 1
        return rest


def _is_down(outcome: httpx.Response | Exception) -> bool:
    """Whether an address gave no reply, or one that says that it cannot serve."""
    if isinstance(outcome, httpx.Response):
        return outcome.status_code in DOWN
    return may_pass(outcome)


class Balanced(httpx.AsyncBaseTransport):
    """Lets `most` requests be in flight at each address; urgent ones go first.

    The limit of an address halves when it says that they are too many, once for each set in flight,
    and grows by one with each set that went well.

    A request goes to the address with the fewest in flight. One that gives no reply, or 502, 503 or
    504, rests for FIRST_REST seconds, twice as long each further time, up to LONGEST_REST, or as
    long as its `Retry-After` asks; then one request finds out whether it is back. Where no address
    is well, rests do not count; so a single address has none.

    A request that failed goes on to another address at once: with no reply to any other, with 502,
    503, 504 or a "too many" to one that does not rest. It is sent to each address at most once.
    """

    def __init__(self, inners: Sequence[httpx.AsyncBaseTransport], most: int) -> None:
        self.most = most * len(inners)
        self._places = [_Place(inner, most) for inner in inners]
        self._waiting: list[tuple[int, int, asyncio.Future[_Place], list[_Place]]] = []  # a heap
        self._order = count()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now, at all addresses."""
        return sum(place.limit for place in self._places)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send when there is a place."""
        priority, order = 0 if request.extensions.get("urgent") else 1, next(self._order)
        tried: list[_Place] = []
        while True:
            place = await self._enter(priority, order, tried)
            tried.append(place)
            cuts, rests = place.cuts, place.rests
            outcome: httpx.Response | Exception
            try:
                try:
                    outcome = await place.inner.handle_async_request(request)
                except (httpx.TransportError, TimeoutError) as exc:
                    outcome = exc
                if rest := place.learn(outcome, cuts, rests):
                    self._rest(place, rest, outcome)
            finally:
                place.in_flight -= 1
                self._admit()
            if not self._goes_on(outcome, tried):
                break
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _rest(self, place: _Place, seconds: float, outcome: httpx.Response | Exception) -> None:
        if len(self._places) == 1:
            return
        loop = asyncio.get_running_loop()
        place.rests_until = loop.time() + seconds
        loop.call_at(place.rests_until, self._admit)
        level = logging.WARNING if place.failures == 1 else logging.INFO
        _log.log(level, "%s rests for %.1f s: %s", place.inner, seconds, _summarize(outcome))

    def _goes_on(self, outcome: httpx.Response | Exception, tried: list[_Place]) -> bool:
        left = [place for place in self._places if place not in tried]
        if isinstance(outcome, Exception):
            return bool(left) and may_pass(outcome)
        now = asyncio.get_running_loop().time()
        is_busy = outcome.status_code in TOO_MANY | DOWN
        return is_busy and any(place.is_due(now) for place in left)

    async def _enter(self, priority: int, order: int, tried: list[_Place]) -> _Place:
        turn: asyncio.Future[_Place] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, order, turn, tried))
        self._admit()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # admitted and cancelled at once
                turn.result().in_flight -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        passed_over = []
        while self._waiting:
            waiting = heapq.heappop(self._waiting)
            _, order, turn, tried = waiting
            if turn.done():
                continue
            place = self._find_place(tried)
            if place is not None:
                place.in_flight += 1
                place.last_turn = order
                turn.set_result(place)
                continue
            passed_over.append(waiting)
            if not tried:  # nor is there one for those behind
                break
        for waiting in passed_over:
            heapq.heappush(self._waiting, waiting)

    def _find_place(self, tried: list[_Place]) -> _Place | None:
        places = [place for place in self._places if place not in tried]
        if not all(place.failures for place in places):
            now = asyncio.get_running_loop().time()
            places = [place for place in places if place.is_due(now)]
        free = [place for place in places if place.in_flight < place.limit]
        return min(free, key=lambda place: (place.in_flight, place.last_turn), default=None)


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
