"""A program with type hints: `make check` has mypy check it, and pytest runs it."""

from __future__ import annotations

import llamaindex_nemoretriever as llamaindex
from langchain_nemoretriever import NeMoRetrieverEmbeddings, NeMoRetrieverRerank
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Embedder, Options, Rows
from tests.support.nim import MODEL, Nim


def test_the_model_by_position_and_the_key_as_a_text() -> None:
    made = [
        Options("a/model", api_key="nvapi-1"),
        NeMoRetrieverEmbeddings("a/model", api_key="nvapi-1"),
        NeMoRetrieverEmbedding("a/model", api_key="nvapi-1"),
        NeMoRetrieverRerank("a/model", api_key="nvapi-1"),
        llamaindex.NeMoRetrieverRerank("a/model", api_key="nvapi-1"),
    ]
    assert {each.model for each in made} == {"a/model"}
    assert "nvapi-1" not in repr(made)


def count_vectors(rows: Rows) -> int:
    return len(rows) - len(rows.errors)


def test_items_of_a_stream() -> None:
    options = Options(MODEL, base_url="http://nim:8000", http_client_factory=Nim().client)
    with Embedder(options) as embedder:
        assert sum(map(count_vectors, embedder.stream(["a", "b"], errors="return"))) == 2
        assert [vectors.shape for vectors in embedder.stream(["a", "b"])] == [(2, 16)]
