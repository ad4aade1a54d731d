"""Measure retrieval quality by model, dimensions and number type, with confidence intervals."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG
from numpy.typing import NDArray

from shared_engine._cache import find_cache
from shared_engine._version import __version__
from shared_engine.errors import ConfigurationError, UnsupportedDimensionsError
from shared_engine.evaluate.data import Qrels, RetrievalData, read_folder
from shared_engine.evaluate.models import EngineReranker, Model, embed
from shared_engine.evaluate.search import Ranking, fuse, rescore, search, search_bm25
from shared_engine.vectors import EmbeddingType, quantize

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
        return asdict(self) | {
            "interval": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "nemoretriever-embeddings": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("numpy", "ir-measures", "bm25s")},
            },
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
    for name, value in (("dimensions", min(sizes, default=1)), ("candidates", candidates)):
        if value < 1:
            raise ConfigurationError(f"{name}={value}: must be at least 1")
    data = read_folder(folder, split)
    measured = _Measured(data, max(DEPTH, candidates), ignore_identical_ids)
    # loads them, so that an invalid one is refused before anything is embedded
    rerankers = [each for each in rerankers if measured.accepts(each)]
    used = []
    for model in models:
        if measured.rows and not measured.accepts(model):
            continue
        offered = measured.find_sizes(model, sizes)
        vectors = []  # of queries, then of documents
        for role, collection in data.by_role.items():
            progress(f"{model.name}: {len(collection):,} vectors of {collection.path.name}")
            vectors.append(embed(model, collection, role, cache or find_cache("evaluate")))
        for size, kind in product(offered, embedding_types):
            measured.add(measured.search(vectors, size, kind), model.name, size, kind)
        for size in offered if rescored else ():
            bits = measured.search(vectors, size, "binary")
            found = rescore(bits, vectors[0], vectors[1], data.corpus.ids, candidates)
            stage = f"full vectors ({candidates})"
            measured.add(found, model.name, size, "binary", second_stage=stage)
        keys = {role: model.cache_key(role) for role in data.by_role}
        used.append(model.describe() | {"cache_key": keys})
    first, row = measured.first, measured.rows[0]
    searched = row.model, row.dimensions, row.embedding_type
    words = measured.search_bm25() if bm25 or hybrid else None
    if words and bm25:
        measured.add(words, "BM25")
    if words and hybrid:
        measured.add(list(map(fuse, first, words)), *searched, second_stage="BM25")
    for reranker in rerankers:
        progress(f"{reranker.name}: {candidates} candidates for each of {len(first):,} queries")
        found, seconds = reranker.rerank(data, first, candidates)
        stage = f"{reranker.name} ({candidates})"
        measured.add(found, *searched, second_stage=stage, seconds=seconds)
        used.append(reranker.describe())
    return Report(data.facts, used, measured.rows, measured.left_out)


class _Measured:
    """The rows of a report, and its omissions."""

    def __init__(self, data: RetrievalData, depth: int, ignore_identical_ids: bool) -> None:
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self._data = data
        self._ranking = Ranking(data.corpus.ids, depth + ignore_identical_ids)
        self._ignores_identical_ids = ignore_identical_ids
        self.first: list[list[str]] = []  # ids by query of the first row
        self._baseline: NDArray[np.float64] = np.zeros(0)  # (q, measures) of the first row

    def accepts(self, model: Model | EngineReranker) -> bool:
        """Return whether a model accepts the documents; if not, note it as left out."""
        if "image" in model.modalities or not self._data.corpus.has_images:
            return True
        self.left_out.append(f"{model.name}: does not accept images")
        return False

    def find_sizes(self, model: Model, sizes: Iterable[int]) -> list[int]:
        """Return the full size and the others that a model offers; note the rest as left out.

        Raises:
            UnsupportedDimensionsError: the first model does not offer one.
        """
        offered = [model.dimensions]
        for size in sizes:
            try:
                model.check_dimensions(size)
            except UnsupportedDimensionsError as exc:
                if not self.rows:
                    raise
                self.left_out.append(f"{model.name}: {exc}")
            else:
                offered.append(size)
        return list(dict.fromkeys(offered))

    def search(
        self, vectors: Sequence[NDArray[np.float32]], size: int, kind: EmbeddingType
    ) -> list[list[str]]:
        """Return the ids of each query's documents, best first."""
        return self._drop_identical(search(vectors[0], vectors[1], self._ranking, size, kind))

    def search_bm25(self) -> list[list[str]] | None:
        """Return the results of BM25; note an omission if the corpus has no words."""
        found = search_bm25(self._data.corpus.texts, self._data.queries.texts, self._ranking)
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
        model: str,
        size: int | None = None,
        kind: EmbeddingType | None = None,
        *,
        second_stage: str = "",
        seconds: float | None = None,
    ) -> None:
        """Add a row; the others are compared with the first one."""
        values = measure(found, self._data.qrels)
        if not self.rows:
            self.first, self._baseline = found, values
        width = None
        if size is not None and kind is not None:
            width = quantize(np.zeros((1, size), np.float32), kind).nbytes
        figures, differences = summarize(values), summarize(values - self._baseline)
        self.rows.append(Row(model, size, kind, width, second_stage, figures, differences, seconds))


def measure(found: Sequence[Sequence[str]], qrels: Qrels) -> NDArray[np.float64]:
    """Return the measures (q, measures) of the documents of each query of `qrels`, best first."""
    run: dict[str, dict[str, float]] = {}
    for query, names in zip(qrels, found, strict=True):
        # places as scores: trec_eval would sort equal scores
        run[query] = {name: -place for place, name in enumerate(names[:DEPTH])}
    measures = list(MEASURES.values())
    values = {(m.query_id, m.measure): m.value for m in ir_measures.iter_calc(measures, qrels, run)}
    return np.array([[values[query, measure] for measure in measures] for query in qrels])


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
