"""One caller's documents on their way to a NIM: which are sent together, and what came of each.

Policy only: nothing is sent here, and one thread uses it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared_engine.backend import Request
from shared_engine.documents import Modality
from shared_engine.errors import (
    EngineError,
    InputError,
    MalformedResponseError,
    NeMoRetrieverError,
)
from shared_engine.nim_wire import encoded
from shared_engine.scheduler import failure


@dataclass
class Limits:
    """The most that one request may hold; learned from what the server refuses."""

    inputs: int
    size: int = 2_000_000
    """Bytes. Common HTTP servers refuse bodies over 2 MB unless told otherwise."""


@dataclass(frozen=True)
class Batch:
    """Documents of one modality that go into one request."""

    rows: tuple[int, ...]
    """Where they are in the caller's list."""
    inputs: tuple[bytes, ...]
    """What is sent for each."""
    modality: Modality
    malformed: int = 0
    """Replies to it that could not be believed."""

    @property
    def size(self) -> int:
        """Bytes of its inputs, with the commas."""
        return sum(map(len, self.inputs)) + len(self.inputs)

    def halves(self) -> tuple[Batch, Batch]:
        """Return the shorter inputs and the longer ones, where a single culprit most often is."""
        by_size = sorted(range(len(self.rows)), key=lambda i: len(self.inputs[i]))
        middle = len(by_size) // 2
        return self.only(by_size[:middle]), self.only(by_size[middle:])

    def apart(self, position: int | None) -> tuple[Batch, Batch]:
        """Return the input at `position` and the others, or halves if no such one is known."""
        if position is None or position >= len(self.rows):
            return self.halves()
        return self.only([position]), self.only([i for i in range(len(self.rows)) if i != position])

    def only(self, positions: list[int]) -> Batch:
        """Return some of its inputs, in their order in the caller's list."""
        chosen = sorted(positions)
        rows = tuple(self.rows[i] for i in chosen)
        return Batch(rows, tuple(self.inputs[i] for i in chosen), self.modality)


class Call:
    """A request's rows: waiting, in a batch, or finished."""

    def __init__(self, request: Request, width: int = 0) -> None:
        """Line the rows up; `width` is the length of a vector, or 0 where no one knows yet."""
        self.request = request
        self.stopped: NeMoRetrieverError | None = None
        """Why nothing more is sent, if so."""
        documents = request.documents
        self._rows = deque(sorted(range(len(documents)), key=lambda row: documents[row].modality))
        self._again: deque[Batch] = deque()
        self._vectors: NDArray[np.float32] | None = None
        self._width = width
        self._errors: dict[int, NeMoRetrieverError] = {}
        self._unfinished = set(range(len(documents)))

    def next_batch(self, limits: Limits) -> Batch | None:
        """Return the next inputs to send, or None where all were given out."""
        if self.stopped is not None:
            return None
        if self._again:
            return self._again.popleft()
        if not self._rows:
            return None
        documents = self.request.documents
        modality = documents[self._rows[0]].modality
        rows: list[int] = []
        inputs: list[bytes] = []
        size = 0
        while self._rows and len(rows) < limits.inputs:
            row = self._rows[0]
            if documents[row].modality != modality:
                break
            try:
                item = encoded(documents[row], row)
            except InputError as exc:
                self._errors[self._rows.popleft()] = exc
                self._finished((row,))
                continue
            size += len(item) + 1
            if rows and size > limits.size:
                break
            rows.append(self._rows.popleft())
            inputs.append(item)
        return Batch(tuple(rows), tuple(inputs), modality) if rows else self.next_batch(limits)

    def send_again(self, *batches: Batch) -> None:
        """Put batches before all others."""
        self._again.extend(batch for batch in batches if batch.rows)

    def deliver(self, batch: Batch, vectors: NDArray[np.float32], tokens: int) -> None:
        """Take the vectors of a batch.

        Raises:
            MalformedResponseError: they are not as long as the vectors before them.
        """
        width = vectors.shape[1]
        if self._vectors is None:
            self._vectors = np.empty((len(self.request.documents), width), np.float32)
        elif self._vectors.shape[1] != width:
            raise MalformedResponseError(
                f"the server sent vectors of {width} values after {self._vectors.shape[1]}"
            )
        self._vectors[list(batch.rows)] = vectors
        if self.request.on_usage and tokens:
            self.request.on_usage(tokens)
        self._finished(batch.rows)

    def fail(self, batch: Batch, error: NeMoRetrieverError) -> None:
        """Take the error of a batch."""
        self._errors.update(dict.fromkeys(batch.rows, error))
        self._finished(batch.rows)

    def _finished(self, rows: tuple[int, ...]) -> None:
        self._unfinished.difference_update(rows)
        if self.request.on_progress:
            self.request.on_progress(len(rows))

    def result(self) -> NDArray[np.float32]:
        """Return all vectors, (n, d).

        Raises:
            NeMoRetrieverError: the reason, where all inputs failed for the same one.
            PartialResultError: some inputs failed, or each for a reason of its own.
        """
        reason = self.stopped or EngineError("this input was not embedded")
        errors = {**self._errors, **dict.fromkeys(self._unfinished, reason)}
        n = len(self.request.documents)
        vectors = self._vectors
        if vectors is None:
            vectors = np.empty((n, self.request.dimensions or self._width), np.float32)
        if not errors:
            return vectors
        first = errors[min(errors)]
        same = len({type(error) for error in errors.values()}) == 1
        if len(errors) == n and same and not isinstance(first, InputError):
            raise first
        vectors[list(errors)] = np.nan
        raise failure(vectors, errors) or AssertionError
