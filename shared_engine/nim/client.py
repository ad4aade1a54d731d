"""What every request to a NIM has in common: headers, the key, trust and proxies."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import SecretStr

from shared_engine._version import __version__
from shared_engine.endpoints import is_safe_for_keys
from shared_engine.errors import (
    ConfigurationError,
)
from shared_engine.nim.connection import KEEP_ALIVE, Connection
from shared_engine.options import Options


def build_headers(options: Options, base_url: str, api_key: SecretStr | None) -> httpx.Headers:
    headers = httpx.Headers(
        {
            "accept": "application/json",
            "accept-encoding": "identity",  # the digits of vectors hardly compress
            "content-type": "application/json",
            "user-agent": f"nemoretriever-embeddings/{__version__}",
        }
    )
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key.get_secret_value()}"
    headers.update(options.default_headers)
    if "authorization" in headers and not (
        options.allow_insecure_key or is_safe_for_keys(base_url)
    ):
        raise ConfigurationError(
            f"the key would travel unencrypted to {base_url}; use https, or, where the network is "
            "trusted, allow_insecure_key=True"
        )
    return headers


def build_clients(options: Options, base_url: str) -> list[httpx.AsyncClient]:
    places = range(options.concurrency)
    if options.http_client is not None:
        client = options.http_client()
        if not isinstance(client, httpx.AsyncClient):
            raise ConfigurationError(
                f"http_client made a {type(client).__name__}; expected an httpx.AsyncClient"
            )
        return [client for _ in places]
    trust = _trust(options.verify_ssl)
    if options.proxy is None and not _is_proxied(base_url):
        return [httpx.AsyncClient(transport=Connection(trust)) for _ in places]
    limits = httpx.Limits(max_keepalive_connections=1, keepalive_expiry=KEEP_ALIVE)
    try:
        return [httpx.AsyncClient(verify=trust, proxy=options.proxy, limits=limits) for _ in places]
    except ValueError as exc:
        raise ConfigurationError(f"the proxy cannot be used: {exc}") from None


def _is_proxied(base_url: str) -> bool:
    """Whether the environment names a proxy for the address."""
    url = httpx.URL(base_url)
    return bool(getproxies().keys() & {url.scheme, "all"}) and not proxy_bypass(url.host)


def _trust(verify_ssl: bool | str) -> ssl.SSLContext:
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
