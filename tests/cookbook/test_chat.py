"""The demos' language model at a server: which one is asked, and where the key goes."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterator

import chat
import pytest

from shared_engine import ConfigurationError
from tests.support.chat_server import ChatServer, serve_chat

KEY = "nvapi-hunter2-hunter2"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVIDIA_BASE_URL", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serve_chat() as server:
        yield server


def test_the_key_alone_selects_no_server() -> None:
    assert chat.choose_server(None, None) is None
    chosen = chat.choose_server(None, "meta/llama")
    assert chosen
    assert (chosen.url, chosen.model) == ("https://integrate.api.nvidia.com/v1", "meta/llama")


def test_the_catalogue_needs_a_key_and_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no default model"):
        chat.choose_server("https://integrate.api.nvidia.com", None)
    monkeypatch.delenv("NVIDIA_API_KEY")
    with pytest.raises(ConfigurationError, match="needs a key"):
        chat.choose_server(None, "meta/llama")


@pytest.mark.parametrize(
    ("url", "is_sent"),
    [
        ("https://llm.example.com/v1", True),
        ("http://127.0.0.1:8000", True),
        ("http://10.0.0.7:8000/v1", True),
        ("http://llm.example.com", False),
        ("http://8.8.8.8:8000/v1", False),
    ],
)
def test_the_key_travels_encrypted_or_to_private_addresses(
    url: str, is_sent: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = chat.choose_server(url, None)
    assert chosen
    assert chosen.url.endswith("/v1")
    assert (chosen.key is not None) == is_sent
    assert ("would travel unencrypted" in capsys.readouterr().out) == (not is_sent)
    assert KEY not in repr(chosen)


def test_a_name_that_resolves_to_a_public_address_gets_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    chosen = chat.choose_server("http://llm/v1", "a-model")
    assert chosen
    with pytest.raises(ConfigurationError, match=r"unencrypted to 8\.8\.8\.8"):
        chat.connect(chosen, 9)


def test_no_proxy_sees_what_is_sent_over_http(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_chat() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        chosen = chat.choose_server(server.url, None)
        assert chosen
        assert chat.connect(chosen, 9).invoke("colour?").text == "It is red [1]."
    assert proxy.keys == []
    assert server.keys == [f"Bearer {KEY}"] * 2
    assert server.asked[0]["model"] == "a-model"


@pytest.mark.parametrize("key", [f"{KEY}\nmore", f"{KEY}\u00e9"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", key)
    with pytest.raises(ConfigurationError, match="NVIDIA_API_KEY has a character") as raised:
        chat.choose_server("http://127.0.0.1:9", None)
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(("status", "reason"), [(401, "unwelcome"), (307, "redirects")])
def test_an_error_names_the_server_and_shows_no_key(
    server: ChatServer, status: int, reason: str
) -> None:
    chosen = chat.choose_server(server.url, "a-model")
    assert chosen
    model = chat.connect(chosen, 9)
    server.status = status
    for ask in (model.invoke, lambda text: list(model.stream(text))):
        with pytest.raises(ConnectionError, match=reason) as raised:
            ask("colour?")
        assert server.url in str(raised.value)
        assert "hunter2" not in "".join(traceback.format_exception(raised.value))
    assert len(server.asked) == 2, "no redirect is followed"


def test_a_model_that_the_server_has_not_is_named(server: ChatServer) -> None:
    chosen = chat.choose_server(server.url, "other")
    assert chosen
    with pytest.raises(ConnectionError, match="has no model other; it has a-model"):
        chat.connect(chosen, 9)
