"""The HTTP of a NIM: one httpx client, what each request carries, and errors that are ours."""

from __future__ import annotations

import asyncio
import re
import ssl
from base64 import b64encode
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
from pydantic import SecretStr

from shared_engine._version import __version__
from shared_engine.endpoints import (
    POLLING,
    check_header,
    describe_proxy,
    find_exposure,
    find_proxy,
    is_hosted,
    is_private,
    parse_address,
)
from shared_engine.errors import (
    ConfigurationError,
    ConnectionFailedError,
    MalformedResponseError,
    MissingExtraError,
    NeMoRetrieverError,
    RequestTimeoutError,
)
from shared_engine.nim import protocol
from shared_engine.nim.reading import MOST_BYTES
from shared_engine.nim.transport import Limited, Retrying, Sending, is_retried
from shared_engine.options import Options

KEEP_ALIVE = 30.0
"""Seconds that an idle connection is kept."""
POLL_EVERY = 0.5
MOST_LISTED = 4 * 2**20
"""Bytes of a reply that holds no vectors, such as the list of models."""
_SECRET_NAME = re.compile(r"auth|key|token|secret|password|cookie", re.IGNORECASE)
_SHORTEST_SECRET = 4


class NimClient:
    """Sends requests to one server; belongs to one event loop, but for the constructor."""

    def __init__(self, options: Options, base_url: str, api_key: SecretStr | None) -> None:
        """Make the httpx client; nothing is sent yet.

        Raises:
            ConfigurationError: a header that cannot be sent, a key that would travel in the clear,
                or TLS or proxy options that cannot work.
            MissingExtraError: a SOCKS proxy, without the package for it.
        """
        check_url(base_url)
        self.base_url = base_url
        self._timeout = options.timeout
        self._headers = build_headers(options, api_key)
        self._proxy = None if options.http_client else options.proxy or find_proxy(base_url)
        proxy_headers = check_proxy(self._proxy) if self._proxy else {}
        is_guarded = urlsplit(base_url).scheme == "http" and not options.allow_insecure_key
        is_guarded = is_guarded and any(map(_SECRET_NAME.search, self._headers))
        way = find_exposure(base_url, options.proxy, options.http_client is not None)
        if is_guarded and way is not None:
            raise ConfigurationError(
                f"the key would travel unencrypted {way}; use https, or, where the network is "
                "trusted, allow_insecure_key=True"
            )
        self._client = build_client(options, self._proxy)
        check_peer = None if self._proxy or not is_guarded else self._check_peer
        self._once = Limited(
            Sending(self._client, options.timeout, check_peer), options.concurrency
        )
        self._transport = Retrying(self._once, options.max_retries)
        headers = {**self._client.headers, **self._headers, **proxy_headers}
        self._secrets = list_secrets(headers.items())

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def mask(self, text: str) -> str:
        """Return a text without the values of headers that were sent, which some servers quote."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def read_error(self, response: httpx.Response) -> protocol.ErrorReply:
        """Return what is known of a reply that is no success."""
        reply = protocol.read_error(response, self.mask)
        if self._proxy and urlsplit(self.base_url).scheme == "http":  # it may be the proxy's
            reply = reply._replace(detail=f"{reply.detail} [by {describe_proxy(self._proxy)}]")
        return reply

    async def post_embeddings(
        self, content: bytes, most_bytes: int, urgent: bool = False
    ) -> httpx.Response:
        """Return the reply to a request for vectors, whatever its status.

        Raises:
            RemoteError: there is no reply, or none that can be read.
        """
        request = self._build_request("POST", f"{self.base_url}/embeddings", most_bytes, content)
        request.extensions["urgent"] = urgent
        return await self._send(request)

    async def get_models(self) -> httpx.Response:
        """Return the reply to `GET /v1/models`; raises as `post_embeddings` does."""
        return await self._send(self._build_request("GET", f"{self.base_url}/models"))

    async def wait_until_ready(self, seconds: float) -> None:
        """Return when the server says that it is ready.

        Raises:
            RequestTimeoutError: it did not within so many seconds.
            RemoteError: it has no such path, or does not let us ask.
        """
        last = "no reply"
        try:
            async with asyncio.timeout(seconds):
                while True:
                    request = self._build_request("GET", f"{self.base_url}/health/ready")
                    try:
                        response = await self._exchange(self._once, request)
                    except NeMoRetrieverError as exc:
                        last = str(exc)
                    else:
                        if response.is_success:
                            return
                        last = f"status {response.status_code}"
                        if not is_retried(response.status_code):
                            raise protocol.build_error(response, self.read_error(response))
                    await asyncio.sleep(min(1.0, seconds / 20))
        except TimeoutError:
            raise RequestTimeoutError(
                f"{self.base_url} was not ready within {seconds} s: {last}"
            ) from None

    def _build_request(
        self, method: str, url: str, most_bytes: int = MOST_LISTED, content: bytes | None = None
    ) -> httpx.Request:
        # A turn in the queue of requests in flight may last, so the pool's own wait has no limit.
        timeout = httpx.Timeout(self._timeout, pool=None)
        request = self._client.build_request(
            method, url, content=content, headers=self._headers, timeout=timeout
        )
        request.extensions[MOST_BYTES] = most_bytes
        return request

    async def _send(self, request: httpx.Request) -> httpx.Response:
        response = await self._exchange(self._transport, request)
        if response.status_code != 202:
            return response
        try:
            async with asyncio.timeout(self._timeout) as running:
                return await self._poll(response, request.extensions[MOST_BYTES])
        except TimeoutError:
            if not running.expired():
                raise
            raise RequestTimeoutError(
                f"the catalogue had no result after {self._timeout} s", status=202
            ) from None

    async def _poll(self, response: httpx.Response, most_bytes: int) -> httpx.Response:
        """Ask the catalogue for the reply that it owes."""
        while response.status_code == 202:
            owed = response.headers.get("nvcf-reqid")
            if owed is None or not is_hosted(self.base_url):
                raise MalformedResponseError("the server replied 202, not with vectors", status=202)
            await asyncio.sleep(POLL_EVERY)
            request = self._build_request("GET", POLLING + quote(owed, safe=""), most_bytes)
            response = await self._exchange(self._transport, request)
        return response

    async def _exchange(
        self, transport: httpx.AsyncBaseTransport, request: httpx.Request
    ) -> httpx.Response:
        """Send; the one place where errors of httpx become ours."""
        way = f" through the proxy {describe_proxy(self._proxy)}" if self._proxy else ""
        try:
            return await transport.handle_async_request(request)
        except (httpx.TimeoutException, TimeoutError):
            error: NeMoRetrieverError = RequestTimeoutError(
                f"no reply from {self.base_url}{way} within timeout={self._timeout} s"
            )
        except httpx.TransportError as exc:
            why = self.mask(str(exc))[:300] or type(exc).__name__
            error = ConnectionFailedError(f"no connection to {self.base_url}{way}: {why}")
        except httpx.RequestError as exc:
            error = MalformedResponseError(f"the reply cannot be read: {type(exc).__name__}")
        raise error  # here, as httpx's own errors hold the request and so the key

    def _check_peer(self, peer: str) -> None:
        address = parse_address(peer)
        if address is not None and not is_private(address):
            raise ConfigurationError(
                f"the key would travel unencrypted to {peer}, where {self.base_url} is; use https, "
                "or, where the network is trusted, allow_insecure_key=True"
            )


def build_headers(options: Options, api_key: SecretStr | None) -> httpx.Headers:
    """Return the headers of every request.

    Raises:
        ConfigurationError: one cannot be sent.
    """
    headers = httpx.Headers(
        {
            "accept": "application/json",
            "accept-encoding": "identity",  # the digits of vectors hardly compress
            "content-type": "application/json",
            "user-agent": f"nemoretriever-embeddings/{__version__}",
        }
    )
    if api_key is not None:
        key = api_key.get_secret_value()
        check_header("authorization", key, "the key")
        headers["authorization"] = f"Bearer {key}"
    for name, value in options.default_headers.items():
        check_header(name, value, "default_headers=")
        headers[name] = value
    return headers


def list_secrets(headers: Iterable[tuple[str, str]]) -> list[str]:
    """Return the values of headers that an error must not show, the longest first.

    >>> list_secrets({"authorization": "Bearer abcde", "accept": "text/html", "x-a": "b"}.items())
    ['Bearer abcde', 'abcde']
    """
    public = {"accept", "accept-encoding", "connection", "content-type", "user-agent"}
    values = {value for name, value in headers if name.lower() not in public}
    values |= {value.partition(" ")[2] for value in values}
    return sorted((v for v in values if len(v) >= _SHORTEST_SECRET), key=len, reverse=True)


def build_client(options: Options, proxy: str | None) -> httpx.AsyncClient:
    """Return the client that the options ask for, or that they bring along.

    Raises:
        ConfigurationError: the options cannot work.
        MissingExtraError: a SOCKS proxy, without the package for it.
    """
    if options.http_client is not None:
        client = options.http_client()
        if not isinstance(client, httpx.AsyncClient):
            raise ConfigurationError(
                f"http_client made a {type(client).__name__}; expected an httpx.AsyncClient"
            )
        return client
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
