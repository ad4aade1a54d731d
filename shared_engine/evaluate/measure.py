"""Figures of retrieval for models, dimensions and number types, each with its interval."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG
from numpy.typing import NDArray

from shared_engine._version import __version__
from shared_engine.errors import ConfigurationError, UnsupportedDimensionsError
from shared_engine.evaluate.data import RetrievalData, read_folder
from shared_engine.evaluate.models import Model, embed, find_cache
from shared_engine.evaluate.search import Hits, search, search_bm25
from shared_engine.vectors import EmbeddingType

MEASURES = {
    "Recall@1": R @ 1,
    "Recall@5": R @ 5,
    "Recall@10": R @ 10,
    "Recall@100": R @ 100,
    "nDCG@10": nDCG @ 10,
    "MRR@10": RR @ 10,
}
"""As trec_eval computes them, and with it BEIR and MTEB: scores are gains of nDCG, and a document
counts for the others where its score is over 0. MRR@10 is 0 where the first relevant document comes
after the tenth place."""
DEEPEST = 100
RESAMPLES = 1000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Figure:
    """A mean over queries, and the middle 95 % of the means of resampled queries (percentiles)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One way to search, and how good it is."""

    model: str
    dimensions: int | None
    embedding_type: EmbeddingType | None
    bytes_per_vector: int | None
    """All three are None of BM25, which has no vectors."""
    figures: dict[str, Figure]
    """By name in MEASURES."""
    differences: dict[str, Figure]
    """To the first row, over the same resamples: query by query, so closer than two intervals."""


@dataclass(frozen=True)
class Report:
    """What was found, and with what."""

    data: dict[str, Any]
    models: list[dict[str, Any]]
    rows: list[Row]
    left_out: list[str]
    """What could not be measured, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for JSON, with versions and the date."""
        names = ("numpy", "ir-measures", "bm25s")
        return asdict(self) | {
            "interval": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"nemoretriever-embeddings": __version__}
            | {"python": platform.python_version()}
            | {name: version(name) for name in names},
        }


def evaluate(
    folder: Path,
    models: Sequence[Model],
    *,
    dimensions: Iterable[int] = (),
    embedding_types: Sequence[EmbeddingType] = ("float", "int8", "binary"),
    split: str | None = None,
    cache: Path | None = None,
    bm25: bool = True,
    ignore_identical_ids: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Report:
    """Measure models on a folder in BEIR's layout; see `data.py` for it.

    Vectors are embedded once, at full size, and shortened as `Options` would. `dimensions` are
    beside the full size; of the models after the first, those that they do not offer are left out.
    With `ignore_identical_ids` no document is found by the query of the same id (ArguAna, Quora).
    `say` is told what goes on.

    Raises:
        ConfigurationError: the folder, a size or a model cannot be.
        InputError: a line of the folder is at fault; the message says file and line.
    """
    sizes = sorted(set(dimensions), reverse=True)
    if sizes and sizes[-1] < 1:
        raise ConfigurationError(f"dimensions={sizes[-1]}; expected 1 or more")
    data = read_folder(folder, split)
    table = _Table(data, ignore_identical_ids)
    facts = []
    for model in models:
        if model is not models[0] and data.corpus.has_images and "image" not in model.modalities:
            table.left_out.append(f"{model.name}: takes no images")
            continue
        offered = [model.dimensions]
        for size in sizes:
            try:
                model.check_dimensions(size)
            except UnsupportedDimensionsError as exc:
                if model is models[0]:
                    raise
                table.left_out.append(f"{model.name}: {exc}")
            else:
                offered += [] if size in offered else [size]
        vectors = {}
        for role, collection in data.by_role.items():
            say(f"{model.name}: {len(collection):,} vectors of {collection.path.name}")
            vectors[role] = embed(model, collection, role, cache or find_cache())
        for size in offered:
            for kind in embedding_types:
                hits = search(vectors["query"], vectors["document"], table.depth, size, kind)
                table.add(hits, model.name, size, kind)
        facts.append(model.facts)
    if bm25:
        table.add_bm25()
    return Report(data.facts, facts, table.rows, table.left_out)


class _Table:
    """The rows so far, of the same queries."""

    def __init__(self, data: RetrievalData, ignore_identical_ids: bool) -> None:
        self._data = data
        self._ignores = ignore_identical_ids
        self.depth = DEEPEST + ignore_identical_ids
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self._first: NDArray[np.float64] | None = None

    def add(
        self, hits: Hits, model: str, size: int | None = None, kind: EmbeddingType | None = None
    ) -> None:
        values = measure(hits, self._data, ignore_identical_ids=self._ignores)  # (q, measures)
        means = resample(values)  # (resamples, measures)
        self._first = means if self._first is None else self._first
        first = [self.rows[0].figures[name].value for name in MEASURES] if self.rows else None
        value = values.mean(axis=0)
        self.rows.append(
            Row(
                model,
                size,
                kind,
                None if size is None or kind is None else count_bytes(size, kind),
                _figures(value, means),
                _figures(value - (value if first is None else first), means - self._first),
            )
        )

    def add_bm25(self) -> None:
        if not self._data.corpus.has_texts:
            self.left_out.append("BM25: the corpus has no texts")
            return
        texts, queries = (
            (document.text or "" for document in collection.documents())
            for collection in (self._data.corpus, self._data.queries)
        )
        hits = search_bm25(texts, queries, self.depth)
        if hits is None:
            self.left_out.append("BM25: no words of two letters between other characters")
        else:
            self.add(hits, "BM25")


def measure(
    hits: Hits, data: RetrievalData, *, ignore_identical_ids: bool = False
) -> NDArray[np.float64]:
    """Return the figures of every query (q, measures), in the order of `data.queries`.

    The order of the hits is what counts: their places are given as scores, so that trec_eval does
    not put equal scores into an order of its own.
    """
    documents, queries = data.corpus.ids, data.queries.ids
    run: dict[str, dict[str, float]] = {}
    for query, rows in zip(queries, hits.rows.tolist(), strict=True):
        found = [documents[row] for row in rows if row >= 0]
        if ignore_identical_ids:
            found = [document for document in found if document != query]
        run[query] = {document: -place for place, document in enumerate(found[:DEEPEST])}
    places = {query: place for place, query in enumerate(queries)}
    columns = {figure: column for column, figure in enumerate(MEASURES.values())}
    values = np.full((len(queries), len(columns)), np.nan)
    for metric in ir_measures.iter_calc(list(columns), data.qrels, run):
        values[places[metric.query_id], columns[metric.measure]] = metric.value
    assert not np.isnan(values).any()
    return values


def resample(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means (resamples, measures) of as many queries, drawn with replacement.

    The same queries are drawn for every table of the same length.
    """
    random = np.random.default_rng(SEED)
    drawn = (random.integers(len(values), size=len(values)) for _ in range(RESAMPLES))
    return np.array([values[queries].mean(axis=0) for queries in drawn])


def count_bytes(dimensions: int, embedding_type: EmbeddingType) -> int:
    """Return the bytes of one vector.

    >>> count_bytes(2048, "float"), count_bytes(2048, "int8"), count_bytes(2048, "binary")
    (8192, 2048, 256)
    """
    if embedding_type == "float":
        return 4 * dimensions
    return dimensions if embedding_type in ("int8", "uint8") else -(-dimensions // 8)


def _figures(values: NDArray[np.float64], means: NDArray[np.float64]) -> dict[str, Figure]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        name: Figure(float(values[i]), float(low[i]), float(high[i]))
        for i, name in enumerate(MEASURES)
    }
