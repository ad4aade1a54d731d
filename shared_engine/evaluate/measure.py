"""Measure retrieval quality by model, dimensions and number type, with confidence intervals."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, get_args

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG
from numpy.typing import NDArray

from shared_engine._version import __version__
from shared_engine.documents import Role
from shared_engine.errors import ConfigurationError, UnsupportedDimensionsError
from shared_engine.evaluate.data import Qrels, read_folder
from shared_engine.evaluate.models import Model, embed, find_cache
from shared_engine.evaluate.search import Ranking, search, search_bm25
from shared_engine.vectors import EmbeddingType

MEASURES = {
    "Recall@1": R @ 1,
    "Recall@5": R @ 5,
    "Recall@10": R @ 10,
    "Recall@100": R @ 100,
    "nDCG@10": nDCG @ 10,
    "MRR@10": RR @ 10,
}
"""Computed by trec_eval, as BEIR and MTEB compute them. Scores are the gains of nDCG; for the
others a document is relevant if its score is greater than 0."""
DEPTH = 100
RESAMPLES = 1000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Figure:
    """A mean over queries and its percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """The quality of one way to search."""

    model: str
    dimensions: int | None
    embedding_type: EmbeddingType | None
    bytes_per_vector: int | None
    """All three are None for BM25, which has no vectors."""
    figures: dict[str, Figure]
    """By name in MEASURES."""
    differences: dict[str, Figure]
    """Differences from the first row, paired by query."""


@dataclass(frozen=True)
class Report:
    """The results, and the data and models they are from."""

    data: dict[str, Any]
    models: list[dict[str, Any]]
    rows: list[Row]
    left_out: list[str]
    """What was not measured, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON, with versions and the date."""
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
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Measure models on a folder in BEIR's layout (see `data.py`).

    Documents are embedded once, at full size; the other sizes and types are computed from these
    vectors, as `Options` would.

    Args:
        folder: The data set.
        models: The first one is the baseline of the differences.
        dimensions: Sizes in addition to the full one. Those that a model after the first does not
            offer are left out.
        embedding_types: Number types, measured at every size.
        split: A file of `qrels`; by default "test", or the only one.
        cache: Folder that keeps the vectors; by default the user's cache.
        bm25: Add a row for BM25.
        ignore_identical_ids: Exclude documents with the id of the query (ArguAna, Quora).
        progress: Called with a line of text before each collection is embedded.

    Raises:
        ConfigurationError: the folder, a size or a model is invalid.
        InputError: a line of the folder is invalid or cannot be embedded; the message has the line.
    """
    sizes = sorted(set(dimensions), reverse=True)
    if sizes and sizes[-1] < 1:
        raise ConfigurationError(f"dimensions={sizes[-1]}: must be at least 1")
    data = read_folder(folder, split)
    ranking = Ranking(data.corpus.ids, DEPTH + ignore_identical_ids)
    measured: list[tuple[str, int | None, EmbeddingType | None, NDArray[np.float64]]] = []
    left_out: list[str] = []
    used = []
    for model in models:
        is_first = model is models[0]
        if not is_first and data.corpus.has_images and "image" not in model.modalities:
            left_out.append(f"{model.name}: does not accept images")
            continue
        offered = list(_find_sizes(model, sizes, None if is_first else left_out))
        vectors = {}
        for role, collection in data.by_role.items():
            progress(f"{model.name}: {len(collection):,} vectors of {collection.path.name}")
            vectors[role] = embed(model, collection, role, cache or find_cache())
        for size, kind in product(offered, embedding_types):
            found = search(vectors["query"], vectors["document"], ranking, size, kind)
            values = measure(found, data.qrels, ignore_identical_ids)
            measured.append((model.name, size, kind, values))
        used.append(_describe(model))
    if bm25:
        matches = search_bm25(data.corpus.texts, data.queries.texts, ranking)
        if matches is None:
            left_out.append("BM25: the corpus has no words")
        else:
            values = measure(matches, data.qrels, ignore_identical_ids)
            measured.append(("BM25", None, None, values))
    baseline = measured[0][-1]
    rows = [
        Row(name, size, kind, count_bytes(size, kind), summarize(own), summarize(own - baseline))
        for name, size, kind, own in measured
    ]
    return Report(data.facts, used, rows, left_out)


def _find_sizes(model: Model, sizes: list[int], left_out: list[str] | None) -> Iterator[int]:
    """Yield the full size and the other sizes that a model offers.

    Args:
        left_out: Takes a reason for each size that is not offered; None raises it.
    """
    yield model.dimensions
    for size in sizes:
        try:
            model.check_dimensions(size)
        except UnsupportedDimensionsError as exc:
            if left_out is None:
                raise
            left_out.append(f"{model.name}: {exc}")
        else:
            if size != model.dimensions:
                yield size


def _describe(model: Model) -> dict[str, Any]:
    return {
        "model": model.name,
        "revision": model.revision,
        "description": model.description,
        "cache_key": {role: model.cache_key(role) for role in get_args(Role)},
    }


def measure(
    found: Sequence[Sequence[str]], qrels: Qrels, ignore_identical_ids: bool = False
) -> NDArray[np.float64]:
    """Return the measures of each query (q, measures).

    Args:
        found: Ids of documents, best first, for each query of `qrels`.
        qrels: The judgements.
        ignore_identical_ids: Exclude documents with the id of the query.
    """
    run: dict[str, dict[str, float]] = {}
    for query, names in zip(qrels, found, strict=True):
        kept = [name for name in names if not (ignore_identical_ids and name == query)]
        # places as scores: trec_eval would sort equal scores
        run[query] = {name: -place for place, name in enumerate(kept[:DEPTH])}
    places = {query: place for place, query in enumerate(qrels)}
    columns = {measure: column for column, measure in enumerate(MEASURES.values())}
    values = np.full((len(qrels), len(columns)), np.nan)
    for metric in ir_measures.iter_calc(list(columns), qrels, run):
        values[places[metric.query_id], columns[metric.measure]] = metric.value
    assert not np.isnan(values).any()
    return values


def summarize(values: NDArray[np.float64]) -> dict[str, Figure]:
    """Return the mean of each measure (q, measures) and its interval.

    The interval is of the means of resampled queries. All tables with as many queries draw the same
    samples, so differences may be taken before or after.
    """
    random = np.random.default_rng(SEED)
    drawn = (random.integers(len(values), size=len(values)) for _ in range(RESAMPLES))
    means = np.array([values[queries].mean(axis=0) for queries in drawn])  # (resamples, measures)
    bounds = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    columns = zip(values.mean(axis=0).tolist(), *bounds.tolist(), strict=True)
    return {name: Figure(*column) for name, column in zip(MEASURES, columns, strict=True)}


def count_bytes(dimensions: int | None, embedding_type: EmbeddingType | None) -> int | None:
    """Return the bytes of one vector; None without vectors.

    >>> count_bytes(2048, "float"), count_bytes(2048, "int8"), count_bytes(2048, "binary")
    (8192, 2048, 256)
    """
    if dimensions is None:
        return None
    if embedding_type == "float":
        return 4 * dimensions
    return dimensions if embedding_type in ("int8", "uint8") else -(-dimensions // 8)
