"""Read the content of a response, up to a bound on its bytes."""

from __future__ import annotations

import httpx

from shared_engine.errors import MalformedResponseError

MOST_BYTES = "most_bytes"
"""Request extension: the most bytes of a successful reply, after decompression."""
MOST_IN_ERROR = 256 * 1024
"""Bytes kept of an error, in addition to the parts of the request that it may quote."""
_QUOTED = 4
"""Bytes that one byte of the request may take where the server quotes it with escapes."""


async def read_reply(response: httpx.Response, request: httpx.Request) -> httpx.Response:
    """Return a response with its content read and decompressed.

    Of an error only the beginning is kept, as its status decides.

    Raises:
        MalformedResponseError: a successful reply is longer than MOST_BYTES of the request.
        httpx.DecodingError: a successful reply cannot be decompressed.
        httpx.TransportError: the connection broke.
    """
    most = MOST_IN_ERROR + _QUOTED * len(request.content)
    if response.is_success:
        most = request.extensions[MOST_BYTES]
    parts: list[bytes] = []
    size = 0
    try:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > most:
                raise MalformedResponseError(
                    f"the reply has more than {most} bytes, the most it may need"
                )
    except (MalformedResponseError, httpx.DecodingError):
        if response.is_success:
            raise
    headers = [pair for pair in response.headers.raw if pair[0].lower() != b"content-encoding"]
    content = b"".join(parts)[:most]
    return httpx.Response(response.status_code, headers=headers, content=content)
