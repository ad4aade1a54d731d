"""The documents of one call to a NIM: which are sent together, and the result of each.

Nothing is sent here, and everything runs in one event loop. The backend encodes images in threads:
a few before their batch is built, and they are dropped when the batch is answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

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
from shared_engine.nim.forms import Form

INPUTS_AHEAD = 8
"""Inputs of a call whose encoding has started before they are in a batch."""
MOST_HELD = 128 * 2**20
"""Bytes of a call's unanswered batches above which no further batch is built."""
_OF_ONE_INPUT = (InvalidRequestError, PayloadTooLargeError)
"""Errors of a request with one input that belong to the input: another might be accepted."""
_log = logging.getLogger("shared_engine")
Encode = Callable[[Form, EmbeddingInput], "asyncio.Future[bytes]"]


@dataclass
class BatchLimits:
    """The most that one request may hold, learned from the server's replies."""

    inputs: int
    size: int = 2_000_000
    """Bytes. Common HTTP servers refuse bodies over 2 MB by default."""
    accepted_size: int = 0
    """Bytes of the largest batch that the server accepted."""

    def shrink_below(self, batch: RequestBatch, by_count: bool) -> None:
        """Reduce a limit after a batch was refused by its count or, maybe for one input, bytes."""
        if by_count:
            self.inputs = min(self.inputs, len(batch.rows) // 2)
        else:
            self.size = min(self.size, max(batch.size // 2, self.accepted_size))
        _log.info("%d inputs of %d bytes are too large a request", len(batch.rows), batch.size)


@dataclass(frozen=True)
class RequestBatch:
    """Documents of one modality for one request."""

    rows: tuple[int, ...]
    """Their positions in the caller's list."""
    inputs: tuple[bytes, ...]
    """Each as an item of `input`, in JSON."""
    modality: Modality
    malformed: int = 0
    """Malformed replies to this batch so far."""

    @property
    def size(self) -> int:
        """Bytes of the inputs and their commas."""
        return sum(map(len, self.inputs)) + len(self.inputs)

    @property
    def has_images(self) -> bool:
        """Whether the inputs are images, alone or with a text."""
        return self.modality != "text"

    def split(self) -> tuple[RequestBatch, RequestBatch]:
        """Return the shorter inputs and the longer ones, which are more often at fault."""
        by_size = sorted(range(len(self.rows)), key=lambda i: len(self.inputs[i]))
        middle = len(by_size) // 2
        return self.select(by_size[:middle]), self.select(by_size[middle:])

    def isolate(self, position: int | None) -> tuple[RequestBatch, RequestBatch]:
        """Return the input at `position` and the others; halves if there is no such position."""
        if position is None or not 0 <= position < len(self.rows):
            return self.split()
        others = [i for i in range(len(self.rows)) if i != position]
        return self.select([position]), self.select(others)

    def select(self, positions: list[int]) -> RequestBatch:
        """Return some of the inputs, in the order of the caller's list."""
        chosen = sorted(positions)
        rows = tuple(self.rows[i] for i in chosen)
        return RequestBatch(rows, tuple(self.inputs[i] for i in chosen), self.modality)


class Dispatch:
    """The rows of a request: waiting, encoded, in a batch, or finished."""

    form: Form
    """The requests that the server takes; set before the first batch."""

    def __init__(self, request: Request, encode: Encode, width: int = 0) -> None:
        """Queue the rows.

        Args:
            encode: Runs `encode_input` of a form for an image in a thread.
            width: Length of a vector; 0 if unknown.
        """
        self.request = request
        self.stopped: NeMoRetrieverError | None = None
        """The reason why nothing more is sent, if there is one."""
        self._encode = encode
        documents = request.documents
        self._waiting = deque(
            sorted(range(len(documents)), key=lambda row: documents[row].modality)
        )
        self._ahead: deque[tuple[int, asyncio.Future[bytes] | None]] = deque()
        """The next rows, and the encoding of their images."""
        self._ready: deque[RequestBatch] = deque()
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
        """Return the next inputs to send, or None if there are none."""
        if not self._ready:
            async with self._building:  # one at a time, so that batches are full
                while not self._ready and self.stopped is None and self._look_ahead():
                    await self._build(limits)
        return self._ready.popleft() if self._ready and self.stopped is None else None

    def _look_ahead(self) -> bool:
        """Start to encode the next inputs; return whether there are any."""
        while self._waiting and len(self._ahead) < INPUTS_AHEAD:
            row = self._waiting.popleft()
            document = self.request.documents[row]
            encoding = None if document.image is None else self._encode(self.form, document)
            self._ahead.append((row, encoding))
        return bool(self._ahead)

    async def _build(self, limits: BatchLimits) -> None:
        """Build a batch of the next inputs of one modality."""
        while self._held > MOST_HELD:
            self._answered.clear()
            await self._answered.wait()
        documents = self.request.documents
        modality = documents[self._ahead[0][0]].modality
        rows: list[int] = []
        inputs: list[bytes] = []
        size = 0
        while len(rows) < limits.inputs and self.stopped is None and self._look_ahead():
            row, encoding = self._ahead[0]
            if documents[row].modality != modality:
                break
            item = await self._finish_encoding(row, encoding)
            size += 0 if item is None else len(item) + 1
            if rows and size > limits.size:
                break
            self._ahead.popleft()
            if item is not None:
                rows.append(row)
                inputs.append(item)
        if rows:
            batch = RequestBatch(tuple(rows), tuple(inputs), modality)
            self._held += batch.size
            self._ready.append(batch)

    async def _finish_encoding(
        self, row: int, encoding: asyncio.Future[bytes] | None
    ) -> bytes | None:
        """Return an encoded input, or None if that failed and the row has an error."""
        try:
            if encoding is None:
                return self.form.encode_input(self.request.documents[row], self.request.role)
            return await encoding
        except NeMoRetrieverError as exc:
            self._errors[row] = exc
        except Exception as exc:
            self._errors[row] = error = EngineError(f"the image cannot be encoded: {exc!r}")
            error.__cause__ = exc
        self._count_finished((row,))
        return None

    def close(self) -> None:
        """Cancel the encoding of images and the probes that are no longer needed."""
        for future in [encoding for _, encoding in self._ahead] + list(self._probes.values()):
            if future is not None:
                future.cancel()  # also keeps asyncio from logging an error that nobody retrieved

    def send_again(self, *batches: RequestBatch) -> None:
        """Put batches in front of all others."""
        self._ready.extendleft(reversed(batches))

    def deliver(self, batch: RequestBatch, vectors: NDArray[np.float32], tokens: int) -> None:
        """Store the vectors of a batch.

        Raises:
            MalformedResponseError: they differ in length from the vectors before them.
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
        """Store the error of a batch."""
        self._errors.update(dict.fromkeys(batch.rows, error))
        self._release(batch)

    async def is_accepted(
        self, modality: Modality, send: Callable[[RequestBatch], Awaitable[bool]]
    ) -> bool:
        """Return whether the server accepts a modality; a probe is sent at most once."""
        if modality in self._accepted or len(self.request.documents) == 1:
            return modality in self._accepted
        if modality not in self._probes:
            batch = RequestBatch((-1,), (self.form.build_probe(modality),), modality)
            self._probes[modality] = asyncio.ensure_future(send(batch))
        return await asyncio.shield(self._probes[modality])

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
            NeMoRetrieverError: all documents failed for the same reason, which is not an input's.
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
