"""A job on this machine: one engine, kept busy from the first fragment to the last."""

from __future__ import annotations

from dataclasses import dataclass

from shared_engine.bulk.job import Fragment, Job
from shared_engine.embedder import Embedder
from shared_engine.errors import NeMoRetrieverError


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


def run_local(job: Job, embedder: Embedder | None = None, show_progress: bool = True) -> Summary:
    """Do what is missing of a job, resume included; errors of rows are in errors.parquet after.

    Raises:
        ConfigurationError: the folder is another job's; a source changed; an id is there twice.
        NeMoRetrieverError: what ended the run, as `embed_fragment` raises it. What was done stays.
    """
    raise NotImplementedError
