"""Read the content of a response, up to a bound on its bytes."""

from __future__ import annotations

import httpx

from shared_engine.errors import MalformedResponseError

MOST_BYTES = "most_bytes"
"""Request extension: the most bytes of a successful reply."""
MOST_IN_ERROR = 256 * 1024
"""Bytes kept of an error, in addition to the parts of the request that it may quote."""
_QUOTED = 4
"""Bytes that one byte of the request may take where the server quotes it with escapes."""


async def read_reply(response: httpx.Response, request: httpx.Request) -> httpx.Response:
    """Return a response with its content read.

    Of an error only the beginning is kept, and nothing if it is compressed, as its status decides.

    Raises:
        MalformedResponseError: a successful reply is compressed, although every request refuses
            that, or longer than MOST_BYTES of the request.
        httpx.TransportError: the connection broke.
    """
    most = MOST_IN_ERROR + _QUOTED * len(request.content)
    if response.is_success:
        most = request.extensions[MOST_BYTES]
    encoding = response.headers.pop("content-encoding", "identity")
    is_compressed = encoding.lower() != "identity"
    if is_compressed and response.is_success:
        raise MalformedResponseError(
            f"the reply has Content-Encoding {encoding[:100]!r}, and the request has "
            "Accept-Encoding identity; switch compression off at the server"
        )
    parts: list[bytes] = []
    size = 0
    if not is_compressed:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > most:
                break
    if size > most and response.is_success:
        raise MalformedResponseError(f"the reply has more than {most} bytes, the most it may need")
    content = b"".join(parts)[:most]
    return httpx.Response(response.status_code, headers=response.headers, content=content)
