"""Where a NIM is, and whether a key may be sent there."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import warnings
from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import urlsplit, urlunsplit

from shared_engine.errors import ConfigurationError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

HOSTED = "https://integrate.api.nvidia.com/v1"
"""NVIDIA's catalogue of hosted models."""
POLLING = "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status/"
"""Where the catalogue is asked for a reply that it still owes."""

MOST_HOSTED_CHARACTERS = 180_000
"""Of an image in base64 there: NVIDIA's documentation, and pull request 2522 of NeMo-Retriever."""

_PRIVATE_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "127.0.0.0/8", "::1/128", "0.0.0.0/8", "::/128",  # this machine
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7",  # RFC 1918, RFC 4193
        "169.254.0.0/16", "fe80::/10",  # the same link
    )
]  # fmt: skip
"""Said here, as versions of Python differ in what they call private: newer ones, 6to4 addresses,
whose packets cross the internet."""
_PRIVATE_DOMAINS = frozenset({"localhost", "local", "internal", "lan", "svc"})
_PATHS = ("embeddings", "completions", "models", "ranking", "rankings", "rerank", "infer", "health")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"(?:[!-~](?:[ -~\t]*[!-~])?)?")


def normalize_url(url: str) -> str:
    """Return a base URL that ends in `/v1`; a false NVIDIA_APPEND_API_VERSION leaves it as it is.

    >>> normalize_url("http://nim:8000"), normalize_url("https://gateway.example/team/v1/")
    ('http://nim:8000/v1', 'https://gateway.example/team/v1')

    Raises:
        ConfigurationError: not http(s), or it holds credentials, a query or an inference path.
    """
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:  # such as a bracket too few
        parts, host = urlsplit(""), None
    steps = [step for step in parts.path.split("/") if step]
    if steps[-2:] == ["v1", "embeddings"]:
        steps.pop()
        warnings.warn("base_url= ends in /embeddings, which each request adds", stacklevel=2)
    wrong = None
    if parts.scheme not in ("http", "https") or not host:
        wrong = "is no address of a server"
    elif "@" in parts.netloc:
        wrong = "holds a user name or password; give api_key= or default_headers="
    elif parts.query or parts.fragment:
        wrong = "holds a query or fragment; give default_headers= for what a gateway needs"
    elif "v1" in steps[:-1] or (steps and steps[-1] in _PATHS):
        wrong = "holds an inference path; the path of each request is added to it"
    if wrong is not None:  # the URL itself may hold a secret, so the message has only its host
        raise ConfigurationError(
            f"the base_url at host {host!r} {wrong}. Expected the root of the server or its /v1: "
            "http://localhost:8000/v1"
        )
    appends = os.environ.get("NVIDIA_APPEND_API_VERSION", "true").strip().lower()
    if steps[-1:] != ["v1"] and appends not in ("false", "0", "no"):
        steps.append("v1")
    return urlunsplit((parts.scheme, parts.netloc, "/".join(["", *steps]), "", ""))


def normalize_urls(urls: str | Iterable[str]) -> str:
    """Return the base URLs of one server's replicas, one or several with commas, as one string.

    Sorted and each once, so that the same addresses are always the same string.

    >>> normalize_urls("http://nim-b:8000, http://nim-a:8000/v1/")
    'http://nim-a:8000/v1,http://nim-b:8000/v1'
    >>> normalize_urls(["http://nim:8000", "http://nim:8000/v1"])
    'http://nim:8000/v1'

    Raises:
        ConfigurationError: none is given, one cannot be used, or NVIDIA's catalogue is among
            others.
    """
    given = [urls] if isinstance(urls, str) else urls
    each = [url for urls in given for url in split_urls(urls) if url.strip()]
    found = sorted({normalize_url(url) for url in each or [""]})
    if len(found) > 1 and any(map(is_hosted, found)):
        raise ConfigurationError(
            "the base_url names NVIDIA's catalogue beside other addresses; what they compute may "
            "differ, so name it alone"
        )
    return ",".join(found)


def split_urls(base_url: str) -> list[str]:
    """Return each address of a `base_url`, which are several with commas in between."""
    return base_url.split(",")


def is_hosted(base_url: str) -> bool:
    """Whether NVIDIA runs the server, or one of several.

    >>> is_hosted(HOSTED), is_hosted("https://nvidia.com.example/v1")
    (True, False)
    """
    return any(
        parts.scheme == "https" and (parts.hostname or "").endswith(".api.nvidia.com")
        for parts in map(urlsplit, split_urls(base_url))
    )


def parse_address(host: str) -> Address | None:
    """Return the address that a host is, in any spelling that connects there; None for a name.

    >>> [str(parse_address(host)) for host in ("134744072", "0x7f.1", "010.8.8.8", "nim")]
    ['8.8.8.8', '127.0.0.1', '8.8.8.8', 'None']
    >>> parse_address("[::ffff:10.0.0.7]")
    IPv4Address('10.0.0.7')
    """
    host = host.rstrip(".").strip("[]")
    address: Address
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def is_private(address: Address) -> bool:
    """Whether an address is this machine's or one of a private network.

    >>> [is_private(ipaddress.ip_address(a)) for a in ("127.0.0.1", "10.1.2.3", "fd00::1")]
    [True, True, True]
    >>> [is_private(ipaddress.ip_address(a)) for a in ("8.8.8.8", "64:ff9b::808:808")]
    [False, False]
    """
    return any(address in network for network in _PRIVATE_NETWORKS)


def is_safe_for_keys(url: str) -> bool:
    """Whether nobody on the way can read a key: TLS, this machine, or a private network.

    A name is judged by its spelling; what it resolves to is looked at when it is connected to.

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
    if not host.isascii():  # other characters are changed on the way: 。 into a dot
        return False
    if (address := parse_address(host)) is not None:
        return is_private(address)
    labels = host.rstrip(".").split(".")
    return len(labels) == 1 or labels[-1] in _PRIVATE_DOMAINS


def find_exposure(
    base_url: str, proxy: str | None = None, is_client_given: bool = False
) -> str | None:
    """Return on which way a key could be read: "to http://nim.example.com/v1"; None if on none.

    Of several addresses, the first such way. A `proxy` that was given is trusted itself, one of the
    environment is not. A client that was given knows its own proxies.
    """
    ways = (_find_exposure(url, proxy, is_client_given) for url in split_urls(base_url))
    return next((way for way in ways if way is not None), None)


def _find_exposure(base_url: str, proxy: str | None, is_client_given: bool) -> str | None:
    if urlsplit(base_url).scheme == "https":
        return None
    if not is_safe_for_keys(base_url):
        return f"to {base_url}"
    if is_client_given:
        return None
    if proxy:
        return None if is_safe_for_keys(proxy) else f"to the proxy {describe_proxy(proxy)}"
    found = find_proxy(base_url)
    return found and f"through {describe_proxy(found)}, the environment's proxy"


def find_proxy(base_url: str) -> str | None:
    """Return the proxy that the environment names for an address, if it names one.

    This machine is never asked for through a proxy; `no_proxy` may hold names and networks.
    """
    from urllib.request import getproxies, proxy_bypass  # brings http.client

    parts = urlsplit(base_url)
    host = parts.hostname or ""
    proxies = getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or host.rstrip(".").split(".")[-1] == "localhost":
        return None
    address = parse_address(host)
    if address is not None and (address.is_loopback or _is_listed(address, proxies.get("no", ""))):
        return None
    if proxy_bypass(parts.netloc) or proxy_bypass(host):
        return None
    return found if "://" in found else f"http://{found}"


def _is_listed(address: Address, networks: str) -> bool:
    for item in networks.split(","):
        try:
            if address in ipaddress.ip_network(item.strip().strip("[]"), strict=False):
                return True
        except ValueError:  # a name
            continue
    return False


def describe_proxy(proxy: str) -> str:
    """Return scheme, host and port of a proxy: it may hold a password.

    >>> describe_proxy("http://user:hunter2@proxy:3128")
    'http://proxy:3128'
    """
    scheme, _, rest = proxy.partition("://")  # urlsplit takes not everything
    return f"{scheme}://{rest.rpartition('@')[2]}"


def check_header(name: str, value: str, source: str) -> None:
    """Refuse a header that HTTP cannot carry, without showing its value.

    Raises:
        ConfigurationError: the name or the value that `source` gave has a character of no header,
            or it says how long a request is.
    """
    if name.lower() in ("content-length", "transfer-encoding"):
        raise ConfigurationError(f"{source} has {name.lower()}, which each request sets itself")
    if not _HEADER_NAME.fullmatch(name):
        raise ConfigurationError(f"{source} has a name that no header can have")
    if not _HEADER_VALUE.fullmatch(value):
        raise ConfigurationError(
            f"{source} holds a character that no header can carry, such as the end of a line, or a "
            "space at its beginning or end"
        )


def read_key(variable: str | None) -> str | None:
    """Return the API key in an environment variable; None if no variable is named.

    Raises:
        ConfigurationError: the variable is unset or empty.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigurationError(f"--api-key-env: {variable} is not set, or empty")
    return key
