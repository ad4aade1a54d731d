"""A job on this machine: one engine, kept busy from the first fragment to the last."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from shared_engine.bulk import manifest
from shared_engine.bulk.fragment import embed_fragment
from shared_engine.bulk.ids import check_ids
from shared_engine.bulk.job import Fragment, Job, list_fragments
from shared_engine.bulk.manifest import Done
from shared_engine.bulk.rows import find_schema
from shared_engine.embedder import Embedder
from shared_engine.errors import InputError, NeMoRetrieverError

IN_FLIGHT = 8
"""Fragments that are begun and not yet done, at most. The next begins when the last row of the one
before is submitted, so there are two of large ones, and more only of those of a few rows."""


@dataclass(frozen=True)
class Work:
    """What a job has to do, from `begin`."""

    fragments: list[Fragment]
    """All of the job."""
    missing: list[Fragment]
    """Those without a file of vectors."""
    done: dict[str, Done]
    """What was done before, by name of the fragment."""


@dataclass(frozen=True)
class Summary:
    """What a run did, here or on a cluster; the command prints it as its last line."""

    rows: int
    """Rows embedded in this run."""
    failed: int
    """Rows of the whole job that could not be embedded: those of errors.parquet."""
    skipped: int
    """Rows that were done before."""
    tokens: int
    seconds: float
    unread: tuple[tuple[Fragment, NeMoRetrieverError], ...] = ()
    """Fragments that could not be read; the next run tries them again."""

    @property
    def is_complete(self) -> bool:
        """Whether every row of the input has a vector."""
        return not self.failed and not self.unread

    def __str__(self) -> str:
        text = (
            f"{self.rows:,} rows done, {self.failed:,} failed, {self.skipped:,} skipped (done "
            f"before); {self.tokens:,} tokens in {self.seconds:,.1f} s"
        )
        lost = sum(fragment.rows for fragment, _ in self.unread)
        return text + (f"; {lost:,} rows could not be read" if lost else "")


def find_work(job: Job, fragments: list[Fragment] | None = None) -> Work:
    """List a job's fragments and find what is missing; nothing is written.

    Raises:
        ConfigurationError: a source changed.
        InputError: a table cannot be read at all.
    """
    fragments = list_fragments(job) if fragments is None else fragments
    is_begun = os.path.isdir(os.path.join(job.out, "vectors"))
    done = manifest.find_done(job, fragments) if is_begun else {}
    return Work(fragments, [each for each in fragments if each.name not in done], done)


def begin(job: Job) -> Work:
    """List a job's fragments, open its folder, check its ids, and find what is missing.

    Raises:
        ConfigurationError: the folder is another job's; a source changed; an id is there twice.
        InputError: a table cannot be read at all.
        OutputError: the folder cannot be written.
    """
    fragments = list_fragments(job)
    if not fragments:
        return Work([], [], {})
    schema = find_schema(job, fragments[0])
    manifest.open_folder(job, schema)
    work = find_work(job, fragments)
    if work.missing:
        check_ids(job, fragments, schema)
    return work


def finish(
    job: Job,
    work: Work,
    done: Iterable[Done],
    unread: Iterable[tuple[Fragment, NeMoRetrieverError]],
    seconds: float,
) -> Summary:
    """Merge the errors of a job and sum up what a run did."""
    rows, _, tokens = manifest.sum_done(done)
    before, _, _ = manifest.sum_done(work.done.values())
    failed = 0
    if work.fragments:
        manifest.remove_leftovers(job)  # of a cluster's workers that died meanwhile
        failed = manifest.merge_errors(job)
    return Summary(rows, failed, before, tokens, seconds, tuple(unread))


def run_local(
    job: Job,
    embedder: Embedder | None = None,
    show_progress: bool = True,
    work: Work | None = None,
) -> Summary:
    """Do what is missing of a job, resume included; errors of rows are in errors.parquet after.

    `work` is what `begin` gave, if that was called before.

    Raises:
        ConfigurationError: the folder is another job's; a source changed; an id is there twice.
        NeMoRetrieverError: what ended the run, as `embed_fragment` raises it. What was done stays.
    """
    work = begin(job) if work is None else work
    start = time.monotonic()
    owned = Embedder(job.options) if embedder is None else None
    bar = tqdm(
        total=sum(fragment.rows for fragment in work.fragments),
        initial=sum(done.rows + done.failed for done in work.done.values()),
        unit="row",
        disable=not show_progress,
    )
    running = _Running(job, embedder or owned or Embedder(job.options), bar)
    try:
        running.do(work.missing)
    finally:
        bar.close()
        if owned is not None:
            owned.close(cancel=True)
    return finish(job, work, running.done, running.unread, time.monotonic() - start)


class _StoppedError(Exception):
    """Ends a fragment because another ended the run."""


class _Running:
    """Fragments in flight on one embedder."""

    def __init__(self, job: Job, embedder: Embedder, bar: Any) -> None:
        self.done: list[Done] = []
        self.unread: list[tuple[Fragment, NeMoRetrieverError]] = []
        self._job, self._embedder, self._bar = job, embedder, bar
        self._turn = threading.Semaphore(1)
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._tokens, self._start = 0, time.monotonic()

    def do(self, fragments: Iterable[Fragment]) -> None:
        """Embed fragments; raise what ended one of them, unless it just could not be read."""
        with ThreadPoolExecutor(IN_FLIGHT, "nemoretriever-fragment") as pool:
            try:
                for fragment in fragments:
                    self._turn.acquire()
                    if self._failure is not None:
                        break
                    pool.submit(self._embed, fragment)
            except BaseException as exc:  # an interrupt
                self._failure = exc
                raise
        if self._failure is not None:
            raise self._failure

    def _embed(self, fragment: Fragment) -> None:
        is_read = threading.Event()

        def pass_on() -> None:
            if not is_read.is_set():
                is_read.set()
                self._turn.release()

        try:
            self.done.append(
                embed_fragment(self._job, self._embedder, fragment, self._advance, pass_on)
            )
        except InputError as exc:
            if self._job.strict:
                self._failure = self._failure or exc
            else:
                self.unread.append((fragment, exc))
        except _StoppedError:
            pass
        except BaseException as exc:
            self._failure = self._failure or exc
        finally:
            pass_on()

    def _advance(self, rows: int, failed: int, tokens: int) -> None:
        if self._failure is not None:
            raise _StoppedError
        with self._lock:
            self._tokens += tokens
            rate = self._tokens / (time.monotonic() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update(rows + failed)
