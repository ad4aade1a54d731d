"""One caller's documents on their way to a NIM: which are sent together, and what came of each.

Policy only: nothing is sent here, and one event loop uses it. Images are encoded in threads of the
backend, a few before their batch is made, and dropped when it is answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_engine.backend import Request, Rows
from shared_engine.documents import EmbeddingInput, Modality
from shared_engine.errors import (
    EngineError,
    InputError,
    InvalidRequestError,
    MalformedResponseError,
    NeMoRetrieverError,
    PayloadTooLargeError,
)
from shared_engine.nim.protocol import PROBES, encode_input

IMAGES_AHEAD = 8
"""Images of one call that are encoded before there is a batch for them."""
MOST_HELD = 128 * 2**20
"""Bytes of a call's batches without a reply, from which on no further batch is made."""
_OF_ONE_INPUT = (InvalidRequestError, PayloadTooLargeError)
"""Errors of a request that are its only input's: with another input it might be accepted."""
Encode = Callable[[EmbeddingInput], "asyncio.Future[bytes]"]


@dataclass
class BatchLimits:
    """The most that one request may hold; learned from what the server takes and refuses."""

    inputs: int
    size: int = 2_000_000
    """Bytes. Common HTTP servers refuse bodies over 2 MB unless told otherwise."""
    passed: int = 0
    """Bytes of the largest batch that was taken."""

    def shrink_below(self, size: int) -> None:
        """Learn that a batch of `size` bytes was refused; one large input may be why."""
        self.size = min(self.size, max(size // 2, self.passed))


@dataclass(frozen=True)
class RequestBatch:
    """Documents of one modality that go into one request."""

    rows: tuple[int, ...]
    """Where they are in the caller's list."""
    inputs: tuple[bytes, ...]
    """What is sent for each."""
    modality: Modality
    malformed: int = 0
    """Replies to it that were not valid."""

    @property
    def size(self) -> int:
        """Bytes of its inputs, with the commas."""
        return sum(map(len, self.inputs)) + len(self.inputs)

    @property
    def has_images(self) -> bool:
        """Whether its inputs are images, alone or with a text."""
        return self.modality != "text"

    def split(self) -> tuple[RequestBatch, RequestBatch]:
        """Return the shorter inputs and the longer ones, where a single culprit most often is."""
        by_size = sorted(range(len(self.rows)), key=lambda i: len(self.inputs[i]))
        middle = len(by_size) // 2
        return self.select(by_size[:middle]), self.select(by_size[middle:])

    def isolate(self, position: int | None) -> tuple[RequestBatch, RequestBatch]:
        """Return the input at `position` and the others, or halves if there is no such one."""
        if position is None or not 0 <= position < len(self.rows):
            return self.split()
        return self.select([position]), self.select(
            [i for i in range(len(self.rows)) if i != position]
        )

    def select(self, positions: list[int]) -> RequestBatch:
        """Return some of its inputs, in their order in the caller's list."""
        chosen = sorted(positions)
        rows = tuple(self.rows[i] for i in chosen)
        return RequestBatch(rows, tuple(self.inputs[i] for i in chosen), self.modality)


class Dispatch:
    """A request's rows on their way: waiting, in a batch, or finished."""

    def __init__(self, request: Request, encode: Encode, width: int = 0) -> None:
        """Queue the rows; `encode` does in a thread what `encode_input` does.

        `width` is the length of a vector, or 0 where no one knows yet.
        """
        self.request = request
        self._encode = encode
        self.stopped: NeMoRetrieverError | None = None
        """Why nothing more is sent, if so."""
        documents = request.documents
        self._rows = deque(sorted(range(len(documents)), key=lambda row: documents[row].modality))
        self._ready: deque[RequestBatch] = deque()
        self._ahead: dict[int, asyncio.Future[bytes]] = {}
        self._building = asyncio.Lock()
        self._held = 0
        self._accepted: set[Modality] = set()
        self._probes: dict[Modality, asyncio.Future[bool]] = {}
        self._answered = asyncio.Event()
        self._vectors: NDArray[np.float32] | None = None
        self._width = width
        self._errors: dict[int, NeMoRetrieverError] = {}
        self._unfinished = set(range(len(documents)))

    async def next_batch(self, limits: BatchLimits) -> RequestBatch | None:
        """Return the next inputs to send, or None where none are left."""
        if not self._ready:
            async with self._building:  # one after the other, so that batches are full
                while self._rows and not self._ready and self.stopped is None:
                    await self._build(limits)
        return self._ready.popleft() if self._ready and self.stopped is None else None

    async def _build(self, limits: BatchLimits) -> None:
        while self._held > MOST_HELD:
            self._answered.clear()
            await self._answered.wait()
        documents = self.request.documents
        modality = documents[self._rows[0]].modality
        rows: list[int] = []
        inputs: list[bytes] = []
        size = 0
        while self._rows and len(rows) < limits.inputs and self.stopped is None:
            row = self._rows[0]
            if documents[row].modality != modality:
                break
            item = await self._get_input(row)
            size += 0 if item is None else len(item) + 1
            if rows and size > limits.size:
                break
            self._rows.popleft()
            self._ahead.pop(row, None)
            if item is None:
                self._count_finished((row,))
            else:
                rows.append(row)
                inputs.append(item)
        if rows:
            batch = RequestBatch(tuple(rows), tuple(inputs), modality)
            self._held += batch.size
            self._ready.append(batch)

    async def _get_input(self, row: int) -> bytes | None:
        """Return what is sent for a row, or None where that failed and its error is kept."""
        documents = self.request.documents
        try:
            if documents[row].image is None:
                return encode_input(documents[row])
            for other in islice(self._rows, IMAGES_AHEAD):
                if other not in self._ahead and documents[other].image is not None:
                    self._ahead[other] = self._encode(documents[other])
            return await self._ahead[row]
        except NeMoRetrieverError as exc:
            self._errors[row] = exc
        except Exception as exc:
            self._errors[row] = error = EngineError(f"the image cannot be sent: {exc!r}")
            error.__cause__ = exc
        return None

    def close(self) -> None:
        """Drop the images that were encoded for batches that are not made any more."""
        unfinished: list[asyncio.Future[Any]] = [*self._ahead.values(), *self._probes.values()]
        for future in unfinished:
            future.cancel()  # if it has failed already, asyncio will not complain of it either

    def send_again(self, *batches: RequestBatch) -> None:
        """Put batches before all others."""
        self._ready.extendleft(reversed(batches))

    def deliver(self, batch: RequestBatch, vectors: NDArray[np.float32], tokens: int) -> None:
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
        self._accepted.add(batch.modality)
        if tokens:
            self.request.report_usage(tokens)
        self._release(batch)

    def fail(self, batch: RequestBatch, error: NeMoRetrieverError) -> None:
        """Take the error of a batch."""
        self._errors.update(dict.fromkeys(batch.rows, error))
        self._release(batch)

    async def is_request_accepted(
        self, batch: RequestBatch, send: Callable[[RequestBatch], Awaitable[bool]]
    ) -> bool:
        """Whether inputs are at fault where a batch is refused, rather than all of the request.

        Where none of its modality was taken yet, one that nothing is wrong with is sent, once.
        """
        if batch.modality in self._accepted or len(self.request.documents) == 1:
            return batch.modality in self._accepted
        if batch.modality not in self._probes:
            probe = RequestBatch((-1,), (PROBES[batch.modality],), batch.modality)
            self._probes[batch.modality] = asyncio.ensure_future(send(probe))
        return await asyncio.shield(self._probes[batch.modality])

    def _release(self, batch: RequestBatch) -> None:
        self._held -= batch.size
        self._answered.set()
        self._count_finished(batch.rows)

    def _count_finished(self, rows: tuple[int, ...]) -> None:
        self._unfinished.difference_update(rows)
        self.request.report_progress(len(rows))

    def result(self) -> Rows:
        """Return the vectors and errors of all documents.

        Raises:
            NeMoRetrieverError: all documents failed for this one reason.
        """
        reason = self.stopped or EngineError("this input was not embedded")
        errors = {**self._errors, **dict.fromkeys(self._unfinished, reason)}
        n = len(self.request.documents)
        vectors = self._vectors
        if vectors is None:
            vectors = np.empty((n, self.request.dimensions or self._width), np.float32)
        if not errors:
            return Rows(vectors)
        first = errors[min(errors)]
        is_same = len({type(error) for error in errors.values()}) == 1
        is_of_a_row = isinstance(first, InputError) or (n == 1 and isinstance(first, _OF_ONE_INPUT))
        if len(errors) == n and is_same and not is_of_a_row:
            raise first
        vectors[list(errors)] = np.nan
        return Rows(vectors, errors)
