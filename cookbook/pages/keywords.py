"""A search of text layers by their words, BM25, which needs no model."""

from __future__ import annotations

import threading
from typing import NamedTuple

import bm25s
import numpy as np
from pages.files import Files, Page
from pages.passages import choose_excerpt, drop_furniture

_COVERED = 0.25
"""Share of a question, by the weight of its words, that the best page has where one is near."""


class KeywordHits(NamedTuple):
    """What the words of a question find."""

    pages: list[Page]
    """Best first."""
    words: set[str]
    """The question's words but for the most frequent of English."""
    unknown: tuple[str, ...]
    """Those that no page has, where no page has most of the question; else none."""

    def excerpt(self, page: Page) -> str:
        """Return the lines of a page that have the most of the words."""
        return choose_excerpt(page.text, self.words)


class Keywords:
    """The words of all finished files; indexed anew after files came or went."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._indexed: list[str] | None = None
        self._pages: list[Page] = []
        self._rows: dict[str, set[int]] = {}
        """Of each word the rows of the pages that have it."""
        self._bm25: bm25s.BM25 | None = None
        self._lock = threading.Lock()

    def search(self, question: str, top: int) -> KeywordHits:
        """Return the pages that share words with a question."""
        (asked,) = bm25s.tokenize([question], return_ids=False, show_progress=False)
        with self._lock:
            self._update()
            if self._bm25 is None or not asked:
                return KeywordHits([], set(asked), ())
            scores = self._bm25.get_scores(asked)
            order = np.argsort(-scores, kind="stable")[:top]
            found = [self._pages[row] for row in order if scores[row] > 0]
            return KeywordHits(found, set(asked), self._find_unknown(set(asked)))

    def _update(self) -> None:
        files = list(self._files)
        ids = [file.id for file in files]
        if ids == self._indexed:
            return
        pages = [page for file in files for page in file.pages.values()]
        texts = [drop_furniture(page.text) for page in pages]
        tokens = bm25s.tokenize(texts, return_ids=False, show_progress=False)
        self._rows = {}
        for row, words in enumerate(tokens):
            for word in words:
                self._rows.setdefault(word, set()).add(row)
        self._bm25 = None
        if self._rows:
            self._bm25 = bm25s.BM25()
            self._bm25.index(tokens, show_progress=False)
        self._pages, self._indexed = pages, ids

    def _find_unknown(self, words: set[str]) -> tuple[str, ...]:
        count = len(self._pages)
        weights = {
            word: max(1.0, np.log1p((count - len(has) + 0.5) / (len(has) + 0.5)))
            for word in words
            for has in [self._rows.get(word, set())]
        }
        covered = np.zeros(count)
        for word, weight in weights.items():
            covered[list(self._rows.get(word, ()))] += weight
        if covered.max() >= _COVERED * sum(weights.values()):
            return ()
        return tuple(sorted(word for word in words if word not in self._rows))
