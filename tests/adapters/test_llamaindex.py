from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding, mean_agg
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.embeddings import resolve_embed_model
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, MetadataMode, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.kvstore import SimpleKVStore
from pydantic import ValidationError

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import ConfigurationError, InputTypeError, Options, UnsupportedModalityError
from shared_engine.registry import _engines
from tests.support.adapters import LLAMAINDEX_CLONES, TEXTS, same
from tests.support.llamaindex import Callbacks, Recorder
from tests.support.oracles import numpy_float64


@pytest.fixture
def model(text_model: NeMoRetrieverEmbedding) -> NeMoRetrieverEmbedding:
    return text_model


@pytest.fixture(scope="module")
def adapter() -> type[NeMoRetrieverEmbedding]:
    return NeMoRetrieverEmbedding


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """LlamaIndex's instrumentation, which reports every call that its base class makes."""
    recorder, root = Recorder(), get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


async def test_every_text_path_gives_the_oracles_vectors(
    model: NeMoRetrieverEmbedding, documents: np.ndarray
) -> None:
    small = model.model_copy(update={"embed_batch_size": 3})
    several = small.model_copy(update={"num_workers": 2})
    nodes = [TextNode(text=text) for text in TEXTS]
    paths = {
        "one": [model.get_text_embedding(text) for text in TEXTS],
        "async one": [await model.aget_text_embedding(text) for text in TEXTS],
        "batch": model.get_text_embedding_batch(TEXTS),
        "async batch": await model.aget_text_embedding_batch(TEXTS),
        "batches of 3": small.get_text_embedding_batch(TEXTS),
        "async batches of 3": await small.aget_text_embedding_batch(TEXTS),
        "batches on 2 workers": await several.aget_text_embedding_batch(TEXTS),
        "nodes": [node.embedding for node in model(copy.deepcopy(nodes))],
        "async nodes": [node.embedding for node in await model.acall(copy.deepcopy(nodes))],
        "embedder": model.embedder.embed(TEXTS, "document"),
    }
    for path, vectors in paths.items():
        same(vectors, documents, path)


async def test_every_query_path_gives_the_oracles_vectors(
    model: NeMoRetrieverEmbedding, queries: np.ndarray
) -> None:
    def gathered(vectors: list[list[float]]) -> Any:
        return vectors

    paths = {
        "one": [model.get_query_embedding(text) for text in TEXTS],
        "async one": [await model.aget_query_embedding(text) for text in TEXTS],
        "gathered": await asyncio.gather(*map(model.aget_query_embedding, TEXTS)),
        "aggregated": model.get_agg_embedding_from_queries(TEXTS, gathered),
        "async aggregated": await model.aget_agg_embedding_from_queries(TEXTS, gathered),
        "embedder": model.embedder.embed(TEXTS, "query"),
    }
    for path, vectors in paths.items():
        same(vectors, queries, path)
    same([model.get_agg_embedding_from_queries(TEXTS)], np.array([mean_agg(queries.tolist())]))


async def test_vectors_are_lists_of_python_floats(model: NeMoRetrieverEmbedding) -> None:
    batch = model.get_text_embedding_batch(TEXTS)
    assert type(batch) is list
    for vector in [
        *batch,
        *await model.aget_text_embedding_batch(TEXTS),
        model.get_query_embedding("one"),
        await model.aget_query_embedding("one"),
    ]:
        assert type(vector) is list
        assert {type(value) for value in vector} == {float}
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


async def test_batches_of_none_one_and_more_than_the_largest_batch(
    model: NeMoRetrieverEmbedding, checkpoint: Path
) -> None:
    assert model.get_text_embedding_batch([]) == []
    assert await model.aget_text_embedding_batch([]) == []
    texts = [str(i * 7919 % 2051) for i in range(2051)]  # all different, of unsorted lengths
    rows = [0, 1, 63, 64, 1023, 1024, 2046, 2047, 2048, 2049, 2050]
    expected = numpy_float64(checkpoint, [texts[row] for row in rows], "passage: ")
    assert np.unique(expected.round(4), axis=0).shape == expected.shape
    sync = model.get_text_embedding_batch(texts)
    by_loop = await model.aget_text_embedding_batch(texts)
    assert len(sync) == len(by_loop) == len(texts)
    same([sync[row] for row in rows], expected)
    same(by_loop, np.array(sync))
    same(model.get_text_embedding_batch(texts[:1]), expected[:1])


async def test_a_cache_serves_texts_and_never_queries(
    model: NeMoRetrieverEmbedding, queries: np.ndarray, documents: np.ndarray
) -> None:
    cache = SimpleKVStore()
    cached = model.model_copy(update={"embeddings_cache": cache})
    same([cached.get_query_embedding("two")], queries[6:7])
    same([await cached.aget_query_embedding("two")], queries[6:7])
    assert not cache.get_all("embeddings"), "a query was put into the cache"
    same([cached.get_text_embedding("two")], documents[6:7])
    same(cached.get_text_embedding_batch(TEXTS), documents)
    same(await cached.aget_text_embedding_batch(TEXTS), documents)
    assert cache.get_all("embeddings").keys() == set(TEXTS)
    same([cached.get_query_embedding(text) for text in TEXTS], queries)
    same([await cached.aget_query_embedding(text) for text in TEXTS], queries)
    same([cached.get_agg_embedding_from_queries(["two"])], queries[6:7])

    forged = [0.5] * 4  # which only the cache can give
    cache.put("two", {"id": forged}, "embeddings")
    assert cached.get_text_embedding("two") == forged
    assert await cached.aget_text_embedding("two") == forged
    assert cached.get_text_embedding_batch(["one", "two"])[1] == forged
    assert (await cached.aget_text_embedding_batch(["one", "two"]))[1] == forged
    same([cached.get_query_embedding("two")], queries[6:7])
    same([await cached.aget_query_embedding("two")], queries[6:7])
    assert cached.embeddings_cache is cache


def test_a_query_beside_a_cache_needs_no_second_embedder(model: NeMoRetrieverEmbedding) -> None:
    cached = model.model_copy(update={"embeddings_cache": SimpleKVStore()})
    before = _leases(cached)
    for _ in range(3):
        cached.get_query_embedding("one")
    assert _leases(cached) - before <= 1


def _leases(model: NeMoRetrieverEmbedding) -> int:
    return sum(engine.leases for engine in _engines.values() if model.model in engine.key)


async def test_ingestion_into_chroma_embeds_what_is_new_or_changed(
    model: NeMoRetrieverEmbedding, checkpoint: Path, tmp_path: Path, recorder: Recorder
) -> None:
    import chromadb
    from llama_index.vector_stores.chroma import ChromaVectorStore

    notes = tmp_path / "docstore.json"

    def run(texts: dict[str, str]) -> None:
        """Do as a new process would: everything but the model is read from the disk."""
        client = chromadb.PersistentClient(str(tmp_path / "chroma"))
        collection = client.get_or_create_collection("texts", embedding_function=None)
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(), model],
            docstore=SimpleDocumentStore.from_persist_path(str(notes))
            if notes.exists()
            else SimpleDocumentStore(),
            docstore_strategy=DocstoreStrategy.UPSERTS,
            vector_store=ChromaVectorStore(chroma_collection=collection),
            disable_cache=True,
        )
        pipeline.run(documents=[Document(id_=id_, text=text) for id_, text in texts.items()])
        assert pipeline.docstore
        pipeline.docstore.persist(str(notes))
        client.close()

    texts = {"a": "one", "b": "two", "c": "a quick brown fox"}
    run(texts)
    assert recorder.embedded() == list(texts.values())
    run(texts)
    assert recorder.embedded() == []
    texts |= {"b": "twelve", "d": "four"}
    run(texts)
    assert sorted(recorder.embedded()) == ["four", "twelve"]

    client = chromadb.PersistentClient(str(tmp_path / "chroma"))
    collection = client.get_collection("texts", embedding_function=None)
    stored = collection.get(include=["embeddings", "documents"])
    assert sorted(stored["documents"]) == sorted(texts.values())
    same(stored["embeddings"], numpy_float64(checkpoint, stored["documents"], "passage: "))
    index = VectorStoreIndex.from_vector_store(
        ChromaVectorStore(chroma_collection=collection), embed_model=model
    )
    scores = numpy_float64(checkpoint, ["one"], "query: ") @ (
        numpy_float64(checkpoint, stored["documents"], "passage: ").T
    )
    ranking = [stored["documents"][i] for i in np.argsort(-scores[0])]
    retriever = index.as_retriever(similarity_top_k=4)
    assert [found.text for found in retriever.retrieve("one")] == ranking
    assert [found.text for found in await retriever.aretrieve("one")] == ranking
    client.close()


async def test_an_index_in_memory_ranks_as_the_oracle(
    model: NeMoRetrieverEmbedding, queries: np.ndarray, checkpoint: Path
) -> None:
    texts = sorted(set(TEXTS) - {""})
    nodes = [TextNode(text=text, metadata={"chapter": i}) for i, text in enumerate(texts)]
    embedded = [node.get_content(MetadataMode.EMBED) for node in nodes]
    scores = queries @ numpy_float64(checkpoint, embedded, "passage: ").T
    index = VectorStoreIndex(nodes, embed_model=model)
    again = VectorStoreIndex([], embed_model=model)
    await again.ainsert_nodes(nodes)
    for found_in in (index, again):
        retriever = found_in.as_retriever(similarity_top_k=len(texts))
        for text, row in zip(TEXTS, scores, strict=True):
            if text:
                for found in (retriever.retrieve(text), await retriever.aretrieve(text)):
                    check_ranking(found, texts, row)


def check_ranking(found: list[NodeWithScore], texts: list[str], scores: np.ndarray) -> None:
    order = np.argsort(-scores)
    assert [node.text for node in found] == [texts[i] for i in order]
    np.testing.assert_allclose([n.score for n in found], scores[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_cache", [False, True], ids=["no cache", "cache"])
async def test_callbacks_and_events_name_the_model_and_come_once(
    model: NeMoRetrieverEmbedding, recorder: Recorder, with_cache: bool
) -> None:
    callbacks = Callbacks()
    model.callback_manager = CallbackManager([callbacks])
    if with_cache:
        model.embeddings_cache = SimpleKVStore()
    calls: list[Callable[[], Any]] = [
        lambda: model.get_query_embedding("one"),
        lambda: model.aget_query_embedding("one"),
        lambda: model.get_text_embedding("one"),
        lambda: model.aget_text_embedding("one"),
        lambda: model.get_text_embedding_batch(["one"]),
        lambda: model.aget_text_embedding_batch(["one"]),
    ]
    payload = {
        "class_name": "NeMoRetrieverEmbedding",
        "model_name": model.model,
        "embed_batch_size": 2048,
    }
    assert model.to_payload() == payload

    def check(said: dict[str, Any]) -> None:
        if hasattr(BaseEmbedding, "to_payload"):
            assert said == payload
        else:  # before 0.14.23 LlamaIndex said everything
            assert payload.items() <= said.items()
            assert "api_key" not in said

    for call in calls:
        result = call()
        vectors = await result if asyncio.iscoroutine(result) else result
        start, end = callbacks.seen
        assert start[:2] == ("start", CBEventType.EMBEDDING)
        assert list(start[2]) == [EventPayload.SERIALIZED]
        check(start[2][EventPayload.SERIALIZED])
        assert end[:2] == ("end", CBEventType.EMBEDDING)
        assert end[2][EventPayload.CHUNKS] == ["one"]
        assert vectors in (end[2][EventPayload.EMBEDDINGS], end[2][EventPayload.EMBEDDINGS][0])
        callbacks.seen.clear()

        began, ended = recorder.events
        assert isinstance(began, EmbeddingStartEvent)
        assert isinstance(ended, EmbeddingEndEvent)
        check(began.model_dict)
        assert ended.chunks == ["one"]
        recorder.events.clear()


def test_model_and_model_name_are_one(checkpoint: Path) -> None:
    name = str(checkpoint)
    for model in (
        NeMoRetrieverEmbedding(model=name),
        NeMoRetrieverEmbedding(model=checkpoint),
        NeMoRetrieverEmbedding(model_name=name),
        NeMoRetrieverEmbedding(model=name, model_name=name),
    ):
        assert (model.model, model.model_name) == (name, name)
    default = NeMoRetrieverEmbedding()
    assert (default.model, default.model_name) == (None, "")
    with pytest.raises(ValidationError, match="one option"):
        NeMoRetrieverEmbedding(model=name, model_name="nvidia/llama-nemotron-embed-1b-v2")
    given = {"model_name": name}
    assert NeMoRetrieverEmbedding.model_validate(given).model == name
    assert given == {"model_name": name}, "the caller's dict was changed"
    for update in ({"model": name}, {"model_name": name}):
        copy = default.model_copy(update=update)
        assert (copy.model, copy.model_name, copy.embedder.options.model) == (name, name, name)
    with pytest.raises(ValueError, match="are one option"):
        default.model_copy(update={"model": name, "model_name": "another"})
    with pytest.raises(ConfigurationError, match="model= cannot change; copy the object"):
        default.model_name = name  # it would be shown and not used


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("clone", LLAMAINDEX_CLONES.values(), ids=LLAMAINDEX_CLONES)
def test_clones_embed_alike(
    model: NeMoRetrieverEmbedding,
    documents: np.ndarray,
    clone: Callable[[NeMoRetrieverEmbedding], NeMoRetrieverEmbedding],
    used: bool,
) -> None:
    model = model.model_copy(update={"dimensions": 32, "embed_batch_size": 2})
    if used:
        model.get_query_embedding("one")
    cloned = clone(model)
    assert type(cloned) is NeMoRetrieverEmbedding
    assert cloned.to_dict() == model.to_dict()
    cut = documents[:, :32]
    same(cloned.get_text_embedding_batch(TEXTS), cut / np.linalg.norm(cut, axis=1, keepdims=True))


def test_the_dictionary_names_the_class_and_is_json(model: NeMoRetrieverEmbedding) -> None:
    dumped = model.to_dict()
    assert dumped["class_name"] == NeMoRetrieverEmbedding.class_name() == "NeMoRetrieverEmbedding"
    assert dumped.keys() >= {
        name for name, field in Options.model_fields.items() if not field.exclude
    }
    assert "api_key" not in dumped
    assert json.loads(json.dumps(dumped)) == dumped


def test_settings_and_resolve_take_the_model(
    model: NeMoRetrieverEmbedding, documents: np.ndarray, queries: np.ndarray
) -> None:
    manager = CallbackManager([Callbacks()])
    assert resolve_embed_model(model, manager) is model
    assert model.callback_manager is manager
    before = Settings._embed_model  # the getter would make OpenAI's
    try:
        Settings.embed_model = model
        assert Settings.embed_model is model
        nodes = [TextNode(text=text) for text in TEXTS]
        (found,) = VectorStoreIndex(nodes).as_retriever(similarity_top_k=1).retrieve(TEXTS[0])
    finally:
        Settings._embed_model = before
    assert found.score == pytest.approx((queries[0] @ documents.T).max(), abs=1e-5)


@pytest.mark.parametrize("image", ["picture.png", BytesIO(b"\x89PNG")], ids=["path", "bytes"])
async def test_images_are_refused_by_a_text_model(
    model: NeMoRetrieverEmbedding, image: str | BytesIO
) -> None:
    with pytest.raises(UnsupportedModalityError, match="'image'"):
        model.get_image_embedding(image)
    with pytest.raises(UnsupportedModalityError):
        await model.aget_image_embedding(image)
    with pytest.raises(UnsupportedModalityError):
        model.get_image_embedding_batch([image, image])
    with pytest.raises(UnsupportedModalityError):
        await model.aget_image_embedding_batch([image, image])


async def test_errors_name_the_input(model: NeMoRetrieverEmbedding) -> None:
    texts: list[Any] = ["one", "two", None]
    with pytest.raises(InputTypeError) as sync:
        model.get_text_embedding_batch(texts)
    with pytest.raises(InputTypeError) as by_loop:
        await model.aget_text_embedding_batch(texts)
    assert (sync.value.index, by_loop.value.index) == (2, 2)


def test_both_frameworks_share_one_model_and_its_vectors(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "of its own"  # other tests' engines have another name
    folder.symlink_to(checkpoint)
    options: dict[str, Any] = {"model": str(folder), "device": "cpu", "dtype": "float32"}
    ours, theirs = NeMoRetrieverEmbedding(**options), NeMoRetrieverEmbeddings(**options)
    assert ours.get_text_embedding_batch(TEXTS) == theirs.embed_documents(TEXTS)
    assert ours.get_query_embedding("one") == theirs.embed_query("one")
    assert ours.embedder.options == theirs.embedder.options
    short = theirs.model_copy(update={"dimensions": 16})
    assert len(short.embed_query("one")) == 16
    assert len([key for key in _engines if str(folder) in key]) == 1
    assert _leases(ours) == 3
