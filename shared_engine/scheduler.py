"""Which text is tokenised next, and which sequences share the next step.

The callers of a device meet here. Queries go first, so that a search does not wait behind an
ingest, but after `QUERY_STEPS_IN_A_ROW` steps of queries waiting documents get one. Callers of one
role take turns step by step. This module holds policy only: no tokenizer, no torch, no thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_engine.backend import Request
from shared_engine.documents import Role
from shared_engine.errors import EngineClosedError, NeMoRetrieverError, PartialResultError

QUERY_STEPS_IN_A_ROW = 8
TEXTS_PER_CHUNK = 256
STEPS_AHEAD = 4


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
    ready: deque[Sequence] = field(default_factory=deque)
    """Tokenised, waiting for a step."""
    tokens_ready: int = 0
    lock: Lock = field(default_factory=Lock)
    """Held while rows are marked as finished."""

    def __post_init__(self) -> None:
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
        self.vectors[row] = np.nan
        self.errors[row] = error
        self._finished(1)

    def _finished(self, count: int) -> None:
        with self.lock:  # two workers may finish rows of one call
            self.unfinished -= count
            done = self.unfinished == 0
        if self.request.on_progress and not self.dropped:
            self.request.on_progress(count)
        if done and self.future.set_running_or_notify_cancel():
            error = failure(self.vectors, self.errors)
            if error is None:
                self.future.set_result(self.vectors)
            else:
                self.future.set_exception(error)


class Sequence(NamedTuple):
    """One tokenised text: which call and row it belongs to."""

    call: Call
    row: int
    ids: NDArray[np.int32]


def failure(
    vectors: NDArray[np.float32], errors: dict[int, NeMoRetrieverError]
) -> NeMoRetrieverError | None:
    """Return the error that a caller should see: none, the only input's own, or a summary."""
    if not errors:
        return None
    first = errors[min(errors)]
    if len(vectors) == 1:
        return first
    return PartialResultError(
        f"{len(errors)} of {len(vectors)} inputs failed, the first: {first}. The others are in "
        "`vectors` of this error, what went wrong in `errors`",
        vectors=vectors,
        errors=errors,
    )


class Scheduler:
    """The queue of one device. Any thread may `put`; two worker threads take from it."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self._changed = Condition()
        self._calls: set[Call] = set()
        self._to_tokenise: deque[Call] = deque()
        self._tokenising = 0
        self._to_run: dict[Role, deque[Call]] = {"query": deque(), "document": deque()}
        self._query_steps = 0
        self._closed = False
        self.steps = 0
        """Steps formed so far."""
        self.tokens = 0
        """Tokens of those steps."""

    def put(self, call: Call, ids: list[NDArray[np.int32]] | None = None) -> None:
        """Accept a call, with the ids of all its texts where they are known already.

        Raises:
            EngineClosedError: the scheduler was closed.
        """
        with self._changed:
            if self._closed:
                raise EngineClosedError("this engine was closed; make a new Embedder")
            self._calls.add(call)
            call.future.add_done_callback(lambda _: self._calls.discard(call))
            if ids is None:
                self._to_tokenise.append(call)
            else:
                self._enqueue(Sequence(call, row, known) for row, known in enumerate(ids))
            self._changed.notify_all()

    def next_chunk(self) -> list[tuple[Call, int]] | None:
        """Return the next (call, row) pairs to tokenise; None after the last.

        Waits while there are none, or enough is tokenised ahead of the device. The caller answers
        with `add`.
        """
        with self._changed:
            while True:
                if chunk := self._take_rows():
                    self._tokenising += 1
                    return chunk
                if self._closed and not self._to_tokenise:
                    self._changed.notify_all()
                    return None
                self._changed.wait()

    def _take_rows(self) -> list[tuple[Call, int]]:
        chunk: list[tuple[Call, int]] = []
        ahead = STEPS_AHEAD * self.tokens_per_step
        for _ in range(len(self._to_tokenise)):
            call = self._to_tokenise.popleft()
            if call.dropped:
                continue
            total = len(call.request.documents)
            if call.tokens_ready < ahead:
                stop = min(total, call.next_row + TEXTS_PER_CHUNK - len(chunk))
                chunk += [(call, row) for row in range(call.next_row, stop)]
                call.next_row = stop
            if call.next_row < total:
                self._to_tokenise.append(call)
            if len(chunk) == TEXTS_PER_CHUNK:
                break
        return chunk

    def add(self, sequences: list[Sequence]) -> None:
        """Take what `next_chunk` gave out, now tokenised; rows that failed are left out."""
        with self._changed:
            self._tokenising -= 1
            self._enqueue(sequences)
            self._changed.notify_all()

    def _enqueue(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            call = sequence.call
            if not call.ready:
                self._to_run[call.request.role].append(call)
            call.ready.append(sequence)
            call.tokens_ready += len(sequence.ids)

    def next_step(self) -> list[Sequence] | None:
        """Return the sequences of the next step, all of one role; None after the last.

        Their tokens are at most `tokens_per_step`, but a longer sequence runs alone. Waits while
        nothing is tokenised.
        """
        with self._changed:
            while True:
                if step := self._form_step():
                    self.steps += 1
                    self.tokens += sum(len(sequence.ids) for sequence in step)
                    self._changed.notify_all()
                    return step
                if self._closed and not self._tokenising and not self._to_tokenise:
                    return None
                self._changed.wait()

    def _form_step(self) -> list[Sequence]:
        queries, documents = self._to_run["query"], self._to_run["document"]
        due = self._query_steps >= QUERY_STEPS_IN_A_ROW
        for calls in (documents, queries) if due else (queries, documents):
            if step := self._take_sequences(calls):
                self._query_steps = self._query_steps + 1 if calls is queries and documents else 0
                return step
        return []

    def _take_sequences(self, calls: deque[Call]) -> list[Sequence]:
        step: list[Sequence] = []
        tokens = 0
        while calls:
            call = calls.popleft()
            if call.dropped:
                call.ready.clear()
            while call.ready:
                length = len(call.ready[0].ids)
                if step and tokens + length > self.tokens_per_step:
                    calls.append(call)  # its turn comes again after the others'
                    return step
                step.append(call.ready.popleft())
                call.tokens_ready -= length
                tokens += length
        return step

    def close(self, cancel: bool = False) -> None:
        """Accept nothing more; with `cancel`, also drop what has not started."""
        with self._changed:
            self._closed = True
            for call in list(self._calls) if cancel else ():
                call.future.cancel()
            self._changed.notify_all()
