"""Values and refusals as HTTP responses."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shared_engine.server.errors import HTTPRefusal, shorten
from shared_engine.server.protocol import dump_json


def respond(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with a value as JSON."""
    return Response(dump_json(body), status, headers, media_type="application/json")


def refuse(refusal: HTTPRefusal) -> Response:
    """Return the response of a refusal: the body of a NIM, and `error` for OpenAI's clients."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    error = {"message": str(refusal), "type": kind, "code": refusal.kind, "param": None}
    return respond({**refusal.body, "error": error}, refusal.status, refusal.headers)


async def refuse_route(request: Request, exc: Exception) -> Response:
    """Answer a wrong path or method."""
    assert isinstance(exc, HTTPException)  # it is registered for these only
    headers = dict(exc.headers or {})
    if allowed := headers.get("Allow"):
        advice = f"expected the method {allowed}"
    else:
        advice = "no such path; the paths of the API begin with /v1, and GET / lists them"
    message = f"{request.method} {shorten(request.scope['path'])}: {advice}"
    return refuse(HTTPRefusal(exc.status_code, "route", message, headers=headers))
