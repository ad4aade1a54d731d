"""Proxies, and the hosts that a key may be sent to.

One rule: a key travels over https, or to a private address. Over http the only proxy is that of
`proxy=`, and it must have a private address, too.
"""

from __future__ import annotations

import ipaddress
from typing import TypeAlias
from urllib.parse import urlsplit

import httpx

from shared_engine.errors import ConfigurationError

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

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
    parts = urlsplit(url)
    if parts.scheme == "https":
        return True
    host = parts.hostname or ""
    if (address := parse_address(host)) is not None:
        return address.is_private
    labels = host.rstrip(".").split(".")
    return len(labels) == 1 or labels[-1] in _PRIVATE_DOMAINS


def parse_address(host: str) -> IPAddress | None:
    """Return a host as an IP address; None for a name.

    >>> parse_address("::ffff:10.0.0.7"), parse_address("nim")
    (IPv4Address('10.0.0.7'), None)
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
