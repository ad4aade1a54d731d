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
        "Largest body of a request in bytes; beyond it 413. All unanswered requests together may "
        "hold eight times as much; beyond that 429.",
    )
    max_inputs: int = _limit(
        8192,
        "Most inputs in a request; beyond it 413. At most 512 at /v1/ranking and 1000 at "
        "/v1/rerank.",
    )
    max_images: int = _limit(256, "Most images in a request; beyond it 413.")
    max_image_bytes: int = _limit(25_000_000, "Largest image file in bytes; beyond it 413.")
    max_waiting: int = _limit(
        16_384, "Most accepted inputs without an answer; beyond it 429 with Retry-After."
    )
    read_seconds: float = _limit(
        60.0,
        "Seconds for a body to arrive, else 408; a reply not read for as long is dropped.",
    )
    head_seconds: float = _limit(
        10.0, "Seconds for the request line and headers to arrive, else the connection is closed."
    )
    max_head_bytes: int = _limit(64 * 2**10, "Largest head of a request in bytes; beyond it 400.")
    max_connections: int = _limit(512, "Most open connections; beyond it 503.")
    grace_seconds: float = _limit(
        30.0, "Seconds for accepted requests to finish after SIGTERM or SIGINT; beyond it 503."
    )
