"""The vectors of a backend's future, or its errors, raised as `Embedder.embed` raises them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray

from shared_engine.backend import Rows


def vectors_of(future: Future[Rows]) -> NDArray[Any]:
    """Return the vectors, or raise the only row's error or a PartialResultError."""
    rows = future.result(60)
    if len(rows) == 1 and rows.errors:
        raise rows.errors[0]
    return rows.unwrap()
