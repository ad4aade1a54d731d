"""Values and refusals as HTTP responses."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shared_engine.server.errors import HTTPRefusal
from shared_engine.server.protocol import dump_json


def respond(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with a value as JSON."""
    return Response(dump_json(body), status, headers, media_type="application/json")


def refuse(refusal: HTTPRefusal, is_nim_client: bool = False) -> Response:
    """Return the response of a refusal, in the form that the client of the request displays.

    OpenAI's clients show only the content of `error`. Clients of a NIM may expect `error` to be the
    message itself.
    """
    body = dict(refusal.body)
    if not is_nim_client:
        kind = "invalid_request_error" if refusal.status < 500 else "server_error"
        body["error"] = {"message": str(refusal), "type": kind, "code": refusal.kind, "param": None}
    return respond(body, refusal.status, refusal.headers)


async def refuse_route(_: Request, exc: Exception) -> Response:
    """Answer a wrong path or method."""
    assert isinstance(exc, HTTPException)  # it is registered for these only
    body = {"detail": exc.detail}
    headers = dict(exc.headers or {})
    return refuse(HTTPRefusal(exc.status_code, "route", exc.detail, body, headers))
