"""Measure retrieval quality by model, dimensions and number type, with confidence intervals."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from shared_engine._cache import find_cache
from shared_engine._version import __version__
from shared_engine.documents import Role
from shared_engine.errors import ConfigurationError, UnsupportedDimensionsError
from shared_engine.evaluate.data import Qrels, RetrievalData, read_folder
from shared_engine.evaluate.models import EngineReranker, Model, embed
from shared_engine.evaluate.search import Ranking, fuse, rescore, search, search_bm25
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
    """All three are of the vectors that are searched, and None for BM25, which has none."""
    second_stage: str
    """The second stage and its number of candidates; "" without one."""
    figures: dict[str, Figure]
    """By name in MEASURES."""
    differences: dict[str, Figure]
    """Differences from the first row, paired by query."""
    seconds_per_query: float | None
    """Median time of the reranker on this machine; None without one."""

    @property
    def label(self) -> str:
        """The model, and the second stage if there is one."""
        return " + ".join(filter(None, (self.model, self.second_stage)))


@dataclass(frozen=True)
class Report:
    """The results, and the data and models they are from."""

    data: dict[str, Any]
    models: list[dict[str, Any]]
    rows: list[Row]
    left_out: list[str]
    """Omitted measurements, with the reason."""

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
    rerankers: Sequence[EngineReranker] = (),
    hybrid: bool = False,
    rescored: bool = False,
    candidates: int = 100,
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
        rerankers: Add a row for each: it orders the first candidates of the first row anew.
        hybrid: Add a row for the fusion of the first row with BM25, by reciprocal ranks.
        rescored: Add a row for each model and size: the first candidates of a search with bits,
            ordered by the full vectors.
        candidates: How many documents of a query the second stages order; the others follow.
        ignore_identical_ids: Exclude documents with the id of the query (ArguAna, Quora).
        progress: Called with a line of text before each collection is embedded.

    Raises:
        ConfigurationError: the folder, a size or a model is invalid.
        InputError: a line of the folder is invalid or cannot be embedded; the message has the line.
    """
    sizes = sorted(set(dimensions), reverse=True)
    if sizes and sizes[-1] < 1:
        raise ConfigurationError(f"dimensions={sizes[-1]}: must be at least 1")
    if candidates < 1:
        raise ConfigurationError(f"candidates={candidates}: must be at least 1")
    data = read_folder(folder, split)
    measured = _Measured(data, max(DEPTH, candidates), ignore_identical_ids)
    # loads them, so that an invalid one is refused before anything is embedded
    rerankers = [each for each in rerankers if measured.accepts(each)]
    first: list[list[str]] = []
    used = []
    for model in models:
        is_first = model is models[0]
        if not is_first and not measured.accepts(model):
            continue
        offered = list(_find_sizes(model, sizes, None if is_first else measured.left_out))
        vectors = {}
        for role, collection in data.by_role.items():
            progress(f"{model.name}: {len(collection):,} vectors of {collection.path.name}")
            vectors[role] = embed(model, collection, role, cache or find_cache("evaluate"))
        for size, kind in product(offered, embedding_types):
            found = measured.search(vectors, size, kind)
            measured.add(found, (model.name, size, kind))
            first = first or found
        for size in offered if rescored else ():
            bits = measured.search(vectors, size, "binary")
            found = rescore(
                bits, vectors["query"], vectors["document"], data.corpus.ids, candidates
            )
            measured.add(found, (model.name, size, "binary"), f"full vectors ({candidates})")
        used.append(_describe(model))
    row = measured.rows[0]
    searched = row.model, row.dimensions, row.embedding_type
    words = measured.search_bm25() if bm25 or hybrid else None
    if words and bm25:
        measured.add(words, ("BM25", None, None))
    if words and hybrid:
        measured.add(list(map(fuse, first, words)), searched, "BM25")
    for reranker in rerankers:
        progress(f"{reranker.name}: {candidates} candidates for each of {len(first):,} queries")
        found, seconds = reranker.rerank(data, first, candidates)
        measured.add(found, searched, f"{reranker.name} ({candidates})", seconds)
        used.append(_describe(reranker))
    return Report(data.facts, used, measured.rows, measured.left_out)


_SearchSpec = tuple[str, int | None, EmbeddingType | None]
"""Model, dimensions and number type of a search."""


class _Measured:
    """The rows of a report, and its omissions."""

    def __init__(self, data: RetrievalData, depth: int, ignore_identical_ids: bool) -> None:
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self._data = data
        self._ranking = Ranking(data.corpus.ids, depth + ignore_identical_ids)
        self._ignores_identical_ids = ignore_identical_ids
        self._baseline: NDArray[np.float64] = np.zeros(0)  # (q, measures) of the first row

    def accepts(self, model: Model | EngineReranker) -> bool:
        """Return whether a model accepts the documents; if not, note it as left out."""
        accepts = "image" in model.modalities or not self._data.corpus.has_images
        if not accepts:
            self.left_out.append(f"{model.name}: does not accept images")
        return accepts

    def search(
        self, vectors: Mapping[Role, NDArray[np.float32]], size: int, kind: EmbeddingType
    ) -> list[list[str]]:
        """Return the ids of each query's documents, best first."""
        queries, corpus = vectors["query"], vectors["document"]
        return self._drop_identical(search(queries, corpus, self._ranking, size, kind))

    def search_bm25(self) -> list[list[str]] | None:
        """Return the results of BM25; note an omission if the corpus has no words."""
        data = self._data
        found = search_bm25(data.corpus.texts, data.queries.texts, self._ranking)
        if found is None:
            self.left_out.append("BM25: the corpus has no words")
            return None
        return self._drop_identical(found)

    def _drop_identical(self, found: list[list[str]]) -> list[list[str]]:
        if not self._ignores_identical_ids:
            return found
        pairs = zip(self._data.queries.ids, found, strict=True)
        return [[name for name in names if name != query] for query, names in pairs]

    def add(
        self,
        found: list[list[str]],
        spec: _SearchSpec,
        second_stage: str = "",
        seconds: float | None = None,
    ) -> None:
        """Add a row; the others are compared with the first one."""
        values = measure(found, self._data.qrels)
        if not self.rows:
            self._baseline = values
        figures, differences = summarize(values), summarize(values - self._baseline)
        width = count_bytes(*spec[1:])
        self.rows.append(Row(*spec, width, second_stage, figures, differences, seconds))


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


def _describe(model: Model | EngineReranker) -> dict[str, Any]:
    facts = {"model": model.name, "revision": model.revision, "description": model.description}
    if isinstance(model, EngineReranker):  # it has no vectors to cache
        return facts
    return facts | {"cache_key": {role: model.cache_key(role) for role in get_args(Role)}}


def measure(found: Sequence[Sequence[str]], qrels: Qrels) -> NDArray[np.float64]:
    """Return the measures of each query (q, measures).

    Args:
        found: Ids of documents, best first, for each query of `qrels`.
        qrels: The judgements.
    """
    run: dict[str, dict[str, float]] = {}
    for query, names in zip(qrels, found, strict=True):
        # places as scores: trec_eval would sort equal scores
        run[query] = {name: -place for place, name in enumerate(names[:DEPTH])}
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
