"""Embed more documents than fit in memory: a stream of documents in, arrays of vectors out.

    read a window ──► submit it, a few ahead ──► wait for the oldest ──► its vectors and errors

`Stream` and `AsyncStream` differ only in how they wait.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from shared_engine.backend import Flow, Rows
from shared_engine.documents import EmbeddingInput, Role, validate_document
from shared_engine.errors import ConfigurationError, EngineClosedError, InputError
from shared_engine.pipeline import EmbeddingPipeline
from shared_engine.threads import result_of, run_off_loop, wait_until_done

if TYPE_CHECKING:
    from tqdm import tqdm

_T = TypeVar("_T")

WINDOWS_AHEAD = 3
"""Windows that are read and not yet returned, at most. The caller stores one while the device
computes the next and a third waits in its queue."""


@dataclass(eq=False)
class _Window:
    """Consecutive documents of a stream, submitted as one request."""

    start: int
    """Position of the first document in the stream."""
    rows: list[int]
    """Rows of the window that were submitted."""
    refused: dict[int, InputError]
    """Errors of the other rows."""
    future: Future[Rows]


class _Windows(Generic[_T]):
    """The parts of a stream that do not wait, for both kinds."""

    def __init__(
        self,
        pipeline: EmbeddingPipeline,
        source: Iterator[str | EmbeddingInput] | AsyncIterator[str | EmbeddingInput],
        role: Role,
        batch_size: int,
        convert: Callable[[Rows], _T],
    ) -> None:
        self._pipeline = pipeline
        self._source = source
        self._role = role
        self._batch_size = batch_size
        self._convert = convert
        self._flow = Flow()
        self._pid = os.getpid()
        self._pending: deque[_Window] = deque()
        self._position = 0
        self._ended = self._closed = False
        self._error: Exception | None = None
        """Raised by the source; raised to the caller after the vectors of the documents before."""
        self._bar: tqdm[Any] | None = None
        if batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size}: must be 1 or more")
        if pipeline.options.show_progress:
            self._bar = pipeline.open_bar()

    @property
    def _is_in_fork(self) -> bool:
        """Whether the threads that compute the windows stayed with the parent of a fork."""
        return self._pid != os.getpid()

    @property
    def _can_read(self) -> bool:
        if self._is_in_fork:
            raise EngineClosedError("a stream cannot continue in a fork; create a new one")
        return not (self._ended or self._closed) and len(self._pending) < WINDOWS_AHEAD

    def _read_window(self) -> None:
        """Read a window from a regular iterable and submit it."""
        assert isinstance(self._source, Iterator)
        documents: list[str | EmbeddingInput] = []
        try:
            documents.extend(islice(self._source, self._batch_size))
        except Exception as exc:
            self._error = exc
        self._submit(documents)

    def _submit(self, documents: list[str | EmbeddingInput]) -> None:
        """Submit a window; one that is not full is the last."""
        self._ended = self._error is not None or len(documents) < self._batch_size
        if not documents:
            return
        window = _Window(self._position, [], {}, Future())
        self._position += len(documents)
        try:
            window.future = self._start(window, documents)
        except Exception as exc:  # raised when it is this window's turn
            window.future.set_exception(exc)
        self._pending.append(window)
        if self._closed:  # by another thread
            window.future.cancel()

    def _start(self, window: _Window, documents: list[str | EmbeddingInput]) -> Future[Rows]:
        modalities = self._pipeline.lease.acquire().modalities
        valid: list[EmbeddingInput] = []
        for row, document in enumerate(documents):
            try:
                valid.append(validate_document(document, self._role, modalities))
                window.rows.append(row)
            except InputError as exc:
                window.refused[row] = exc
        progress = None if self._bar is None else self._bar.update
        return self._pipeline.submit_valid(valid, self._role, self._flow, progress)

    def _take(self, window: _Window) -> _T:
        """Wait for the oldest window, and return its item."""
        rows = result_of(window.future)
        if self._pending and self._pending[0] is window:
            self._pending.popleft()
        return self._convert(self._pipeline.finish(self._place(rows, window)))

    def _place(self, rows: Rows, window: _Window) -> Rows:
        """Return the rows that were submitted among all rows of their window."""
        import numpy as np

        if not window.refused:
            return Rows(rows.vectors, rows.errors, window.start)
        width = rows.vectors.shape[1] or self._pipeline.find_width()
        vectors = np.full((len(window.rows) + len(window.refused), width), np.nan, np.float32)
        if rows.vectors.shape[1]:
            vectors[window.rows] = rows.vectors
        errors = {window.rows[row]: error for row, error in rows.errors.items()}
        return Rows(vectors, {**window.refused, **errors}, window.start)

    def _raise_source_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the stream: read nothing more, and cancel the work that has not started."""
        self._closed = True
        for window in list(self._pending):
            if not self._is_in_fork:  # a thread of the parent may hold the locks of its future
                window.future.cancel()
        self._pending.clear()
        if self._bar is not None:
            self._bar.close()

    __del__ = close


class Stream(_Windows[_T], Iterator[_T]):
    """Iterator over the vectors of a stream, made by `Embedder.stream`. For one consumer."""

    def __next__(self) -> _T:
        try:
            while self._can_read:
                self._read_window()
            if self._pending:
                return self._take(self._pending[0])
            self._raise_source_error()
            raise StopIteration
        except BaseException:
            self.close()
            raise


class AsyncStream(_Windows[_T], AsyncIterator[_T]):
    """Asynchronous iterator over the vectors of a stream, made by `Embedder.astream`."""

    async def __anext__(self) -> _T:
        try:
            while self._can_read:
                await self._aread_window()
            if self._pending:
                window = self._pending[0]
                await wait_until_done(window.future)
                return await run_off_loop(self._take, window)
            self._raise_source_error()
            raise StopAsyncIteration
        except BaseException:
            self.close()
            raise

    async def _aread_window(self) -> None:
        if isinstance(self._source, Iterator):  # may read files
            return await run_off_loop(self._read_window)
        documents: list[str | EmbeddingInput] = []
        try:
            while len(documents) < self._batch_size:
                documents.append(await anext(self._source))
        except StopAsyncIteration:
            pass
        except Exception as exc:
            self._error = exc
        await run_off_loop(self._submit, documents)

    async def aclose(self) -> None:
        """Close the stream; see `close`."""
        self.close()
