"""A language model at a server: LangChain's ChatNVIDIA under the engine's rules for keys.

The key of NVIDIA_API_KEY travels over https or to private addresses. Over http no proxy is used,
no redirect is followed, and no error shows the key. The variable alone selects no server.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from demo import show  # beside this file
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_nvidia_ai_endpoints import ChatNVIDIA
from pydantic import PrivateAttr, SecretStr

from shared_engine import ConfigurationError
from shared_engine.endpoints import HOSTED, check_header, is_hosted, normalize_url
from shared_engine.errors import first_line
from shared_engine.nim.client import list_secrets
from shared_engine.nim.proxies import find_exposure, parse_address

TIMEOUT = 60.0
"""Seconds without a byte of a reply."""
_NO_KEY = "none"  # ChatNVIDIA would read the environment itself


class Server(NamedTuple):
    """The address of a language model, and what it is asked with."""

    url: str
    model: str | None
    """None for the first one that the server offers."""
    key: SecretStr | None


def choose_server(url: str | None, model: str | None) -> Server | None:
    """Return the server of a language model, or None where neither argument is given.

    Args:
        url: Address of a NIM or another server; None with a model for NVIDIA's catalogue.
        model: Name of the model; None for the first one that the server offers.

    Raises:
        ConfigurationError: the address cannot be used, NVIDIA's catalogue lacks a key or the name
            of a model, or no header can carry the key.
    """
    if not (url or model):
        return None
    url = normalize_url(url, "--llm-url") if url else HOSTED
    if is_hosted(url) and not model:
        raise ConfigurationError("NVIDIA's catalogue has no default model; name one")
    key = os.environ.get("NVIDIA_API_KEY", "").strip()
    if not key:
        if is_hosted(url):
            raise ConfigurationError("NVIDIA's catalogue needs a key; set NVIDIA_API_KEY")
        return Server(url, model, None)
    check_header("authorization", key, "NVIDIA_API_KEY")
    if exposure := find_exposure(url, None):
        show("Key", f"NVIDIA_API_KEY is not sent: it would travel unencrypted to {exposure}")
        return Server(url, model, None)
    return Server(url, model, SecretStr(key))


def connect(server: Server, tokens: int) -> Chat:
    """Return the language model, which answers in at most `tokens` tokens.

    Raises:
        ConnectionError: no language model answers there, or it has another name.
    """
    key = server.key.get_secret_value() if server.key else _NO_KEY
    with _translate(server), warnings.catch_warnings(action="ignore"):  # of models unknown to it
        chat = Chat(
            base_url=server.url,
            model=server.model or "to be found",
            api_key=key,
            temperature=0,
            max_completion_tokens=tokens,
            timeout=TIMEOUT,
            usage_telemetry_enabled=False,
        )
        chat.guard(server)
        offered = [model.id for model in chat.available_models]
    if not offered:
        raise ConnectionError(f"the server at {server.url} has no language model")
    chat.model = server.model or offered[0]
    if chat.model not in offered:
        names = ", ".join(offered)
        raise ConnectionError(f"{server.url} has no model {chat.model}; it has {names}")
    return chat


class Chat(ChatNVIDIA):
    """ChatNVIDIA with sessions and errors that keep the key."""

    _server: Server = PrivateAttr()

    def guard(self, server: Server) -> None:
        """Send all requests in sessions for this server."""
        self._server = server
        self._client.get_session_fn = lambda: _open_session(server)

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        with _translate(self._server):
            return super()._generate(*args, **kwargs)

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        with _translate(self._server):
            yield from super()._stream(*args, **kwargs)


def _open_session(server: Server) -> requests.Session:
    parts = urlsplit(server.url)
    session = requests.Session()
    session.trust_env = parts.scheme == "https"  # a proxy could read what is sent over http
    session.max_redirects = 0
    if server.key and parts.scheme == "http":
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        for *_, (host, *_) in found:
            address = parse_address(str(host))
            if address is None or not address.is_private:
                raise ConfigurationError(
                    f"the key would travel unencrypted to {host}, the resolved address of the "
                    "server; use https, or unset NVIDIA_API_KEY"
                )
    return session


@contextmanager
def _translate(server: Server) -> Iterator[None]:
    """Raise errors of ChatNVIDIA as a ConnectionError of one line without the key."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as exc:  # of requests, of json, or a bare one; any may quote the key
        reason = first_line(exc)
        key = server.key.get_secret_value() if server.key else ""
        for secret in list_secrets([("authorization", f"Bearer {key}")] if key else []):
            reason = reason.replace(secret, "***")
        message = f"the language model at {server.url} gave no answer: {reason}"
        raise ConnectionError(message) from None
