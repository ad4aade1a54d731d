"""What keeps other pages of the same browser out, and a page of ours to what we sent it."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with none at all, a form would send the origin "null"
    "X-Content-Type-Options": "nosniff",
}

VIEWED = "default-src 'none'; object-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""The policy of an original, which a browser's own viewer of PDFs shows as an object."""


class SecureHeaders:
    """Sends with every response what it may load, and who may load it: this app, nobody else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the headers."""

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_more)


class RequireOrigin:
    """Lets nothing change but by a form of this app: a browser says which page a form is on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 to whatever comes from another page, or does not say where from."""
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            headers = Headers(scope=scope)
            if not _is_same(headers.get("origin", ""), headers.get("host", "")):
                refusal = PlainTextResponse("Only a page of this app may send this.\n", 403)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_same(origin: str, host: str) -> bool:
    """Tell whether an Origin is where the request went.

    >>> _is_same("http://127.0.0.1:8090", "127.0.0.1:8090"), _is_same("null", "127.0.0.1:8090")
    (True, False)
    """
    return bool(host) and origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
