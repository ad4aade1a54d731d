"""Copies of a model that was created without a name: they use the server's only model, too."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode

import llamaindex_nemoretriever as llamaindex
from langchain_nemoretriever import NeMoRetrieverEmbeddings, NeMoRetrieverRerank
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Embedder, ModelNotFoundError, Options, Reranker, RerankOptions
from shared_engine.catalogue import DEFAULT_MODEL, DEFAULT_MODELS
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import vectors

SERVED = [{"id": "team/embedder"}]
KINDS = [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding]
RERANKERS = [RerankOptions, NeMoRetrieverRerank, llamaindex.NeMoRetrieverRerank]
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "deepcopy": copy.deepcopy,
    "model_copy": lambda made: made.model_copy(update={"truncate": "END"}),
    "model_dump": lambda made: type(made)(**_without_class(made.model_dump())),
    "json": lambda made: type(made)(**_without_class(json.loads(made.model_dump_json()))),
    "fields": lambda made: type(made)(**{name: getattr(made, name) for name in _names(made)}),
}


def _without_class(dumped: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in dumped.items() if name != "class_name"}


def _names(made: Any) -> list[str]:
    return [name for name in type(made).model_fields if name != "callback_manager"]


def embed(made: Any) -> Any:
    embedder = made.embedder if isinstance(made, KINDS[1] | KINDS[2]) else Embedder(made)
    return embedder.embed(["a", "b"])


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_uses_the_only_model_of_a_server(kind: Any, copied: Callable[[Any], Any]) -> None:
    with FaultyNim(models=SERVED) as nim:
        made = kind(base_url=nim.url)
        np.testing.assert_allclose(embed(copied(made)), vectors(["a", "b"]), atol=1e-6)
        embed(made)
        np.testing.assert_allclose(embed(copied(made)), vectors(["a", "b"]), atol=1e-6)
        assert {one.body["model"] for one in nim.embedded} == {"team/embedder"}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_model_with_a_name_keeps_it(kind: Any, copied: Callable[[Any], Any]) -> None:
    with FaultyNim(models=SERVED) as nim:
        made = copied(kind(base_url=nim.url, model=DEFAULT_MODEL))
        with pytest.raises(ModelNotFoundError, match=f"team/embedder, not {DEFAULT_MODEL}"):
            embed(made)


def rank(body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """Reply with the length of each passage as its score."""
    scores = [{"index": i, "logit": len(each["text"])} for i, each in enumerate(body["passages"])]
    return 200, {}, json.dumps({"rankings": scores}).encode()


def score(made: Any) -> Any:
    reranker = Reranker(made) if type(made) is RerankOptions else made.reranker
    return reranker.score("a", ["b", "cc"]).tolist()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", RERANKERS)
def test_a_copy_of_a_reranker_uses_the_only_model_of_a_server(
    kind: Any, copied: Callable[[Any], Any]
) -> None:
    with FaultyNim(models=SERVED, answer=rank) as nim:
        made = kind(base_url=nim.url)
        assert score(copied(made)) == score(made) == score(copied(made)) == [1, 2]
        assert {one.body["model"] for one in nim.seen if one.body} == {"team/embedder"}
        made = copied(kind(base_url=nim.url, model=DEFAULT_MODELS["rerank"]))
        with pytest.raises(ModelNotFoundError, match=f"not {DEFAULT_MODELS['rerank']}"):
            score(made)


def test_llamaindexs_own_copies_use_the_only_model_of_a_server() -> None:
    with FaultyNim(models=SERVED) as nim:
        made = NeMoRetrieverEmbedding(base_url=nim.url)
        for copied in (
            NeMoRetrieverEmbedding.from_dict(made.to_dict()),
            NeMoRetrieverEmbedding.from_json(made.to_json()),
        ):
            assert copied.get_query_embedding("a") == made.get_query_embedding("a")
    with FaultyNim(models=SERVED, answer=rank) as nim:
        reranker = llamaindex.NeMoRetrieverRerank(base_url=nim.url)
        for again in (
            llamaindex.NeMoRetrieverRerank.from_dict(reranker.to_dict()),
            llamaindex.NeMoRetrieverRerank.from_json(reranker.to_json()),
        ):
            assert score(again) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
def test_workers_of_an_ingestion_use_the_only_model_of_a_server(is_async: bool) -> None:
    texts = ["a", "b", "c", "d"]
    nodes = [TextNode(text=text) for text in texts]
    with FaultyNim(models=SERVED) as nim:
        pipeline = IngestionPipeline(transformations=[NeMoRetrieverEmbedding(base_url=nim.url)])
        if is_async:
            done = asyncio.run(pipeline.arun(nodes=nodes, num_workers=2))
        else:
            done = pipeline.run(nodes=nodes, num_workers=2)
    found = {node.get_content(): node.embedding for node in done}
    np.testing.assert_allclose([found[text] for text in texts], vectors(texts), atol=1e-6)


def test_events_name_the_model_that_is_used(checkpoint: Any) -> None:
    assert NeMoRetrieverEmbedding().to_payload()["model_name"] == DEFAULT_MODEL
    assert NeMoRetrieverEmbedding(model=checkpoint).to_payload()["model_name"] == str(checkpoint)
    with FaultyNim(models=SERVED) as nim:
        made = NeMoRetrieverEmbedding(base_url=nim.url)
        assert made.to_payload()["model_name"] == "unknown"
        assert nim.seen == []
        made.get_query_embedding("a")
        assert made.to_payload()["model_name"] == made.embedder.model == "team/embedder"
