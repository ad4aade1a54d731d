"""Addresses of a NIM, and the syntax of headers."""

from __future__ import annotations

import os
import re
import warnings
from urllib.parse import SplitResult, urlsplit, urlunsplit

from shared_engine.errors import ConfigurationError
from shared_engine.logs import mask_keys

HOSTED = "https://integrate.api.nvidia.com/v1"
"""NVIDIA's catalogue of hosted models."""
HOSTED_RANKING = "https://ai.api.nvidia.com/v1/retrieval/{}/reranking"
"""Where the catalogue has a reranker, with the name of the model, whose dots are underscores."""
POLLING = "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status/"
"""Where a client polls the catalogue for the result of a request that it answered with 202."""
MOST_HOSTED_CHARACTERS = 180_000
"""The catalogue's limit for an image in base64. Sources: NVIDIA's documentation, and pull request
2522 of NeMo-Retriever."""

_EXPECTED = "expected one address, the root of the server or its /v1: http://localhost:8000/v1"
_BALANCE = "put replicas behind a load balancer: a Kubernetes Service, nginx, Envoy or Ray Serve"
_ADDED = ("embeddings", "ranking", "rerank")
_PATHS = (*_ADDED, "completions", "models", "rankings", "infer", "health")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"(?:[!-~](?:[ -~\t]*[!-~])?)?")


def normalize_url(url: object, source: str = "base_url=") -> str:
    """Return a base URL that ends in `/v1`.

    NVIDIA_APPEND_API_VERSION=false keeps a URL without it, as NVIDIA's own clients do.

    >>> normalize_url("http://nim:8000"), normalize_url("https://gateway.example/team/v1/")
    ('http://nim:8000/v1', 'https://gateway.example/team/v1')

    Args:
        source: Name of the option or variable, for error messages.

    Raises:
        ConfigurationError: it is not one http(s) URL, or it has credentials, a query or an
            inference path.
    """
    if not isinstance(url, str) or "," in url:
        found = "has a comma" if isinstance(url, str) else f"is a {type(url).__name__}"
        raise ConfigurationError(f"{source} {found}; {_EXPECTED}; {_BALANCE}")
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:  # for example an unbalanced bracket
        parts, host = urlsplit(""), None
    steps = [step for step in parts.path.split("/") if step]
    if steps[-2:-1] == ["v1"] and steps[-1] in _ADDED:
        warnings.warn(f"{source} ends in /{steps.pop()}, which each request adds", stacklevel=2)
    if fault := _find_fault(url, parts, steps):  # the URL may hold a secret: only its host is shown
        shown = mask_keys(repr(host))
        raise ConfigurationError(f"{source} with host {shown} {fault}; {_EXPECTED}")
    appends = os.environ.get("NVIDIA_APPEND_API_VERSION", "true").strip().lower()
    if steps[-1:] != ["v1"] and appends not in ("false", "0", "no"):
        steps.append("v1")
    return urlunsplit((parts.scheme, parts.netloc, "/".join(["", *steps]), "", ""))


def _find_fault(url: str, parts: SplitResult, steps: list[str]) -> str | None:
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "is not an http or https URL"
    if "@" in parts.netloc:
        return "has a user name or password; use api_key= or default_headers="
    if mask_keys(url) != url:
        return "has an API key; use api_key="
    if parts.query or parts.fragment:
        return "has a query or fragment; use default_headers= for the needs of a gateway"
    if "v1" in steps[:-1] or (steps and steps[-1] in _PATHS):
        return "has an inference path, which each request adds"
    return None


def is_hosted(base_url: str) -> bool:
    """Whether the address is that of NVIDIA's catalogue.

    >>> is_hosted(HOSTED), is_hosted("https://nvidia.com.example/v1")
    (True, False)
    """
    parts = urlsplit(base_url)
    return parts.scheme == "https" and (parts.hostname or "").endswith(".api.nvidia.com")


def check_header(name: str, value: str, source: str) -> None:
    """Refuse a header that HTTP cannot carry, without showing its value.

    Args:
        source: Name of the option that has the header, for error messages.

    Raises:
        ConfigurationError: the name or value has a character that no header may have, or the
            header describes the length of a request.
    """
    if name.lower() in ("content-length", "transfer-encoding"):
        raise ConfigurationError(f"{source} has {name.lower()}, which each request sets itself")
    if not _HEADER_NAME.fullmatch(name):
        raise ConfigurationError(f"{source} has an invalid header name")
    if not _HEADER_VALUE.fullmatch(value):
        raise ConfigurationError(
            f"{source} has a character that no header can carry, such as a line break, or a space "
            "at its beginning or end"
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
        raise ConfigurationError(  # without its name, which may be a key by mistake
            "--api-key-env: no variable of this name is set, or it is empty; expected the name of "
            "an environment variable that holds the key"
        )
    return key
