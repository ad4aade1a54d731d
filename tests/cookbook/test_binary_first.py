"""What a search by bits finds of the nearest rows, on XQuAD's sentences with the stand-in.

    pytest tests/cookbook/test_binary_first.py --data=FOLDER

The ten nearest of 1,240 sentences by 576 values are compared with those of an exact search. Qdrant
Edge runs a server's engine in this process; its client's local mode ignores bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared_engine import Embedder, Options

pytestmark = [pytest.mark.slow, pytest.mark.data("xquad")]

K = 10
OVERSAMPLING = (1, 2, 5, 10, 20, 50)
EXPECTED = {1: 0.4, 10: 0.85}
"""What at least is found with so many candidates for each row that is asked for."""


@pytest.fixture(scope="module")
def vectors(standin: Path, data: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """All sentences, their vectors (n, 576), and those of 119 questions."""
    articles = json.loads((data / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    entries = [entry for article in articles for entry in article["paragraphs"]]
    sentences = [text for entry in entries for text in re.split(r"(?<=[.?!])\s+", entry["context"])]
    questions = [qa["question"] for entry in entries for qa in entry["qas"]][::10]
    embedder = Embedder(Options(model=str(standin), device="cpu", dtype="float32"))
    return sentences, embedder.embed(sentences), embedder.embed(questions, "query")


def recall(
    vectors: tuple[list[str], np.ndarray, np.ndarray], search: Callable[[np.ndarray], list[int]]
) -> float:
    """Return the part of the K nearest rows that a search finds."""
    _, sentences, questions = vectors
    nearest = np.argsort(-(questions @ sentences.T), axis=1)[:, :K]  # (q, K)
    found = [len({*search(q)} & {*row}) for q, row in zip(questions, nearest.tolist(), strict=True)]
    return float(np.mean(found)) / K


def check(
    name: str,
    oversampling: int,
    figure: float,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    record_property(f"{name}: recall@{K}, oversampling {oversampling}", round(figure, 3))
    with capsys.disabled():
        print(f"\n  {name}: recall@{K} {figure:.3f}, oversampling {oversampling}", end="")
    assert figure >= EXPECTED.get(oversampling, 0)


def test_pgvector(
    vectors: tuple[list[str], np.ndarray, np.ndarray],
    tmp_path: Path,
    postgres: Any,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("langchain_postgres")
    from cookbook.stores import into_pgvector

    texts, sentences, _ = vectors
    column = pa.FixedSizeListArray.from_arrays(pa.array(sentences.ravel()), sentences.shape[1])
    (tmp_path / "vectors").mkdir()
    table = pa.table({"id": range(len(texts)), "text": texts, "vector": column})
    pq.write_table(table, tmp_path / "vectors" / "part-0.parquet")
    into_pgvector.load(tmp_path, postgres, is_binary=True)
    postgres.execute("SET enable_seqscan = off")  # of so few rows PostgreSQL would compare all
    for oversampling in OVERSAMPLING:

        def search(vector: np.ndarray, candidates: int = K * oversampling) -> list[int]:
            found = into_pgvector.search(postgres, vector, K, candidates=candidates)
            return [row["id"] for _, row, _ in found]

        check("pgvector", oversampling, recall(vectors, search), record_property, capsys)


def test_qdrant(
    vectors: tuple[list[str], np.ndarray, np.ndarray],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    edge = pytest.importorskip("qdrant_edge", reason="needs pip install qdrant-edge-py")
    from cookbook.stores import into_qdrant

    _, sentences, _ = vectors
    bits = edge.BinaryQuantizationConfig(always_ram=True)
    params = edge.EdgeVectorParams(
        sentences.shape[1], edge.Distance.Cosine, on_disk=True, quantization_config=bits
    )
    shard = edge.EdgeShard.create(str(tmp_path), edge.EdgeConfig(params))
    points = [edge.Point(n, vector.tolist()) for n, vector in enumerate(sentences)]
    shard.update(edge.UpdateOperation.upsert_points(points))
    assert into_qdrant.RESCORE.quantization.oversampling in OVERSAMPLING
    for oversampling in OVERSAMPLING:
        quantization = edge.QuantizationSearchParams(rescore=True, oversampling=float(oversampling))
        asked = edge.SearchParams(quantization=quantization)

        def search(vector: np.ndarray, asked: Any = asked) -> list[int]:
            query = edge.Query.Nearest(vector.tolist())
            request = edge.QueryRequest(limit=K, query=query, params=asked)
            return [point.id for point in shard.query(request)]

        check("Qdrant", oversampling, recall(vectors, search), record_property, capsys)
    shard.close()
