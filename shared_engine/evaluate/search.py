"""Exact search over vectors that need not fit in memory, and BM25 beside it.

Every number type is searched by inner products of float32 vectors, in blocks, with BLAS:

- float: cosine, as the vectors are of unit length.
- int8, uint8: cosine of the levels, uint8's less 128. Each vector is scaled by a largest value of
  its own, so their bare inner product would prefer vectors without a peak.
- binary, ubinary: bits as -1 and 1. The inner product is `dimensions` - 2 x Hamming distance, exact
  in float32, and BLAS on all cores is no slower than XOR and `bitwise_count` in numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_engine.vectors import EmbeddingType, quantize, unit

ROWS_PER_BLOCK = 2048
"""Documents, and queries, of which all scores are in memory at once: 16 MB, and five times that for
their keys."""
_LOW = 0xFFFFFFFF


class Hits(NamedTuple):
    """What was found, best first: (q, k) each; equal scores are in the order of the corpus."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


def shorten(
    vectors: NDArray[np.float32], dimensions: int, embedding_type: EmbeddingType
) -> NDArray[Any]:
    """Return full float vectors (n, d) as `Embedder` gives them with these two options."""
    cut = np.array(vectors[:, :dimensions])
    if dimensions < vectors.shape[1]:
        cut = unit(cut)  # else they are of unit length already
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
    k: int,
    dimensions: int,
    embedding_type: EmbeddingType = "float",
) -> Hits:
    """Return the best k documents of every query; full vectors (q, d), (n, d) are shortened first.

    Memory is a few blocks, whatever n is; `corpus` may be a memory map.
    """
    asked = decode(shorten(queries, dimensions, embedding_type), dimensions, embedding_type)
    best = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(corpus), ROWS_PER_BLOCK):
        block = shorten(corpus[start : start + ROWS_PER_BLOCK], dimensions, embedding_type)
        block = decode(block, dimensions, embedding_type)
        best = np.concatenate(
            [
                _keep_best(best[first : first + ROWS_PER_BLOCK], chunk @ block.T, start, k)
                for first, chunk in _chunks(asked)
            ]
        )
    return _read_keys(best)


def search_bm25(texts: Iterable[str], queries: Iterable[str], k: int) -> Hits | None:
    """Return what BM25 finds, row -1 where no word of a query is in a document; None: no words.

    As `bm25s` is by default (Lucene's formula, k1 1.5, b 0.75, words of two letters or more), but
    without a list of stop words, since those are of one language.
    """
    import bm25s
    from bm25s.tokenization import Tokenizer

    tokenizer = Tokenizer(stopwords=None)
    tokens = list(tokenizer.streaming_tokenize(texts, allow_empty=False))
    vocabulary = tokenizer.get_vocab_dict()
    if not any(tokens):
        return None
    index = bm25s.BM25()
    index.index((tokens, vocabulary), show_progress=False)
    best = []
    for asked in tokenizer.streaming_tokenize(queries, update_vocab=False, allow_empty=False):
        known = [token for token in asked if token < len(vocabulary)]
        scores = np.asarray(index.get_scores_from_ids(known), np.float32)[None]
        best.append(_keep_best(np.empty((1, 0), np.int64), scores, 0, k))
    rows, scores = _read_keys(np.concatenate(best))
    return Hits(np.where(scores > 0, rows, -1), scores)


def _chunks(asked: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for first in range(0, len(asked), ROWS_PER_BLOCK):
        yield first, asked[first : first + ROWS_PER_BLOCK]


# A score and its row are one whole number, the score in its upper half: all numbers differ, so
# that the best k are the same however the corpus is cut into blocks.


def _keep_best(
    best: NDArray[np.int64], scores: NDArray[np.float32], start: int, k: int
) -> NDArray[np.int64]:
    """Return the best k keys (q, k) of those before and of new scores (q, b) from row `start`."""
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 would be below 0.0
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)  # as the floats are
    keys = ordered << 32 | (_LOW - np.arange(start, start + scores.shape[1]))
    keys = np.concatenate([best, keys], axis=1)
    return keys if keys.shape[1] <= k else np.partition(keys, -k, axis=1)[:, -k:]


def _read_keys(keys: NDArray[np.int64]) -> Hits:
    keys = np.sort(keys, axis=1)[:, ::-1]
    ordered = (keys >> 32).astype(np.int32)
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32)
    return Hits(_LOW - (keys & _LOW), bits.view(np.float32))
