"""Exact search over vectors that need not fit in memory, BM25, and second stages.

Every number type is searched by inner products of float32 vectors, in blocks, with BLAS:

- float: cosine, as the vectors are of unit length.
- int8, uint8: cosine of the levels (uint8: minus 128). Each vector is scaled by its own largest
  value, so the plain inner product would favour vectors without a peak.
- binary, ubinary: bits as -1 and 1. The inner product is `dimensions` - 2 x Hamming distance, exact
  in float32, and BLAS on all cores is as fast as XOR and `bitwise_count` in numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_engine.vectors import EmbeddingType, quantize, unit

ROWS_PER_BLOCK = 2048
"""Documents scored together."""
SCORES_PER_BLOCK = 4_194_304
"""Bound on the scores in memory; their sort keys take ten times the bytes."""
RRF_K = 60
"""The constant of reciprocal rank fusion (Cormack et al., 2009)."""


class Ranking:
    """The best k documents of each query; equal scores rank by descending id, as in trec_eval.

    A sort key is one integer: the score in its upper half, the place of the id in its lower half.
    All keys differ, so the best k do not depend on how the corpus is cut into blocks.
    """

    def __init__(self, ids: Sequence[str], k: int) -> None:
        self._k = k
        self._sorted = sorted(ids)
        places = {name: place for place, name in enumerate(self._sorted)}
        self._places = np.array([places[name] for name in ids], np.int64)

    def merge(
        self, keys: NDArray[np.int64], scores: NDArray[np.float32], start: int = 0
    ) -> NDArray[np.int64]:
        """Return the best keys (q, k) among earlier ones and scores (q, b) from row `start`."""
        bits = (scores + np.float32(0)).view(np.int32)  # the sum turns -0.0 into 0.0
        ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)  # as the floats
        new = ordered << 32 | self._places[start : start + scores.shape[1]]
        merged = np.concatenate([keys, new], axis=1)
        if merged.shape[1] <= self._k:
            return merged
        return np.partition(merged, -self._k, axis=1)[:, -self._k :]

    def find_ids(self, keys: NDArray[np.int64]) -> list[list[str]]:
        """Return the ids of the documents of each query, best first."""
        places = (np.sort(keys, axis=1)[:, ::-1] & 0xFFFFFFFF).tolist()
        return [[self._sorted[place] for place in row] for row in places]


def shorten(
    vectors: NDArray[np.float32], dimensions: int, embedding_type: EmbeddingType
) -> NDArray[Any]:
    """Return full float vectors (n, d) as `Embedder` returns them with these two options."""
    cut = np.array(vectors[:, :dimensions])
    if dimensions < vectors.shape[1]:  # else they are of unit length already
        cut = unit(cut)
    return quantize(cut, embedding_type)


def decode(
    vectors: NDArray[Any], dimensions: int, embedding_type: EmbeddingType
) -> NDArray[np.float32]:
    """Return float32 vectors (n, dimensions) whose inner products rank as the number type does."""
    if embedding_type == "float":
        return vectors
    if embedding_type in ("int8", "uint8"):
        return unit(vectors.astype(np.float32) - (128 if embedding_type == "uint8" else 0))
    packed = vectors.astype(np.int16) + (128 if embedding_type == "binary" else 0)
    bits = np.unpackbits(packed.astype(np.uint8), axis=1, count=dimensions)
    return bits.astype(np.float32) * 2 - 1


def search(
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32],
    ranking: Ranking,
    dimensions: int,
    embedding_type: EmbeddingType = "float",
) -> list[list[str]]:
    """Return the ids of the best documents of each query, best first.

    Args:
        queries: Full vectors (q, d).
        corpus: Full vectors (n, d), in the order of the ranking's ids; may be a memory map, as only
            a block of them is in memory.
        ranking: The ids and how many of them to return.
        dimensions: Length to cut the vectors to.
        embedding_type: Number type to convert them to.
    """

    def convert(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return decode(shorten(vectors, dimensions, embedding_type), dimensions, embedding_type)

    converted, keys = convert(queries), np.empty((len(queries), 0), np.int64)
    step = max(1, min(ROWS_PER_BLOCK, SCORES_PER_BLOCK // len(queries)))
    for start in range(0, len(corpus), step):
        keys = ranking.merge(keys, converted @ convert(corpus[start : start + step]).T, start)
    return ranking.find_ids(keys)


def search_bm25(
    texts: Iterable[str], queries: Iterable[str], ranking: Ranking
) -> list[list[str]] | None:
    """Return the ids of documents that share words with each query; None if no text has words.

    The defaults of `bm25s` (Lucene's formula, k1 1.5, b 0.75, words of at least two letters), but
    without stop words, as a list of them is for one language.
    """
    import bm25s

    tokenize = partial(bm25s.tokenize, stopwords=None, show_progress=False)
    tokens = tokenize(texts)
    if not tokens.vocab:
        return None
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    none, found = np.empty((1, 0), np.int64), []
    for words in tokenize(queries, return_ids=False):
        scores = index.get_scores_from_ids(index.get_tokens_ids(words)).astype(np.float32)
        (ids,) = ranking.find_ids(ranking.merge(none, scores[None]))
        found.append(ids[: np.count_nonzero(scores > 0)])
    return found


def fuse(*rankings: Sequence[str]) -> list[str]:
    """Return the ids of several rankings by reciprocal rank fusion; equal ones keep their order.

    >>> fuse(["a", "b", "c"], ["c", "d"])
    ['c', 'a', 'b', 'd']
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for place, name in enumerate(ranking, 1):
            scores[name] = scores.get(name, 0) + 1 / (RRF_K + place)
    return sorted(scores, key=scores.__getitem__, reverse=True)


def reorder(names: Sequence[str], scores: NDArray[np.float32]) -> list[str]:
    """Return ids by scores (k,) of the first k; equal ones keep their order, the rest follows."""
    order = np.argsort(-scores, kind="stable").tolist()
    return [*(names[place] for place in order), *names[len(scores) :]]


def rescore(
    found: Iterable[Sequence[str]],
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32],
    ids: Sequence[str],
    candidates: int,
) -> list[list[str]]:
    """Return the documents of each query with the first `candidates` ordered by full vectors.

    Args:
        found: Ids for each query, best first.
        queries: Full vectors (q, d).
        corpus: Full vectors (n, d); only those of the candidates are read.
        ids: The ids of the corpus, in order.
    """
    rows = {name: row for row, name in enumerate(ids)}
    return [
        reorder(names, corpus[[rows[name] for name in names[:candidates]]] @ query)
        for names, query in zip(found, queries, strict=True)
    ]
