"""What may go where: keys, proxies, the words of errors; and connections to whom."""

from __future__ import annotations

import json
import logging
import pickle
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from httpcore._backends.anyio import AnyIOStream
from pydantic import ValidationError

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import (
    AuthenticationError,
    ConfigurationError,
    ConnectionFailedError,
    Embedder,
    MissingExtraError,
    NeMoRetrieverError,
    Options,
)
from shared_engine.endpoints import find_proxy, is_safe_for_keys
from shared_engine.routing import select_backend
from tests.support import nim
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import MODEL, WIDTH, Nim, vectors
from tests.support.raw_server import RawServer, whole

KEY = "nvapi-this-is-secret"
KINDS = [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVIDIA_API_KEY", "NVIDIA_BASE_URL", *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)


def show(error: BaseException) -> str:
    """Return all that can be read on an error and on what led to it."""
    shown = ""
    seen: BaseException | None = error
    while seen is not None:
        shown += f"{seen!s}{seen!r}{vars(seen)}"
        if isinstance(seen, ValidationError):
            shown += f"{seen.errors()}{seen.json()}"
        seen = seen.__cause__ or seen.__context__
    return shown


# Keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["\n", "\r\n", " ", "\t", "\n\n"])
def test_a_key_is_the_same_with_space_around_it(
    kind: type[Options], space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("api_key", "nvidia_api_key"):
        options = kind(base_url="https://nim", **{name: f"{space}{KEY}{space}"})
        assert select_backend(options).api_key.get_secret_value() == KEY
    monkeypatch.setenv("NVIDIA_API_KEY", f"{KEY}{space}")
    assert select_backend(kind(base_url="https://nim")).api_key.get_secret_value() == KEY
    assert kind(default_headers={"x": f"a{space}"}).default_headers == {"x": "a"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given",
    [
        *({"api_key": f"{KEY}{letter}x"} for letter in "\n\r\0é\x7f"),
        *({"nvidia_api_key": f"{KEY}{letter}x"} for letter in "\n\r\0é\x7f"),
        *({"default_headers": {"x-key": f"{KEY}{letter}x"}} for letter in "\n\r\0é\x1b"),
        {"default_headers": {f"{KEY}:": "x"}},
        {"default_headers": {f"{KEY} x": "x"}},
        {"default_headers": {"": KEY}},
        {"default_headers": {"Content-Length": KEY}},
        {"default_headers": {"transfer-encoding": KEY}},
    ],
)  # fmt: skip
def test_what_no_header_can_carry_is_refused_at_once_and_not_shown(
    kind: type[Options], given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        kind(base_url="https://nim", **given)
    assert KEY not in show(caught.value)
    with pytest.raises(ValueError, match="header") as caught:
        kind.model_validate({"base_url": "https://nim", **given})
    assert KEY not in show(caught.value)


def test_a_key_of_the_environment_that_no_header_can_carry_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", f"{KEY}\nx")
    engine = Embedder(Options(base_url="https://nim"))
    with engine, pytest.raises(ConfigurationError, match="no header can carry") as caught:
        engine.embed(["a"])
    assert KEY not in show(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given",
    [
        {"key": KEY},
        {"model": [KEY]},
        {"timeout": KEY},
        {"truncate": KEY},
        {"api_key": [KEY]},
        {"default_headers": KEY},
        {"default_headers": {"x": [KEY]}},
        {"base_url": f"https://user:{KEY}@nim"},
        {"http_client_factory": KEY},
        {"verify_ssl": [KEY]},
    ],
)
def test_no_error_of_an_option_holds_what_was_given(
    kind: type[Options], given: dict[str, Any]
) -> None:
    for make in (lambda: kind(**given), lambda: kind.model_validate(given)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - it is what it holds that counts
            make()
        assert KEY not in show(caught.value)
        assert KEY not in str(pickle.dumps(str(caught.value)))


SENT = {"x-team": "search-team", "x-secret": "a b c d", "cookie": "session=hunter2"}


@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize("quoted", [f"Bearer {KEY}", KEY, *SENT.values()])
def test_no_error_holds_a_header_that_was_sent(
    status: int, quoted: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bodies: list[Any] = [
        {"error": f"your header {quoted} is wrong"},
        {"detail": [{"msg": quoted, "loc": ["body", quoted]}]},
        {"data": [{"index": quoted, "embedding": quoted}]},
        {"data": [{"index": 0, "embedding": quoted}]},
        {"data": [{"index": 0, "embedding": [quoted]}]},
        quoted,
        {"error": "x" * 990 + quoted},
    ]
    for body in bodies:
        headers = {"x-request-id": quoted, "location": f"https://nim/{quoted}"}
        answer = Nim(
            lambda r, sent, b=body, h=headers: (
                httpx.Response(status, text=b if isinstance(b, str) else json.dumps(b), headers=h)
                if sent
                else None
            )
        )
        options = {"base_url": "https://nim", "api_key": KEY, "default_headers": SENT}
        with answer.embedder(**options) as engine, pytest.raises(NeMoRetrieverError) as caught:
            engine.embed(["a"])
        assert quoted not in show(caught.value)
    assert quoted not in caplog.text


def test_the_headers_of_a_ready_client_are_not_told_either() -> None:
    def client() -> httpx.AsyncClient:
        refuse = httpx.MockTransport(lambda r: httpx.Response(401, json={"error": f"not {KEY}"}))
        return httpx.AsyncClient(transport=refuse, headers={"x-api-key": KEY})

    engine = Embedder(Options(base_url="https://nim", http_client_factory=client))
    with engine, pytest.raises(AuthenticationError, match=r"not \*\*\*"):
        engine.embed(["a"])


def test_a_reply_that_is_no_http_quotes_no_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shared_engine")

    async def respond(request: bytes, _: int) -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 what? " + request

    with RawServer(respond) as server:
        options = Options(base_url=server.url, api_key=KEY, max_retries=1, timeout=5.0)
        with Embedder(options) as engine, pytest.raises(ConnectionFailedError) as caught:
            engine.embed(["a"])
    assert KEY not in show(caught.value) + caplog.text


# Where a key may go


@pytest.mark.parametrize(
    ("host", "is_safe"),
    [
        *((host, False) for host in (
            "134744072", "0x08080808", "010.8.8.8", "8.8.2056", "0x8.8.8.8", "8.8.8.8.",
            "[::ffff:8.8.8.8]", "[::ffff:808:808]", "[64:ff9b::808:808]", "[2001:4860:4860::8888]",
            "[2002:808:808::1]", "evil.svc.attacker.com", "svc.attacker.com", "local.attacker.com",
            "localhost.attacker.com", "10.0.0.1.attacker.com", "evilsvc.com", "mylocalhost.com",
            "attacker.com.", "a.internal.com", "100.64.0.1", "198.18.0.1", "192.0.2.1", "240.0.0.1",
            "[2001:db8::1]", "[2001::1]", "[64:ff9b:1::808:808]", "[5f00::1]",
            "attacker\u3002com", "attacker\uff0ecom", "attacker\uff61com",
        )),
        *((host, True) for host in (
            "0.0.0.0", "[::]", "169.254.7.7", "172.31.0.1",
            "2130706433", "0x7f000001", "127.1", "127.0.0.1.", "[::1]",
            "[::ffff:127.0.0.1]", "[::ffff:10.1.2.3]", "167838211", "10.1.2.3", "192.168.0.1",
            "[fd00::1]", "[fe80::1]", "localhost", "LOCALHOST.", "nim", "nim.localhost", "nim.lan",
            "nim.team.svc", "nim.team.svc.cluster.local", "nim.team.svc.cluster.local.",
            "host.docker.internal",
        )),
    ],
)  # fmt: skip
def test_a_key_goes_unencrypted_to_private_hosts_only(host: str, is_safe: bool) -> None:
    assert is_safe_for_keys(f"http://{host}:8000/v1") is is_safe
    assert is_safe_for_keys(f"https://{host}/v1")
    server = Nim()
    with server.embedder(base_url=f"http://{host}:8000", api_key=KEY) as engine:
        if is_safe:
            engine.embed(["a"])
        else:
            with pytest.raises(ConfigurationError, match=r"unencrypted|cannot be used"):
                engine.embed(["a"])
    assert bool(server.requests) is is_safe


@pytest.mark.parametrize("host", ["0177.0.0.1", "1.2.3.256", "ä" * 70])
def test_an_address_that_is_none_is_refused(host: str) -> None:
    with Nim().embedder(base_url=f"http://{host}") as engine, pytest.raises(ConfigurationError):
        engine.embed(["a"])


@pytest.mark.parametrize("name", ["X-Api-Key", "api-key", "Cookie", "X-Auth-Token", "secret"])
def test_a_header_that_is_a_key_by_its_name_is_kept_as_one(name: str) -> None:
    server = Nim()
    given = {"base_url": "http://nim.example.com", "default_headers": {name: KEY}}
    with server.embedder(**given) as engine, pytest.raises(ConfigurationError, match="unencrypted"):
        engine.embed(["a"])
    assert server.requests == []
    with server.embedder(**given, allow_insecure_key=True) as engine:
        engine.embed(["a"])
    with server.embedder(**{**given, "default_headers": {"x-team": "search"}}) as engine:
        engine.embed(["a"])


@pytest.mark.parametrize(("peer", "is_safe"), [("127.0.0.1", True), ("8.8.8.8", False)])
def test_what_a_name_resolves_to_is_looked_at_before_the_key_is_sent(
    peer: str, is_safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyNim() as server:
        server.models = [{"id": MODEL}]

        def say(stream: object, name: str) -> object:
            return (peer, 80) if name == "server_addr" else get_extra_info(stream, name)

        get_extra_info = AnyIOStream.get_extra_info
        monkeypatch.setattr(AnyIOStream, "get_extra_info", say)
        resolve = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: resolve("127.0.0.1", *a, **k)
        )
        options = {"model": MODEL, "base_url": f"http://nim:{server.port}", "max_retries": 0}
        with Embedder(Options(api_key=KEY, **options)) as engine:
            if is_safe:
                assert engine.embed(["a"]).shape == (1, WIDTH)
            else:
                with pytest.raises(ConfigurationError, match=r"unencrypted to 8\.8\.8\.8"):
                    engine.embed(["a"])
                assert server.seen == []
        for given in ({}, {"api_key": KEY, "allow_insecure_key": True}):
            with Embedder(Options(**options, **given)) as engine:
                assert engine.embed(["a"]).shape == (1, WIDTH)


# Proxies


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_a_key_goes_through_no_plain_proxy_of_the_environment(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": "nvidia/m", "base_url": "http://nim.internal", "max_retries": 0}
    with FaultyNim() as proxy:
        monkeypatch.setenv(variable, proxy.url)
        refused = pytest.raises(ConfigurationError, match=r"through .*the environment's proxy")
        with Embedder(Options(api_key=KEY, **options)) as engine, refused:
            engine.embed(["a"])
        assert proxy.seen == []
        for given in ({"allow_insecure_key": True}, {"proxy": proxy.url}):
            with Embedder(Options(api_key=KEY, **options, **given)) as engine:
                assert engine.embed(["a"]).shape == (1, WIDTH)
        assert proxy.seen[-1].headers["authorization"] == f"Bearer {KEY}"
        monkeypatch.setenv("NVIDIA_API_KEY", KEY)  # one that nobody gave is left out instead
        with Embedder(Options(**options)) as engine:
            assert engine.embed(["a"]).shape == (1, WIDTH)
        assert "authorization" not in proxy.seen[-1].headers
    for wrong in ("http://8.8.8.8:3128", "http://134744072:3128", "http://proxy.example.com"):
        engine = Embedder(Options(api_key=KEY, proxy=wrong, **options))
        with engine, pytest.raises(ConfigurationError, match="to the proxy"):
            engine.embed(["a"])


@pytest.mark.parametrize(
    ("url", "no_proxy", "expected"),
    [
        ("http://nim.example.com/v1", "", "http://proxy:3128"),
        ("https://nim.example.com/v1", "", "http://secure:3128"),
        ("http://localhost:8000/v1", "", None),
        ("http://nim.localhost/v1", "", None),
        ("http://127.0.0.1:8000/v1", "", None),
        ("http://127.8.9.1/v1", "", None),
        ("http://2130706433/v1", "", None),
        ("https://[::1]:8000/v1", "", None),
        ("http://[::ffff:127.0.0.1]/v1", "", None),
        ("http://10.1.2.3/v1", "10.0.0.0/8", None),
        ("http://10.1.2.3/v1", "192.168.0.0/16, 10.1.2.3", None),
        ("http://10.1.2.3/v1", "192.168.0.0/16", "http://proxy:3128"),
        ("http://[fd00::7]:8000/v1", "fd00::/8", None),
        ("http://[fd00::7]:8000/v1", "[fd00::7]", None),
        ("http://nim.team.example/v1", "team.example", None),
        ("http://nim.team.example/v1", ".example", None),
        ("http://nim.team.example:8000/v1", "nim.team.example:8000", None),
        ("http://nim.team.example/v1", "*", None),
        ("http://nim.team.example/v1", "other.example,10.0.0.0/8", "http://proxy:3128"),
    ],
)
def test_which_proxy_of_the_environment(
    url: str, no_proxy: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_proxy(url) is None
    monkeypatch.setenv("http_proxy", "proxy:3128")
    monkeypatch.setenv("https_proxy", "http://secure:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert find_proxy(url) == expected


@pytest.mark.parametrize("where", ["option", "environment"])
def test_a_socks_proxy_needs_a_package_and_says_which(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    given = {"proxy": "socks5://user:hunter2@proxy:1080"} if where == "option" else {}
    monkeypatch.setenv("all_proxy", "socks5://user:hunter2@proxy:1080")
    engine = Embedder(Options(base_url="https://nim", **given))
    needed = pytest.raises(MissingExtraError, match=r"proxy:1080.*pip install 'httpx\[socks\]'")
    with engine, needed as caught:
        engine.embed(["a"])
    assert "hunter2" not in show(caught.value)


@pytest.mark.parametrize(
    "proxy", ["gopher://proxy", "proxy", "http://", "http://u:hunter2@proxy:port", "http://["]
)
def test_a_proxy_that_cannot_be_one_is_refused_without_its_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Embedder(Options(base_url="https://nim", proxy=proxy))
    with engine, pytest.raises(ConfigurationError, match="proxy") as caught:
        engine.embed(["a"])
    assert "hunter2" not in show(caught.value)
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)
    engine = Embedder(Options(base_url="http://nim", proxy=proxy))
    with engine, pytest.raises(ConfigurationError, match="proxy") as caught:
        engine.embed(["a"])
    assert "hunter2" not in show(caught.value)


@pytest.mark.parametrize("target", ["http://nim.example.com", "https://nim.example.com"])
def test_an_error_of_a_proxy_names_it(target: str) -> None:
    async def refuse(request: bytes, _: int) -> AsyncIterator[bytes]:
        yield whole(b"I do not know " + request, 407)

    options = {"base_url": target, "max_retries": 0, "timeout": 5.0}
    with RawServer(refuse) as proxy:
        address = proxy.url.removeprefix("http://")
        engine = Embedder(Options(proxy=f"http://user:hunter2@{address}", **options))
        with engine, pytest.raises(NeMoRetrieverError, match="proxy") as caught:
            engine.embed(["a"])
        assert "hunter2" not in show(caught.value)
        assert "dXNlcjpodW50ZXIy" not in show(caught.value)
        assert address in str(caught.value)
    engine = Embedder(Options(proxy=f"http://user:hunter2@{address}", **options))
    down = pytest.raises(ConnectionFailedError, match=f"through the proxy http://{address}")
    with engine, down as caught:
        engine.embed(["a"])
    assert "hunter2" not in show(caught.value)


def test_a_ready_client_decides_about_proxies_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example.com")
    server = Nim()
    with server.embedder(base_url="http://10.0.0.1", api_key=KEY) as engine:
        np.testing.assert_allclose(engine.embed(["a"]), vectors(["a"]), atol=1e-6)
    assert server.bodies[0]["model"] == nim.MODEL
