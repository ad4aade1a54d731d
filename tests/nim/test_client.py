"""Keys, proxies and secrets in errors: what is sent to whom, and what is shown."""

from __future__ import annotations

import ipaddress
import json
import logging
import pickle
import socket
import sys
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
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
    MissingExtraError,
    NeMoRetrieverError,
    Options,
)
from shared_engine.nim import proxies
from shared_engine.nim.proxies import find_proxy, is_safe_for_keys
from shared_engine.routing import select_backend
from tests.support import nim
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import MODEL, WIDTH, Nim, vectors
from tests.support.raw_server import RawServer, whole

KEY = "nvapi-this-is-secret"
KINDS = [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding]


def show(error: BaseException) -> str:
    """Return the text and attributes of an error and of its causes."""
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
def test_space_around_a_key_is_removed(
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
def test_an_invalid_header_is_refused_and_not_shown(
    kind: type[Options], given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        kind(base_url="https://nim", **given)
    assert KEY not in show(caught.value)
    with pytest.raises(ValueError, match="header") as caught:
        kind.model_validate({"base_url": "https://nim", **given})
    assert KEY not in show(caught.value)


def test_an_invalid_key_of_the_environment_is_not_shown(
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
def test_no_error_of_an_option_shows_its_value(kind: type[Options], given: dict[str, Any]) -> None:
    for make in (lambda: kind(**given), lambda: kind.model_validate(given)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the test is about its content
            make()
        assert KEY not in show(caught.value)
        assert KEY not in str(pickle.dumps(str(caught.value)))


SENT = {"x-team": "search-team", "x-secret": "a b c d", "cookie": "session=hunter2"}


@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize("quoted", [f"Bearer {KEY}", KEY, *SENT.values()])
def test_no_error_shows_a_header_that_was_sent(
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


def test_the_headers_of_a_given_client_are_not_shown_either() -> None:
    def client() -> httpx.AsyncClient:
        refuse = httpx.MockTransport(lambda r: httpx.Response(401, json={"error": f"not {KEY}"}))
        return httpx.AsyncClient(transport=refuse, headers={"x-api-key": KEY})

    engine = Embedder(Options(base_url="https://nim", http_client_factory=client))
    with engine, pytest.raises(AuthenticationError, match=r"not \*\*\*"):
        engine.embed(["a"])


def test_an_invalid_http_reply_shows_no_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shared_engine")

    async def respond(request: bytes, _: int) -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 what? " + request

    with RawServer(respond) as server:
        options = Options(base_url=server.url, api_key=KEY, max_retries=1, timeout=5.0)
        with Embedder(options) as engine, pytest.raises(ConnectionFailedError) as caught:
            engine.embed(["a"])
    assert KEY not in show(caught.value) + caplog.text


# Where a key may be sent


@pytest.mark.parametrize(
    ("host", "is_safe"),
    [
        *((host, False) for host in (
            "8.8.8.8", "8.8.8.8.", "[::ffff:8.8.8.8]", "[64:ff9b::808:808]",
            "[2001:4860:4860::8888]", "evil.svc.attacker.com", "svc.attacker.com",
            "local.attacker.com", "localhost.attacker.com", "10.0.0.1.attacker.com", "evilsvc.com",
            "mylocalhost.com",
            "attacker.com.", "a.internal.com", "100.64.0.1",
        )),
        *((host, True) for host in (
            "0.0.0.0", "[::]", "169.254.7.7", "172.31.0.1",
            "[::1]", "[::ffff:127.0.0.1]", "[::ffff:10.1.2.3]", "10.1.2.3", "192.168.0.1",
            "[fd00::1]", "[fe80::1]", "localhost", "LOCALHOST.", "nim", "nim.localhost", "nim.lan",
            "nim.team.svc", "nim.team.svc.cluster.local", "nim.team.svc.cluster.local.",
            "host.docker.internal",
        )),
    ],
)  # fmt: skip
def test_a_key_is_sent_unencrypted_to_private_hosts_only(host: str, is_safe: bool) -> None:
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
def test_a_host_that_httpx_refuses_is_an_error(host: str) -> None:
    with Nim().embedder(base_url=f"http://{host}") as engine, pytest.raises(ConfigurationError):
        engine.embed(["a"])


@pytest.mark.parametrize("name", ["X-Api-Key", "api-key", "Cookie", "X-Auth-Token", "secret"])
def test_a_header_named_like_a_key_is_protected_like_one(name: str) -> None:
    server = Nim()
    given = {"base_url": "http://nim.example.com", "default_headers": {name: KEY}}
    with server.embedder(**given) as engine, pytest.raises(ConfigurationError, match="unencrypted"):
        engine.embed(["a"])
    assert server.requests == []
    with server.embedder(**given, allow_insecure_key=True) as engine:
        engine.embed(["a"])
    with server.embedder(**{**given, "default_headers": {"x-team": "search"}}) as engine:
        engine.embed(["a"])


@pytest.mark.parametrize("is_private", [True, False])
def test_the_resolved_address_is_checked_before_the_key_is_sent(
    is_private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyNim() as server:
        server.models = [{"id": MODEL}]
        resolve = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: resolve("127.0.0.1", *a, **k)
        )
        address = ipaddress.ip_address("127.0.0.1" if is_private else "8.8.8.8")
        monkeypatch.setattr(
            proxies, "parse_address", lambda host: None if host == "nim" else address
        )
        options = {"model": MODEL, "base_url": f"http://nim:{server.port}", "max_retries": 0}
        with Embedder(Options(api_key=KEY, **options)) as engine:
            if is_private:
                assert engine.embed(["a"]).shape == (1, WIDTH)
            else:
                for call in (lambda: engine.embed(["a"]), lambda: engine.wait_until_ready(60)):
                    with pytest.raises(ConfigurationError, match=r"unencrypted to 127\.0\.0\.1"):
                        call()
                assert server.seen == []
        for given in ({}, {"api_key": KEY, "allow_insecure_key": True}):
            with Embedder(Options(**options, **given)) as engine:
                assert engine.embed(["a"]).shape == (1, WIDTH)


def test_a_key_of_the_environment_is_withheld_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)
    server = Nim()
    with server.embedder(base_url="http://nim.example.com") as engine:
        engine.embed(["a"])
    assert all("authorization" not in request.headers for request in server.requests)
    assert "NVIDIA_API_KEY is not sent" in caplog.text
    assert "http://nim.example.com/v1" in caplog.text
    assert KEY not in caplog.text


# Proxies


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_an_http_address_uses_no_proxy_of_the_environment(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyNim() as server, FaultyNim() as proxy:
        monkeypatch.setenv(variable, proxy.url)
        with Embedder(Options(model="nvidia/m", base_url=server.url, api_key=KEY)) as engine:
            assert engine.embed(["a"]).shape == (1, WIDTH)
        assert server.embedded[-1].headers["authorization"] == f"Bearer {KEY}"
        assert proxy.seen == []


def test_a_key_takes_an_explicit_proxy_that_is_private() -> None:
    options = {"model": "nvidia/m", "base_url": "http://nim.internal", "max_retries": 0}
    with FaultyNim() as proxy:
        with Embedder(Options(api_key=KEY, proxy=proxy.url, **options)) as engine:
            np.testing.assert_allclose(engine.embed(["a"]), vectors(["a"]), atol=1e-6)
        assert proxy.seen[-1].headers["authorization"] == f"Bearer {KEY}"
        proxy.seen.clear()
        public = {**options, "base_url": "http://nim.example.com", "proxy": proxy.url}
        refused = pytest.raises(
            ConfigurationError, match=r"unencrypted to http://nim\.example\.com"
        )
        with Embedder(Options(api_key=KEY, **public)) as engine, refused:
            engine.embed(["a"])
        assert proxy.seen == []
        with Embedder(Options(api_key=KEY, allow_insecure_key=True, **public)) as engine:
            assert engine.embed(["a"]).shape == (1, WIDTH)


@pytest.mark.parametrize("proxy", ["http://8.8.8.8:3128", "http://proxy.example.com"])
def test_a_key_takes_no_public_http_proxy(proxy: str) -> None:
    engine = Embedder(Options(base_url="http://nim.internal", api_key=KEY, proxy=proxy))
    with engine, pytest.raises(ConfigurationError, match="unencrypted to http://"):
        engine.embed(["a"])


@pytest.mark.parametrize(
    ("url", "no_proxy", "expected"),
    [
        ("https://nim.example.com/v1", "", "http://secure:3128"),
        ("https://nim.example.com/v1", "other.example", "http://secure:3128"),
        ("https://nim.team.example/v1", "team.example", None),
        ("https://nim.team.example/v1", ".example", None),
        ("https://nim.team.example:8000/v1", "nim.team.example:8000", None),
        ("https://nim.team.example/v1", "*", None),
        ("https://10.1.2.3/v1", "10.1.2.3", None),
        ("http://nim.example.com/v1", "", None),
        ("http://localhost:8000/v1", "", None),
    ],
)
@pytest.mark.parametrize("variable", ["https_proxy", "all_proxy"])
def test_https_uses_the_proxy_of_the_environment(
    variable: str, url: str, no_proxy: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_proxy(url, None) is None
    monkeypatch.setenv(variable, "secure:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    found = find_proxy(url, None)
    assert (found and str(found.url)) == expected
    explicit = find_proxy(url, "http://explicit:3128")
    assert explicit is not None
    assert str(explicit.url) == "http://explicit:3128"


@pytest.mark.parametrize("where", ["option", "environment"])
def test_a_socks_proxy_without_its_package_is_an_error_with_the_pip_line(
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
def test_an_invalid_proxy_is_refused_without_its_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Embedder(Options(base_url="https://nim", proxy=proxy))
    with engine, pytest.raises(ConfigurationError, match="proxy") as caught:
        engine.embed(["a"])
    assert "hunter2" not in show(caught.value)
    monkeypatch.setenv("https_proxy", proxy if "://" in proxy else f"gopher://{proxy}")
    engine = Embedder(Options(base_url="https://nim"))
    with engine, pytest.raises(ConfigurationError, match="HTTPS_PROXY") as caught:
        engine.embed(["a"])
    assert "hunter2" not in show(caught.value)


@pytest.mark.parametrize("target", ["http://nim.example.com", "https://nim.example.com"])
def test_an_error_through_a_proxy_names_the_proxy(target: str) -> None:
    async def refuse(request: bytes, _: int) -> AsyncIterator[bytes]:
        yield whole(b"I do not know you", 407)

    options = {"base_url": target, "max_retries": 0, "timeout": 5.0}
    with RawServer(refuse) as proxy:
        address = proxy.url.removeprefix("http://")
        engine = Embedder(Options(proxy=f"http://user:hunter2@{address}", **options))
        with engine, pytest.raises(NeMoRetrieverError, match="proxy") as caught:
            engine.embed(["a"])
        assert "hunter2" not in show(caught.value)
        assert address in str(caught.value)
    engine = Embedder(Options(proxy=f"http://user:hunter2@{address}", **options))
    down = pytest.raises(ConnectionFailedError, match=f"through the proxy http://{address}")
    with engine, down as caught:
        engine.embed(["a"])
    assert "hunter2" not in show(caught.value)


def test_https_to_a_server_without_tls_is_explained() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"https://127.0.0.1:{server.server_port}"
        engine = Embedder(Options(base_url=url, verify_ssl=False))
        with engine, pytest.raises(ConnectionFailedError, match="use http://"):
            engine.embed(["a"])


def test_a_given_client_has_its_own_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "gopher://proxy.example.com")
    server = Nim()
    with server.embedder(base_url="https://nim", api_key=KEY) as engine:
        np.testing.assert_allclose(engine.embed(["a"]), vectors(["a"]), atol=1e-6)
    assert server.bodies[0]["model"] == nim.MODEL
