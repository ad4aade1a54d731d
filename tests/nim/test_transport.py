"""The decision to retry, and the limit of requests in flight, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shared_engine.nim import transport
from shared_engine.nim.reading import MOST_BYTES
from shared_engine.nim.transport import (
    FIRST_REST,
    LONGEST_REST,
    LONGEST_WAIT,
    Balanced,
    Retrying,
    Sending,
    _Place,
    is_retried,
    wait_before_retry,
)

REQUEST = httpx.Request("POST", "http://nim/v1/embeddings", extensions={MOST_BYTES: 1000})


def test_only_statuses_that_can_get_better_are_retried() -> None:
    again = {status for status in range(200, 600) if wait_before_retry(0, 5, status) is not None}
    assert again == {408, 429, *range(500, 600)} == set(filter(is_retried, range(600)))


@pytest.mark.parametrize(
    ("error", "again"),
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
def test_only_faults_of_the_connection_are_retried(error: Exception, again: bool) -> None:
    assert (wait_before_retry(0, 5, error) is not None) is again


def test_waits_grow_spread_and_end() -> None:
    waits = [wait_before_retry(attempt, 20, 503, chance=0.5) for attempt in range(21)]
    assert waits[-1] is None
    numbers = [wait for wait in waits if wait is not None]
    assert numbers == sorted(numbers)
    assert max(numbers) <= LONGEST_WAIT
    spread = {wait_before_retry(3, 20, 503, chance=chance / 10) for chance in range(10)}
    assert len(spread) == 10


def test_never_earlier_than_the_server_asked() -> None:
    for chance in (0.0, 0.5, 1.0):
        wait = wait_before_retry(0, 5, 429, retry_after=2.0, chance=chance)
        assert wait is not None
        assert 2.0 <= wait <= 2.5


class Server(httpx.AsyncBaseTransport):
    """Answers when told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[httpx.Request, asyncio.Future[httpx.Response]]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        future: asyncio.Future[httpx.Response] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        return await future

    async def answer(self, *statuses: int) -> None:
        for status in statuses:
            self.waiting.pop(0)[1].set_result(httpx.Response(status))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_the_limit_halves_once_for_a_set_in_flight_and_recovers() -> None:
    server = Server()
    limited = Balanced([server], 8)
    tasks = [asyncio.create_task(limited.handle_async_request(REQUEST)) for _ in range(40)]
    await asyncio.sleep(0)
    assert len(server.waiting) == 8
    await server.answer(429, 429, 503)  # three of one set
    assert limited.limit == 4
    assert len(server.waiting) == 5, "no new request while more are in flight than the limit"
    await server.answer(200, 200)
    assert len(server.waiting) == 4
    while server.waiting:
        await server.answer(200)
    await asyncio.gather(*tasks)
    assert limited.limit == 8


async def test_urgent_requests_go_first() -> None:
    server = Server()
    limited = Balanced([server], 1)
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


async def test_cancelled_requests_give_their_place_back() -> None:
    server = Server()
    limited = Balanced([server], 1)
    tasks = [asyncio.create_task(limited.handle_async_request(REQUEST)) for _ in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()  # waiting
    tasks[0].cancel()  # in flight
    await asyncio.sleep(0)
    tasks[2].cancel()  # just let in
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


async def test_the_last_reply_is_returned_when_retries_are_used_up() -> None:
    statuses = iter([503, 429, 500, 200])

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(next(statuses), headers={"retry-after": "0"})

    retrying = Retrying(httpx.MockTransport(answer), 2)
    assert (await retrying.handle_async_request(REQUEST)).status_code == 500


# Several addresses


def refused() -> httpx.ConnectError:
    return httpx.ConnectError("refused")


class Replica(httpx.AsyncBaseTransport):
    """Comes to one outcome whatever it is sent, until told otherwise."""

    def __init__(self, outcome: int | Callable[[], Exception], after: str | None = None) -> None:
        self.outcome = outcome
        self.after = after
        self.sent = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent += 1
        await asyncio.sleep(0)
        if not isinstance(self.outcome, int):
            raise self.outcome()
        headers = {} if self.after is None else {"retry-after": self.after}
        return httpx.Response(self.outcome, headers=headers)


async def status_of(transport: httpx.AsyncBaseTransport) -> int:
    return (await transport.handle_async_request(REQUEST)).status_code


async def test_a_request_goes_where_the_fewest_are_in_flight() -> None:
    servers = [Server() for _ in range(3)]
    balanced = Balanced(servers, 4)
    assert balanced.limit == balanced.most == 12

    async def send(n: int) -> None:
        tasks.extend(asyncio.create_task(status_of(balanced)) for _ in range(n))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    tasks: list[asyncio.Task[int]] = []
    await send(6)
    assert [len(server.waiting) for server in servers] == [2, 2, 2]
    await servers[1].answer(200, 200)
    await send(3)
    assert [len(server.waiting) for server in servers] in ([2, 3, 2], [2, 2, 3], [3, 2, 2])
    await send(20)
    assert [len(server.waiting) for server in servers] == [4, 4, 4]
    while any(server.waiting for server in servers):
        for server in servers:
            await server.answer(*[200] * len(server.waiting))
    assert await asyncio.gather(*tasks) == [200] * 29


async def test_one_after_the_other_they_take_turns() -> None:
    replicas = [Replica(200) for _ in range(3)]
    balanced = Balanced(replicas, 4)
    for _ in range(12):
        await status_of(balanced)
    assert [replica.sent for replica in replicas] == [4, 4, 4]


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("max_retries", [0, 2])
@pytest.mark.parametrize(
    "outcome", [refused, lambda: httpx.ReadError("reset"), TimeoutError, 429, 502, 503, 504, 529]
)
async def test_a_request_is_sent_at_most_once_to_each_address_per_attempt(
    replicas: int, max_retries: int, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.0)
    servers = [Replica(outcome) for _ in range(replicas)]
    retrying = Retrying(Balanced(servers, 4), max_retries)
    if isinstance(outcome, int):
        assert await status_of(retrying) == outcome
    else:
        with pytest.raises(type(outcome())):
            await status_of(retrying)
    sent = [server.sent for server in servers]
    assert min(sent) >= (1 if replicas <= 1 + max_retries or max_retries == 0 else 0)
    assert max(sent) <= 1 + max_retries
    if not isinstance(outcome, int):
        assert sum(sent) == replicas * (1 + max_retries)


@pytest.mark.parametrize(
    "outcome", [200, 400, 401, 404, 422, 500, 501, lambda: httpx.UnsupportedProtocol("ftp")]
)
async def test_what_another_address_cannot_change_is_the_outcome(outcome: Any) -> None:
    servers = [Replica(outcome), Replica(outcome)]
    if isinstance(outcome, int):
        assert await status_of(Balanced(servers, 4)) == outcome
    else:
        with pytest.raises(httpx.UnsupportedProtocol):
            await status_of(Balanced(servers, 4))
    assert sum(server.sent for server in servers) == 1


@pytest.mark.parametrize("outcome", [refused, TimeoutError, 502, 503, 504])
async def test_an_address_that_is_down_rests_and_one_request_finds_it_back(
    outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "FIRST_REST", 0.05)
    down, well = Replica(outcome), Replica(200)
    balanced = Balanced([down, well], 50)
    assert set(await asyncio.gather(*(status_of(balanced) for _ in range(8)))) == {200}
    seen = down.sent
    assert seen <= 4
    for _ in range(5):
        assert await status_of(balanced) == 200
    assert down.sent == seen, "it was asked while it rested"
    await asyncio.sleep(0.06)
    assert set(await asyncio.gather(*(status_of(balanced) for _ in range(8)))) == {200}
    assert down.sent == seen + 1, "more than one request found out that it is still down"
    down.outcome = 200
    await asyncio.sleep(0.11)
    for _ in range(10):
        assert await status_of(balanced) == 200
    assert down.sent >= seen + 5, "it did not get its share back"


async def test_rests_grow_to_a_bound_and_are_as_long_as_asked_for() -> None:
    place = _Place(Replica(200), 4)
    rests = [place.learn(refused(), 0, rest) for rest in range(12)]
    assert rests == [min(LONGEST_REST, FIRST_REST * 2**n) for n in range(12)]
    assert place.learn(refused(), 0, 3) == 0.0, "it had been sent before"
    place.learn(httpx.Response(200), 0, place.rests)
    assert place.learn(refused(), 0, place.rests) == FIRST_REST

    def ask(seconds: str) -> float:
        reply = httpx.Response(503, headers={"retry-after": seconds})
        return _Place(Replica(200), 4).learn(reply, 0, 0)

    assert [ask("20"), ask("0"), ask("3600")] == [20.0, FIRST_REST, LONGEST_WAIT]


async def test_one_address_alone_never_rests() -> None:
    replica = Replica(refused)
    balanced = Balanced([replica], 4)
    for n in range(1, 20):
        with pytest.raises(httpx.ConnectError):
            await status_of(balanced)
        assert replica.sent == n
    replica.outcome = 200
    assert await status_of(balanced) == 200


async def test_too_many_at_one_address_is_no_matter_of_the_others() -> None:
    busy, well = Replica(429, after="3600"), Replica(200)
    balanced = Balanced([busy, well], 8)
    assert set(await asyncio.gather(*(status_of(balanced) for _ in range(8)))) == {200}
    assert balanced.limit == 4 + 8


async def test_an_address_that_hangs_holds_nobody_up() -> None:
    hanging, well = Server(), Replica(200)
    balanced = Balanced([hanging, well], 2)
    tasks = [asyncio.create_task(status_of(balanced)) for _ in range(50)]
    _, pending = await asyncio.wait(tasks, timeout=2)
    assert len(pending) == 2, "all but what it holds"
    for task in pending:
        task.cancel()
    await asyncio.wait(pending)


async def test_what_is_cancelled_on_its_way_to_another_address_gives_its_place_back() -> None:
    dead, server = Replica(refused), Server()
    balanced = Balanced([dead, server], 1)
    tasks = [asyncio.create_task(status_of(balanced)) for _ in range(5)]
    for _ in range(20):
        await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    tasks[0].cancel()
    await asyncio.gather(*tasks[:4], return_exceptions=True)
    for _ in range(20):
        await asyncio.sleep(0)
    server.waiting[-1][1].set_result(httpx.Response(200))
    assert await tasks[4] == 200
