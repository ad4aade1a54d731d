"""Values and refusals as HTTP responses."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shared_engine.server.errors import HTTPRefusal
from shared_engine.server.protocol import dump_json


def respond(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with a value as JSON."""
    return Response(dump_json(body), status, headers, media_type="application/json")


def refuse(refusal: HTTPRefusal, request_headers: Headers) -> Response:
    """Return the response of a refusal, in the form that the client of the request displays.

    OpenAI's clients, which send an `x-stainless-lang` header, show only a message inside `error`.
    Clients of a NIM expect `error` to be the message itself.
    """
    body = dict(refusal.body)
    if "x-stainless-lang" in request_headers:
        body["error"] = {"message": str(refusal), "type": refusal.kind}
    return respond(body, refusal.status, refusal.headers)


async def refuse_route(request: Request, exc: Exception) -> Response:
    """Answer a wrong path or method."""
    assert isinstance(exc, HTTPException)  # it is registered for these only
    body = {"detail": exc.detail}
    headers = dict(exc.headers or {})
    return refuse(HTTPRefusal(exc.status_code, "route", exc.detail, body, headers), request.headers)
