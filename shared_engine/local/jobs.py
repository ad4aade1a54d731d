"""What callers want of a device: calls, their sequences, and the lines they stand in."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from shared_engine.errors import NeMoRetrieverError, combine_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared_engine.backend import Request
    from shared_engine.images.tiles import Tiles


@dataclass(eq=False)
class Line:
    """What takes turns: one caller's call, or the batches of a stream one after the other."""

    calls: deque[Call] = field(default_factory=deque)
    """With documents that nobody has taken to tokenise."""
    ready: deque[Sequence] = field(default_factory=deque)
    """Tokenised, waiting for a step."""
    cost_ready: int = 0
    """Of the sequences in `ready`."""
    used: int = 0
    """What the turn has cost so far; more than a turn may is paid for with the next ones."""

    def leave(self, call: Call) -> None:
        """Drop what is left of a call."""
        if call in self.calls:
            self.calls.remove(call)
        self.ready = deque(sequence for sequence in self.ready if sequence.call is not call)
        self.cost_ready = sum(sequence.cost for sequence in self.ready)


@dataclass(eq=False)
class Call:
    """One caller's request on its way: what is tokenised, what is finished, and where it goes."""

    request: Request
    vectors: NDArray[np.float32]
    """(n, d), filled row by row."""
    future: Future[NDArray[np.float32]] = field(default_factory=Future)
    errors: dict[int, NeMoRetrieverError] = field(default_factory=dict)
    known: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    """Token ids of rows that had to be tokenised before anything was accepted."""
    next_row: int = 0
    """The first row that nobody has taken to tokenise."""
    unfinished: int = 0
    """Rows without vector or error."""
    lock: Lock = field(default_factory=Lock)
    """Held while rows are marked as finished."""
    line: Line = field(init=False)
    """Where it waits."""

    def __post_init__(self) -> None:
        self.line = Line()
        self.unfinished = len(self.request.documents)

    @property
    def dropped(self) -> bool:
        """Whether the caller is gone."""
        return self.future.cancelled()

    def deliver(self, rows: list[int], vectors: NDArray[np.float32], tokens: int) -> None:
        """Take the full vectors (len(rows), hidden) of some rows, made of so many tokens."""
        self.vectors[rows] = vectors[:, : self.vectors.shape[1]]
        if self.request.on_usage and not self.dropped:
            self.request.on_usage(tokens)
        self._finished(len(rows))

    def fail(self, row: int, error: NeMoRetrieverError) -> None:
        """Take the error of one row."""
        self.vectors[row] = math.nan
        self.errors[row] = error
        self._finished(1)

    def _finished(self, count: int) -> None:
        with self.lock:  # two workers may finish rows of one call
            self.unfinished -= count
            done = self.unfinished == 0
        if self.request.on_progress and not self.dropped:
            self.request.on_progress(count)
        if done and self.future.set_running_or_notify_cancel():
            if self.errors:
                self.future.set_exception(combine_errors(self.vectors, self.errors))
            else:
                self.future.set_result(self.vectors)


class Sequence(NamedTuple):
    """One document, ready to compute: which call and row it belongs to."""

    call: Call
    row: int
    ids: NDArray[np.int32]
    tiles: Tiles | None = None
    """Its image."""
    patches: int = 0
    """Of the image."""

    @property
    def cost(self) -> int:
        """Its share of a step, in tokens: a patch takes the vision tower half of what one takes."""
        return len(self.ids) + self.patches // 2
