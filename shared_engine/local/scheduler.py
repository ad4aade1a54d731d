"""Which document is tokenised next, and which sequences share the next step.

The callers of a device meet here. Queries go first, so that a search does not wait behind an
ingest, but after `QUERY_STEPS_IN_A_ROW` steps of queries waiting documents get one. Callers of one
role take turns of equal cost, and a step has the end of one turn and the beginning of the next. A
call that is cancelled is gone before anything else is taken. This module holds policy only: no
tokenizer, no torch, no thread.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from itertools import groupby
from threading import Condition
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from shared_engine.backend import Flow
from shared_engine.documents import Document, Role
from shared_engine.errors import EngineClosedError
from shared_engine.local.jobs import Call, Line, Sequence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


QUERY_STEPS_IN_A_ROW = 8
TEXTS_PER_CHUNK = 256
STEPS_AHEAD = 4
"""Steps of work that are prepared ahead for all callers together, or one for each if more wait."""


class Scheduler:
    """The queue of one device. Any thread may `put`; worker threads take from it."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self._changed = Condition()
        self._calls: dict[Future[NDArray[np.float32]], Call] = {}
        self._lines: WeakKeyDictionary[Flow, Line] = WeakKeyDictionary()
        self._cancelled: deque[Call] = deque()
        self._to_tokenise: deque[Line] = deque()
        self._tokenising = 0
        self._to_run: dict[Role, deque[Line]] = {"query": deque(), "document": deque()}
        self._query_steps = 0
        self._closed = False
        self.steps = 0
        """Steps formed so far."""
        self.tokens = 0
        """What those steps cost, in tokens."""

    def put(self, call: Call, ids: list[NDArray[np.int32]] | None = None) -> None:
        """Accept a call, with the ids of all its texts where they are known already.

        Raises:
            EngineClosedError: the scheduler was closed.
        """
        with self._changed:
            if self._closed:
                raise EngineClosedError("this engine was closed; make a new Embedder")
            self._calls[call.future] = call
            if call.request.flow is not None:
                call.line = self._lines.setdefault(call.request.flow, call.line)
            call.future.add_done_callback(self._ended)
            if ids is not None:
                self._enqueue([Sequence(call, row, known) for row, known in enumerate(ids)])
            else:
                if not call.line.calls:
                    self._to_tokenise.append(call.line)
                call.line.calls.append(call)
            self._changed.notify_all()

    def _ended(self, future: Future[NDArray[np.float32]]) -> None:
        call = self._calls.pop(future)
        if future.cancelled():
            # Runs wherever the garbage collector does, so it changes no queue: a worker does.
            self._cancelled.append(call)
            with self._changed:
                self._changed.notify_all()

    def _forget_cancelled(self) -> None:
        while self._cancelled:
            call = self._cancelled.popleft()
            line, waiting = call.line, self._to_run[call.request.role]
            line.leave(call)
            if not line.calls and line in self._to_tokenise:
                self._to_tokenise.remove(line)
            if not line.ready and line in waiting:
                waiting.remove(line)

    def next_chunk(self) -> list[tuple[Call, int]] | None:
        """Return the next (call, row) pairs to tokenise; None after the last.

        Waits while there are none, or enough is tokenised ahead of the device. The caller answers
        with `add`.
        """
        with self._changed:
            while not (chunk := self.take_chunk()):
                if self._closed and not self._to_tokenise:
                    self._changed.notify_all()
                    return None
                self._changed.wait()
            return chunk

    def take_chunk(self) -> list[tuple[Call, int]]:
        """Do as `next_chunk` does, but return [] instead of waiting."""
        with self._changed:
            self._forget_cancelled()
            chunk: list[tuple[Call, int]] = []
            room = TEXTS_PER_CHUNK
            waiting = len(self._to_tokenise)
            ahead = self.tokens_per_step * max(1, STEPS_AHEAD // max(1, waiting))
            for _ in range(waiting):
                line = self._to_tokenise.popleft()
                while line.calls and line.cost_ready < ahead and room > 0:
                    call = line.calls[0]
                    chunk.append((call, call.next_row))
                    room -= _share(call.request.documents[call.next_row])
                    call.next_row += 1
                    if call.next_row == len(call.request.documents):
                        line.calls.popleft()
                if line.calls:
                    self._to_tokenise.append(line)
                if room <= 0:
                    break
            if chunk:
                self._tokenising += 1
            return chunk

    def add(self, sequences: list[Sequence]) -> None:
        """Take what `next_chunk` gave out, now tokenised; rows that failed are left out."""
        with self._changed:
            self._tokenising -= 1
            self._enqueue(sequences)
            self._changed.notify_all()

    def _enqueue(self, sequences: list[Sequence]) -> None:
        for call, group in groupby(sequences, key=lambda sequence: sequence.call):
            if call.dropped:
                continue
            line = call.line
            if not line.ready:
                self._to_run[call.request.role].append(line)
            for sequence in group:
                line.ready.append(sequence)
                line.cost_ready += sequence.cost

    def next_step(self) -> list[Sequence] | None:
        """Return the sequences of the next step, all of one role; None after the last.

        Their cost is at most `tokens_per_step`, but a longer sequence runs alone. Waits while
        nothing is tokenised.
        """
        with self._changed:
            while not (step := self.take_step()):
                if self._closed and not self._tokenising and not self._to_tokenise:
                    return None
                self._changed.wait()
            return step

    def take_step(self) -> list[Sequence]:
        """Do as `next_step` does, but return [] instead of waiting."""
        with self._changed:
            self._forget_cancelled()
            queries, documents = self._to_run["query"], self._to_run["document"]
            due = self._query_steps >= QUERY_STEPS_IN_A_ROW
            lines = documents if documents and (due or not queries) else queries
            if not lines:
                return []
            self._query_steps = self._query_steps + 1 if lines is queries and documents else 0
            step = self._filled(lines)
            self.steps += 1
            self._changed.notify_all()  # there is room to tokenise ahead
            return step

    def _filled(self, lines: deque[Line]) -> list[Sequence]:
        step: list[Sequence] = []
        turn = room = self.tokens_per_step
        passed: list[Line] = []
        while lines:
            line = lines.popleft()
            while line.ready and line.used < turn:
                cost = line.ready[0].cost
                if step and cost > room:
                    break
                step.append(line.ready.popleft())
                room -= cost
                line.used += cost
                line.cost_ready -= cost
            if line.ready and line.used >= turn:
                line.used -= turn
                lines.append(line)
            elif line.ready:  # its next does not fit; it goes on with its turn in the next step
                passed.append(line)
                if room < turn / 10:  # full enough not to look for something smaller
                    break
        lines.extendleft(reversed(passed))
        self.tokens += turn - room
        return step

    def close(self, cancel: bool = False) -> None:
        """Accept nothing more; with `cancel`, also drop what has not started."""
        with self._changed:
            self._closed = True
            for future in list(self._calls) if cancel else ():
                future.cancel()
            self._changed.notify_all()


def _share(document: Document) -> int:
    # An image is work for a core, and a long text is more work than a short one.
    return TEXTS_PER_CHUNK if document.image is not None else 1 + len(document.text or "") // 1000
