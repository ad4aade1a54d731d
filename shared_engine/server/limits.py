"""Limits on requests and connections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ServerLimits:
    """Limits of the server and their defaults; the command line has an option for each."""

    max_body_bytes: int = _limit(
        64 * 2**20,
        "Maximum bytes of a request body; larger ones get 413. All unanswered requests together "
        "may hold eight times as much; more get 429.",
    )
    max_inputs: int = _limit(
        8192,
        "Maximum inputs of a request; more get 413. At most 512 at /v1/ranking and 1000 at "
        "/v1/rerank.",
    )
    max_images: int = _limit(256, "Maximum images of a request; more get 413.")
    max_image_bytes: int = _limit(25_000_000, "Maximum bytes of an image; larger ones get 413.")
    max_waiting: int = _limit(
        16_384, "Maximum accepted inputs without a response; more get 429 with Retry-After."
    )
    read_seconds: float = _limit(
        60.0,
        "Seconds for a request body to arrive; later ones get 408. A client that does not read its "
        "response for so long is disconnected.",
    )
    head_seconds: float = _limit(
        10.0, "Seconds for request line and headers to arrive; then the connection is closed."
    )
    max_head_bytes: int = _limit(
        64 * 2**10, "Maximum bytes of request line and headers; more get 400."
    )
    max_connections: int = _limit(512, "Maximum open connections; more get 503.")
    grace_seconds: float = _limit(
        30.0, "Seconds for accepted requests to finish after SIGTERM or SIGINT; later ones get 503."
    )
