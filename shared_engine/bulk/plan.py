"""What a job will take, from a random sample of its rows and some seconds of the real engine."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from shared_engine.bulk import fragment as fragments_
from shared_engine.bulk.job import Fragment, Job
from shared_engine.bulk.rows import Rows, find_schema, read_rows
from shared_engine.bulk.run import Work
from shared_engine.catalogue import lookup
from shared_engine.documents import EmbeddingInput
from shared_engine.embedder import Embedder

_SAMPLE, _IMAGE_SAMPLE = 2_048, 32
"""Rows of the sample."""
_FRAGMENTS = 32
"""Fragments that they are of, at most: each must be read up to its last row of the sample."""
_SMALLEST = 16
"""Rows of the first windows that are measured; they double until one takes long enough."""
_TYPES = (("float", 32), ("int8", 8), ("binary", 1))
"""Number types, with bits per value; uint8 and ubinary are as large as their twins."""


@dataclass(frozen=True)
class Plan:
    """What a job will take."""

    rows: int
    """Rows of the job."""
    missing: int
    """Those that are to be embedded yet."""
    tokens_per_row: float
    rows_per_second: float
    """0 where too few rows were there to measure."""
    kept_bytes: float
    """Bytes per row of ids and kept columns in the files."""
    dimensions: tuple[int, ...]
    """Lengths of vectors that can be chosen."""

    @property
    def seconds(self) -> float:
        """How long the missing rows will take."""
        return self.missing / self.rows_per_second if self.rows_per_second else 0.0

    @property
    def heading(self) -> str:
        """Rows, tokens and time in one line."""
        time_ = f", about {_name_time(self.seconds)}" if self.rows_per_second else ""
        tokens = f", about {self.missing * self.tokens_per_row:,.0f} tokens" * bool(
            self.tokens_per_row
        )
        return f"{self.missing:,} of {self.rows:,} rows to embed{tokens}{time_}"

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
        return "\n".join(lines)


def plan(  # noqa: PLR0917
    job: Job,
    embedder: Embedder,
    work: Work,
    seconds: float = 10.0,
    most: float = 1.0,
    seed: int = 0,
) -> Plan:
    """Return what a job will take at this engine; nothing is written to its folder.

    Args:
        job: what to embed.
        embedder: the engine that will do it.
        work: what of it is missing.
        seconds: how long to measure, warm-up included, once the model is loaded.
        most: the largest part of the missing rows that the measurement may cost.
        seed: of the sample.

    Raises:
        ConfigurationError, InputError: as `run.begin` does.
        NeMoRetrieverError: the engine fails.
    """
    count = sum(fragment.rows for fragment in work.fragments)
    missing = sum(fragment.rows for fragment in work.missing)
    full = embedder.with_options(dimensions=None).dimensions
    spec = lookup(job.options.model)
    shorter = (width for width in (spec.dimensions if spec else ()) if width < full)
    widths = tuple(sorted({*shorter, full, embedder.dimensions}))
    if not missing:
        return Plan(count, 0, 0.0, 0.0, 0.0, widths)
    schema = find_schema(job, work.fragments[0])
    sample = _draw(job, work.missing, schema, random.Random(seed))
    measured = _measure(job, embedder, schema, sample, seconds, int(missing * most))
    return Plan(count, missing, *measured, widths)


def _draw(job: Job, fragments: list[Fragment], schema: Any, dice: random.Random) -> Rows:
    """Return rows from all over the input, in random order."""
    window = fragments_.find_window(job, fragments[0])
    wanted = _SAMPLE if window == fragments_.WINDOW else _IMAGE_SAMPLE
    weights = [fragment.rows for fragment in fragments]
    wanted = min(wanted, sum(weights))
    chosen = Counter(
        dice.choices(range(len(fragments)), weights, k=min(_FRAGMENTS, wanted))
        if len(fragments) > 1
        else [0]
    )
    tables: list[Any] = []
    documents: list[str | EmbeddingInput] = []
    refused: dict[int, str] = {}
    share = wanted / chosen.total()
    for number, times in sorted(chosen.items()):
        fragment = fragments[number]
        rows = dice.sample(range(fragment.rows), min(fragment.rows, round(share * times)))
        for part in _pick(job, fragment, schema, sorted(rows)):
            refused |= {len(documents) + row: why for row, why in part.refused.items()}
            documents += part.documents
            tables.append(part.kept)
    order = list(range(len(documents)))
    dice.shuffle(order)
    return Rows(
        pa.concat_tables(tables).take(order),
        [documents[row] for row in order],
        {at: refused[row] for at, row in enumerate(order) if row in refused},
    )


def _pick(job: Job, fragment: Fragment, schema: Any, rows: list[int]) -> Iterator[Rows]:
    """Yield some rows of a fragment."""
    size = 1 if fragments_.find_window(job, fragment) == fragments_.IMAGE_WINDOW else 1024
    start = 0
    for window in read_rows(job, fragment, schema, size):
        wanted = [row - start for row in rows if start <= row < start + size]
        start += size
        if wanted:
            yield _take(window, wanted)
        if not rows or start > rows[-1]:
            return


def _take(rows: Rows, which: list[int]) -> Rows:
    return Rows(
        rows.kept.take(which),
        [rows.documents[row] for row in which],
        {at: rows.refused[row] for at, row in enumerate(which) if row in rows.refused},
    )


def _measure(  # noqa: PLR0917
    job: Job, embedder: Embedder, schema: Any, sample: Rows, seconds: float, most: int
) -> tuple[float, float, float]:
    """Return tokens per row, rows per second, and bytes kept per row.

    Windows become larger until one takes long enough, which warms the engine up; then windows of
    that size are measured until the time is over.
    """
    largest = fragments_.WINDOW
    if any(
        isinstance(each, EmbeddingInput) and each.image is not None for each in sample.documents
    ):
        largest = fragments_.IMAGE_WINDOW
    own = embedder.with_options(show_progress=False, embedding_type="float")
    own.embed(["warm up"], job.role)
    warm, kind = own.usage, job.options.embedding_type
    deadline = time.monotonic() + seconds
    size, rows, rate, is_last = max(1, min(_SMALLEST, largest // 8)), 0, 0.0, False
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sample.parquet")
        with fragments_.open_writer(path, job, schema, own.dimensions, {}) as writer:
            while time.monotonic() < deadline and rows + 5 * size <= most:
                started, count = time.monotonic(), 0
                windows = (most - rows) // size if is_last else 5
                source = _repeat(sample, size, windows, deadline)
                for window, vectors, errors in fragments_.embed_windows(job, own, source):
                    fragments_.write_window(writer, window, vectors, errors, kind)
                    count += size
                rows += count
                rate = count / (time.monotonic() - started)
                if is_last:
                    break
                is_last = 2 * size > largest or size / rate > seconds / 20
                size = size if is_last else 2 * size
        kept = os.path.getsize(path)
    bits = {"float": 32, "int8": 8, "uint8": 8}.get(kind, 1)
    if not rows:
        return 0.0, 0.0, 0.0
    per_row = max(0.0, kept / rows - own.dimensions * bits / 8)
    return (own.usage - warm) / rows, rate, per_row


def _repeat(sample: Rows, size: int, windows: int, deadline: float) -> Iterator[Rows]:
    """Yield windows of the sample, over and over until it is time."""
    count = len(sample.documents)
    for number in range(windows):
        if number > 1 and time.monotonic() >= deadline:
            return
        yield _take(sample, [(number * size + n) % count for n in range(size)])


def _name_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
