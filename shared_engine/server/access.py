"""Access control: an API key or, without one, the host names of the server.

The health routes are open: a probe has no key, and another address.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from shared_engine.errors import ConfigurationError
from shared_engine.server.errors import HTTPRefusal, shorten
from shared_engine.server.responses import refuse

_OPEN = ("/health", "/v1/health/live", "/v1/health/ready")
_PATTERN = re.compile(r"\*|(\*\.)?[^*]+")
_NAME = re.compile(r"[a-z0-9._-]+")
_PORT = re.compile(r":\d*$")


def control_access(key: str | None, hosts: Sequence[str]) -> Middleware:
    """Return the middleware that requires the key or, without one, an allowed host name.

    Raises:
        ConfigurationError: the key is blank; `hosts` is a string, or has an invalid pattern.
    """
    hosts = check_hosts(hosts)
    if key is None:
        return Middleware(RequireHost, hosts=hosts)
    if not (key := key.strip()):  # a key read from a file may end with a newline
        raise ConfigurationError("the server's key is blank; leave it out to serve without a key")
    return Middleware(RequireKey, key=key)


def check_hosts(hosts: Sequence[str]) -> Sequence[str]:
    """Return the host names unchanged.

    Raises:
        ConfigurationError: a single string, or a pattern other than "*" and "*.example.com".
    """
    if isinstance(hosts, str):
        raise ConfigurationError(f"allowed_hosts={hosts!r}: expected a list; use [{hosts!r}]")
    for host in hosts:
        if not _PATTERN.fullmatch(host):
            raise ConfigurationError(
                f"allowed_hosts has {host!r}; expected a host name, '*.example.com' or '*'"
            )
    return hosts


class RequireKey:
    """Answers requests without the key with 401, except to the health routes."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key of a request."""
        if scope["type"] != "http" or scope["path"] in _OPEN or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        detail = "Authorization: Bearer <key> is missing or wrong"
        body = {"status": 401, "title": "Unauthorized", "detail": detail}
        headers = {"WWW-Authenticate": "Bearer"}
        refusal = HTTPRefusal(401, "unauthorized", detail, body, headers)
        await refuse(refusal)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


class RequireHost:
    """Answers requests with 421 whose Host is a name with a dot that is not allowed.

    Otherwise a web page in a local browser could use the server, by pointing its own name to this
    machine (DNS rebinding): the browser then sends that name as Host. It cannot do so with an
    address, or with a name that only the local network has, such as localhost or the name of a
    Service, a container or an nginx upstream. Ports are ignored.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        names = [host.partition(":")[0].lower() for host in hosts]
        self._allowed = ["*.localhost", *filter(None, names)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the Host of a request."""
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")
        if self._is_allowed(host):
            await self._app(scope, receive, send)
            return
        message = (
            f"host {shorten(host)!r} is not allowed; start the server with --allowed-host NAME"
        )
        await refuse(HTTPRefusal(421, "host", message))(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        name = _PORT.sub("", host).lower()
        if _is_address(name):
            return True
        return _NAME.fullmatch(name) is not None and (
            "." not in name
            or any(
                known in (name, "*") or (known[0] == "*" and name.endswith(known[1:]))
                for known in self._allowed
            )
        )


def _is_address(name: str) -> bool:
    """Return whether the host of a Host header is an IP address.

    >>> _is_address("127.0.0.1"), _is_address("[::1]"), _is_address("127.0.0.1.evil.test")
    (True, True, False)
    """
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
