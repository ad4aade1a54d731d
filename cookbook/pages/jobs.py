"""One file after the other, in the background: open, draw, embed, write down that it is done."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Literal

from pages.files import File, Files, Page, clean
from pages.index import Index

from shared_engine import EngineClosedError, NeMoRetrieverError, PageError
from shared_engine.images.pages import Pages, open_pages

BATCH = 4  # pages between two steps of the progress bar

_log = logging.getLogger(__name__)


@dataclass
class Job:
    """What is told of a file that was sent."""

    id: int
    name: str
    state: Literal["waiting", "working", "done", "known", "failed"] = "waiting"
    message: str = ""
    done: int = 0
    """Pages."""
    total: int = 0
    """Pages; 0 until the file is open."""
    is_cancelled: bool = False
    started: float = 0.0
    """When its first page was begun, on the monotonic clock."""
    source: Pages | None = None
    """Its pages, once the file is open."""

    @property
    def is_active(self) -> bool:
        """Whether it is still to be done."""
        return self.state in ("waiting", "working")

    def stop(self) -> None:
        """End the reading of a page, which may take long."""
        if self.source:
            self.source.stop()

    @property
    def left(self) -> str:
        """How long it takes yet, in words; empty until some pages are done."""
        if self.state != "working" or not self.done:
            return ""
        seconds = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"


class Jobs:
    """All work on files; `close` leaves what is not done for next time."""

    def __init__(self, files: Files, index: Index, max_pages: int) -> None:
        self._files = files
        self._index = index
        self._max_pages = max_pages
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._queued: dict[int, tuple[File, Future[None]]] = {}
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._worker = ThreadPoolExecutor(1, "pages")
        for file in files:
            if index.lacks(file.pages.values()):
                _log.warning("%s is indexed again: the index lacks its pages", file.name)
                files.reopen(file)
        index.forget_others(file.id for file in (*files, *files.unfinished))
        for file in files.unfinished:
            self._start(file, file.name)

    def __iter__(self) -> Iterator[Job]:
        """Yield what goes on, and what a person has not yet put away."""
        return iter(list(self._jobs.values()))

    def receive(self, name: str, content: IO[bytes]) -> Job:
        """Take a file in; one that is here or under way is not worked on again.

        One that has no pages has failed when this returns.
        """
        file = self._files.receive(name, content)
        return self._start(file, clean(name), is_sent=True)

    def cancel(self, id_: int) -> None:
        """Give a file up that is not finished, and delete what was made of it."""
        job = self._jobs.get(id_)
        if job and job.is_active:
            job.is_cancelled = True
            job.stop()
            file, future = self._queued[id_]
            if future.cancel():  # it was not begun
                self._discard(file)
                del self._jobs[id_], self._queued[id_]

    def remove(self, file: File) -> None:
        """Delete a file with its pages, pictures and vectors."""
        self._files.remove(file)
        self._index.remove(file.id)

    def dismiss(self, id_: int) -> None:
        """Put away what was said of a file."""
        job = self._jobs.get(id_)
        if job and not job.is_active:
            self._jobs.pop(id_, None)

    def close(self) -> None:
        """Stop after the batch in hand, or before it while its pages are read."""
        self._closing.set()
        for job in self:
            job.stop()
        self._worker.shutdown(cancel_futures=True)

    def _start(self, file: File, name: str, is_sent: bool = False) -> Job:
        job = Job(next(self._numbers), file.name)
        with self._lock:
            is_known = self._files.get(file.id) is not None
            is_new = not (is_known or file.id in self._busy)
            if is_new:
                self._busy.add(file.id)
        if not is_new:
            how = "is here already" if is_known else "is being added already"
            job.state = "known"
            job.message = f"{file.name} {how}, byte for byte; nothing was added."
            if name != file.name:
                job.message += f" You sent it as {name}."
        elif not is_sent or self._look(job, file):
            self._queued[job.id] = file, self._worker.submit(self._work, job, file)
        self._jobs[job.id] = job
        return job

    def _look(self, job: Job, file: File) -> bool:
        """Count the pages of a file that came; tell whether it has any."""
        try:
            with open_pages(file.original, file.name, self._max_pages) as source:
                job.total = len(source)
        except PageError as exc:
            self._discard(file)
            job.state, job.message = "failed", str(exc)
            return False
        return True

    def _discard(self, file: File) -> None:
        self._files.remove(file)
        self._index.remove(file.id)
        self._busy.discard(file.id)

    def _work(self, job: Job, file: File) -> None:
        job.state, job.started = "working", time.monotonic()
        try:
            with open_pages(file.original, file.name, self._max_pages) as source:
                job.source, job.total = source, len(source)
                is_complete = self._take_in(job, file, source)
        except PageError as exc:
            self._discard(file)
            job.state, job.message = "failed", str(exc)
        except NeMoRetrieverError as exc:
            job.state, job.message = "failed", f"{file.name} could not be embedded: {exc}. {_LATER}"
        except Exception:
            _log.exception("%s could not be indexed", file.name)
            job.message = f"{file.name} could not be indexed; the terminal says why. {_LATER}"
            job.state = "failed"
        else:
            if job.is_cancelled and not is_complete:
                self._discard(file)
            if is_complete or job.is_cancelled:
                job.state = "done"
                self._jobs.pop(job.id, None)
        finally:
            self._busy.discard(file.id)
            self._queued.pop(job.id, None)

    def _take_in(self, job: Job, file: File, source: Pages) -> bool:
        """Index the pages of a file; return whether it got to its end."""
        pages: list[Page] = []
        notes: list[str] = []
        for first in range(0, len(source), BATCH):
            if self._closing.is_set() or job.is_cancelled:
                return False
            batch = []
            for number in range(first + 1, min(first + BATCH, len(source)) + 1):
                try:
                    batch.append(file.save_page(number, source.read(number - 1)))
                except EngineClosedError:
                    return False
                except PageError as exc:
                    notes.append(str(exc))
            if batch:
                self._index.add(batch)
            pages += batch
            job.done = min(first + BATCH, len(source))
        if not pages:
            raise PageError(notes[0])
        self._files.finish(file, pages, notes + _tell_textless(pages))
        return True


_LATER = "Send it again, or start the app again."


def _tell_textless(pages: list[Page]) -> list[str]:
    """Say which pages words cannot find by their text layer."""
    without = [page.title.removeprefix("page ") for page in pages if not page.text]
    if not without:
        return []
    which = "It has" if len(without) == len(pages) else f"Of its pages, {', '.join(without)} have"
    return [
        f"{which} no text layer, as scans and pictures have none: found by picture, not by words "
        "in the text. For those, run text recognition over it first (ocrmypdf) and send that."
    ]
