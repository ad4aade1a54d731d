"""Jobs, one for each request, and the token sequences that are made of their documents."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from shared_engine.backend import Rows
from shared_engine.errors import NeMoRetrieverError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared_engine.backend import Request
    from shared_engine.images.tiles import Tiles
    from shared_engine.local.vision_cache import KeyedImage


@dataclass(eq=False)
class Job:
    """A request in progress, with its vectors, errors and future."""

    request: Request
    vectors: NDArray[np.float32]
    """(n, d), filled row by row."""
    future: Future[Rows] = field(default_factory=Future)
    errors: dict[int, NeMoRetrieverError] = field(default_factory=dict)
    accepted: float = field(default_factory=time.perf_counter)
    has_started: bool = False
    """Whether a step has had one of its rows."""
    next_row: int = 0
    """The first row that no thread prepares yet."""
    unfinished: int = field(init=False)
    """Number of rows without a vector or an error."""
    lock: Lock = field(default_factory=Lock)
    """Held while rows are marked as finished."""

    def __post_init__(self) -> None:
        self.unfinished = len(self.request.documents)

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller cancelled the request."""
        return self.future.cancelled()

    def deliver(self, rows: list[int], vectors: NDArray[np.float32], tokens: int) -> None:
        """Store the vectors of some rows, cut to the requested dimensions.

        Args:
            vectors: (len(rows), hidden), in full size.
            tokens: Number of tokens that were embedded.
        """
        self.vectors[rows] = vectors[:, : self.vectors.shape[1]]
        if not self.is_cancelled:
            self.request.report_usage(tokens)
        self._finish(len(rows))

    def fail(self, row: int, error: NeMoRetrieverError) -> None:
        """Store the error of one row."""
        self.vectors[row] = math.nan
        self.errors[row] = error
        self._finish(1)

    def _finish(self, count: int) -> None:
        with self.lock:  # two workers may finish rows of one job
            self.unfinished -= count
            done = self.unfinished == 0
        if not self.is_cancelled:
            self.request.report_progress(count)
        if done and self.future.set_running_or_notify_cancel():
            self.future.set_result(Rows(self.vectors, self.errors))


class TokenSequence(NamedTuple):
    """A prepared document, with its job and its row there."""

    job: Job
    row: int
    ids: NDArray[np.int32]
    tiles: Tiles | KeyedImage | None = None
    """The document's image; None for a text."""
    patches: int = 0
    """Number of patches of the image."""

    @property
    def cost(self) -> int:
        """Cost in tokens; a patch takes half the time of a token."""
        return len(self.ids) + self.patches // 2
