"""A folder in BEIR's layout: documents, queries, and which document answers which query.

    corpus.jsonl      {"_id": "d1", "title": "optional", "text": "...", "image": "pages/1.png"}
    queries.jsonl     {"_id": "q1", "text": "..."}
    qrels/test.tsv    query-id  corpus-id  score, under a line with these names

A document has a text, an image (a path from the folder), or both. Its title and text are embedded
as "title text", as BEIR's and MTEB's own models do it (`sep=" "`, `_corpus_to_dict`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from shared_engine.documents import EmbeddingInput, Role
from shared_engine.errors import ConfigurationError, InputError

Qrels = dict[str, dict[str, int]]
"""Scores by query and document; a document is relevant where its score is over 0."""


class Collection:
    """The rows of a JSON Lines file, read anew at every pass: of them only the ids are kept."""

    def __init__(self, path: Path, only: Container[str] | None = None) -> None:
        """Read the file once and check all of it; `only` are the ids to take, None is all.

        Raises:
            InputError: a line that is no row, an id that comes twice, or an image that is no file.
        """
        self.path = path
        self._only = only
        self.ids: list[str] = []
        self.has_texts = self.has_images = False
        digest = hashlib.sha256()
        seen: set[str] = set()
        for line, name, row in self._rows():
            if name in seen:
                raise InputError(f"{_place(path, line)}: the id {name!r} comes twice")
            seen.add(name)
            document = self._read(line, row)
            for part in (document.text, document.image):
                content = self._content(line, part)
                digest.update(b"%d:" % len(content) + content)
            self.has_texts |= bool(document.text)
            self.has_images |= document.image is not None
            self.ids.append(name)
        self.digest = digest.hexdigest()
        """Names what the texts and images are, in order; ids do not count."""

    def __len__(self) -> int:
        return len(self.ids)

    def documents(self, start: int = 0) -> Iterator[EmbeddingInput]:
        """Yield the documents from position `start` on."""
        for line, _, row in islice(self._rows(), start, None):
            yield self._read(line, row)

    def place(self, position: int) -> str:
        """Return file and line of the document at a position."""
        return _place(self.path, next(islice(self._rows(), position, None))[0])

    def _rows(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        for line, text in _lines(self.path):
            try:
                row = orjson.loads(text)
            except orjson.JSONDecodeError as exc:
                raise InputError(f"{_place(self.path, line)}: is no JSON: {exc}") from None
            name = row.get("_id") if isinstance(row, dict) else None
            if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
                raise InputError(f'{_place(self.path, line)}: expected {{"_id": "...", ...}}')
            if self._only is None or str(name) in self._only:
                yield line, str(name), row

    def _read(self, line: int, row: dict[str, Any]) -> EmbeddingInput:
        for key in ("title", "text", "image"):
            if not isinstance(row.get(key), (str, type(None))):
                raise InputError(f"{_place(self.path, line)}: {key!r} is no string")
        if row.get("text") is None and not row.get("image"):
            raise InputError(f"{_place(self.path, line)}: has neither 'text' nor 'image'")
        text = row.get("text") or ""
        if self.path.stem == "corpus":
            text = f"{row.get('title') or ''} {text}".strip()
        if image := row.get("image"):
            return EmbeddingInput(text or None, self.path.parent / image)
        return EmbeddingInput(text)

    def _content(self, line: int, part: str | Path | None) -> bytes:
        if isinstance(part, Path):
            try:
                return hashlib.sha256(part.read_bytes()).digest()
            except OSError as exc:
                raise InputError(
                    f"{_place(self.path, line)}: the image {part} cannot be read: {exc.strerror}"
                ) from None
        return (part or "").encode()


@dataclass(frozen=True)
class RetrievalData:
    """What is searched, what is asked, and what should be found."""

    folder: Path
    split: str
    corpus: Collection
    queries: Collection
    """Those with a relevant document in the split."""
    qrels: Qrels
    """Of these queries only."""
    unanswered: int
    """Queries of the split that no document is relevant to: they cannot be measured."""

    @property
    def by_role(self) -> dict[Role, Collection]:
        """Both collections, queries first."""
        return {"query": self.queries, "document": self.corpus}

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of the data."""
        return {
            "folder": self.folder.name,
            "split": self.split,
            "documents": len(self.corpus),
            "queries": len(self.queries),
            "queries_without_relevant_documents": self.unanswered,
            "corpus_sha256": self.corpus.digest,
            "queries_sha256": self.queries.digest,
        }


def read_folder(folder: Path, split: str | None = None) -> RetrievalData:
    """Read and check a folder; `split` names a file of `qrels`, by default "test" or the only one.

    Raises:
        ConfigurationError: a file is missing, or the split is not there.
        InputError: a line is at fault (the message says file and line), or nothing can be measured.
    """
    for name in ("corpus.jsonl", "queries.jsonl", "qrels"):
        if not (folder / name).exists():
            raise ConfigurationError(
                f"{folder / name} is missing; expected corpus.jsonl, queries.jsonl and qrels/*.tsv"
            )
    path = _find_split(folder, split)
    qrels: Qrels = {}
    for line, query, document, score in _judgements(path):
        judged = qrels.setdefault(query, {})
        if judged.setdefault(document, score) != score:
            raise InputError(f"{_place(path, line)}: {query!r}, {document!r} has another score too")
    queries = Collection(folder / "queries.jsonl", qrels)
    corpus = Collection(folder / "corpus.jsonl")
    if not len(corpus):
        raise InputError(f"{corpus.path} has no documents")
    known, asked = set(corpus.ids), set(queries.ids)
    for line, query, document, _ in _judgements(path):
        for name, ids, file in ((query, asked, queries), (document, known, corpus)):
            if name not in ids:
                raise InputError(f"{_place(path, line)}: {name!r} is not in {file.path.name}")
    relevant = {query: judged for query, judged in qrels.items() if max(judged.values()) > 0}
    if not relevant:
        raise InputError(f"{path} has no query with a relevant document")
    if len(relevant) < len(qrels):
        queries = Collection(folder / "queries.jsonl", relevant)
    return RetrievalData(folder, path.stem, corpus, queries, relevant, len(qrels) - len(relevant))


def _find_split(folder: Path, split: str | None) -> Path:
    paths = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
    wanted = split or ("test" if len(paths) != 1 else next(iter(paths)))
    if wanted not in paths:
        raise ConfigurationError(
            f"{folder / 'qrels'} has no {wanted}.tsv; there is {', '.join(paths) or 'none'}"
        )
    return paths[wanted]


def _judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    for line, text in _lines(path):
        try:
            query, document, score = text.decode().rstrip("\r\n").split("\t")
            if line == 1 and score == "score":
                continue
            yield line, query, document, int(score)
        except ValueError:
            raise InputError(
                f"{_place(path, line)}: expected query-id, corpus-id and a whole number, "
                "with tabs between"
            ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if not text.isspace():
                yield line, text


def _place(path: Path, line: int) -> str:
    return f"{path}, line {line}"
