"""A job on this machine: one engine, kept busy from the first fragment to the last."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import pyarrow as pa
from tqdm.auto import tqdm

from shared_engine.backend import Rows
from shared_engine.bulk import files, manifest
from shared_engine.bulk.fragment import embed_fragment
from shared_engine.bulk.ids import check_ids
from shared_engine.bulk.job import TABLES, Fragment, Job, Source, Unread, find_sources, list_inputs
from shared_engine.bulk.manifest import Done
from shared_engine.bulk.tables import Cursors
from shared_engine.embedder import Embedder
from shared_engine.errors import EngineClosedError, InputError
from shared_engine.stream import Stream

IN_FLIGHT = 8
"""The most fragments that are begun and not yet done. The next one begins when the last row of the
one before is submitted: there are two large ones, and more only if they have a few rows."""


@dataclass(frozen=True)
class Work:
    """The work of a run, from `begin` or `find_work`."""

    fragments: list[Fragment]
    """All of the job."""
    missing: list[Fragment]
    """Those without a file of vectors."""
    done: dict[str, Done]
    """Outcomes of earlier runs, by name of the fragment."""
    schema: Any = None
    """Names and types of the id and the kept columns; None if no file can be read."""
    unread: tuple[Unread, ...] = ()
    """Files that cannot be read."""


@dataclass(frozen=True)
class Summary:
    """Counts of a run, here or on a cluster; the command prints them as its last line."""

    rows: int
    """Rows embedded in this run."""
    failed: int
    """Rows of the whole job that could not be embedded: those of errors.parquet."""
    skipped: int
    """Rows embedded by earlier runs."""
    tokens: int
    seconds: float
    unread: tuple[Unread, ...] = ()
    """Files and fragments that could not be read; the next run tries them again."""
    failed_before: int = 0
    """Those of `failed` that earlier runs reported."""

    @property
    def is_complete(self) -> bool:
        """Whether all input was read, and no row failed in this run."""
        return self.failed == self.failed_before and not self.unread

    def __str__(self) -> str:
        before = f" ({self.failed_before:,} of them before)" if self.failed_before else ""
        text = (
            f"{self.rows:,} rows done, {self.failed:,} failed{before}, {self.skipped:,} skipped "
            f"(done before); {self.tokens:,} tokens in {self.seconds:,.1f} s"
        )
        if rows := sum(each.rows for each in self.unread):
            text += f"; {rows:,} rows could not be read"
        if files := sum(each.first is None for each in self.unread):
            text += f"; {files:,} files could not be read"
        return text


def find_work(job: Job, folder: str | None = None, sources: Sequence[Source] | None = None) -> Work:
    """List a job's fragments and find the unfinished ones.

    Args:
        job: the job; nothing is written to its folder but the converted tables.
        folder: where these are instead.
        sources: the result of `find_sources`, if that was called before.

    Raises:
        ConfigurationError: a source changed; see also `find_sources` and `list_inputs`.
    """
    sources = find_sources(job) if sources is None else sources
    folder = folder or os.path.join(job.out, TABLES)
    fragments, schema, unread = list_inputs(job, sources, folder)
    done = manifest.find_done(job, fragments)
    missing = [each for each in fragments if each.name not in done]
    return Work(fragments, missing, done, schema, tuple(unread))


@contextmanager
def begin(job: Job) -> Iterator[Work]:
    """Open a job's folder, find its unfinished work, and check its ids; keep the folder locked.

    Raises:
        ConfigurationError: the folder is another job's, or in use by another run; a source changed;
            two rows have the same id; every file lacks a column.
        OutputError: the folder cannot be written.
    """
    sources = find_sources(job)  # wrong inputs are refused before a folder is made for them
    with files.lock(job.out):
        manifest.open_folder(job)
        work = find_work(job, sources=sources)
        if work.schema is not None:
            work = replace(work, schema=manifest.record_schema(job, work.schema))
            if work.missing:
                check_ids(job, work.fragments, work.schema)
        yield work


def finish(job: Job, work: Work, outcomes: Sequence[Done | Unread], seconds: float) -> Summary:
    """Merge the errors of a job and return the counts of a run."""
    before = work.done.values()
    done = [each for each in outcomes if isinstance(each, Done)]
    lost = (*work.unread, *(each for each in outcomes if isinstance(each, Unread)))
    manifest.remove_leftovers(job)  # of workers of a cluster that died
    id_type = pa.string() if work.schema is None else work.schema.field("id").type
    failed = manifest.merge_errors(job, id_type, lost)
    if not lost and len(done) == len(work.missing):
        with suppress(OSError):  # a file that another node still has open may stay, as on NFS
            files.remove(os.path.join(job.out, TABLES))
    return Summary(
        rows=sum(each.rows for each in done),
        failed=failed,
        skipped=sum(each.rows for each in before),
        tokens=sum(each.tokens for each in done),
        seconds=seconds,
        unread=lost,
        failed_before=sum(each.failed for each in before),
    )


def run_local(
    job: Job,
    embedder: Embedder | None = None,
    show_progress: bool = True,
    on_begin: Callable[[Work], object] | None = None,
) -> Summary:
    """Embed the unfinished fragments of a job on this machine.

    Args:
        embedder: the engine; None makes one of the job's options and closes it.
        on_begin: Called with the result of `begin`, before any row is embedded.

    Returns:
        Counts of the run. Failed rows and unreadable files are in errors.parquet.

    Raises:
        ConfigurationError: as `begin` raises it.
        NeMoRetrieverError: the error that ended the run, as `embed_fragment` raises it. What was
            finished is kept.
    """
    with begin(job) as work:
        if on_begin is not None:
            on_begin(work)
        start = time.monotonic()
        engine = Embedder(job.options) if embedder is None else embedder
        bar = tqdm(
            total=sum(fragment.rows for fragment in work.fragments),
            initial=sum(done.rows + done.failed for done in work.done.values()),
            unit="row",
            disable=not show_progress,
        )
        running = _Running(job, engine, bar)
        try:
            running.do(work.missing)
        finally:
            bar.close()
            if engine is not embedder:
                engine.close(cancel=True)
        return finish(job, work, running.outcomes, time.monotonic() - start)


class _Running:
    """Fragments in flight on one embedder."""

    def __init__(self, job: Job, embedder: Embedder, bar: Any) -> None:
        self.outcomes: list[Done | Unread] = []
        self._job, self._embedder, self._bar = job, embedder, bar
        self._turn = threading.Semaphore(1)
        self._lock = threading.Lock()
        self._cursors = Cursors()
        self._failure: BaseException | None = None
        self._streams: WeakSet[Stream[Rows]] = WeakSet()
        self._tokens, self._start = 0, time.monotonic()

    def do(self, fragments: Iterable[Fragment]) -> None:
        """Embed fragments; raise the error that ended one of them, unless it cannot be read."""
        threads = ThreadPoolExecutor(IN_FLIGHT, "nemoretriever-fragment")
        running: set[Future[None]] = set()
        with closing(self._cursors), threads as pool:
            try:
                for fragment in fragments:
                    self._turn.acquire()
                    if self._failure is not None:
                        break
                    running = {each for each in running if not each.done()}
                    running.add(pool.submit(self._embed, fragment))
                wait(running)  # an interrupted join of Python 3.11 takes its thread for ended
            except BaseException as exc:  # an interrupt
                self._stop(exc)
                raise
        if self._failure is not None:
            raise self._failure

    def _stop(self, failure: BaseException) -> None:
        """End the run: fragments that wait for vectors end now, and others at their next window."""
        self._failure = self._failure or failure
        self._cursors.stop()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()

    def _watch(self, stream: Stream[Rows]) -> None:
        with self._lock:
            self._streams.add(stream)
        self._check_stopped()  # `_stop` may not have seen the stream

    def _embed(self, fragment: Fragment) -> None:
        with ExitStack() as turn:
            turn.callback(self._turn.release)
            try:
                done = embed_fragment(
                    self._job,
                    self._embedder,
                    fragment,
                    on_rows=self._advance,
                    on_read=turn.close,
                    cursors=self._cursors,
                    on_stream=self._watch,
                )
                self.outcomes.append(done)
            except BaseException as exc:
                if self._job.strict or not isinstance(exc, InputError):
                    self._stop(exc)
                else:
                    lost = Unread(fragment.title, fragment.first, fragment.rows, exc)
                    self.outcomes.append(lost)

    def _check_stopped(self) -> None:
        if self._failure is not None:
            raise EngineClosedError("the run was stopped")

    def _advance(self, rows: int, failed: int, tokens: int) -> None:
        self._check_stopped()
        with self._lock:
            self._tokens += tokens
            rate = self._tokens / (time.monotonic() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update(rows + failed)
