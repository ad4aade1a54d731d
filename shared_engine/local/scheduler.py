"""Deficit round robin: which document is prepared next, which sequences share the next step.

The callers of a device meet here. Queries go first, so that a search does not wait behind an
ingest, but after `QUERY_STEPS_IN_A_ROW` steps of queries waiting documents get one. A device that
can pause a step of documents runs queries in its pauses, too, up to the same amount of work. Flows
of one role take turns of one quantum, the tokens of a step; a step has the end of one turn and the
beginning of the next. A job that is cancelled is gone before anything else is taken. This module
holds policy only: no tokenizer, no torch, no thread.

Source: Shreedhar and Varghese, Efficient Fair Queuing using Deficit Round Robin, 1995; here in its
surplus form: a flow may overdraw its quantum by one sequence, and pays in its next turns.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from threading import Condition
from weakref import WeakKeyDictionary

from shared_engine.backend import Flow, Rows
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.errors import EngineClosedError
from shared_engine.local.jobs import Job, TokenSequence

QUERY_STEPS_IN_A_ROW = 8
TEXTS_PER_CHUNK = 256
STEPS_AHEAD = 4
"""Steps of work that are prepared ahead for all callers together, or one for each if more wait."""
PATIENCE = 16
"""Full steps that must fit before a step that was shrunk grows again; twice as many each time that
it was too early, and never over `MOST_PATIENCE`."""
MOST_PATIENCE = 1024


@dataclass(eq=False)
class FlowQueue:
    """Where a flow stands: its jobs to prepare, and its sequences to run."""

    jobs: deque[Job] = field(default_factory=deque)
    """With documents that nobody has taken to prepare."""
    ready: deque[TokenSequence] = field(default_factory=deque)
    """Prepared, waiting for a step."""
    ready_cost: int = 0
    """Of the sequences in `ready`, in tokens."""
    deficit: int = 0
    """Cost of what ran in this turn; an overdraft is taken from later turns."""

    def leave(self, job: Job) -> None:
        """Drop what is left of a job."""
        if job in self.jobs:
            self.jobs.remove(job)
        self.ready = deque(sequence for sequence in self.ready if sequence.job is not job)
        self.ready_cost = sum(sequence.cost for sequence in self.ready)


class Scheduler:
    """The queue of one model's devices. Any thread may `put`; worker threads take from it."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._changed = Condition()
        self._jobs: dict[Future[Rows], Job] = {}
        self._turns: WeakKeyDictionary[Flow | Job, FlowQueue] = WeakKeyDictionary()
        self._cancelled: deque[Job] = deque()
        self._to_prepare: deque[FlowQueue] = deque()
        self._preparing = 0
        self._to_run: dict[Role, deque[FlowQueue]] = {"query": deque(), "document": deque()}
        self._query_steps = 0.0
        """Steps of queries since the last step of documents; in pauses a step counts by tokens."""
        self._tokens_at_first = max_batch_tokens
        self._full_steps = 0
        self._patience = PATIENCE
        self._has_grown = False
        self._closed = False
        self.steps = 0
        """Steps formed so far."""
        self.tokens = 0
        """What those steps cost, in tokens."""

    def put(self, job: Job, sequences: list[TokenSequence] | None = None) -> None:
        """Accept a job, with its sequences where they are prepared already.

        Raises:
            EngineClosedError: the scheduler was closed.
        """
        with self._changed:
            if self._closed:
                raise EngineClosedError("this engine was closed; make a new Embedder")
            self._jobs[job.future] = job
            job.future.add_done_callback(self._forget)
            if sequences is not None:
                self._enqueue(sequences)
            else:
                turn = self.find_turn(job)
                if not turn.jobs:
                    self._to_prepare.append(turn)
                turn.jobs.append(job)
            self._changed.notify_all()

    def find_turn(self, job: Job) -> FlowQueue:
        """Return where a job's flow stands; a job without one is a flow of its own."""
        return self._turns.setdefault(job.request.flow or job, FlowQueue())

    def shrink(self, tokens: int) -> None:
        """Let steps have at most so many tokens from now on, and never more than before."""
        with self._changed:
            self.max_batch_tokens = max(1, min(self.max_batch_tokens, tokens))
            self._full_steps = 0
            if self._has_grown:  # and that was too early
                self._has_grown = False
                self._patience = min(2 * self._patience, MOST_PATIENCE)

    def grow(self, tokens: int) -> None:
        """Note a step of so many tokens that fitted; many full ones double what was shrunk."""
        with self._changed:
            is_full = 2 * tokens >= self.max_batch_tokens
            if not is_full or self.max_batch_tokens == self._tokens_at_first:
                return
            self._full_steps += 1
            if self._full_steps == self._patience:
                self.max_batch_tokens = min(2 * self.max_batch_tokens, self._tokens_at_first)
                self._full_steps, self._has_grown = 0, True

    def _forget(self, future: Future[Rows]) -> None:
        job = self._jobs.pop(future)
        if future.cancelled():
            # Runs wherever the garbage collector does, so it changes no queue: a worker does.
            self._cancelled.append(job)
            with self._changed:
                self._changed.notify_all()

    def _forget_cancelled(self) -> None:
        while self._cancelled:
            job = self._cancelled.popleft()
            turn, waiting = self.find_turn(job), self._to_run[job.request.role]
            turn.leave(job)
            if not turn.jobs and turn in self._to_prepare:
                self._to_prepare.remove(turn)
            if not turn.ready and turn in waiting:
                waiting.remove(turn)

    def next_chunk(self) -> list[tuple[Job, int]] | None:
        """Return the next (job, row) pairs to prepare; None after the last.

        Waits while there are none, or enough is prepared ahead of the device. The caller answers
        with `add`.
        """
        with self._changed:
            while not (chunk := self.take_chunk()):
                if self._closed and not self._to_prepare:
                    self._changed.notify_all()
                    return None
                self._changed.wait()
            return chunk

    def take_chunk(self) -> list[tuple[Job, int]]:
        """Do as `next_chunk` does, but return [] instead of waiting."""
        with self._changed:
            self._forget_cancelled()
            chunk: list[tuple[Job, int]] = []
            room = TEXTS_PER_CHUNK
            waiting = len(self._to_prepare)
            ahead = self.max_batch_tokens * max(1, STEPS_AHEAD // max(1, waiting))
            for _ in range(waiting):
                turn = self._to_prepare.popleft()
                while turn.jobs and turn.ready_cost < ahead and room > 0:
                    job = turn.jobs[0]
                    chunk.append((job, job.next_row))
                    room -= _weigh(job.request.documents[job.next_row])
                    job.next_row += 1
                    if job.next_row == len(job.request.documents):
                        turn.jobs.popleft()
                if turn.jobs:
                    self._to_prepare.append(turn)
                if room <= 0:
                    break
            if chunk:
                self._preparing += 1
            return chunk

    def add(self, sequences: list[TokenSequence]) -> None:
        """Take what `next_chunk` gave out, now prepared; rows that failed are left out."""
        with self._changed:
            self._preparing -= 1
            self._enqueue(sequences)
            self._changed.notify_all()

    def _enqueue(self, sequences: list[TokenSequence]) -> None:
        for job, group in groupby(sequences, key=lambda sequence: sequence.job):
            if job.is_cancelled:
                continue
            turn = self.find_turn(job)
            if not turn.ready:
                self._to_run[job.request.role].append(turn)
            for sequence in group:
                turn.ready.append(sequence)
                turn.ready_cost += sequence.cost

    def next_step(self) -> list[TokenSequence] | None:
        """Return the sequences of the next step, all of one role; None after the last.

        Their cost is at most `max_batch_tokens`, but a longer sequence runs alone. Waits while
        nothing is prepared.
        """
        with self._changed:
            while not (step := self.take_step()):
                if self._closed and not self._preparing and not self._to_prepare:
                    return None
                self._changed.wait()
            return step

    def take_step(self) -> list[TokenSequence]:
        """Do as `next_step` does, but return [] instead of waiting."""
        with self._changed:
            self._forget_cancelled()
            queries, documents = self._to_run["query"], self._to_run["document"]
            due = self._query_steps >= QUERY_STEPS_IN_A_ROW
            turns = documents if documents and (due or not queries) else queries
            if not turns:
                return []
            self._query_steps = self._query_steps + 1 if turns is queries and documents else 0
            return self._fill_step(turns)

    def take_queries(self) -> list[TokenSequence]:
        """Return a step of queries for a pause of a step of documents, [] if none may run."""
        with self._changed:
            self._forget_cancelled()
            queries = self._to_run["query"]
            if not queries or self._query_steps >= QUERY_STEPS_IN_A_ROW:
                return []
            before = self.tokens
            step = self._fill_step(queries)
            # A search is small, and a step of documents has dozens of pauses.
            self._query_steps += (self.tokens - before) / self.max_batch_tokens
            return step

    def _fill_step(self, turns: deque[FlowQueue]) -> list[TokenSequence]:
        step: list[TokenSequence] = []
        quantum = room = self.max_batch_tokens
        passed: list[FlowQueue] = []
        while turns:
            turn = turns.popleft()
            while turn.ready and turn.deficit < quantum:
                cost = turn.ready[0].cost
                if step and cost > room:
                    break
                step.append(turn.ready.popleft())
                room -= cost
                turn.deficit += cost
                turn.ready_cost -= cost
            if turn.ready and turn.deficit >= quantum:
                turn.deficit -= quantum
                turns.append(turn)
            elif turn.ready:  # its next does not fit; it goes on with its turn in the next step
                passed.append(turn)
                if room < quantum / 10:  # full enough not to look for something smaller
                    break
        turns.extendleft(reversed(passed))
        self.steps += 1
        self.tokens += quantum - room
        self._changed.notify_all()  # there is room to prepare ahead
        return step

    def close(self, cancel: bool = False) -> None:
        """Accept nothing more; with `cancel`, also drop what has not started."""
        with self._changed:
            self._closed = True
            for future in list(self._jobs) if cancel else ():
                future.cancel()
            self._changed.notify_all()


def _weigh(document: EmbeddingInput) -> int:
    # An image is work for a core, and a long text is more work than a short one.
    return TEXTS_PER_CHUNK if document.image is not None else 1 + len(document.text or "") // 1000
