"""The HTTP client of a NIM: headers, TLS, requests, and errors of httpx as ours."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
from pydantic import SecretStr

from shared_engine._version import __version__
from shared_engine.endpoints import POLLING, check_header, is_hosted
from shared_engine.errors import (
    ConfigurationError,
    ConnectionFailedError,
    MalformedResponseError,
    MissingExtraError,
    NeMoRetrieverError,
    RemoteError,
    RequestTimeoutError,
)
from shared_engine.nim import protocol, proxies
from shared_engine.nim.transport import (
    MOST_BYTES,
    TLS_ADVICE,
    Limited,
    Retrying,
    Sending,
    Traced,
    is_retried,
)
from shared_engine.options import EngineOptions

KEEP_ALIVE = 30.0
"""Seconds that an idle connection is kept."""
POLL_INTERVAL = 0.5
MOST_LISTED = 4 * 2**20
"""Bytes of a reply without vectors, such as the list of models."""
_SECRET_NAME = re.compile(r"auth|key|token|secret|password|cookie", re.IGNORECASE)
_SHORTEST_SECRET = 4

_log = logging.getLogger("shared_engine")


class NimClient:
    """Sends requests to one server; all but the constructor runs in one event loop."""

    def __init__(self, options: EngineOptions, base_url: str, api_key: SecretStr | None) -> None:
        """Create the httpx client; nothing is sent yet.

        Raises:
            ConfigurationError: a secret would travel unencrypted to a public host, or an option
                cannot work.
            MissingExtraError: a SOCKS proxy, and the package for it is not installed.
        """
        try:
            httpx.URL(base_url)
        except httpx.InvalidURL as exc:  # for example IPv4 with octal numbers
            raise ConfigurationError(f"base_url={base_url!r} cannot be used: {exc}") from None
        self.base_url = base_url
        self._timeout = options.timeout
        client = _create_own_client(options)
        self._proxy = None if client else proxies.find_proxy(base_url, options.proxy)
        exposure = proxies.find_exposure(base_url, self._proxy)
        if options.allow_insecure_key:
            exposure = None
        if exposure and api_key and options.api_key is None:  # it is of the environment
            _log.warning("NVIDIA_API_KEY is not sent: it would travel unencrypted to %s", exposure)
            api_key = None
        self._headers = _build_headers(options, api_key)
        has_secret = any(map(_SECRET_NAME.search, self._headers))
        if exposure and has_secret:
            raise _refuse_key(exposure)
        self._client = client or _build_client(options, self._proxy)
        is_safe = self._is_encrypted or options.allow_insecure_key or self._proxy is not None
        check_peer = _check_peer if has_secret and not is_safe else None
        self._limited = Limited(
            Traced(Sending(self._client, options.timeout, check_peer)), options.concurrency
        )
        self._retrying = Retrying(self._limited, options.max_retries)
        self._secrets = list_secrets([*self._client.headers.items(), *self._headers.items()])

    @property
    def _is_encrypted(self) -> bool:
        return urlsplit(self.base_url).scheme == "https"

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def mask(self, text: str) -> str:
        """Return a text without the secrets that were sent, which some servers quote."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def read_error(self, response: httpx.Response) -> protocol.ErrorReply:
        """Return the status, message and location of a reply that is not a success."""
        reply = protocol.read_error(response, self.mask)
        if self._proxy is None or self._is_encrypted:
            return reply
        # The proxy may have replied itself.
        return reply._replace(detail=f"{reply.detail} [through the proxy {self._proxy.url}]")

    async def post(
        self, url: str, content: bytes, most_bytes: int, urgent: bool = False
    ) -> httpx.Response:
        """Return the reply to a request for vectors or scores, of any status.

        Args:
            most_bytes: The most bytes of a successful reply.
            urgent: Send it before requests that wait and are not.

        Raises:
            RemoteError: there is no reply, or it cannot be read.
        """
        request = self._build_request("POST", url, most_bytes, content)
        request.extensions["urgent"] = urgent
        return await self._send(request)

    async def get(self, path: str) -> httpx.Response:
        """Return the reply to a request for a path below /v1; raises like `post`."""
        return await self._send(self._build_request("GET", path))

    async def wait_until_ready(self, seconds: float) -> None:
        """Return when the server replies that it is ready; see `Backend.wait_until_ready`."""
        last = "no reply"
        try:
            async with asyncio.timeout(seconds):
                path = "/health/ready"
                while True:
                    request = self._build_request("GET", path)
                    try:
                        response = await self._exchange(self._limited, request)
                    except RemoteError as exc:
                        last = str(exc)
                    else:
                        if response.is_success:
                            return
                        if response.status_code == 404 and path == "/health/ready":
                            # of vLLM, text-embeddings-inference, infinity and llama.cpp
                            path = self.base_url.removesuffix("/v1") + "/health"
                            continue
                        last = f"status {response.status_code}"
                        if not is_retried(response.status_code):
                            raise protocol.build_error(self.read_error(response))
                    await asyncio.sleep(min(1.0, seconds / 20))
        except TimeoutError:
            raise RequestTimeoutError(
                f"{self.base_url} was not ready within {seconds} s; the last attempt: {last}"
            ) from None

    def _build_request(
        self, method: str, url: str, most_bytes: int = MOST_LISTED, content: bytes | None = None
    ) -> httpx.Request:
        """Return a request to a path of the server, or to a whole URL."""
        return self._client.build_request(
            method,
            self.base_url + url if url.startswith("/") else url,
            content=content,
            headers=self._headers,
            timeout=httpx.Timeout(self._timeout, pool=None),  # Limited is the queue, not the pool
            extensions={MOST_BYTES: most_bytes},
        )

    async def _send(self, request: httpx.Request) -> httpx.Response:
        response = await self._exchange(self._retrying, request)
        if response.status_code != 202:
            return response
        try:
            async with asyncio.timeout(self._timeout) as deadline:
                return await self._poll(response, request.extensions[MOST_BYTES])
        except TimeoutError:
            if not deadline.expired():  # a RequestTimeoutError of one poll
                raise
            raise RequestTimeoutError(
                f"the catalogue had no result after {self._timeout} s", status=202
            ) from None

    async def _poll(self, response: httpx.Response, most_bytes: int) -> httpx.Response:
        """Poll the catalogue for the result of a request that it answered with 202."""
        while response.status_code == 202:
            request_id = response.headers.get("nvcf-reqid")
            if request_id is None or not is_hosted(self.base_url):
                raise MalformedResponseError("the server replied 202, without vectors", status=202)
            await asyncio.sleep(POLL_INTERVAL)
            request = self._build_request("GET", POLLING + quote(request_id, safe=""), most_bytes)
            response = await self._exchange(self._retrying, request)
        return response

    async def _exchange(
        self, transport: httpx.AsyncBaseTransport, request: httpx.Request
    ) -> httpx.Response:
        """Send a request; the one place where errors of httpx become ours."""
        server = self.base_url
        if self._proxy is not None:
            server += f" through the proxy {self._proxy.url}"
        try:
            return await transport.handle_async_request(request)
        except (httpx.TimeoutException, TimeoutError):
            error: NeMoRetrieverError = RequestTimeoutError(
                f"no reply from {server} within timeout={self._timeout} s"
            )
        except httpx.TransportError as exc:
            reason = self.mask(str(exc))[:300] or type(exc).__name__
            advice = next(
                (f"; {words}" for name, words in TLS_ADVICE.items() if name in reason), ""
            )
            error = ConnectionFailedError(f"the connection to {server} failed: {reason}{advice}")
        raise error  # outside of `except`, as httpx's errors hold the request and so the key


def _create_own_client(options: EngineOptions) -> httpx.AsyncClient | None:
    if options.http_client_factory is None:
        return None
    client = options.http_client_factory()
    if not isinstance(client, httpx.AsyncClient):
        raise ConfigurationError(
            f"http_client_factory= returned a {type(client).__name__}; expected an "
            "httpx.AsyncClient"
        )
    return client


def _build_client(options: EngineOptions, proxy: httpx.Proxy | None) -> httpx.AsyncClient:
    trust = _load_trust(options.verify_ssl)
    limits = httpx.Limits(
        max_connections=None,  # Limited bounds the requests in flight
        max_keepalive_connections=options.concurrency,
        keepalive_expiry=KEEP_ALIVE,
    )
    try:
        transport = httpx.AsyncHTTPTransport(verify=trust, proxy=proxy, limits=limits)
    except ImportError as exc:
        raise MissingExtraError(
            f"the proxy {proxy and proxy.url} needs another package: pip install 'httpx[socks]'"
        ) from exc
    return httpx.AsyncClient(transport=transport, trust_env=False)


def _build_headers(options: EngineOptions, api_key: SecretStr | None) -> httpx.Headers:
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


def _check_peer(peer: str) -> None:
    address = proxies.parse_address(peer)
    if address is not None and not address.is_private:
        raise _refuse_key(f"{peer}, the resolved address of the server")


def _refuse_key(host: str) -> ConfigurationError:
    return ConfigurationError(
        f"the key would travel unencrypted to {host}; use https, or allow_insecure_key=True in a "
        "trusted network"
    )


def _load_trust(verify_ssl: bool | str) -> ssl.SSLContext:
    if isinstance(verify_ssl, bool):
        return httpx.create_ssl_context(verify=verify_ssl)
    path = Path(verify_ssl).expanduser()
    try:
        if path.is_dir():
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as exc:  # includes ssl.SSLError
        raise ConfigurationError(
            f"verify_ssl={verify_ssl!r} has no certificates: {exc}; expected a CA file or folder"
        ) from None
