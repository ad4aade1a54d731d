"""Who may ask: with a key, everything but the health routes wants it."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shared_engine.server.errors import HTTPRefusal
from shared_engine.server.responses import refuse

_OPEN = ("/v1/health/live", "/v1/health/ready")  # a probe has no key


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
