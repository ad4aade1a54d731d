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

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Embedder, ModelNotFoundError, Options
from shared_engine.catalogue import DEFAULT_MODEL
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import vectors

SERVED = [{"id": "team/embedder"}]
KINDS = [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding]
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


def test_llamaindexs_own_copies_use_the_only_model_of_a_server() -> None:
    with FaultyNim(models=SERVED) as nim:
        made = NeMoRetrieverEmbedding(base_url=nim.url)
        for copied in (
            NeMoRetrieverEmbedding.from_dict(made.to_dict()),
            NeMoRetrieverEmbedding.from_json(made.to_json()),
        ):
            assert copied.get_query_embedding("a") == made.get_query_embedding("a")


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
