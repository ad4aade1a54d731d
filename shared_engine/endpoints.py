"""Where a NIM is, and whether a key may be sent there."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit, urlunsplit

from shared_engine.errors import ConfigurationError

HOSTED = "https://integrate.api.nvidia.com/v1"
"""NVIDIA's catalogue of hosted models."""
POLLING = "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status/"
"""Where the catalogue is asked for a reply that it still owes."""

_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".lan", ".svc")
_PATHS = ("embeddings", "completions", "models", "ranking", "rankings", "rerank", "infer", "health")


def normalised(url: str) -> str:
    """Return a base URL that ends in `/v1`.

    >>> normalised("http://nim:8000"), normalised("https://gateway.example/team/v1/")
    ('http://nim:8000/v1', 'https://gateway.example/team/v1')

    Raises:
        ConfigurationError: not http(s), or it holds credentials, a query or an inference path.
    """
    parts = urlsplit(url.strip())
    steps = [step for step in parts.path.split("/") if step]
    try:
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
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
    if steps[-1:] != ["v1"]:
        steps.append("v1")
    return urlunsplit((parts.scheme, parts.netloc, "/" + "/".join(steps), "", ""))


def is_hosted(base_url: str) -> bool:
    """Whether NVIDIA runs the server.

    >>> is_hosted(HOSTED), is_hosted("https://nvidia.com.example/v1")
    (True, False)
    """
    parts = urlsplit(base_url)
    return parts.scheme == "https" and (parts.hostname or "").endswith(".api.nvidia.com")


def is_safe_for_keys(base_url: str) -> bool:
    """Whether nobody on the way can read a key: TLS, this machine, or a private network.

    >>> is_safe_for_keys("http://nim.example.com/v1"), is_safe_for_keys("http://10.0.0.7:8000/v1")
    (False, True)
    >>> is_safe_for_keys("http://nim:8000/v1"), is_safe_for_keys("https://nim.example.com/v1")
    (True, True)
    """
    parts = urlsplit(base_url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme == "https":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_NAMES) or ".svc." in host
    return address.is_loopback or address.is_private
