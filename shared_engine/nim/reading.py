"""The content of a reply, however long the server makes it: no more is kept than was asked for."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator

import httpx

from shared_engine.errors import MalformedResponseError

MOST_BYTES = "most_bytes"
"""The extension of a request that says how long the content of a successful reply may be."""
MOST_IN_ERROR = 256 * 1024
"""Bytes kept of a reply that is no success, beside what it may quote of the request."""
_QUOTED = 4
"""Bytes that one byte of the request may become where the server quotes it with escapes."""
_PIECE = 1024 * 1024
"""Bytes that are inflated before others have a turn."""


async def read_reply(response: httpx.Response, request: httpx.Request) -> httpx.Response:
    """Return a reply with its content read, and decompressed where it has to be.

    Of an error only the beginning is kept: its status is what counts.

    Raises:
        MalformedResponseError: it is no error and longer than the request says, or compressed in
            a way that nobody asked for.
        httpx.TransportError: the connection broke.
    """
    most = MOST_IN_ERROR + _QUOTED * len(request.content)
    if response.is_success:
        most = request.extensions[MOST_BYTES]
    parts: list[bytes] = []
    size = 0
    try:
        async for part in _decode(response, most):
            parts.append(part)
            size += len(part)
            if size > most:
                raise _too_long(response, most)
    except MalformedResponseError:
        if response.is_success:
            raise
    headers = [pair for pair in response.headers.raw if pair[0].lower() != b"content-encoding"]
    content = b"".join(parts)[:most]
    return httpx.Response(response.status_code, headers=headers, content=content)


def _too_long(response: httpx.Response, most: int) -> MalformedResponseError:
    return MalformedResponseError(
        f"the reply is longer than the {most} bytes that it may need", status=response.status_code
    )


async def _decode(response: httpx.Response, most: int) -> AsyncIterator[bytes]:
    if response.is_stream_consumed:  # by a client of the user's, whose transport had it whole
        yield response.content
        return
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        async for part in response.aiter_raw():
            yield part
        return
    # Identity is what was asked for, but some gateways compress all the same.
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise MalformedResponseError(
            "the reply is compressed, though no compression was asked for",
            status=response.status_code,
        )
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its first bytes
    size = 0
    try:
        async for part in response.aiter_raw():
            size += len(part)
            if size > most:  # though nothing may come out of it
                raise _too_long(response, most)
            while part:
                yield inflater.decompress(part, _PIECE)
                part = inflater.unconsumed_tail  # noqa: PLW2901 - what is left of it
                await asyncio.sleep(0)
    except zlib.error:
        inflater = zlib.decompressobj()
    if not inflater.eof:
        raise MalformedResponseError(
            "the reply cannot be decompressed", status=response.status_code
        )
