"""What a folder of results holds, and what is missing.

    OUT/job.json                what was asked: written first, compared at each resume
    OUT/engine.json             who computes: written by whichever process embeds first, compared by
                                every other (cache_key: weights, dtype, role, dimensions, ...)
    OUT/vectors/<name>.parquet  a fragment that is done; its counts and the fingerprint of its source
                                are in the file's metadata
    OUT/errors/<name>.parquet   its rows that failed, if any
    OUT/errors.parquet          all of those, merged when a run ends

There is no other list: the files are the manifest, so that a million of them need no rewriting.
"""

from __future__ import annotations

from collections.abc import Iterable

from shared_engine.bulk.fragment import Done
from shared_engine.bulk.job import Fragment, Job
from shared_engine.embedder import Embedder


def open_folder(job: Job) -> None:
    """Make the folder of a job, or check that it is the same job's.

    Raises:
        ConfigurationError: it was begun with other inputs, model, role or options; says which.
        OutputError: it cannot be written.
    """
    raise NotImplementedError


def describe_engine(job: Job, embedder: Embedder) -> dict[str, str]:
    """Return the metadata of each file of vectors, and hold all processes to the same engine.

    Raises:
        ConfigurationError: the folder holds vectors of another model, dtype or the like.
    """
    raise NotImplementedError


def find_done(job: Job, fragments: Iterable[Fragment]) -> dict[str, Done]:
    """Return what is done, by name of the fragment: those with a file whose footer can be read.

    Raises:
        ConfigurationError: a source changed since, or is no more; says which and what to do.
    """
    raise NotImplementedError


def merge_errors(job: Job) -> int:
    """Write `errors.parquet` from the fragments' errors; return how many rows it has."""
    raise NotImplementedError
