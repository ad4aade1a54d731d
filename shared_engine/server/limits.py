"""How much one client, or all of them together, may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ServerLimits:
    """Every limit of the server with its default; the command line has an option for each."""

    max_body_bytes: int = _limit(
        64 * 2**20,
        "A larger request gets 413, while it is being read; eight times as much is held for all.",
    )
    max_inputs: int = _limit(8192, "A request with more inputs gets 413.")
    max_images: int = _limit(256, "A request with more images gets 413.")
    max_image_bytes: int = _limit(25_000_000, "A larger file of an image gets 413.")
    max_waiting: int = _limit(
        16_384, "Inputs accepted and not answered; what comes on top gets 429 and Retry-After."
    )
    read_seconds: float = _limit(
        60.0,
        "A body that has not arrived by then gets 408; a reply that nobody reads is dropped.",
    )
    head_seconds: float = _limit(
        10.0, "A connection whose request line and headers have not arrived by then is closed."
    )
    max_head_bytes: int = _limit(64 * 2**10, "Larger headers get 400.")
    max_connections: int = _limit(512, "A connection on top of these gets 503.")
