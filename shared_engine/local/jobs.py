"""What callers want of a device: jobs, and the sequences that they are made into."""

from __future__ import annotations

import math
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


@dataclass(eq=False)
class Job:
    """One caller's request on its way: how far it is, and where its vectors go."""

    request: Request
    vectors: NDArray[np.float32]
    """(n, d), filled row by row."""
    future: Future[Rows] = field(default_factory=Future)
    errors: dict[int, NeMoRetrieverError] = field(default_factory=dict)
    next_row: int = 0
    """The first row that nobody has taken to prepare."""
    unfinished: int = field(init=False)
    """Rows without vector or error."""
    lock: Lock = field(default_factory=Lock)
    """Held while rows are marked as finished."""

    def __post_init__(self) -> None:
        self.unfinished = len(self.request.documents)

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller is gone."""
        return self.future.cancelled()

    def deliver(self, rows: list[int], vectors: NDArray[np.float32], tokens: int) -> None:
        """Take the full vectors (len(rows), hidden) of some rows, made of so many tokens."""
        self.vectors[rows] = vectors[:, : self.vectors.shape[1]]
        if not self.is_cancelled:
            self.request.report_usage(tokens)
        self._finish(len(rows))

    def fail(self, row: int, error: NeMoRetrieverError) -> None:
        """Take the error of one row."""
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
    """One document, ready to compute: which job and row it belongs to."""

    job: Job
    row: int
    ids: NDArray[np.int32]
    tiles: Tiles | None = None
    """Its image."""
    patches: int = 0
    """Of the image."""

    @property
    def cost(self) -> int:
        """Its share of a step, in tokens; a patch takes half the time of a token."""
        return len(self.ids) + self.patches // 2
