"""One address of a server: the httpx client that sends there, and what is checked before."""

from __future__ import annotations

import re
import ssl
from base64 import b64encode
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from shared_engine.endpoints import (
    describe_proxy,
    find_exposure,
    find_proxy,
    is_private,
    parse_address,
)
from shared_engine.errors import ConfigurationError, MissingExtraError
from shared_engine.nim.transport import Sending
from shared_engine.options import Options

KEEP_ALIVE = 30.0
"""Seconds that an idle connection is kept."""
PATH = "path"
"""The extension of a request that any address may get: what follows `base_url` in its URL."""
SENDER = "address"
"""The extension of a reply that holds the address it came from."""
_SECRET_NAME = re.compile(r"auth|key|token|secret|password|cookie", re.IGNORECASE)


class Address(httpx.AsyncBaseTransport):
    """Sends requests to one address, also those that were made for another."""

    def __init__(
        self,
        base_url: str,
        options: Options,
        headers: httpx.Headers,
        client: httpx.AsyncClient | None = None,
        connect_timeout: float | None = None,
    ) -> None:
        """Create the httpx client, with `http_client_factory` if given; nothing is sent yet.

        Raises:
            ConfigurationError: a key would travel in the clear, or TLS or proxy options that
                cannot work.
            MissingExtraError: a SOCKS proxy, without the package for it.
        """
        check_url(base_url)
        self.base_url = base_url
        is_given = client is not None
        self.proxy = None if is_given else options.proxy or find_proxy(base_url)
        self.proxy_headers = check_proxy(self.proxy) if self.proxy else {}
        is_guarded = urlsplit(base_url).scheme == "http" and not options.allow_insecure_key
        is_guarded = is_guarded and any(map(_SECRET_NAME.search, headers))
        way = find_exposure(base_url, options.proxy, is_given)
        if is_guarded and way is not None:
            raise ConfigurationError(
                f"the key would travel unencrypted {way}; use https, or, where the network is "
                "trusted, allow_insecure_key=True"
            )
        self.client = build_client(options, self.proxy) if client is None else client
        check_peer = None if self.proxy or not is_guarded else self._check_peer
        self._headers = headers
        # A turn in the queue of requests in flight may last, so the pool's own wait has no limit.
        self._timeout = httpx.Timeout(options.timeout, pool=None)
        if connect_timeout is not None:
            self._timeout.connect = min(connect_timeout, options.timeout or connect_timeout)
        self._sending = Sending(self.client, options.timeout, check_peer)

    def __str__(self) -> str:
        return self.base_url

    def build_request(self, method: str, url: str, content: bytes | None = None) -> httpx.Request:
        """Return a request to a path of this address, such as "/models", or to a whole URL."""
        url = self.base_url + url if url.startswith("/") else url
        return self.client.build_request(
            method, url, content=content, headers=self._headers, timeout=self._timeout
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, made again for this address where its PATH is said.

        So it names this host, and has no other's cookies.
        """
        if (path := request.extensions.get(PATH)) is not None:
            made = self.build_request(request.method, path, request.content or None)
            made.extensions = {**request.extensions, **made.extensions}
            request = made
        response = await self._sending.handle_async_request(request)
        response.extensions[SENDER] = self
        return response

    def _check_peer(self, peer: str) -> None:
        address = parse_address(peer)
        if address is not None and not is_private(address):
            raise ConfigurationError(
                f"the key would travel unencrypted to {peer}, where {self.base_url} is; use https, "
                "or, where the network is trusted, allow_insecure_key=True"
            )


def take_client(options: Options) -> httpx.AsyncClient | None:
    """Return the client that the options bring along, if they do.

    Raises:
        ConfigurationError: it is none.
    """
    if options.http_client_factory is None:
        return None
    client = options.http_client_factory()
    if not isinstance(client, httpx.AsyncClient):
        raise ConfigurationError(
            f"http_client_factory made a {type(client).__name__}; expected an httpx.AsyncClient"
        )
    return client


def build_client(options: Options, proxy: str | None) -> httpx.AsyncClient:
    """Return the client that the options ask for.

    Raises:
        ConfigurationError: the options cannot work.
        MissingExtraError: a SOCKS proxy, without the package for it.
    """
    trust = _load_trust(options.verify_ssl)
    limits = httpx.Limits(
        max_connections=None,  # as many as there are requests in flight
        max_keepalive_connections=options.concurrency,
        keepalive_expiry=KEEP_ALIVE,
    )
    try:
        transport = httpx.AsyncHTTPTransport(verify=trust, proxy=proxy, limits=limits)
    except ImportError as exc:
        raise MissingExtraError(
            f"the proxy {describe_proxy(proxy or '')} needs a package more: "
            "pip install 'httpx[socks]'"
        ) from exc
    return httpx.AsyncClient(transport=transport, trust_env=False)


def check_url(base_url: str) -> None:
    """Refuse what httpx takes for no address, such as IPv4 with octal numbers.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        httpx.URL(base_url)
    except httpx.InvalidURL as exc:
        raise ConfigurationError(f"the base_url {base_url} cannot be used: {exc}") from None


def check_proxy(proxy: str) -> dict[str, str]:
    """Return what is sent to a proxy alone; refuse what is no address of one, without showing it.

    >>> check_proxy("http://user:hunter2@proxy:3128")
    {'proxy-password': 'hunter2', 'proxy-authorization': 'Basic dXNlcjpodW50ZXIy'}

    Raises:
        ConfigurationError: it is none.
    """
    try:
        auth = httpx.Proxy(proxy).raw_auth
        host = urlsplit(proxy).hostname
    except (ValueError, httpx.InvalidURL):
        host = None
    if not host:
        raise ConfigurationError(
            "the proxy cannot be used; expected http://host:port, https://host:port or "
            "socks5://host:port"
        )
    if auth is None:
        return {}
    basic = b64encode(b":".join(auth)).decode()
    return {"proxy-password": auth[1].decode(), "proxy-authorization": f"Basic {basic}"}


def _load_trust(verify_ssl: bool | str) -> ssl.SSLContext:
    if isinstance(verify_ssl, bool):
        return httpx.create_ssl_context(verify=verify_ssl)
    path = Path(verify_ssl).expanduser()
    try:
        if path.is_dir():
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigurationError(
            f"verify_ssl={verify_ssl!r} holds no certificates: {exc}"
        ) from None
