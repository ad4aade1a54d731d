"""The HTTP of a NIM: its addresses, what each request carries, and errors that are ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from urllib.parse import quote, urlsplit

import httpx
from pydantic import SecretStr

from shared_engine._version import __version__
from shared_engine.endpoints import (
    POLLING,
    check_header,
    describe_proxy,
    is_hosted,
    split_urls,
)
from shared_engine.errors import (
    ConnectionFailedError,
    MalformedResponseError,
    NeMoRetrieverError,
    RequestTimeoutError,
)
from shared_engine.nim import protocol
from shared_engine.nim.address import PATH, SENDER, Address, take_client
from shared_engine.nim.reading import MOST_BYTES
from shared_engine.nim.transport import Balanced, Retrying, is_retried
from shared_engine.options import Options

CONNECT_WITHIN = 5.0
"""Seconds after which another address is tried, where there is one."""
POLL_EVERY = 0.5
MOST_LISTED = 4 * 2**20
"""Bytes of a reply that holds no vectors, such as the list of models."""
_SHORTEST_SECRET = 4


class NimClient:
    """Sends requests to the addresses of a server; all but the constructor in one event loop."""

    def __init__(self, options: Options, base_url: str, api_key: SecretStr | None) -> None:
        """Make the httpx clients; nothing is sent yet.

        Raises:
            ConfigurationError: a header that cannot be sent, a key that would travel in the clear,
                or TLS or proxy options that cannot work.
            MissingExtraError: a SOCKS proxy, without the package for it.
        """
        self.base_url = base_url
        self._timeout = options.timeout
        headers = build_headers(options, api_key)
        urls = split_urls(base_url)
        within = CONNECT_WITHIN if len(urls) > 1 else None
        client = take_client(options)
        self._addresses = [Address(url, options, headers, client, within) for url in urls]
        self._once = Balanced(self._addresses, options.concurrency)
        self._transport = Retrying(self._once, options.max_retries)
        proxies = [address.proxy for address in self._addresses if address.proxy]
        self._proxies = ", ".join(dict.fromkeys(map(describe_proxy, proxies)))
        self._secrets = list_secrets(
            pair
            for address in self._addresses
            for sent in (address.client.headers, headers, address.proxy_headers)
            for pair in sent.items()
        )

    @property
    def most_in_flight(self) -> int:
        """Requests that may be in flight while no address says that it is busy."""
        return self._once.most

    async def aclose(self) -> None:
        """Close the connections."""
        for client in dict.fromkeys(address.client for address in self._addresses):
            await client.aclose()

    def mask(self, text: str) -> str:
        """Return a text without the values of headers that were sent, which some servers quote."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def read_error(self, response: httpx.Response) -> protocol.ErrorReply:
        """Return what is known of a reply that is no success."""
        reply = protocol.read_error(response, self.mask)
        sender: Address = response.extensions[SENDER]
        by = [] if len(self._addresses) == 1 else [sender.base_url]
        if sender.proxy and urlsplit(sender.base_url).scheme == "http":  # it may be the proxy's
            by.append(describe_proxy(sender.proxy))
        return reply._replace(detail=f"{reply.detail} [by {' or '.join(by)}]") if by else reply

    async def post_embeddings(
        self, content: bytes, most_bytes: int, urgent: bool = False
    ) -> httpx.Response:
        """Return the reply to a request for vectors, whatever its status.

        Raises:
            RemoteError: there is no reply, or none that can be read.
        """
        request = self._build_request("POST", "/embeddings", most_bytes, content)
        request.extensions["urgent"] = urgent
        return await self._send(request)

    async def get_models(self) -> httpx.Response:
        """Return the reply to `GET /v1/models`; raises as `post_embeddings` does."""
        return await self._send(self._build_request("GET", "/models"))

    async def wait_until_ready(self, seconds: float) -> None:
        """Return when the server says that it is ready, at any of its addresses.

        Raises:
            RequestTimeoutError: it did not within so many seconds.
            RemoteError: it has no such path, or does not let us ask.
        """
        last = "no reply"
        try:
            async with asyncio.timeout(seconds):
                while True:
                    request = self._build_request("GET", "/health/ready")
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
        request = self._addresses[0].build_request(method, url, content)
        request.extensions[MOST_BYTES] = most_bytes
        if len(self._addresses) > 1:
            request.extensions[PATH] = url
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
        way = f" through the proxy {self._proxies}" if self._proxies else ""
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
