"""Select the documents to prepare next and the sequences of the next step, by deficit round robin.

All callers of a model share one `Scheduler`. Its policy:

- Queries run before documents, so that a search does not wait for an ingest. All requests to a
  reranker count as queries.
- After `QUERY_STEPS_IN_A_ROW` steps of queries, waiting documents get one step.
- If a device can pause a step of documents, queries also run in its pauses, up to the same amount
  of work.
- Flows of one kind alternate. A flow may run one quantum, the tokens of a step, before the next
  flow; a step may hold the end of one flow's quantum and the beginning of the next.
- Cancelled jobs are removed before anything else is selected.

This module is policy only: it starts no thread and uses neither the tokenizer nor torch.

Source: Shreedhar and Varghese, Efficient Fair Queuing using Deficit Round Robin, 1995, in its
surplus form: a flow may exceed its quantum by one sequence, and its next quanta are reduced by it.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from threading import Condition
from weakref import WeakKeyDictionary

from shared_engine.backend import Flow, Rows, StepStats
from shared_engine.documents import EmbeddingInput
from shared_engine.errors import EngineClosedError
from shared_engine.local.jobs import Job, TokenSequence

QUERY_STEPS_IN_A_ROW = 8
TEXTS_PER_CHUNK = 256
STEPS_AHEAD = 4
"""Steps of sequences prepared in advance, shared by all flows; at least one step for each flow."""
PATIENCE = 256
"""Full steps that must fit in memory before a reduced step size is doubled."""


@dataclass(eq=False)
class FlowQueue:
    """The queues of one flow: jobs to prepare, and sequences to run."""

    jobs: deque[Job] = field(default_factory=deque)
    """Jobs with rows that no thread prepares yet."""
    ready: deque[TokenSequence] = field(default_factory=deque)
    """Prepared sequences that wait for a step."""
    ready_cost: int = 0
    """Cost of `ready` in tokens."""
    deficit: int = 0
    """Tokens used of the current quantum; an excess counts against the next quanta."""

    def discard(self, job: Job) -> None:
        """Remove a job and its sequences."""
        if job in self.jobs:
            self.jobs.remove(job)
        self.ready = deque(sequence for sequence in self.ready if sequence.job is not job)
        self.ready_cost = sum(sequence.cost for sequence in self.ready)


class Scheduler:
    """The queue of one model's devices. Any thread may `put`; worker threads take from it."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.stats = StepStats(max_batch_tokens)
        self._changed = Condition()
        self._jobs: dict[Future[Rows], Job] = {}
        self._queues: WeakKeyDictionary[Flow | Job, FlowQueue] = WeakKeyDictionary()
        self._cancelled: deque[Job] = deque()
        self._to_prepare: deque[FlowQueue] = deque()
        self._preparing = 0
        self._to_run: dict[bool, deque[FlowQueue]] = {True: deque(), False: deque()}
        """Flows with prepared sequences, those of searches and those of documents."""
        self._query_steps = 0.0
        """Steps of queries since the last step of documents; a step in a pause is a fraction."""
        self._initial_batch_tokens = max_batch_tokens
        self._full_steps = 0
        self._closed = False

    def put(self, job: Job, sequences: list[TokenSequence] | None = None) -> None:
        """Accept a job.

        Args:
            sequences: The job's sequences if they are prepared already.

        Raises:
            EngineClosedError: the scheduler was closed.
        """
        with self._changed:
            if self._closed:
                raise EngineClosedError("this object was closed; create a new one")
            self._jobs[job.future] = job
            job.future.add_done_callback(self._forget)
            if sequences is not None:
                self._enqueue(sequences)
            else:
                queue = self.queue_of(job)
                if not queue.jobs:
                    self._to_prepare.append(queue)
                queue.jobs.append(job)
            self._changed.notify_all()

    def queue_of(self, job: Job) -> FlowQueue:
        """Return the queue of a job's flow; a job without a flow has its own queue."""
        return self._queues.setdefault(job.request.flow or job, FlowQueue())

    def shrink(self, tokens: int) -> None:
        """Limit steps to this number of tokens; a lower limit stays."""
        with self._changed:
            self.stats.max_batch_tokens = max(1, min(self.stats.max_batch_tokens, tokens))
            self._full_steps = 0

    def grow(self, tokens: int) -> None:
        """Count a step that fitted in memory; after enough full steps, double a reduced limit."""
        with self._changed:
            is_full = 2 * tokens >= self.stats.max_batch_tokens
            if not is_full or self.stats.max_batch_tokens == self._initial_batch_tokens:
                return
            self._full_steps += 1
            if self._full_steps == PATIENCE:
                self.stats.max_batch_tokens = min(
                    2 * self.stats.max_batch_tokens, self._initial_batch_tokens
                )
                self._full_steps = 0

    def _forget(self, future: Future[Rows]) -> None:
        job = self._jobs.pop(future)
        if future.cancelled():
            # The garbage collector may run this inside any method, so only a worker edits queues.
            self._cancelled.append(job)
            with self._changed:
                self._changed.notify_all()

    def _discard_cancelled(self) -> None:
        while self._cancelled:
            job = self._cancelled.popleft()
            queue, to_run = self.queue_of(job), self._to_run[job.request.is_search]
            queue.discard(job)
            if not queue.jobs and queue in self._to_prepare:
                self._to_prepare.remove(queue)
            if not queue.ready and queue in to_run:
                to_run.remove(queue)

    def next_chunk(self) -> list[tuple[Job, int]] | None:
        """Return the next (job, row) pairs to prepare; None after the last.

        Waits while there are none or enough sequences are prepared in advance. The caller must
        pass the sequences to `add`.
        """
        with self._changed:
            while not (chunk := self.take_chunk()):
                if self._closed and not self._to_prepare:
                    self._changed.notify_all()
                    return None
                self._changed.wait()
            return chunk

    def take_chunk(self) -> list[tuple[Job, int]]:
        """Return the same as `next_chunk`, but [] instead of waiting."""
        with self._changed:
            self._discard_cancelled()
            chunk: list[tuple[Job, int]] = []
            budget = TEXTS_PER_CHUNK
            flows = len(self._to_prepare)
            ahead = self.stats.max_batch_tokens * max(1, STEPS_AHEAD // max(1, flows))
            for _ in range(flows):
                queue = self._to_prepare.popleft()
                while queue.jobs and queue.ready_cost < ahead and budget > 0:
                    job = queue.jobs[0]
                    chunk.append((job, job.next_row))
                    budget -= _preparation_cost(job.request.documents[job.next_row])
                    job.next_row += 1
                    if job.next_row == len(job.request.documents):
                        queue.jobs.popleft()
                if queue.jobs:
                    self._to_prepare.append(queue)
                if budget <= 0:
                    break
            if chunk:
                self._preparing += 1
            return chunk

    def add(self, sequences: list[TokenSequence]) -> None:
        """Queue the sequences of a chunk from `next_chunk`, without the rows that failed."""
        with self._changed:
            self._preparing -= 1
            self._enqueue(sequences)
            self._changed.notify_all()

    def _enqueue(self, sequences: list[TokenSequence]) -> None:
        for job, group in groupby(sequences, key=lambda sequence: sequence.job):
            if job.is_cancelled:
                continue
            queue = self.queue_of(job)
            if not queue.ready:
                self._to_run[job.request.is_search].append(queue)
            for sequence in group:
                queue.ready.append(sequence)
                queue.ready_cost += sequence.cost

    def next_step(self) -> list[TokenSequence] | None:
        """Return the sequences of the next step; None after the last.

        They are all of searches or all of documents. Their total cost is at most
        `max_batch_tokens`; a longer sequence runs alone. Waits while no sequence is prepared.
        """
        with self._changed:
            while not (step := self.take_step()):
                if self._closed and not self._preparing and not self._to_prepare:
                    return None
                self._changed.wait()
            return step

    def take_step(self) -> list[TokenSequence]:
        """Return the same as `next_step`, but [] instead of waiting."""
        with self._changed:
            self._discard_cancelled()
            queries, documents = self._to_run[True], self._to_run[False]
            documents_first = self._query_steps >= QUERY_STEPS_IN_A_ROW
            queues = documents if documents and (documents_first or not queries) else queries
            if not queues:
                return []
            self._query_steps = self._query_steps + 1 if queues is queries and documents else 0
            return self._fill_step(queues)

    def take_queries(self) -> list[TokenSequence]:
        """Return a step of queries for a pause of a step of documents, or [] if none may run."""
        with self._changed:
            self._discard_cancelled()
            queries = self._to_run[True]
            if not queries or self._query_steps >= QUERY_STEPS_IN_A_ROW:
                return []
            before = self.stats.tokens
            step = self._fill_step(queries)
            # Counted by tokens: a search is small, and a step of documents has dozens of pauses.
            self._query_steps += (self.stats.tokens - before) / self.stats.max_batch_tokens
            return step

    def _fill_step(self, queues: deque[FlowQueue]) -> list[TokenSequence]:
        step: list[TokenSequence] = []
        quantum = free = self.stats.max_batch_tokens
        skipped: list[FlowQueue] = []
        while queues:
            queue = queues.popleft()
            while queue.ready and queue.deficit < quantum:
                cost = queue.ready[0].cost
                if step and cost > free:
                    break
                step.append(queue.ready.popleft())
                self._count_start(step[-1].job)
                free -= cost
                queue.deficit += cost
                queue.ready_cost -= cost
            if queue.ready and queue.deficit >= quantum:
                queue.deficit -= quantum
                queues.append(queue)
            elif queue.ready:  # its next sequence does not fit; the next step begins with it
                skipped.append(queue)
                if free < quantum / 10:  # full enough not to search for smaller sequences
                    break
        queues.extendleft(reversed(skipped))
        self.stats.steps += 1
        self.stats.tokens += quantum - free
        self._changed.notify_all()  # more chunks may be prepared in advance
        return step

    def _count_start(self, job: Job) -> None:
        if not job.has_started:
            job.has_started = True
            self.stats.started_requests += 1
            self.stats.wait_seconds += time.perf_counter() - job.accepted

    def close(self, cancel: bool = False) -> None:
        """Refuse new jobs; with `cancel`, also cancel the jobs that are not finished."""
        with self._changed:
            self._closed = True
            for future in list(self._jobs) if cancel else ():
                future.cancel()
            self._changed.notify_all()


def _preparation_cost(document: EmbeddingInput) -> int:
    """Return the work of preparing a document, in short texts; an image is a whole chunk."""
    return TEXTS_PER_CHUNK if document.image is not None else 1 + len(document.text or "") // 1000
