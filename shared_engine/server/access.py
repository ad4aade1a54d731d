"""Who may ask: who has the key or, where there is none, whoever asks for this machine by its name.

The health routes are open to all: a probe has no key, and asks by an address of its own.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from fnmatch import fnmatchcase
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from shared_engine.errors import ConfigurationError
from shared_engine.server.errors import HTTPRefusal, shorten
from shared_engine.server.responses import refuse

_OPEN = ("/v1/health/live", "/v1/health/ready")
_LOOPBACK = ("localhost", "*.localhost")


def control_access(key: str | None, hosts: Sequence[str]) -> Middleware:
    """Return what lets through who has the key or, without one, who names the server rightly.

    Raises:
        ConfigurationError: the key is blank, which would be none; the hosts are one text.
    """
    hosts = require_hosts(hosts)
    if key is None:
        return Middleware(RequireHost, hosts=hosts)
    if not (key := key.strip()):  # a line end of the file that it was read from
        raise ConfigurationError("the server's key is blank; leave it out to serve without one")
    return Middleware(RequireKey, key=key)


def require_hosts(hosts: Sequence[str]) -> Sequence[str]:
    """Return the names of hosts, unless they are one text, whose letters would be names.

    Raises:
        ConfigurationError: they are.
    """
    if isinstance(hosts, str):
        raise ConfigurationError(f"allowed_hosts is {hosts!r}; expected a list: [{hosts!r}]")
    return hosts


class RequireKey:
    """Lets requests with the key pass, and probes."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 where the key is missing or wrong."""
        if scope["type"] != "http" or scope["path"] in _OPEN or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        detail = "Authorization: Bearer <key> is missing or wrong"
        body = {"status": 401, "title": "Unauthorized", "detail": detail}
        headers = {"WWW-Authenticate": "Bearer"}
        refusal = HTTPRefusal(401, "unauthorized", detail, body, headers)
        await refuse(refusal, Headers(scope=scope))(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


class RequireHost:
    """Lets requests pass whose Host is a loopback name, an address, or one of `hosts`.

    Else any page in a browser here could use the server, once its own name points to this machine
    (DNS rebinding): the browser then sends that name. An address cannot be made to point elsewhere.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._patterns = [*_LOOPBACK, *filter(None, map(_find_name, hosts))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 421 where the request names another machine."""
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        named = headers.getlist("host")
        if len(named) == 1 and self._is_allowed(named[0]):
            await self._app(scope, receive, send)
            return
        message = (
            f"Host {shorten(', '.join(named))!r} is not a name of this server; it is started with "
            "--allowed-host NAME, or with a key, to be reached under another name than localhost"
        )
        await refuse(HTTPRefusal(421, "host", message), headers)(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        name = _find_name(host)
        return _is_address(name) or any(fnmatchcase(name, known) for known in self._patterns)


def _find_name(host: str) -> str:
    """Return the name or address in a Host header, in small letters; "" where it is none.

    >>> _find_name("GPU-box.:8000"), _find_name("[::1]:80"), _find_name("evil.test@localhost")
    ('gpu-box', '::1', '')
    """
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # looked at, as it may be none
    except ValueError:
        return ""
    is_host = parts.netloc == host and "@" not in host
    return (parts.hostname or "").removesuffix(".") if is_host else ""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
