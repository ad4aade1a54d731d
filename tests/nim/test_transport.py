"""The decision to retry, and the limit of requests in flight, without a server."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from shared_engine.nim.transport import (
    LONGEST_WAIT,
    MOST_BYTES,
    Limited,
    Retrying,
    Sending,
    is_retried,
    wait_before_retry,
)

REQUEST = httpx.Request("POST", "http://nim/v1/embeddings", extensions={MOST_BYTES: 1000})


def test_only_transient_statuses_are_retried() -> None:
    retried = {
        status
        for status in range(200, 600)
        if wait_before_retry(0, 5, httpx.Response(status)) is not None
    }
    assert retried == {408, 429, *range(500, 600)} == set(filter(is_retried, range(600)))


@pytest.mark.parametrize(
    ("error", "is_retried"),
    [
        (httpx.ConnectError("refused"), True),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]"), False),
        (httpx.RemoteProtocolError("server left"), True),
        (httpx.ReadTimeout("slow"), True),
        (TimeoutError(), True),
        (httpx.UnsupportedProtocol("ftp"), False),
        (httpx.ProxyError("407 Proxy Authentication Required"), False),
        (httpx.ProxyError("503 Service Unavailable"), True),
        (ValueError("bug"), False),
    ],
)
def test_only_errors_of_the_connection_are_retried(error: Exception, is_retried: bool) -> None:
    assert (wait_before_retry(0, 5, error) is not None) is is_retried


def test_waits_grow_spread_and_end() -> None:
    busy = httpx.Response(503)
    waits = [wait_before_retry(attempt, 20, busy, jitter=0.5) for attempt in range(21)]
    assert waits[-1] is None
    numbers = [wait for wait in waits if wait is not None]
    assert numbers == sorted(numbers)
    assert max(numbers) <= LONGEST_WAIT
    spread = {wait_before_retry(3, 20, busy, jitter=jitter / 10) for jitter in range(10)}
    assert len(spread) == 10


def test_a_retry_is_never_earlier_than_the_server_asked() -> None:
    busy = httpx.Response(429, headers={"retry-after": "2"})
    for jitter in (0.0, 0.5, 1.0):
        wait = wait_before_retry(0, 5, busy, jitter)
        assert wait is not None
        assert 2.0 <= wait <= 2.5


def test_retries_of_a_rate_limit_take_a_minute() -> None:
    limited = httpx.Response(429)
    waits = [wait_before_retry(attempt, 5, limited, jitter=0.5) or 0 for attempt in range(5)]
    assert waits == sorted(waits)
    assert waits[0] <= 1
    assert sum(waits) > 60


def test_a_server_that_asks_for_short_waits_still_gets_longer_ones() -> None:
    loading = httpx.Response(503, headers={"retry-after": "1"})
    waits = [wait_before_retry(attempt, 5, loading, jitter=0) for attempt in range(5)]
    assert waits == [1.0, 1.0, 1.0, 2.0, 4.0]


class Server(httpx.AsyncBaseTransport):
    """Replies when `answer` is called."""

    def __init__(self) -> None:
        self.waiting: list[tuple[httpx.Request, asyncio.Future[httpx.Response]]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        future: asyncio.Future[httpx.Response] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        return await future

    async def answer(self, *statuses: int) -> None:
        for status in statuses:
            self.waiting.pop(0)[1].set_result(httpx.Response(status))
        for _ in range(3):
            await asyncio.sleep(0)


async def test_the_limit_halves_once_for_requests_in_flight_together_and_recovers() -> None:
    server = Server()
    limited = Limited(server, 8)
    tasks = [asyncio.create_task(limited.handle_async_request(REQUEST)) for _ in range(40)]
    await asyncio.sleep(0)
    assert len(server.waiting) == 8
    await server.answer(429, 429, 503)
    assert limited.limit == 4
    assert len(server.waiting) == 5, "no new request while more are in flight than the limit"
    await server.answer(200, 200)
    assert len(server.waiting) == 4
    await server.answer(200, 200, 200, 529)  # the last was sent after the first cut
    assert limited.limit == 2
    while server.waiting:
        await server.answer(200)
    await asyncio.gather(*tasks)
    assert limited.limit == 8


async def test_the_limit_is_never_below_one_and_never_above_the_most() -> None:
    statuses = iter([429] * 20 + [200] * 200)
    limited = Limited(httpx.MockTransport(lambda _: httpx.Response(next(statuses))), 8)
    for _ in range(20):
        await limited.handle_async_request(REQUEST)
    assert limited.limit == 1
    for _ in range(200):
        await limited.handle_async_request(REQUEST)
    assert limited.limit == limited.most == 8


async def test_an_error_frees_its_slot() -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    limited = Limited(httpx.MockTransport(fail), 1)
    for _ in range(3):
        with pytest.raises(httpx.ConnectError):
            await asyncio.wait_for(limited.handle_async_request(REQUEST), 5)


async def test_urgent_requests_go_first() -> None:
    server = Server()
    limited = Limited(server, 1)
    plain = [httpx.Request("POST", f"http://nim/{n}") for n in range(3)]
    urgent = httpx.Request("POST", "http://nim/urgent", extensions={"urgent": True})
    tasks = [asyncio.create_task(limited.handle_async_request(one)) for one in (*plain, urgent)]
    await asyncio.sleep(0)
    order = []
    while server.waiting:
        order.append(server.waiting[0][0].url.path)
        await server.answer(200)
    await asyncio.gather(*tasks)
    assert order == ["/0", "/urgent", "/1", "/2"]


async def test_cancelled_requests_free_their_slots() -> None:
    server = Server()
    limited = Limited(server, 1)
    tasks = [asyncio.create_task(limited.handle_async_request(REQUEST)) for _ in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()  # waiting
    tasks[0].cancel()  # in flight
    await asyncio.sleep(0)
    tasks[2].cancel()  # just admitted
    await asyncio.gather(*tasks[:3], return_exceptions=True)
    await asyncio.sleep(0)
    server.waiting[-1][1].set_result(httpx.Response(200))
    assert (await tasks[3]).status_code == 200


async def test_a_slow_drip_ends_at_the_timeout() -> None:
    class Drip(httpx.AsyncByteStream):
        async def __aiter__(self):
            while True:
                await asyncio.sleep(0.01)
                yield b" "

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Drip())

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), timeout=5) as client:
        with pytest.raises(TimeoutError):
            await Sending(client, 0.1).handle_async_request(REQUEST)


@pytest.mark.parametrize("max_retries", [0, 2])
@pytest.mark.parametrize("outcome", [500, 429, httpx.ReadError("reset"), TimeoutError()])
async def test_the_last_outcome_stands_when_retries_are_used_up(
    max_retries: int, outcome: int | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared_engine.nim.transport.FIRST_WAIT", 0.0)
    sent = 0

    def answer(_: httpx.Request) -> httpx.Response:
        nonlocal sent
        sent += 1
        if isinstance(outcome, Exception):
            raise outcome
        return httpx.Response(outcome if sent > max_retries else 503)

    retrying = Retrying(httpx.MockTransport(answer), max_retries)
    if isinstance(outcome, Exception):
        with pytest.raises(type(outcome)):
            await retrying.handle_async_request(REQUEST)
    else:
        assert (await retrying.handle_async_request(REQUEST)).status_code == outcome
    assert sent == 1 + max_retries


async def test_a_success_after_a_retry_is_returned() -> None:
    statuses = iter([503, 429, 200, 500])
    headers = {"retry-after": "0"}
    busy = httpx.MockTransport(lambda _: httpx.Response(next(statuses), headers=headers))
    assert (await Retrying(busy, 5).handle_async_request(REQUEST)).status_code == 200
