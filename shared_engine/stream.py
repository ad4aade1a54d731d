"""Documents too many for memory, to arrays of vectors.

    read a batch ──► submit it, a few ahead ──► wait for the oldest ──► its vectors, or an error

What is handed out, in arrays and on PartialResultErrors, is always the beginning of the stream
without a gap. `Stream` and `AsyncStream` differ only in how they wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from shared_engine.backend import Flow
from shared_engine.documents import Document, Role, validate
from shared_engine.errors import (
    ConfigurationError,
    EngineClosedError,
    EngineError,
    InputError,
    NeMoRetrieverError,
    PartialResultError,
    place_error,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared_engine.embedder import Embedder

BATCHES_AHEAD = 3
"""Batches that are read and not yet handed out, at most: one to wait for, and the next of which the
device goes on while the caller stores it."""


@dataclass(eq=False)
class Batch:
    """Some consecutive documents of a stream."""

    start: int
    """Position of the first in the stream."""
    documents: list[str | Document]
    refused: dict[int, NeMoRetrieverError] = field(default_factory=dict)
    """Errors of documents, by row, from before anything was computed."""
    pieces: list[tuple[list[int], Future[NDArray[np.float32]]]] | None = None
    """Rows and their vectors, most often all in one; None is not submitted."""

    @property
    def futures(self) -> list[Future[NDArray[np.float32]]]:
        """What to wait for."""
        return [future for _, future in self.pieces or ()]

    def withdraw(self) -> None:
        """Cancel what has not started; it may be submitted again."""
        for future in self.futures:
            future.cancel()
        self.pieces = None


class _Batches:
    """What both kinds of stream do between their waits."""

    def __init__(self, embedder: Embedder, role: Role, batch_size: int) -> None:
        self._embedder = embedder
        self._role = role
        self._batch_size = batch_size
        self._flow = Flow()
        self._pending: deque[Batch] = deque()
        self._read: list[str | Document] = []
        self._next = 0
        self._ended = self._closed = False
        self._error: Exception | None = None
        self._bar: Any = None
        if batch_size < 1:
            raise ConfigurationError(f"batch_size is {batch_size}; expected 1 or more")
        if embedder.options.show_progress:
            from tqdm.auto import tqdm

            self._bar = tqdm(unit="doc")

    @property
    def _wants_more(self) -> bool:
        done = self._ended or self._closed or self._error is not None
        return not done and len(self._pending) < BATCHES_AHEAD

    def _read_from(self, source: Iterator[str | Document]) -> None:
        try:
            self._read.extend(islice(source, self._batch_size - len(self._read)))
        except Exception as exc:  # comes after the vectors of what was read before it
            self._error = exc
        self._put_together()

    def _put_together(self) -> None:
        self._ended = self._error is None and len(self._read) < self._batch_size
        if self._read:
            self._pending.append(Batch(self._next, self._read))
            self._next += len(self._read)
            self._read = []

    def _submit(self) -> None:
        """Submit the batches that are not, new ones and those to be tried again."""
        for batch in list(self._pending):
            if batch.pieces is None:
                batch.pieces = self._submitted(batch)
            if self._closed:  # meanwhile
                batch.withdraw()

    def _submitted(self, batch: Batch) -> list[tuple[list[int], Future[NDArray[np.float32]]]]:
        every = range(len(batch.documents))
        try:
            modalities = self._embedder.modalities
            for row in every:
                try:
                    document = batch.documents[row]
                    (batch.documents[row],) = validate([document], self._role, modalities)
                except InputError as exc:
                    batch.refused[row] = place_error(exc, batch.start + row)
            return self._halves(batch, [row for row in every if row not in batch.refused])
        except Exception as exc:
            failed: Future[NDArray[np.float32]] = Future()
            failed.set_exception(exc)
            return [(list(every), failed)]

    def _halves(
        self, batch: Batch, rows: list[int]
    ) -> list[tuple[list[int], Future[NDArray[np.float32]]]]:
        """Submit rows at once, or in halves as long as one of them is refused."""
        if not rows:
            return []
        documents = [batch.documents[row] for row in rows]
        progress = None if self._bar is None else self._bar.update
        try:
            return [(rows, self._embedder._submit(documents, self._role, self._flow, progress))]
        except InputError as exc:
            if len(rows) > 1:
                middle = len(rows) // 2
                return self._halves(batch, rows[:middle]) + self._halves(batch, rows[middle:])
            batch.refused[rows[0]] = place_error(exc, batch.start + rows[0])
            return []

    def _oldest(self) -> Batch | None:
        """Return the batch whose turn it is; at the end, the error of the source or None."""
        if self._pending:
            return self._pending[0]
        error, self._error = self._error, None
        if error is not None:
            raise error
        self.close()
        return None

    def _take(self, batch: Batch) -> NDArray[Any]:
        """Return the vectors of a batch that is done, or raise what went wrong."""
        import numpy as np

        parts, errors = [], dict(batch.refused)
        try:
            for rows, future in batch.pieces or ():
                part, failed = _outcome(future.result, len(rows))
                parts.append((rows, part))
                errors |= {
                    rows[row]: place_error(error, batch.start + rows[row])
                    for row, error in failed.items()
                }
        except BaseException as exc:
            for each in self._pending:
                each.withdraw()
            if isinstance(exc, CancelledError):
                message = "the engine was closed before this work was done"
                raise EngineClosedError(message) from None
            raise
        width = next((p.shape[1] for _, p in parts if p is not None), None)
        count = len(batch.documents)
        pooled = np.full((count, width or self._embedder.dimensions), np.nan, np.float32)
        for rows, part in parts:
            if part is not None:
                pooled[rows] = part
        self._pending.popleft()
        out, not_finite = _outcome(partial(self._embedder._finish, pooled), count)
        for row in not_finite.keys() - errors.keys():
            errors[row] = place_error(not_finite[row], batch.start + row)
        if not errors and out is not None:
            return out
        first, last = errors[min(errors)], batch.start + count - 1
        raise PartialResultError(
            f"{len(errors)} of the documents {batch.start} to {last} of the stream failed, the "
            f"first: {first}. The others are in `vectors` of this error, which begin at `offset`, "
            "what went wrong in `errors`; iterate on for the documents after them",
            vectors=pooled if out is None else out,
            errors={batch.start + row: errors[row] for row in sorted(errors)},
            offset=batch.start,
        )

    def close(self) -> None:
        """End the stream: nothing more is read, and what has not started is cancelled."""
        self._closed = True
        for batch in list(self._pending):
            batch.withdraw()
        self._pending.clear()
        if self._bar is not None:
            self._bar.close()

    __del__ = close


class Stream(_Batches, Iterator["NDArray[Any]"]):
    """Arrays of vectors, in order; made by `Embedder.stream`. For one consumer at a time."""

    def __init__(
        self, embedder: Embedder, documents: Iterable[str | Document], role: Role, batch_size: int
    ) -> None:
        super().__init__(embedder, role, batch_size)
        self._source = iter(documents)

    def __next__(self) -> NDArray[Any]:
        self._submit()
        while self._wants_more:
            self._read_from(self._source)
            self._submit()
        batch = self._oldest()
        if batch is None:
            raise StopIteration
        concurrent.futures.wait(batch.futures)
        return self._take(batch)


class AsyncStream(_Batches, AsyncIterator["NDArray[Any]"]):
    """Arrays of vectors, in order; made by `Embedder.astream`. For one consumer at a time."""

    def __init__(
        self,
        embedder: Embedder,
        documents: Iterable[str | Document] | AsyncIterable[str | Document],
        role: Role,
        batch_size: int,
    ) -> None:
        super().__init__(embedder, role, batch_size)
        self._source = aiter(documents) if isinstance(documents, AsyncIterable) else iter(documents)

    async def __anext__(self) -> NDArray[Any]:
        try:
            await asyncio.to_thread(self._submit)
            while self._wants_more:
                await self._aread()
                await asyncio.to_thread(self._submit)
            batch = self._oldest()
            if batch is None:
                raise StopAsyncIteration
            waiting = map(asyncio.wrap_future, batch.futures)
            await asyncio.gather(*waiting, return_exceptions=True)
            return await asyncio.to_thread(self._take, batch)
        except asyncio.CancelledError:
            self.close()
            raise

    async def _aread(self) -> None:
        if isinstance(self._source, Iterator):  # which may read files
            return await asyncio.to_thread(self._read_from, self._source)
        try:
            while len(self._read) < self._batch_size:
                self._read.append(await anext(self._source))
        except StopAsyncIteration:
            pass
        except Exception as exc:
            self._error = exc
        self._put_together()

    async def aclose(self) -> None:
        """Do as `close` does."""
        self.close()


def _outcome(
    result: Callable[[], NDArray[Any]], count: int
) -> tuple[NDArray[Any] | None, dict[int, NeMoRetrieverError]]:
    """Return vectors and the errors of rows; raise what is the error of all."""
    try:
        return result(), {}
    except PartialResultError as exc:
        return exc.vectors, exc.errors
    except (InputError, EngineError) as exc:
        if count > 1:
            raise
        return None, {0: exc}
