from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import PrivateAttr

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from shared_engine import (
    InputTooLongError,
    InputTypeError,
    Options,
    PartialResultError,
    UnsupportedDimensionsError,
)
from shared_engine.catalogue import DEFAULT_MODEL
from tests.support.adapters import LANGCHAIN_CLONES, TEXTS, same
from tests.support.oracles import numpy_float64


@pytest.fixture
def model(text_model: NeMoRetrieverEmbeddings) -> NeMoRetrieverEmbeddings:
    return text_model


@pytest.fixture(scope="module")
def adapter() -> type[NeMoRetrieverEmbeddings]:
    return NeMoRetrieverEmbeddings


class _Suite:
    @pytest.fixture(autouse=True)
    def _folder(self, checkpoint: Path) -> None:
        self.folder = checkpoint

    @property
    def embeddings_class(self) -> type[NeMoRetrieverEmbeddings]:
        return NeMoRetrieverEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": str(self.folder), "device": "cpu"}


class TestUnitSuite(_Suite, EmbeddingsUnitTests):
    """LangChain's own."""


class TestIntegrationSuite(_Suite, EmbeddingsIntegrationTests):
    """LangChain's own."""


async def test_every_document_path_gives_the_oracles_vectors(
    model: NeMoRetrieverEmbeddings, documents: np.ndarray
) -> None:
    paths = {
        "batch": model.embed_documents(TEXTS),
        "one by one": [model.embed_documents([text])[0] for text in TEXTS],
        "async batch": await model.aembed_documents(TEXTS),
        "async one by one": [(await model.aembed_documents([text]))[0] for text in TEXTS],
        "embedder": model.embedder.embed(TEXTS, "document"),
    }
    for path, vectors in paths.items():
        same(vectors, documents, path)


async def test_every_query_path_gives_the_oracles_vectors(
    model: NeMoRetrieverEmbeddings, queries: np.ndarray
) -> None:
    paths = {
        "sync": [model.embed_query(text) for text in TEXTS],
        "async": [await model.aembed_query(text) for text in TEXTS],
        "embedder": model.embedder.embed(TEXTS, "query"),
    }
    for path, vectors in paths.items():
        same(vectors, queries, path)


async def test_vectors_are_lists_of_python_floats_of_unit_length(
    model: NeMoRetrieverEmbeddings,
) -> None:
    batch = model.embed_documents(TEXTS)
    vectors = [*batch, *await model.aembed_documents(TEXTS), model.embed_query("one")]
    assert type(batch) is list
    for vector in [*vectors, await model.aembed_query("one")]:
        assert type(vector) is list
        assert {type(value) for value in vector} == {float}
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


async def test_no_documents(model: NeMoRetrieverEmbeddings) -> None:
    assert model.embed_documents([]) == await model.aembed_documents([]) == []


async def test_concurrent_calls_on_one_loop(
    model: NeMoRetrieverEmbeddings, queries: np.ndarray, documents: np.ndarray
) -> None:
    """Each call its own number of texts, so that an answer to another call shows."""
    spans = [(i, j) for i in range(len(TEXTS)) for j in range(i + 1, len(TEXTS) + 1)]
    asked = [model.aembed_documents(TEXTS[i:j]) for i, j in spans]
    batches, single = await asyncio.gather(
        asyncio.gather(*asked), asyncio.gather(*map(model.aembed_query, TEXTS))
    )
    for (i, j), batch in zip(spans, batches, strict=True):
        same(batch, documents[i:j], f"texts {i} to {j}")
    same(single, queries)


def test_one_model_from_two_event_loops_and_none(
    model: NeMoRetrieverEmbeddings, documents: np.ndarray
) -> None:
    same(asyncio.run(model.aembed_documents(TEXTS)), documents)
    same(asyncio.run(model.aembed_documents(TEXTS)), documents)
    same(model.embed_documents(TEXTS), documents)


def test_threads_with_and_without_loops_of_their_own(
    model: NeMoRetrieverEmbeddings, queries: np.ndarray, documents: np.ndarray
) -> None:
    def by_loop(text: str) -> list[float]:
        return asyncio.run(model.aembed_query(text))

    def batch(i: int) -> list[list[float]]:
        return model.embed_documents(TEXTS[i:])

    with ThreadPoolExecutor(12) as pool:
        batches = pool.map(batch, range(len(TEXTS)))
        plain, looped = pool.map(model.embed_query, TEXTS), pool.map(by_loop, TEXTS)
        same(list(plain), queries)
        same(list(looped), queries)
        for i, vectors in enumerate(batches):
            same(vectors, documents[i:])


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("clone", LANGCHAIN_CLONES.values(), ids=LANGCHAIN_CLONES)
def test_clones_embed_alike(
    model: NeMoRetrieverEmbeddings,
    documents: np.ndarray,
    clone: Callable[[NeMoRetrieverEmbeddings], NeMoRetrieverEmbeddings],
    used: bool,
) -> None:
    model = model.model_copy(update={"dimensions": 32})
    if used:
        model.embed_query("one")
    cloned = clone(model)
    assert type(cloned) is NeMoRetrieverEmbeddings
    assert cloned.model_dump() == model.model_dump()
    cut = documents[:, :32]
    same(cloned.embed_documents(TEXTS), cut / np.linalg.norm(cut, axis=1, keepdims=True))


def test_equal_options_are_equal_models(model: NeMoRetrieverEmbeddings) -> None:
    other = NeMoRetrieverEmbeddings(**model.model_dump())
    assert model == other
    model.embed_query("one")
    assert model == other  # using one does not change what it is
    assert pickle.loads(pickle.dumps(model)) == model


def test_a_copy_with_other_dimensions(
    model: NeMoRetrieverEmbeddings, queries: np.ndarray, documents: np.ndarray
) -> None:
    model.embed_query("one")  # so that it has an embedder to leave behind
    short = model.model_copy(update={"dimensions": 16})
    for vectors, expected in (
        (short.embed_documents(TEXTS), documents),
        ([short.embed_query(text) for text in TEXTS], queries),
    ):
        cut = expected[:, :16]
        same(vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True))
    same(model.embed_documents(TEXTS), documents, "the original stays as it was")
    assert short.embedder is short.embedder
    with pytest.raises(UnsupportedDimensionsError, match="16, 32, 64"):
        model.model_copy(update={"dimensions": 17}).embed_query("one")


SECRETS = {"api_key", "default_headers", "proxy", "http_client_factory"}


def test_options_show_and_dump(checkpoint: Path) -> None:
    model = NeMoRetrieverEmbeddings(model=checkpoint, device="cpu", truncate="end")
    assert repr(model).startswith(f"NeMoRetrieverEmbeddings(model={str(checkpoint)!r}, ")
    assert model.model_dump(exclude_defaults=True) == {
        "model": str(checkpoint),
        "device": "cpu",
        "truncate": "END",
    }
    dumped = {name for name, field in Options.model_fields.items() if not field.exclude}
    assert model.model_dump().keys() == dumped
    assert Options.model_fields.keys() - dumped == SECRETS


async def test_errors_name_the_input(model: NeMoRetrieverEmbeddings) -> None:
    texts: list[Any] = ["one", "two", None]
    with pytest.raises(InputTypeError) as sync:
        model.embed_documents(texts)
    with pytest.raises(InputTypeError) as by_loop:
        await model.aembed_documents(texts)
    assert (sync.value.index, by_loop.value.index) == (2, 2)
    with pytest.raises(InputTypeError, match="wrap it in a list"):
        model.embed_documents("one")  # type: ignore[arg-type]
    small = model.model_copy(update={"max_tokens": 8})
    with pytest.raises(PartialResultError) as partial:
        small.embed_documents(["one", "word " * 20])
    assert {row: (type(error), error.index) for row, error in partial.value.errors.items()} == {
        1: (InputTooLongError, 1)
    }
    with pytest.raises(InputTooLongError, match=r"input 0 has .* limit is 8"):
        small.embed_query("word " * 20)


async def test_a_chain_over_chroma_and_the_store_opened_again(
    model: NeMoRetrieverEmbeddings, checkpoint: Path, tmp_path: Path
) -> None:
    import chromadb
    from langchain_chroma import Chroma

    texts = sorted(set(TEXTS) - {""})  # Chroma takes no empty ones
    questions = ["how many tokens?", "one", "a dog"]
    scores = numpy_float64(checkpoint, questions, "query: ") @ (
        numpy_float64(checkpoint, texts, "passage: ").T
    )
    ranking = [[texts[i] for i in row] for row in np.argsort(-scores)]

    async def check(store: Chroma) -> None:
        retriever = store.as_retriever(search_kwargs={"k": len(texts)})
        chain = retriever | RunnableLambda(lambda found: [each.page_content for each in found])
        assert [chain.invoke(question) for question in questions] == ranking
        assert chain.batch(questions) == await chain.abatch(questions) == ranking
        found = store.similarity_search_with_score(questions[0], k=len(texts))
        np.testing.assert_allclose(
            [1 - distance for _, distance in found], -np.sort(-scores[0]), rtol=0, atol=1e-5
        )

    for first in (True, False):
        client = chromadb.PersistentClient(str(tmp_path))
        store = Chroma(
            "texts",
            model,
            client=client,
            collection_configuration={"hnsw": {"space": "cosine"}},
        )
        if first:
            store.add_texts(texts[:3])
            await store.aadd_texts(texts[3:])
        await check(store)
        client.close()  # the next one reads the disk


class _Counting(NeMoRetrieverEmbeddings):
    _asked: list[str] = PrivateAttr(default_factory=list)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self._asked += texts
        return super().embed_documents(texts)


def test_indexing_again_embeds_only_what_is_new(model: NeMoRetrieverEmbeddings) -> None:
    counting = _Counting(**model.model_dump())
    store, records = InMemoryVectorStore(counting), InMemoryRecordManager("texts")
    records.create_schema()

    def run(*texts: str) -> list[str]:
        counting._asked.clear()
        documents = [Document(text, metadata={"source": text}) for text in texts]
        index(documents, records, store, cleanup="full", key_encoder="blake2b")
        return sorted(counting._asked)

    assert run("one", "two", "three") == ["one", "three", "two"]
    assert run("one", "two", "three") == []
    assert run("one", "four", "two") == ["four"]
    found = store.similarity_search("one", k=4)
    assert sorted(document.page_content for document in found) == ["four", "one", "two"]


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_dumps_and_loads_keep_the_options_and_not_the_key(monkeypatch):
    from langchain_core.load import dumps, loads

    given = {
        "model": DEFAULT_MODEL,  # passed, though it is the default
        "base_url": "https://nim.example",
        "api_key": "nvapi-secret",
        "default_headers": {"x-secret": "hidden"},
        "proxy": "http://user:hidden@proxy:3128",
        "dimensions": 1024,
        "truncate": "END",
    }
    text = dumps(NeMoRetrieverEmbeddings(**given))
    for secret in ("nvapi-secret", "hidden"):
        assert secret not in text
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-other")
    allowed = {"allowed_objects": [NeMoRetrieverEmbeddings], "secrets_from_env": True}
    loaded = loads(text, valid_namespaces=["langchain_nemoretriever"], **allowed)
    assert loaded.model_dump() == NeMoRetrieverEmbeddings(**given).model_dump()
    assert loaded.api_key.get_secret_value() == "nvapi-other"
    without_key = dumps(NeMoRetrieverEmbeddings(dimensions=384))
    monkeypatch.delenv("NVIDIA_API_KEY")
    loaded = loads(without_key, valid_namespaces=["langchain_nemoretriever"], **allowed)
    assert (loaded.dimensions, loaded.api_key, loaded.model) == (384, None, None)
