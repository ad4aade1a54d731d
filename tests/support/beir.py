"""Folders in BEIR's layout: small ones that a test makes up, and XQuAD's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_beir(
    folder: Path,
    corpus: Iterable[Mapping[str, Any]],
    queries: Iterable[Mapping[str, Any]],
    qrels: Iterable[tuple[str, str, int]],
    split: str = "test",
) -> Path:
    """Write a folder in BEIR's layout; return it."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = ["query-id\tcorpus-id\tscore\n"]
    lines += [f"{query}\t{document}\t{score}\n" for query, document, score in qrels]
    (folder / "qrels" / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def convert_xquad(source: Path, folder: Path) -> Path:
    """Write a language of XQuAD (`xquad.en.json`) in BEIR's layout; return the folder.

    The paragraphs are the documents, and each is the answer to its own questions.
    """
    articles = json.loads(source.read_text(encoding="utf-8"))["data"]
    entries = [entry for article in articles for entry in article["paragraphs"]]
    asked = [(row, qa["question"]) for row, entry in enumerate(entries) for qa in entry["qas"]]
    return write_beir(
        folder,
        [{"_id": f"p{row}", "text": entry["context"]} for row, entry in enumerate(entries)],
        [{"_id": f"q{n}", "text": question} for n, (_, question) in enumerate(asked)],
        [(f"q{n}", f"p{row}", 1) for n, (row, _) in enumerate(asked)],
    )
