"""Read a retrieval data set: a folder in BEIR's layout.

    corpus.jsonl      {"_id": "d1", "title": "optional", "text": "...", "image": "pages/1.png"}
    queries.jsonl     {"_id": "q1", "text": "..."}
    qrels/test.tsv    query-id  corpus-id  score

A document has a text, an image (a path relative to the folder), or both. Judgements have these
three columns or TREC's four (query, iteration, document, score), with or without a header.

Data that BEIR and MTEB accept is scored as they score it, and counted in `RetrievalData.counts`: a
judged document that is not in the corpus is relevant and never found, a query without a relevant
document scores 0, a judgement of an unknown query is ignored, and the last of repeated rows counts.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_engine.documents import EmbeddingInput, Role, join_title
from shared_engine.errors import ConfigurationError, InputError

Qrels = dict[str, dict[str, int]]
"""Scores by query and document; a document is relevant if its score is greater than 0."""
_MAX_SCORE = 1_000_000
"""Of either sign; trec_eval's sums overflow with larger ones."""


@dataclass(frozen=True)
class Collection:
    """The documents or the queries of a data set."""

    path: Path
    inputs: dict[str, EmbeddingInput]
    """By id, in the order of the file."""
    repeated: int
    """Rows that were replaced by a later one with the same id."""
    digest: str
    """Identifies ids, texts and images, in order."""

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def ids(self) -> list[str]:
        """The ids, in the order of the file."""
        return list(self.inputs)

    @property
    def texts(self) -> Iterator[str]:
        """The texts, in the order of the file; "" for an image alone."""
        return (document.text or "" for document in self.inputs.values())

    @property
    def has_images(self) -> bool:
        """Whether any document has an image."""
        return any(document.image is not None for document in self.inputs.values())


@dataclass(frozen=True)
class RetrievalData:
    """A corpus, the queries of one split, and their judgements."""

    folder: Path
    split: str
    corpus: Collection
    queries: Collection
    qrels: Qrels
    counts: dict[str, int]
    """How many of each irregularity the data has; only those that occur."""

    @property
    def by_role(self) -> dict[Role, Collection]:
        """Both collections, queries first."""
        return {"query": self.queries, "document": self.corpus}

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for a report: sizes, digests and irregularities."""
        return {
            "folder": self.folder.name,
            "split": self.split,
            "documents": len(self.corpus),
            "queries": len(self.queries),
            "irregularities": self.counts,
            "corpus_sha256": self.corpus.digest,
            "queries_sha256": self.queries.digest,
        }


def read_folder(folder: Path, split: str | None = None) -> RetrievalData:
    """Read and check a folder.

    Args:
        folder: The data set.
        split: A file of `qrels`; by default "test", or the only one.

    Raises:
        ConfigurationError: a file or the split is missing.
        InputError: a line is invalid (the message has file and line), or nothing can be measured.
    """
    for name in ("corpus.jsonl", "queries.jsonl", "qrels"):
        if not (folder / name).exists():
            raise ConfigurationError(
                f"{folder / name} is missing; expected corpus.jsonl, queries.jsonl and qrels/*.tsv"
            )
    path = find_split(folder, split)
    judged: Qrels = {}
    changed = 0
    for query, document, score in _read_qrels(path):
        scores = judged.setdefault(query, {})
        changed += scores.get(document, score) != score
        scores[document] = score
    queries = _read_collection(folder / "queries.jsonl", judged)
    corpus = _read_collection(folder / "corpus.jsonl")
    qrels = {query: judged[query] for query in queries.ids}
    relevant = {query: {d for d, s in scores.items() if s > 0} for query, scores in qrels.items()}
    if not corpus.inputs:
        raise InputError(f"{corpus.path} has no documents")
    if not any(relevant.values()):
        raise InputError(f"{path}: no query of queries.jsonl has a relevant document")
    is_blank = (document == EmbeddingInput("") for document in corpus.inputs.values())
    counts = {
        "relevant documents not in the corpus (never found)": sum(
            len(documents - corpus.inputs.keys()) for documents in relevant.values()
        ),
        "queries without a relevant document (scored 0)": list(relevant.values()).count(set()),
        "judged queries not in queries.jsonl (ignored)": len(judged) - len(qrels),
        "judgements that change an earlier one (the last counts)": changed,
        "rows with the id of an earlier one (the last counts)": corpus.repeated + queries.repeated,
        "documents without text or image (embedded as blank texts)": sum(is_blank),
    }
    counts = {name: count for name, count in counts.items() if count}
    return RetrievalData(folder, path.stem, corpus, queries, qrels, counts)


def find_split(folder: Path, split: str | None = None) -> Path:
    """Return the file of a split; by default "test", or the only one."""
    paths = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
    name = split or ("test" if len(paths) != 1 else next(iter(paths)))
    if name not in paths:
        raise ConfigurationError(
            f"{folder / 'qrels'} has no {name}.tsv; it has {', '.join(paths) or 'no *.tsv'}"
        )
    return paths[name]


def _read_collection(path: Path, only: Container[str] | None = None) -> Collection:
    """Read the rows with these ids; None reads all."""
    inputs: dict[str, EmbeddingInput] = {}
    repeated = 0
    digest = hashlib.sha256()
    for line, content in _read_lines(path):
        try:
            name, document = _parse_row(content, path)
            if only is not None and name not in only:
                continue
            image = b"" if document.image is None else document.image.read_bytes()
        except (ValueError, RecursionError) as exc:
            raise InputError(f"{path}, line {line}: {exc}") from None
        except OSError as exc:
            reason = f"cannot read {document.image}: {exc.strerror}"
            raise InputError(f"{path}, line {line}: {reason}") from None
        for part in (name, document.text or ""):
            digest.update(hashlib.sha256(part.encode(errors="surrogatepass")).digest())
        digest.update(hashlib.sha256(image).digest())
        repeated += inputs.pop(name, None) is not None
        inputs[name] = document
    return Collection(path, inputs, repeated, digest.hexdigest())


def _parse_row(content: bytes, path: Path) -> tuple[str, EmbeddingInput]:
    """Return id and document of a row, or raise a ValueError with the reason."""
    row = json.loads(content)  # as BEIR: unlike orjson it reads NaN in other fields
    name = row.get("_id", row.get("id")) if isinstance(row, dict) else None
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise ValueError('expected {"_id": "...", "text": "..."}')
    for key in ("title", "text", "image"):
        if not isinstance(row.get(key), (str, type(None))):
            raise ValueError(f"{key!r} is not a string")
    text, image = row.get("text") or "", row.get("image")
    if path.stem == "corpus":
        text = join_title(row.get("title"), text)
    return str(name), EmbeddingInput(text, path.parent / image if image else None)


def _read_qrels(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield query, document and score of each judgement."""
    columns: list[int] | None = None
    for line, content in _read_lines(path):
        try:
            text = content.decode("utf-8-sig").rstrip("\r\n")
            rows = csv.reader([text], delimiter="\t", strict=True)
            cells = next(rows) if "\t" in text else text.split()
            if columns is None:
                columns, width = _find_columns(cells), len(cells)
                if cells[-1][:1].isalpha():  # a header
                    continue
            query, document, score = (cells[column] for column in columns)
            value = float(score)
            if len(cells) != width or not (value.is_integer() and abs(value) <= _MAX_SCORE):
                raise ValueError
        except (ValueError, LookupError, csv.Error):
            raise InputError(
                f"{path}, line {line}: expected query-id, corpus-id and an integer score up to "
                f"{_MAX_SCORE:,}, separated by tabs, or TREC's four columns; "
                f"not {content[:80]!r}"
            ) from None
        yield query, document, int(value)


def _find_columns(cells: list[str]) -> list[int]:
    """Return the positions of query, document and score, given the first line."""
    names = ["query-id", "corpus-id", "score"]
    if set(names) <= set(cells):
        return [cells.index(name) for name in names]
    return {3: [0, 1, 2], 4: [0, 2, 3]}[len(cells)]


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each line that is not blank."""
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            if not content.isspace():
                yield line, content
