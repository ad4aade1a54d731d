"""Request ids, spans, the access log, and the answer to a request that is cancelled."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared_engine import spans
from shared_engine.logs import request_id
from shared_engine.server.errors import refuse_for_now, shorten
from shared_engine.server.responses import refuse

_log = logging.getLogger("shared_engine.access")
_ID = re.compile(r"[!-~]{1,128}")
_PROBE = re.compile(r"/health|/v1/health/.*|(/v1)?/metrics")


class TrackRequests:
    """Gives each request an id, returns it in `x-request-id`, and logs the request on demand.

    A request that is still computed after the grace time of a stopping server gets 503.

    An id of the client is used if it has 1 to 128 printable ASCII characters, without spaces. The
    query string is not logged, because it may hold a key. Probes are logged at the level DEBUG.
    """

    def __init__(self, app: ASGIApp, access_log: bool) -> None:
        self._app = app
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Track a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        found = given if _ID.fullmatch(given) else uuid4().hex
        state: dict[str, Any] = dict(scope.get("state") or {})
        status, has_begun = 500, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                if getattr(scope["app"].state, "returns_request_id", True):
                    MutableHeaders(scope=message)["x-request-id"] = found
            await send(message)

        span = None
        if (tracer := spans.find_tracer()) and not _PROBE.fullmatch(scope["path"]):
            facts = {
                "http.request.method": scope["method"],
                "url.path": shorten(scope["path"]),
                "url.scheme": scope["scheme"],
            }
            span = spans.start_span(tracer, scope["method"], "SERVER", facts, headers)
        token = request_id.set(found)
        try:
            with spans.make_current(span):
                await self._app({**scope, "state": state}, receive, send_with_id)
        except asyncio.CancelledError:  # after the grace time
            if not has_begun:
                stopping = refuse(refuse_for_now("the server is stopping", 1))
                await stopping(scope, receive, send_with_id)
        finally:
            if self._access_log:
                _write(scope, state, status, time.perf_counter() - started)
            request_id.reset(token)
            if span is not None:
                route = state.get("route")
                if route is not None:
                    span.update_name(f"{scope['method']} {route}")
                facts = {"http.route": route, "http.response.status_code": status}
                spans.end_span(span, facts, str(status) if status >= 500 else None)


def _write(scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
    fields: dict[str, Any] = {
        "client": (scope.get("client") or ("-",))[0],
        "method": scope["method"],
        "path": quote(shorten(scope["path"])),
        "status": status,
        "seconds": round(seconds, 4),
    }
    line = "{client} {method} {path} {status} in {seconds:.3f} s".format_map(fields)
    counts = {name: state[name] for name in ("inputs", "tokens") if name in state}
    words = (name.removesuffix("s") if count == 1 else name for name, count in counts.items())
    line = ", ".join([line, *map("{} {}".format, counts.values(), words)])
    level = logging.DEBUG if _PROBE.fullmatch(scope["path"]) else logging.INFO
    _log.log(level, "%s", line, extra={"fields": fields | counts})
