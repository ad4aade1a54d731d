"""Several addresses of one server: balanced, a dead one rested, and the key's rules for each."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import (
    AuthenticationError,
    ConfigurationError,
    ConnectionFailedError,
    Embedder,
    Options,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
)
from shared_engine.cli.check import check
from shared_engine.endpoints import HOSTED, find_exposure, is_hosted
from shared_engine.nim import transport
from shared_engine.routing import select_backend
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import MODEL, Nim, vectors

KEY = "nvapi-this-is-secret"
KINDS = [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding]
TEXTS = [f"text {i} of two thousand" for i in range(2000)]
BOTH = "http://nim-a:8000/v1,http://nim-b:8000/v1"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVIDIA_API_KEY", "NVIDIA_BASE_URL", "http_proxy", "HTTP_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transport, "FIRST_REST", 0.05)
    monkeypatch.setattr(transport, "LONGEST_REST", 0.2)


@contextmanager
def replicas(n: int, latency: float = 0.01) -> Iterator[list[FaultyNim]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FaultyNim(latency=latency)) for _ in range(n)]


def embedder(nims: list[FaultyNim], **options: Any) -> Embedder:
    options = {"max_retries": 0, "max_batch_size": 10, "concurrency": 4, **options}
    return Embedder(Options(model="nvidia/m", base_url=[nim.url for nim in nims], **options))


def assert_right_and_once(nims: list[FaultyNim], out: np.ndarray) -> None:
    np.testing.assert_allclose(out, vectors(TEXTS), atol=1e-6)
    answered = sum((nim.answered for nim in nims[1:]), nims[0].answered)
    assert set(answered) == set(TEXTS)
    assert set(answered.values()) == {1}, "a text was sent again after its vector had arrived"


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.002)


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Let something happen to the servers meanwhile."""
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


# How they are given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given",
    [
        BOTH,
        "http://nim-b:8000 , http://nim-a:8000/",
        ["http://nim-b:8000", "http://nim-a:8000/v1"],
        ("http://nim-a:8000", "http://nim-b:8000/v1/", "http://nim-b:8000"),
        ["http://nim-b:8000,", "http://nim-a:8000"],
    ],
)
def test_the_same_addresses_are_one_value(
    kind: type[Options], given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = kind(base_url=given)
    assert options.base_url == BOTH
    assert kind(nvidia_base_url=given).base_url == BOTH
    assert pickle.loads(pickle.dumps(options)).base_url == BOTH
    assert options.model_dump()["base_url"] == BOTH
    assert select_backend(options).base_url == BOTH
    if isinstance(given, str):
        monkeypatch.setenv("NVIDIA_BASE_URL", given)
        assert select_backend(kind()).base_url == BOTH


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrong",
    [
        "ftp://b",
        "b:8000",
        f"http://user:{KEY}@b",
        f"http://b?key={KEY}",
        "http://b/v1/models",
        "http://[b",
        HOSTED,
    ],
)
def test_each_address_is_checked_and_no_secret_shown(kind: type[Options], wrong: str) -> None:
    for given in (f"http://a,{wrong}", [wrong, "http://a"]):
        with pytest.raises(ConfigurationError, match="base_url") as caught:
            kind(base_url=given)
        assert KEY not in f"{caught.value}{caught.value.__context__}{caught.value.__cause__}"


@pytest.mark.parametrize("wrong", ["", ",", " , ", [], [""], ["http://a", 1], [["http://a"]], 1])
def test_no_address_is_an_error(wrong: Any) -> None:
    with pytest.raises((ConfigurationError, ValidationError)):
        Options(base_url=wrong)


def test_the_description_and_the_cache_key_cover_all() -> None:
    server = Nim()
    given = {"a": "http://nim-a:8000", "both": BOTH, "turned": ",".join(BOTH.split(",")[::-1])}
    keys = {}
    for name, base_url in given.items():
        with server.embedder(base_url=base_url) as engine:
            keys[name] = engine.cache_key("document")
            engine.embed(["a"])
            for url in base_url.split(","):
                assert url in engine.description
    assert keys["a"] != keys["both"] == keys["turned"]


# Balance


def test_the_load_is_even_and_every_row_right() -> None:
    with replicas(3, 0.05) as nims, embedder(nims) as engine:
        assert_right_and_once(nims, engine.embed(TEXTS))
        shares = [len(nim.embedded) for nim in nims]
        assert sum(shares) == 200
        assert min(shares) >= 30, shares
        assert max(nim.most_in_flight for nim in nims) <= 4, "the limit is one of each address"


def test_a_slow_address_gets_less() -> None:
    with replicas(2) as nims, embedder(nims) as engine:
        nims[0].latency = 0.3
        assert_right_and_once(nims, engine.embed(TEXTS))
        assert len(nims[0].embedded) < len(nims[1].embedded) / 2


# Death


def test_nothing_is_lost_when_one_dies_for_good(caplog: pytest.LogCaptureFixture) -> None:
    with replicas(3) as nims, embedder(nims) as engine:

        def kill() -> None:
            wait_for(lambda: len(nims[1].embedded) >= 10)
            nims[1].down()

        with beside(kill):
            out = engine.embed(TEXTS)
        assert_right_and_once(nims, out)
        assert f"{nims[1].url}/v1 rests for" in caplog.text
        assert caplog.records[0].levelno == logging.WARNING


def test_nothing_is_lost_when_each_is_restarted_in_turn() -> None:
    with replicas(3) as nims, embedder(nims) as engine:

        def restart() -> None:
            for nim in nims:
                seen = len(nim.embedded)
                wait_for(lambda nim=nim, seen=seen: len(nim.embedded) >= seen + 5)  # type: ignore[misc]
                nim.down()
                time.sleep(0.1)
                nim.up()

        with beside(restart):
            out = asyncio.run(engine.aembed(TEXTS))
        assert_right_and_once(nims, out)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_nothing_is_lost_when_one_says_that_it_cannot_serve(status: int) -> None:
    with replicas(2) as nims, embedder(nims) as engine:
        nims[0].answer = lambda _: (status, {"Retry-After": "30"}, b"draining")
        assert_right_and_once(nims, engine.embed(TEXTS))
        assert len(nims[0].embedded) <= 4, "it was asked before the time that it had said"


def test_one_that_comes_back_gets_its_share_again() -> None:
    with replicas(2) as nims, embedder(nims) as engine:
        nims[0].down()
        engine.embed(TEXTS[:200])
        assert not nims[0].embedded
        nims[0].up()
        wait_for(lambda: bool(engine.embed(TEXTS[:10]).all() and nims[0].embedded))
        seen = [len(nim.embedded) for nim in nims]
        engine.embed(TEXTS)
        shares = [len(nim.embedded) - before for nim, before in zip(nims, seen, strict=True)]
        assert min(shares) >= 50, shares


def test_where_none_is_left_the_error_names_all() -> None:
    with replicas(3) as nims, embedder(nims) as engine:
        engine.embed(["a"])
        for nim in nims:
            nim.down()
        with pytest.raises(ConnectionFailedError) as caught:
            engine.embed(TEXTS[:100])
        assert all(nim.url in str(caught.value) for nim in nims)
        for nim in nims:
            nim.up()
        np.testing.assert_allclose(engine.embed(["a"]), vectors(["a"]), atol=1e-6)


def test_where_all_are_down_for_a_while_the_callers_retries_are_used() -> None:
    with replicas(2) as nims, embedder(nims, max_retries=5) as engine:

        def kill() -> None:
            wait_for(lambda: len(nims[1].embedded) >= 5)
            for nim in nims:
                nim.down()
            time.sleep(0.3)
            for nim in nims:
                nim.up()

        with beside(kill):
            out = engine.embed(TEXTS)
        assert_right_and_once(nims, out)


def test_one_that_hangs_is_left_at_the_timeout() -> None:
    with replicas(2) as nims, embedder(nims, timeout=0.5) as engine:
        nims[0].latency = 60.0
        assert_right_and_once(nims, engine.embed(TEXTS))
        nims[1].latency = 60.0
        with pytest.raises(RequestTimeoutError):
            engine.embed(["a"])


def test_too_many_requests_at_one_address_go_to_another() -> None:
    with replicas(2) as nims, embedder(nims) as engine:
        nims[0].answer = lambda _: (429, {"Retry-After": "30"}, b"{}")
        assert_right_and_once(nims, engine.embed(TEXTS))
        nims[1].answer = nims[0].answer
        with pytest.raises(RateLimitError):
            engine.embed(["a"])


def test_an_error_says_which_address_replied() -> None:
    with replicas(2) as nims, embedder(nims) as engine:
        for nim in nims:
            nim.answer = lambda _: (500, {}, b"no memory")
        with pytest.raises(ServerError, match=r"no memory.*\[by http://127.0.0.1:\d+/v1\]"):
            engine.embed(["a"])


def test_any_that_is_ready_will_do() -> None:
    with replicas(2) as nims, embedder(nims) as engine:
        nims[0].down()
        nims[1].ready = False
        with pytest.raises(RequestTimeoutError, match=nims[0].url):
            engine.wait_until_ready(0.2)
        nims[1].ready = True
        engine.wait_until_ready(5.0)
        assert engine.embed(["a"]).shape[0] == 1


def test_an_address_with_another_model_is_no_replica() -> None:
    def say(request: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if request.url.host == "nim-b" and body:
            body["dimensions"] = 8
        return None

    with Nim(say).embedder(base_url=BOTH, max_batch_size=1) as engine:
        out = engine.embed(TEXTS[:20])  # what a replica of another width sent is asked for again
    width = out.shape[1]
    expected = vectors(TEXTS[:20])[:, :width]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(out, expected, atol=1e-6)


# Keys, proxies, cookies: the rules of one address, for each


def test_a_key_is_sent_nowhere_where_one_of_the_ways_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for one, other in (("https://nim", "http://nim.example.com"), ("http://a", "http://8.8.8.8")):
        server = Nim()
        for urls in ([one, other], [other, one]):
            options = {"base_url": urls, "http_client_factory": server.client}
            refused = pytest.raises(ConfigurationError, match=f"unencrypted to {other}/v1;")
            with Embedder(Options(api_key=KEY, **options)) as engine, refused:
                engine.embed(["a"])
            monkeypatch.setenv("NVIDIA_API_KEY", KEY)
            assert select_backend(Options(**options)).api_key is None
            monkeypatch.delenv("NVIDIA_API_KEY")
        assert not server.requests
    with server.embedder(base_url=BOTH, api_key=KEY) as engine:
        engine.embed(["a"])
        engine.embed(["a"])
    sent = {request.url.host: request.headers["authorization"] for request in server.requests}
    assert sent == dict.fromkeys(("nim-a", "nim-b"), f"Bearer {KEY}")


def test_the_rules_look_at_every_address() -> None:
    urls = ["https://a.example/v1", "http://b/v1", "http://c.example/v1"]
    assert find_exposure(",".join(urls[:2])) is None
    assert find_exposure(",".join(urls)) == "to http://c.example/v1"
    assert is_hosted(f"http://a/v1,{HOSTED}")


def test_each_address_has_its_own_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with replicas(2) as (direct, proxy):
        monkeypatch.setenv("http_proxy", proxy.url)
        urls = [direct.url, "http://nim.example.com"]
        options = Options(base_url=urls, model="nvidia/m", max_retries=0)
        with Embedder(options) as engine:
            for _ in range(4):
                engine.embed(["a"])
        assert {one.headers["host"] for one in direct.seen} == {direct.url.removeprefix("http://")}
        assert {one.headers["host"] for one in proxy.seen} == {"nim.example.com"}
        options = options.replace(base_url=[direct.url, "http://nim"], api_key=KEY)
        refused = pytest.raises(ConfigurationError, match="the environment's proxy")
        with Embedder(options) as engine, refused:
            engine.embed(["a"])


def test_no_address_gets_the_cookies_or_the_host_of_another() -> None:
    def say(request: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        hosts.append((request.url.host, request.headers["host"], request.headers.get("cookie")))
        if request.method == "POST":
            return None
        cookie = {"set-cookie": f"of={request.url.host}"}
        return httpx.Response(200, json={"data": [{"id": MODEL}]}, headers=cookie)

    hosts: list[tuple[str, str, str | None]] = []
    with Nim(say).embedder(base_url=BOTH) as engine:
        for _ in range(4):
            engine.list_models()
            engine.embed(["a"])
    assert {(host, header) for host, header, _ in hosts} == {
        ("nim-a", "nim-a:8000"),
        ("nim-b", "nim-b:8000"),
    }
    assert {(host, cookie) for host, _, cookie in hosts if cookie} <= {
        ("nim-a", "of=nim-a"),
        ("nim-b", "of=nim-b"),
    }
    assert any(cookie for *_, cookie in hosts)


def test_what_any_address_quotes_of_the_key_is_masked() -> None:
    with replicas(2) as nims, embedder(nims, api_key=KEY) as engine:
        for nim in nims:
            nim.answer = lambda _: (401, {}, f"who is {KEY}?".encode())
        for nim in nims:
            with pytest.raises(AuthenticationError, match=r"who is \*\*\*\?"):
                engine.embed(["a"])
            assert nim.seen


def test_check_asks_each_address(capsys: pytest.CaptureFixture[str]) -> None:
    with replicas(2) as nims:
        assert check(None, f"{nims[0].url},{nims[1].url}")
        said = capsys.readouterr().out
        assert all(f"{nim.url}/v1/models: 200" in said for nim in nims)
