"""Estimate time, tokens and bytes of a job from a sample of its rows and the real engine."""

from __future__ import annotations

import random
import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle, islice

import pyarrow as pa
import pyarrow.parquet as pq

from shared_engine.bulk.fragment import WINDOW, check_errors, find_window
from shared_engine.bulk.job import Job, Unread
from shared_engine.bulk.rows import open_table, read_windows
from shared_engine.bulk.run import Work
from shared_engine.bulk.tables import Cursors
from shared_engine.catalogue import lookup
from shared_engine.documents import EmbeddingInput
from shared_engine.embedder import Embedder
from shared_engine.errors import InputError

_PLACES = 32
"""Places that the sample is read from: some consecutive rows at each, two windows in all."""
_SEEK_BYTES = 1 << 23
"""The most bytes that are read to reach a place within a row group."""
_FIRST_PASS = 8
"""Texts of the first pass that is measured."""
_TYPES = (("float", 32), ("int8", 8), ("binary", 1))
"""Number types, with bits per value; uint8 and ubinary are as large as their twins."""


@dataclass(frozen=True)
class Plan:
    """An estimate of the cost of a job."""

    rows: int
    """Rows of the job."""
    missing: int
    """Rows that have no vector yet."""
    tokens_per_row: float
    rows_per_second: float
    """0 if there were too few rows to measure."""
    kept_bytes: float
    """Bytes per row of ids and kept columns in the files."""
    dimensions: tuple[int, ...]
    """Vector sizes to choose from."""
    unread: tuple[Unread, ...] = ()
    """Files that cannot be read; the other figures leave them out."""

    @property
    def seconds(self) -> float:
        """How long the missing rows will take."""
        return self.missing / self.rows_per_second if self.rows_per_second else 0.0

    @property
    def heading(self) -> str:
        """Rows, tokens and time in one line."""
        text = f"{self.missing:,} of {self.rows:,} rows to embed"
        if self.tokens_per_row:
            text += f", about {self.missing * self.tokens_per_row:,.0f} tokens"
        if self.rows_per_second:
            minutes = self.seconds / 60
            text += (
                f", about {minutes / 60:,.1f} h" if minutes >= 60 else f", about {minutes:.1f} min"
            )
        return text

    def count_bytes(self, dimensions: int, bits: int) -> int:
        """Return the bytes of all files of vectors."""
        return int(self.rows * (self.kept_bytes + -(-dimensions * bits // 8)))

    def __str__(self) -> str:
        rate = (
            f"{self.rows_per_second:,.1f} rows/s, "
            f"{self.rows_per_second * self.tokens_per_row:,.0f} tokens/s"
            if self.rows_per_second
            else "too few rows to measure"
        )
        head = "".join(f"{name + ' (GB)':>14}" for name, _ in _TYPES)
        lines = [self.heading, f"measured here: {rate}", f"{'dimensions':>10}{head}"]
        for width in self.dimensions:
            sizes = (self.count_bytes(width, bits) / 1e9 for _, bits in _TYPES)
            lines.append(f"{width:>10}" + "".join(f"{size:>14,.3f}" for size in sizes))
        if self.unread:
            lines.append(f"without {len(self.unread):,} files that cannot be read:")
            lines += [f"  {each.error}" for each in self.unread[:10]]
        return "\n".join(lines)


def plan(
    job: Job, embedder: Embedder, work: Work, seconds: float = 10.0, most: float = 1.0
) -> Plan:
    """Return an estimate of the cost of a job with this engine; nothing is written to its folder.

    The sample is drawn from all over the missing rows. A row deep in a large Parquet row group is
    replaced by one that can be read sooner: a group sorted by length misleads it.

    Args:
        seconds: how long to measure, about, once the model is loaded.
        most: the largest part of the missing rows that the measurement may embed.

    Raises:
        NeMoRetrieverError: the engine fails.
    """
    count = sum(fragment.rows for fragment in work.fragments)
    missing = sum(fragment.rows for fragment in work.missing)
    full = embedder.with_options(dimensions=None).dimensions
    spec = lookup(embedder.model)
    shorter = (width for width in (spec.dimensions if spec else ()) if width < full)
    widths = tuple(sorted({*shorter, full, embedder.dimensions}))
    tokens = rate = kept_bytes = 0.0
    if missing:
        size = find_window(job, work.missing[0])
        documents, kept = _draw(job, work, size)
        if documents:
            most_rows = int(missing * most)
            tokens, rate = _measure(job, embedder, documents, size, seconds, most_rows)
            written = pa.BufferOutputStream()
            pq.write_table(pa.concat_tables(kept).drop_columns(""), written, compression="zstd")
            kept_bytes = written.tell() / len(documents)
    return Plan(count, missing, tokens, rate, kept_bytes, widths, work.unread)


def _draw(job: Job, work: Work, size: int) -> tuple[list[str | EmbeddingInput], list[pa.Table]]:
    """Return documents from all over the missing fragments, in random order, and what is kept."""
    dice = random.Random(0)
    rows = 2 * size // _PLACES
    weights = [fragment.rows for fragment in work.missing]
    kept: list[pa.Table] = []
    documents: list[str | EmbeddingInput] = []
    with closing(Cursors()) as cursors:
        for number in sorted(dice.choices(range(len(weights)), weights, k=_PLACES)):
            fragment = work.missing[number]
            start = dice.randrange(max(1, fragment.rows - rows + 1))
            part = replace(
                fragment, first=fragment.first + start, rows=min(rows, fragment.rows),
                names=fragment.names[start : start + rows],
            )  # fmt: skip
            try:
                if fragment.table:
                    cursor = open_table(job, fragment, cursors)
                    part = replace(part, first=cursor.limit_seek(part.first, _SEEK_BYTES))
                for window in read_windows(job, part, work.schema, size, cursors):
                    kept.append(window.kept)
                    documents += window.documents
            except InputError:  # the run will report it
                continue
    dice.shuffle(documents)
    return documents, kept


def _measure(  # noqa: PLR0917
    job: Job,
    embedder: Embedder,
    documents: list[str | EmbeddingInput],
    size: int,
    seconds: float,
    most: int,
) -> tuple[float, float]:
    """Return tokens per row and rows per second.

    Each pass embeds four times the rows of the pass before, until one takes a quarter of the time.
    """
    own = embedder.with_options(show_progress=False, embedding_type="float")
    count = _FIRST_PASS * size // WINDOW or 1
    done, tokens, rate = 0, 0.0, 0.0
    if count <= most:
        own.embed(["warm up"], job.role)
    while done + count <= most:
        used, start = own.usage, time.monotonic()
        some = islice(cycle(documents), count)
        window = max(1, min(size, count // 4))
        for rows in own.stream(some, job.role, window, errors="return"):
            check_errors(rows)
        took = time.monotonic() - start
        done += count
        tokens, rate = (own.usage - used) / count, count / took
        count *= 4
        if took >= seconds / 4:
            break
    return tokens, rate
