"""Read the content of a response, up to a bound on its bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

from shared_engine.errors import MalformedResponseError

MOST_BYTES = "most_bytes"
"""Request extension: the most bytes of a successful reply, before and after decompression."""
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
    if isinstance(response.stream, httpx.AsyncByteStream):
        response.stream = _BoundedStream(response.stream, most)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            _check_size(size, most)
    except (MalformedResponseError, httpx.DecodingError):
        if response.is_success:
            raise
    headers = [pair for pair in response.headers.raw if pair[0].lower() != b"content-encoding"]
    content = b"".join(parts)[:most]
    return httpx.Response(response.status_code, headers=headers, content=content)


class _BoundedStream(httpx.AsyncByteStream):
    """A stream with a bound on its bytes, as compressed bytes may decompress to none."""

    def __init__(self, stream: httpx.AsyncByteStream, most: int) -> None:
        self._stream = stream
        self._most = most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            _check_size(size, self._most)
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise MalformedResponseError(f"the reply has more than {most} bytes, the most it may need")
