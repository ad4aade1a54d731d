"""Documents too many for memory, to arrays of vectors.

    read a window ──► submit it, a few ahead ──► wait for the oldest ──► its vectors, or an error

What is handed out, in arrays and on PartialResultErrors, is always the beginning of the stream
without a gap. `Stream` and `AsyncStream` differ only in how they wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from shared_engine.backend import Flow
from shared_engine.documents import EmbeddingInput, Role, validate_document
from shared_engine.errors import (
    ConfigurationError,
    EngineError,
    InputError,
    NeMoRetrieverError,
    PartialResultError,
    place_error,
)
from shared_engine.pipeline import Pipeline
from shared_engine.threads import run_off_loop, wait_until_done

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WINDOWS_AHEAD = 3
"""Windows that are read and not yet handed out, at most: one to wait for, and the next of which the
device goes on while the caller stores it."""


@dataclass(eq=False)
class Window:
    """Some consecutive documents of a stream."""

    start: int
    """Position of the first in the stream."""
    documents: list[str | EmbeddingInput]
    refused: dict[int, NeMoRetrieverError] = field(default_factory=dict)
    """Errors of documents that were not submitted, by row."""
    rows: list[int] = field(default_factory=list)
    """Those that were submitted."""
    future: Future[NDArray[np.float32]] | None = None
    """Their vectors; None is not submitted yet."""

    def withdraw(self) -> None:
        """Cancel what has not started; it may be submitted again."""
        if self.future is not None:
            self.future.cancel()
        self.future = None


class _Windows:
    """What both kinds of stream do between their waits."""

    def __init__(self, pipeline: Pipeline, role: Role, batch_size: int) -> None:
        self._pipeline = pipeline
        self._role = role
        self._batch_size = batch_size
        self._flow = Flow()
        self._pending: deque[Window] = deque()
        self._pid = os.getpid()
        self._read: list[str | EmbeddingInput] = []
        self._next = 0
        self._ended = self._closed = False
        self._error: Exception | None = None
        self._bar: Any = None
        if batch_size < 1:
            raise ConfigurationError(f"batch_size is {batch_size}; expected 1 or more")
        if pipeline.options.show_progress:
            from tqdm.auto import tqdm

            self._bar = tqdm(unit="doc")

    @property
    def _wants_more(self) -> bool:
        done = self._ended or self._closed or self._error is not None
        return not done and len(self._pending) < WINDOWS_AHEAD

    def _read_from(self, source: Iterator[str | EmbeddingInput]) -> None:
        try:
            self._read.extend(islice(source, self._batch_size - len(self._read)))
        except Exception as exc:  # comes after the vectors of what was read before it
            self._error = exc
        self._put_together()

    def _put_together(self) -> None:
        self._ended = self._error is None and len(self._read) < self._batch_size
        if self._read:
            self._pending.append(Window(self._next, self._read))
            self._next += len(self._read)
            self._read = []

    def _leave_parent(self) -> None:
        """Submit anew in the child of a fork, where what the parent submitted is never done."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            for window in self._pending:
                window.future = None  # not to be cancelled: the parent may have held its lock

    def _submit(self) -> None:
        """Submit the windows that are not, new ones and those to be tried again."""
        self._leave_parent()
        for window in list(self._pending):
            if window.future is None:
                try:
                    window.future = self._submit_window(window)
                except Exception as exc:
                    window.future = Future()
                    window.future.set_exception(exc)
            if self._closed:  # meanwhile
                window.withdraw()

    def _submit_window(self, window: Window) -> Future[NDArray[np.float32]]:
        modalities = self._pipeline.backend.modalities
        valid: list[EmbeddingInput] = []
        window.rows = []
        for row, document in enumerate(window.documents):
            if row in window.refused:  # when it was submitted before
                continue
            try:
                window.documents[row] = accepted = validate_document(
                    document, self._role, modalities
                )
            except InputError as exc:
                window.refused[row] = exc
            else:
                window.documents[row] = accepted  # an open file is read only once
                valid.append(accepted)
                window.rows.append(row)
        progress = None if self._bar is None else self._bar.update
        return self._pipeline.submit_valid(valid, self._role, self._flow, progress)

    def _oldest(self) -> Window | None:
        """Return the window whose turn it is; at the end, the error of the source or None."""
        if self._pending:
            return self._pending[0]
        error, self._error = self._error, None
        if error is not None:
            raise error
        self.close()
        return None

    def _take(self, window: Window) -> NDArray[Any]:
        """Return the vectors of a window that is done, or raise what went wrong."""
        assert window.future is not None
        try:
            vectors, failed = self._finish(window.future, len(window.rows))
        except BaseException:
            for each in self._pending:
                each.withdraw()
            raise
        self._pending.popleft()
        errors = window.refused | {window.rows[row]: error for row, error in failed.items()}
        if not errors:
            return vectors
        placed = {
            window.start + row: place_error(errors[row], window.start + row)
            for row in sorted(errors)
        }
        raise PartialResultError(
            f"{len(errors)} of the documents {window.start} to "
            f"{window.start + len(window.documents) - 1} of the stream failed, the first: "
            f"{next(iter(placed.values()))}. The others are in `vectors` of this error, which "
            "begin at `offset`, what went wrong in `errors`; iterate on for the documents after "
            "them",
            vectors=self._spread(vectors, window),
            errors=placed,
            offset=window.start,
        )

    def _finish(
        self, future: Future[NDArray[np.float32]], count: int
    ) -> tuple[NDArray[Any], dict[int, NeMoRetrieverError]]:
        """Return vectors and the errors of rows; raise what is the error of all."""
        import numpy as np

        try:
            return self._pipeline.finish(future), {}
        except PartialResultError as exc:
            return exc.vectors, dict(exc.errors)
        except (InputError, EngineError) as exc:
            if count > 1:
                raise
            return np.full((count, 0), np.nan, np.float32), {0: exc}

    def _spread(self, vectors: NDArray[Any], window: Window) -> NDArray[np.float32]:
        """Return vectors of the submitted rows as those of all rows, NaN for the others."""
        import numpy as np

        width = vectors.shape[1] or self._pipeline.find_width()
        out = np.full((len(window.documents), width), np.nan, np.float32)
        if vectors.shape[1]:
            out[window.rows] = vectors
        return out

    def close(self) -> None:
        """End the stream: nothing more is read, and what has not started is cancelled."""
        self._closed = True
        self._leave_parent()
        for window in list(self._pending):
            window.withdraw()
        self._pending.clear()
        if self._bar is not None:
            self._bar.close()

    __del__ = close


class Stream(_Windows, Iterator["NDArray[Any]"]):
    """Arrays of vectors, in order; made by `Embedder.stream`. For one consumer at a time."""

    def __init__(
        self,
        pipeline: Pipeline,
        documents: Iterable[str | EmbeddingInput],
        role: Role,
        batch_size: int,
    ) -> None:
        super().__init__(pipeline, role, batch_size)
        self._source = iter(documents)

    def __next__(self) -> NDArray[Any]:
        self._submit()
        while self._wants_more:
            self._read_from(self._source)
            self._submit()
        window = self._oldest()
        if window is None:
            raise StopIteration
        if window.future is not None:
            concurrent.futures.wait([window.future])
        return self._take(window)


class AsyncStream(_Windows, AsyncIterator["NDArray[Any]"]):
    """Arrays of vectors, in order; made by `Embedder.astream`. For one consumer at a time."""

    def __init__(
        self,
        pipeline: Pipeline,
        documents: Iterable[str | EmbeddingInput] | AsyncIterable[str | EmbeddingInput],
        role: Role,
        batch_size: int,
    ) -> None:
        super().__init__(pipeline, role, batch_size)
        self._source = aiter(documents) if isinstance(documents, AsyncIterable) else iter(documents)

    async def __anext__(self) -> NDArray[Any]:
        try:
            await run_off_loop(self._submit)
            while self._wants_more:
                await self._aread()
                await run_off_loop(self._submit)
            window = self._oldest()
            if window is None:
                raise StopAsyncIteration
            if window.future is not None:
                await wait_until_done(window.future)
            return await run_off_loop(self._take, window)
        except asyncio.CancelledError:
            self.close()
            raise

    async def _aread(self) -> None:
        if isinstance(self._source, Iterator):  # which may read files
            return await run_off_loop(self._read_from, self._source)
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
