"""What is asked, by words, by a picture or by a page, and the pages that answer it."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlencode

from langchain_classic.retrievers import EnsembleRetriever
from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableLambda
from pages.files import File, Files, Page
from pages.index import KINDS, Hit, Index
from pages.keywords import Keywords
from pages.passages import locate
from relevance import ELSEWHERE, MIN_LOGIT, find_bound, has_all_words

from shared_engine import EmbeddingInput, Reranker

TOP = 12
CANDIDATES = 40  # of each search, before the two are fused, and pages that a reranker scores
WEIGHT = 0.5  # of vectors beside BM25
KEPT_PICTURES = 32
_WORDS_NEED_TEXT = (
    "The model that runs is a stand-in whose eyes are untrained: in words it finds texts only, so "
    "the text layer is searched. NVIDIA's model searches the pictures in words, too."
)
_PICTURES_NEED_PICTURES = (
    "The model that runs is a stand-in whose eyes are untrained: by a picture it finds pictures "
    "only. NVIDIA's model finds texts by a picture, too."
)


@dataclass(frozen=True)
class Query:
    """What is asked, as it stands in the address: one of the first three, and where to look."""

    words: str = ""
    picture: str = ""
    """Id of one that was sent to search with."""
    like: str = ""
    """Id of a page."""
    kind: str = ""
    """One of KINDS; anything else is the best for what is asked."""

    @property
    def by(self) -> Literal["words", "picture", "like", ""]:
        """What is asked with."""
        if self.words:
            return "words"
        return "picture" if self.picture else "like" if self.like else ""

    def at(self, kind: str) -> str:
        """Return the address of the same question put to another kind."""
        by = self.by or "words"
        value = {"words": self.words, "picture": self.picture, "like": self.like, "": ""}[by]
        return "/?" + urlencode({"q" if by == "words" else by: value, "kind": kind})

    def back(self, marked: str = "") -> str:
        """Return what the address of a page has of this query, to lead back to the results.

        Args:
            marked: Where the passage is in the text layer of the page.
        """
        if not self.by:
            return ""
        more = f"&passage={marked}#passage" if marked else ""
        return self.at(self.kind).removeprefix("/") + more


class Picture(NamedTuple):
    """A picture to search with; it is forgotten when the app stops."""

    name: str
    vector: list[float]
    thumb: bytes
    """WebP."""


class Found(NamedTuple):
    """A page that answers."""

    file: File
    page: Page
    score: float | None
    """Cosine similarity; None where only its words were found."""
    passage: str
    before: int
    """Its rank in the search, before a reranker."""

    @property
    def marked(self) -> str:
        """Where the passage is in the text layer, as an address has it."""
        span = locate(self.page.text, self.passage)
        return "{}-{}".format(*span) if span else ""


class Results(NamedTuple):
    """What is shown for a query."""

    found: list[Found]
    kind: str
    """What was searched."""
    kinds: tuple[str, ...]
    """What can be searched so."""
    notices: tuple[str, ...] = ()
    """Why something was not searched."""
    is_answered: bool = True
    """Whether a page answers what was asked in words; else they are the nearest ones."""
    reranked: int = 0
    """How many pages the reranker scored; 0 without one."""


class Search:
    """Searches the pages of finished files."""

    def __init__(
        self,
        files: Files,
        index: Index,
        *,
        is_trained: bool,
        reranker: Reranker | None = None,
        min_score: float | None = None,
    ) -> None:
        self._files = files
        self._index = index
        self._is_trained = is_trained
        self._reranker = reranker
        self._min_score = min_score
        self._keywords = Keywords(files)
        self._pictures: OrderedDict[str, Picture] = OrderedDict()

    def keep_picture(self, name: str, path: Path, thumb: bytes) -> str:
        """Embed a picture to search with and return its id."""
        id_ = secrets.token_urlsafe(12)
        self._pictures[id_] = Picture(name, self._index.embed_picture(path), thumb)
        while len(self._pictures) > KEPT_PICTURES:
            self._pictures.popitem(last=False)
        return id_

    def get_picture(self, id_: str) -> Picture | None:
        """Return a picture that was kept."""
        return self._pictures.get(id_)

    def get_page(self, id_: str) -> tuple[File, Page] | None:
        """Return a page and its file by the page's id."""
        file = self._files.get(id_.partition("-")[0])
        pages = file.pages.values() if file else ()
        return next(((file, page) for page in pages if file and page.id == id_), None)

    def find(self, query: Query) -> Results | None:
        """Return what a query finds; None where nothing is asked."""
        if not query.by:
            return None
        kinds, best, notice = self._choose(query.by)
        kind = query.kind if query.kind in kinds else best
        vector = self._embed(query, kind)
        if isinstance(vector, str):
            return Results([], kind, kinds, (vector,))
        found = self._list(self._index.search(vector, kind, CANDIDATES), query)
        nearest = found[0].score if found else None
        notices = (notice,) if notice else ()
        if query.words and kind != "picture":
            found = self._add_keywords(query.words, found)
        if not query.words or not found:
            return Results(found[:TOP], kind, kinds, notices)
        if not self._reranker:
            best = found[:TOP]
            is_answered = self._is_near(nearest, kind) or has_all_words(
                query.words, (each.page.text for each in best if kind != "picture")
            )
            return Results(best, kind, kinds, notices, is_answered)
        found = found[:CANDIDATES]
        documents = [_document(each.page, kind, self._reranker) for each in found]
        ranking = self._reranker.rank(query.words, documents, TOP)
        lowest = MIN_LOGIT if self._min_score is None else self._min_score
        best = [found[index] for index, _ in ranking]
        return Results(best, kind, kinds, notices, ranking[0][1] >= lowest, len(found))

    def _is_near(self, score: float | None, kind: str) -> bool:
        """Tell whether the page with this cosine answers what was asked in words."""
        if score is None:
            return False
        lowest = self._min_score
        if lowest is None:
            lowest = find_bound(self._index.measure(self._elsewhere, kind))
        return score >= lowest

    @cached_property
    def _elsewhere(self) -> list[list[float]]:
        return [self._index.embed_words(question) for question in ELSEWHERE]

    def _list(self, hits: Sequence[Hit], query: Query) -> list[Found]:
        """Return the pages of hits but for the one that was started from."""
        return [
            Found(*both, hit.score, hit.passage, rank)
            for rank, hit in enumerate(hits, 1)
            if (id_ := f"{hit.file}-{hit.number}") != query.like and (both := self.get_page(id_))
        ]

    def _add_keywords(self, words: str, found: list[Found]) -> list[Found]:
        """Return what vectors and BM25 find, by reciprocal ranks."""
        hits = self._keywords.search(words, CANDIDATES)
        known = {each.page.id: each for each in found}
        for page in hits.pages:
            file = self._files.get(page.file)
            if file and page.id not in known:
                known[page.id] = Found(file, page, None, hits.excerpt(page), 0)
        ensemble = EnsembleRetriever(
            retrievers=[_give(each.page for each in found), _give(hits.pages)],
            weights=[WEIGHT, 1 - WEIGHT],
        )
        fused = [known.get(each.page_content) for each in ensemble.invoke(words)]
        ordered = [each for each in fused if each]  # without pages of a file deleted meanwhile
        return [each._replace(before=rank) for rank, each in enumerate(ordered, 1)]

    def _choose(self, by: str) -> tuple[tuple[str, ...], str, str]:
        """Return what can be searched, the best of it, and why not the rest."""
        if by == "words":
            trained = (KINDS, "both", "")
            return trained if self._is_trained else (("text",), "text", _WORDS_NEED_TEXT)
        if by == "picture" and not self._is_trained:
            return ("picture", "both"), "picture", _PICTURES_NEED_PICTURES
        return KINDS, "picture", ""

    def _embed(self, query: Query, kind: str) -> list[float] | str:
        """Return the vector of a query, or why it has none."""
        if query.by == "words":
            return self._index.embed_words(query.words)
        if query.by == "picture":
            picture = self.get_picture(query.picture)
            return (
                picture.vector
                if picture
                else ("The picture that you searched with is no longer kept. Send it again.")
            )
        both = self.get_page(query.like)
        if not both:
            return "The page that you started from has been deleted."
        return self._index.read_vector(both[1], kind) or (
            "The page that you started from has no text layer. Look for its picture."
        )


def _give(pages: Iterable[Page]) -> Runnable[str, list[Document]]:
    """Return a retriever of pages that were found, as documents of their ids."""
    found = [Document(page.id) for page in pages]
    return RunnableLambda(lambda _: found)


def _document(page: Page, kind: str, reranker: Reranker) -> EmbeddingInput:
    """Return a page as a reranker reads it: what was searched, or the text without images."""
    if "image" not in reranker.modalities:
        return EmbeddingInput(page.text)
    text = None if kind == "picture" else page.text
    return EmbeddingInput(text, None if kind == "text" else page.picture)
