"""Fetch an image from the public internet, and from nowhere else.

Addresses come from users of users, so a name is resolved once, every address of it is checked, and
the connection goes to the very one that was checked. No proxy, no credentials, few redirects, one
deadline however slowly the other side drips.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from ssl import SSLContext
from typing import Any, TypeAlias

import httpcore
from httpx import URL

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_SECONDS, _REDIRECTS = 10.0, 3
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""Of IPv6, all that the internet routes (RFC 4291); the rest is local, or a translator's."""


class _Timed(httpcore.NetworkStream):
    """A connection that ends at one time, however slowly the other side drips."""

    def __init__(self, stream: httpcore.NetworkStream, end: float) -> None:
        self._stream = stream
        self._end = end

    def _left(self) -> float:
        if (left := self._end - time.monotonic()) <= 0:
            raise httpcore.ReadTimeout("the server takes too long")
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
    """Connects only to addresses that are allowed, and to the very one that was looked at.

    TLS still checks the name of the URL. A name of which any address is refused is refused.
    """

    def __init__(self, allowed: Callable[[Address], bool], end: float) -> None:
        self._allowed = allowed
        self._end = end

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any
    ) -> httpcore.NetworkStream:
        found = _resolve(host, port, self._end - time.monotonic())
        for address in found:
            if not self._allowed(ipaddress.ip_address(address)):
                raise ValueError(f"{host} is at {address}, which is not on the public internet")
        seconds = max(self._end - time.monotonic(), 0.001)
        return _Timed(super().connect_tcp(found[0], port, seconds, *args, **kwargs), self._end)


def _resolve(host: str, port: int, seconds: float) -> list[str]:
    """Return the addresses of a name, at least one.

    A look-up cannot be ended, so one that takes longer is left to a thread that nobody waits for.
    """
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.set_result([str(row[4][0]) for row in rows])
        except Exception as exc:
            answer.set_exception(exc)

    threading.Thread(target=ask, name="nemoretriever-resolve", daemon=True).start()
    try:
        found = answer.result(max(seconds, 0))
    except TimeoutError:
        raise httpcore.ConnectTimeout(f"looking up {host} takes too long") from None
    if not found:
        raise ValueError(f"{host} has no address")
    return found


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the public internet, also seen through a translator.

    >>> [is_public(ipaddress.ip_address(a)) for a in ("8.8.8.8", "10.0.0.1", "64:ff9b::a00:1")]
    [True, False, False]
    """
    if address.version == 6 and (address not in _GLOBAL_UNICAST or address.sixtofour is not None):
        return False
    return address.is_global and not address.is_multicast


def fetch(
    url: str, allowed: Callable[[Address], bool] = is_public, seconds: float = _SECONDS
) -> Iterator[bytes]:
    """GET what is at an address, within so many seconds in all, from hosts that are `allowed`.

    Raises:
        ValueError: a host that is not allowed, too many redirects, or another status than 200.
        httpcore.NetworkError, httpcore.TimeoutException, OSError: what the network raises.
    """
    place = URL(url)
    network = _Network(allowed, time.monotonic() + seconds)
    with httpcore.ConnectionPool(network_backend=network) as pool:
        for _ in range(1 + _REDIRECTS):
            if place.scheme not in ("http", "https"):
                raise ValueError(f"it is redirected to {place.scheme}:")
            target = httpcore.URL(
                scheme=place.raw_scheme, host=place.raw_host, port=place.port, target=place.raw_path
            )
            with pool.stream("GET", target, headers={"Accept": "image/*"}) as reply:
                headers = {name.lower(): value for name, value in reply.headers}
                if 300 <= reply.status < 400 and b"location" in headers:
                    place = place.join(headers[b"location"].decode("latin-1"))
                elif reply.status == 200:
                    yield from reply.iter_stream()
                    return
                else:
                    raise ValueError(f"the server answers with status {reply.status}")
    raise ValueError(f"it is redirected more than {_REDIRECTS} times")
