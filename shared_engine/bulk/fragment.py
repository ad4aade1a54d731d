"""One fragment of input to one file of vectors, in whatever process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shared_engine.bulk.job import Fragment, Job
from shared_engine.embedder import Embedder


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a fragment."""

    name: str
    rows: int
    """Rows with a vector."""
    failed: int
    """Rows in the file of errors."""
    tokens: int
    """Tokens embedded; 0 where a NIM does not say."""
    seconds: float


def embed_fragment(
    job: Job,
    embedder: Embedder,
    fragment: Fragment,
    on_rows: Callable[[int, int, int], object] | None = None,
    on_read: Callable[[], object] | None = None,
) -> Done:
    """Embed the rows of a fragment and write `vectors/<name>.parquet`, and `errors/<name>.parquet`
    where rows failed, each beside and then renamed; done twice, it writes the same again.

    Memory is that of a few windows of rows. `on_rows(rows, failed, tokens)` is called after each
    window with what it added; `on_read()` once all rows are submitted: time to begin the next
    fragment, so that the device goes on. Safe in several threads with one embedder.

    Raises:
        InputError: the source cannot be read, or changed since it was listed; with `job.strict`
            also the first row that cannot be embedded. Other fragments are not concerned.
        ConfigurationError: the folder holds vectors of another engine; the options cannot work.
        OutputError: the files cannot be written: no space, no permission.
        RemoteError, EngineError, EngineClosedError: as with `Embedder.stream`; the run should stop.
    """
    raise NotImplementedError
