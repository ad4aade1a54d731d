"""Proxies, and the hosts that a key may be sent to.

One rule: a key travels over https, or to a private address. Over http the only proxy is that of
`proxy=`, and it must have a private address, too.
"""

from __future__ import annotations

import ipaddress
import socket
from base64 import b64encode
from typing import TypeAlias
from urllib.parse import urlsplit

import httpx

from shared_engine.errors import ConfigurationError

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_PRIVATE_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "127.0.0.0/8", "::1/128", "0.0.0.0/8", "::/128",  # this machine
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7",  # RFC 1918, RFC 4193
        "169.254.0.0/16", "fe80::/10",  # the same link
    )
]  # fmt: skip
"""Listed here, as `is_private` differs between Python versions: newer ones count 6to4 addresses as
private, whose packets cross the internet."""
_PRIVATE_DOMAINS = frozenset({"localhost", "local", "internal", "lan", "svc"})


def find_proxy(base_url: str, proxy: str | None) -> httpx.Proxy | None:
    """Return the proxy to use: `proxy=`, or over https that of HTTPS_PROXY or ALL_PROXY.

    An http address never uses a proxy of the environment, as the proxy could read the key.

    Raises:
        ConfigurationError: it is not the URL of a proxy; the message does not show it.
    """
    from urllib.request import getproxies, proxy_bypass  # imports http.client

    parts = urlsplit(base_url)
    if proxy is None and parts.scheme == "https" and not proxy_bypass(parts.netloc):
        proxies = getproxies()
        proxy = proxies.get("https") or proxies.get("all")
        if proxy and "://" not in proxy:
            proxy = f"http://{proxy}"
    if not proxy:
        return None
    try:
        if urlsplit(proxy).hostname:
            return httpx.Proxy(proxy)
    except (ValueError, httpx.InvalidURL):  # has the URL in its message, and so a password
        pass
    raise ConfigurationError(
        "proxy= or HTTPS_PROXY is not the URL of a proxy; expected http://host:port, "
        "https://host:port or socks5://host:port"
    )


def find_exposure(base_url: str, proxy: httpx.Proxy | None) -> str | None:
    """Return the public host that a key would reach unencrypted, or None.

    >>> find_exposure("https://nim.example.com/v1", None), find_exposure("http://nim:8000/v1", None)
    (None, None)
    >>> find_exposure("http://nim.example.com/v1", None)
    'http://nim.example.com/v1'
    >>> find_exposure("http://nim/v1", httpx.Proxy("http://user:hunter2@proxy.example.com:3128"))
    'http://proxy.example.com:3128'
    """
    if urlsplit(base_url).scheme == "https":
        return None
    hosts = [base_url] if proxy is None else [base_url, str(proxy.url)]
    return next((host for host in hosts if not is_safe_for_keys(host)), None)


def list_credentials(proxy: httpx.Proxy) -> list[tuple[str, str]]:
    """Return the secrets that only the proxy receives, by name.

    >>> list_credentials(httpx.Proxy("http://user:hunter2@proxy:3128"))
    [('proxy-password', 'hunter2'), ('proxy-authorization', 'Basic dXNlcjpodW50ZXIy')]
    """
    if proxy.raw_auth is None:
        return []
    basic = b64encode(b":".join(proxy.raw_auth)).decode()
    password = proxy.raw_auth[1].decode()
    return [("proxy-password", password), ("proxy-authorization", f"Basic {basic}")]


def is_safe_for_keys(url: str) -> bool:
    """Whether a key to this URL is encrypted, or stays on this machine or a private network.

    A name is judged by its spelling; the client checks the resolved address when it connects.

    >>> is_safe_for_keys("http://nim.example.com/v1"), is_safe_for_keys("http://10.0.0.7:8000/v1")
    (False, True)
    >>> is_safe_for_keys("http://nim:8000/v1"), is_safe_for_keys("https://nim.example.com/v1")
    (True, True)
    >>> is_safe_for_keys("http://a.svc.cluster.local"), is_safe_for_keys("http://a.svc.example.com")
    (True, False)
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    if parts.scheme == "https":
        return True
    host = parts.hostname or ""
    if not host.isascii():  # clients normalize other characters: 。 becomes a dot
        return False
    if (address := parse_address(host)) is not None:
        return is_private(address)
    labels = host.rstrip(".").split(".")
    return len(labels) == 1 or labels[-1] in _PRIVATE_DOMAINS


def parse_address(host: str) -> IPAddress | None:
    """Return a host as an IP address, in any spelling that connects there; None for a name.

    >>> [str(parse_address(host)) for host in ("134744072", "0x7f.1", "010.8.8.8", "nim")]
    ['8.8.8.8', '127.0.0.1', '8.8.8.8', 'None']
    >>> parse_address("[::ffff:10.0.0.7]")
    IPv4Address('10.0.0.7')
    """
    host = host.rstrip(".").strip("[]")
    address: IPAddress
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def is_private(address: IPAddress) -> bool:
    """Whether an address belongs to this machine or a private network.

    >>> [is_private(ipaddress.ip_address(a)) for a in ("127.0.0.1", "10.1.2.3", "fd00::1")]
    [True, True, True]
    >>> [is_private(ipaddress.ip_address(a)) for a in ("8.8.8.8", "64:ff9b::808:808")]
    [False, False]
    """
    return any(address in network for network in _PRIVATE_NETWORKS)
