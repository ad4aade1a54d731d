"""Values and refusals as HTTP responses, and what is to do after a large one."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shared_engine.server.errors import HTTPRefusal
from shared_engine.server.protocol import dump_json


def respond(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return the response with a value as JSON."""
    return Response(dump_json(body), status, headers, media_type="application/json")


def refuse(refusal: HTTPRefusal, asked: Headers) -> Response:
    """Return the response of a refusal to a request with the headers `asked`.

    Clients of OpenAI, which name themselves in a header, show a message only where it is inside of
    `error`; clients of a NIM know `error` as the words themselves.
    """
    body = dict(refusal.body)
    if "x-stainless-lang" in asked:
        body["error"] = {"message": str(refusal), "type": refusal.kind}
    return respond(body, refusal.status, refusal.headers)


async def refuse_route(request: Request, exc: Exception) -> Response:
    """Answer a wrong path or method."""
    assert isinstance(exc, HTTPException)  # it is registered for these only
    body = {"detail": exc.detail}
    headers = dict(exc.headers or {})
    return refuse(HTTPRefusal(exc.status_code, "route", exc.detail, body, headers), request.headers)


async def collect_soon() -> None:
    """Give back what is left of a request that was answered: in circles, and in free lists."""
    await asyncio.sleep(0.5)  # until the threads that were busy with the request wait again
    await asyncio.to_thread(_free_memory)


def _free_memory() -> None:
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc keeps up to 64 MB for each thread that had much
