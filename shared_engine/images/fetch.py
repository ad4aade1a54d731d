"""Fetch an image from the public internet only.

The URLs are untrusted input. A host name is resolved once, all its addresses are checked, and the
connection goes to an address that was checked. There are no proxies, no credentials, few redirects,
and one deadline for all that comes after the lookups.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from ssl import SSLContext
from typing import Any, TypeAlias

import httpcore
from httpx import URL

from shared_engine._version import __version__

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_SECONDS, _REDIRECTS = 10.0, 3
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""The addresses of IPv6 that the internet routes (RFC 4291); others are local or translators."""


class _Timed(httpcore.NetworkStream):
    """A connection with one deadline for all its reads and writes."""

    def __init__(self, stream: httpcore.NetworkStream, end: float) -> None:
        self._stream = stream
        self._end = end

    def _left(self) -> float:
        if (left := self._end - time.monotonic()) <= 0:
            raise httpcore.ReadTimeout("the server took too long")
        return left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._left())

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: Any = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._left())
        return _Timed(stream, self._end)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        self._stream.close()


class _Network(httpcore.SyncBackend):
    """Connects to the first address of a host that answers; all of them must be allowed.

    TLS still verifies the name in the URL.
    """

    def __init__(self, allowed: Callable[[IPAddress], bool], end: float) -> None:
        self._allowed = allowed
        self._end = end

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any
    ) -> httpcore.NetworkStream:
        rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = [str(row[4][0]) for row in rows]
        for address in found:
            if not self._allowed(ipaddress.ip_address(address)):
                raise ValueError(f"{host} is at {address}, which is not on the public internet")
        for address in found:
            seconds = max(self._end - time.monotonic(), 0.001)
            try:
                stream = super().connect_tcp(address, port, seconds, *args, **kwargs)
                return _Timed(stream, self._end)
            except httpcore.ConnectError as exc:  # such as IPv6 without a route
                error = exc
        raise error


def is_public(address: IPAddress) -> bool:
    """Return whether an address is on the public internet; translated IPv4 addresses are not.

    >>> [is_public(ipaddress.ip_address(a)) for a in ("8.8.8.8", "10.0.0.1", "64:ff9b::a00:1")]
    [True, False, False]
    """
    if address.version == 6 and (address not in _GLOBAL_UNICAST or address.sixtofour is not None):
        return False
    return address.is_global and not address.is_multicast


def fetch(
    url: str, allowed: Callable[[IPAddress], bool] = is_public, seconds: float = _SECONDS
) -> Iterator[bytes]:
    """GET a URL and yield the body.

    Args:
        url: An http or https URL.
        allowed: Whether to connect to an address; asked for every address of every host.
        seconds: Deadline for the whole fetch, redirects included; the resolver limits the lookups.

    Raises:
        ValueError: a host that is not allowed, too many redirects, or a status other than 200.
        httpcore.NetworkError, httpcore.TimeoutException, OSError: the network failed.
    """
    page = URL(url)
    headers = [("Accept", "image/*"), ("User-Agent", f"nemoretriever-embeddings/{__version__}")]
    network = _Network(allowed, time.monotonic() + seconds)
    with httpcore.ConnectionPool(network_backend=network) as pool:
        for _ in range(1 + _REDIRECTS):
            if page.scheme not in ("http", "https"):
                raise ValueError(f"it redirects to {page.scheme}:; expected http or https")
            target = httpcore.URL(
                scheme=page.raw_scheme, host=page.raw_host, port=page.port, target=page.raw_path
            )
            with pool.stream("GET", target, headers=headers) as reply:
                replied = {name.lower(): value for name, value in reply.headers}
                if 300 <= reply.status < 400 and b"location" in replied:
                    page = page.join(replied[b"location"].decode("latin-1"))
                elif reply.status == 200:
                    yield from reply.iter_stream()
                    return
                else:
                    raise ValueError(f"the server replied with status {reply.status}; expected 200")
    raise ValueError(f"it redirects more than {_REDIRECTS} times")
