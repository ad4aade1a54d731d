"""Limits on requests."""

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
    max_image_bytes: int = _limit(25_000_000, "Maximum bytes of an image; larger ones get 413.")
    max_waiting: int = _limit(
        16_384, "Maximum accepted inputs without a response; more get 429 with Retry-After."
    )
    read_seconds: float = _limit(60.0, "Seconds for a request body to arrive; later ones get 408.")
    grace_seconds: float = _limit(
        30.0, "Seconds for accepted requests to finish after SIGTERM or SIGINT; later ones get 503."
    )
