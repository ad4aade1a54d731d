"""A search of text layers by their words, BM25, which needs no model."""

from __future__ import annotations

import threading
from typing import NamedTuple

import bm25s
import numpy as np
from pages.files import Files, Page
from pages.passages import choose_excerpt, drop_contents


class KeywordHits(NamedTuple):
    """What the words of a question find."""

    pages: list[Page]
    """Best first."""
    words: set[str]
    """The question's words but for the most frequent of English."""

    def excerpt(self, page: Page) -> str:
        """Return the lines of a page that have the most of the words."""
        return choose_excerpt(page.text, self.words)


class Keywords:
    """The words of all finished files; indexed anew after files came or went."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._indexed: list[str] | None = None
        self._pages: list[Page] = []
        self._bm25: bm25s.BM25 | None = None
        self._lock = threading.Lock()

    def search(self, question: str, top: int) -> KeywordHits:
        """Return the pages that share words with a question."""
        (asked,) = bm25s.tokenize([question], return_ids=False, show_progress=False)
        with self._lock:
            self._update()
            if self._bm25 is None or not asked:
                return KeywordHits([], set(asked))
            scores = self._bm25.get_scores(asked)
            order = np.argsort(-scores, kind="stable")[:top]
            found = [self._pages[row] for row in order if scores[row] > 0]
            return KeywordHits(found, set(asked))

    def _update(self) -> None:
        files = list(self._files)
        ids = [file.id for file in files]
        if ids == self._indexed:
            return
        pages = [page for file in files for page in file.pages.values()]
        texts = [drop_contents(page.text) for page in pages]
        tokens = bm25s.tokenize(texts, return_ids=False, show_progress=False)
        self._bm25 = None
        if any(tokens):
            self._bm25 = bm25s.BM25()
            self._bm25.index(tokens, show_progress=False)
        self._pages, self._indexed = pages, ids
