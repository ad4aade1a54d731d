"""Reranking through LangChain: scores against an independent model, alone and in retrievers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from PIL import Image
from pydantic import ValidationError

from langchain_nemoretriever import NeMoRetrieverEmbeddings, NeMoRetrieverRerank
from shared_engine import (
    ImageError,
    InputTooLongError,
    InputTypeError,
    PartialResultError,
    UnsupportedModalityError,
)
from shared_engine.local.backend import LocalBackend
from tests.support.adapters import (
    BASE64,
    CAPTIONS,
    LANGCHAIN_CLONES,
    PNGS,
    QUESTION,
    URLS,
    called,
    check_that_the_loop_goes_on,
    same,
)
from tests.support.adapters import TEXTS as REPEATING
from tests.support.rerankers import score_float64, score_pages

classic = pytest.importorskip("langchain_classic.retrievers")

TEXTS = list(dict.fromkeys(REPEATING))  # equal texts have no order that an oracle knows
Make = Callable[..., NeMoRetrieverRerank]


@pytest.fixture(scope="module")
def adapter() -> type[NeMoRetrieverRerank]:
    return NeMoRetrieverRerank


@pytest.fixture
def scores(reranker: Path) -> np.ndarray:
    """The scores of `TEXTS` for `QUESTION`."""
    return score_float64(reranker, QUESTION, TEXTS)


def list_documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [Document(text, id=str(i), metadata={"row": i}) for i, text in enumerate(texts)]


def check(found: Sequence[Document], documents: list[Document], scores: np.ndarray) -> None:
    """Check that documents are the best of all, in order, with their scores."""
    order = np.argsort(-scores)[: len(found)]
    assert (np.diff(np.sort(scores)) > 1e-5).all(), "the order is by chance"
    assert [each.id for each in found] == [documents[i].id for i in order]
    assert [each.page_content for each in found] == [documents[i].page_content for i in order]
    same([each.metadata["relevance_score"] for each in found], scores[order])
    assert {type(each.metadata["relevance_score"]) for each in found} <= {float}


async def compress_both(
    model: NeMoRetrieverRerank, documents: Sequence[Document], query: str = QUESTION
) -> list[Document]:
    """Return the result of both methods, which agree."""
    found = model.compress_documents(documents, query)
    again = await model.acompress_documents(documents, query)
    assert [each.id for each in found] == [each.id for each in again]
    same(*([each.metadata["relevance_score"] for each in result] for result in (found, again)))
    assert type(found) is type(again) is list
    return found


# --- order and scores ----------------------------------------------------------------------------


async def test_documents_come_by_descending_score_as_copies(
    make: Make, reranker: Path, scores: np.ndarray
) -> None:
    documents = list_documents()
    before = copy.deepcopy(documents)
    found = await compress_both(make(reranker, top_n=None), documents)
    check(found, documents, scores)
    assert len(found) == len(documents)
    assert documents == before
    assert all(each.metadata.keys() == {"row", "relevance_score"} for each in found)
    again = await compress_both(make(reranker), tuple(found))  # over an earlier score
    check(again, documents, scores)


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (3, 3), (7, 7), (100, 7), (None, 7), (0, 0)])
async def test_top_n(
    make: Make, reranker: Path, scores: np.ndarray, top_n: int | None, count: int
) -> None:
    documents, model = list_documents(), make(reranker)
    assert len(await compress_both(model, documents)) == model.top_n == 5
    engine = model.reranker
    model.top_n = top_n
    found = await compress_both(model, documents)
    check(found, documents, scores)
    assert len(found) == count
    assert model.reranker is engine
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        model.top_n = -1
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        make(reranker, top_n=-1)


async def test_a_threshold_of_scores_or_of_probabilities(
    make: Make, reranker: Path, scores: np.ndarray
) -> None:
    middle = float(np.sort(scores)[3:5].mean())
    above = int((scores > middle).sum())
    assert 0 < above < len(scores)
    documents = list_documents()
    found = await compress_both(make(reranker, top_n=None, score_threshold=middle), documents)
    check(found, documents, scores)
    assert len(found) == above
    few = await compress_both(make(reranker, top_n=2, score_threshold=middle), documents)
    assert [each.id for each in few] == [each.id for each in found[:2]]
    assert await compress_both(make(reranker, score_threshold=1e6), documents) == []
    probable = make(
        reranker, top_n=None, activation="sigmoid", score_threshold=1 / (1 + np.exp(-middle))
    )
    found = await compress_both(probable, documents)
    check(found, documents, 1 / (1 + np.exp(-scores)))
    assert len(found) == above


async def test_no_documents_load_nothing(make: Make) -> None:
    missing = make(Path("/no/such/folder"))
    assert await compress_both(missing, []) == []
    assert missing.score([]) == []
    assert await compress_both(make(Path("/no/such/folder"), top_n=0), list_documents()) == []


async def test_a_score_does_not_depend_on_other_documents(make: Make, reranker: Path) -> None:
    model, documents = make(reranker, top_n=None), list_documents()
    together = {each.id: each for each in await compress_both(model, documents)}
    for document in documents:
        (alone,) = await compress_both(model, [document])
        same(alone.metadata["relevance_score"], together[document.id].metadata["relevance_score"])


async def test_concurrent_calls_on_one_loop(make: Make, reranker: Path) -> None:
    model, documents = make(reranker, top_n=None), list_documents()
    queries = [f"question {i}?" for i in range(12)]
    results = await asyncio.gather(
        *(model.acompress_documents(documents[i % 7 :], query) for i, query in enumerate(queries))
    )
    for i, (query, found) in enumerate(zip(queries, results, strict=True)):
        part = documents[i % 7 :]
        check(found, part, score_float64(reranker, query, TEXTS[i % 7 :]))
        assert len(found) == len(part)


async def test_errors_name_the_document_and_keep_the_other_scores(
    make: Make, reranker: Path
) -> None:
    documents = list_documents(["one", "word " * 80, "two"])
    model = make(reranker, max_tokens=60)
    with pytest.raises(PartialResultError, match=r"1 of 3 inputs failed.*input 1") as failed:
        model.compress_documents(documents, QUESTION)
    with pytest.raises(PartialResultError) as by_loop:
        await model.acompress_documents(documents, QUESTION)
    for error in (failed.value, by_loop.value):
        assert {row: type(each) for row, each in error.errors.items()} == {1: InputTooLongError}
        same(error.scores[[0, 2]], score_float64(reranker, QUESTION, ["one", "two"]))
    cut = make(reranker, max_tokens=60, truncate="END")
    assert len(await compress_both(cut, documents)) == 3
    for wrong in ("", None):
        with pytest.raises(InputTypeError, match="expected a query") as no_query:
            model.compress_documents(documents, wrong)  # type: ignore[arg-type]
        assert no_query.value.index is None


# --- pairs ---------------------------------------------------------------------------------------


def test_pairs_of_several_queries_keep_their_order(make: Make, reranker: Path) -> None:
    queries = ["how much was sold?", "one?", "tokens"]
    pairs = [(queries[i * 7 % 3], text) for i, text in enumerate(TEXTS * 2)]
    expected = [score_float64(reranker, query, [text])[0] for query, text in pairs]
    model = make(reranker)
    found = model.score(pairs)
    same(found, expected)
    assert {type(score) for score in found} == {float}
    same(model.score(pairs[:1]), expected[:1])


def test_errors_name_the_pair(make: Make, reranker: Path) -> None:
    model = make(reranker, max_tokens=60)
    good = [("one?", "one"), ("two?", "two")]
    with pytest.raises(PartialResultError, match=r"1 of 3 inputs failed.*input 2") as failed:
        model.score([*good, ("one?", "word " * 80)])
    assert {row: error.index for row, error in failed.value.errors.items()} == {2: 2}  # type: ignore[attr-defined]
    expected = [score_float64(reranker, query, [text])[0] for query, text in good]
    same(failed.value.scores[:2], expected)
    with pytest.raises(InputTooLongError, match="the query has") as long:
        model.score([*good, ("word " * 80, "three")])
    assert long.value.index == 2
    wrong: list[Any] = [("one?", None), ("", "one"), (3, "one")]
    for pair in wrong:
        with pytest.raises(InputTypeError) as refused:
            model.score([*good, pair])
        assert refused.value.index == 2


def test_pairs_are_all_checked_before_any_is_submitted(
    make: Make, reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[object] = []
    monkeypatch.setattr(LocalBackend, "submit", lambda _, request: submitted.append(request))
    wrong: list[Any] = [("one?", "one"), ("two?", None)]
    with pytest.raises(InputTypeError, match="input 1"):
        make(reranker).score(wrong)
    assert not submitted


def test_langchains_cross_encoder_reranker(make: Make, reranker: Path, scores: np.ndarray) -> None:
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker

    documents = list_documents()
    compressor = CrossEncoderReranker(model=make(reranker), top_n=4)
    found = compressor.compress_documents(documents, QUESTION)
    order = np.argsort(-scores)[:4]
    assert [each.id for each in found] == [str(i) for i in order]


# --- images --------------------------------------------------------------------------------------


async def test_every_kind_of_image_with_and_without_text(
    make: Make, page_reranker: Path, files: list[Path]
) -> None:
    given: list[tuple[str, Any]] = [
        (CAPTIONS[0], URLS[0]),
        ("", PNGS[1]),
        (" \n", str(files[2])),
        (CAPTIONS[1], files[3]),
        ("", files[4].as_uri()),
        (CAPTIONS[2], BytesIO(PNGS[5])),
        ("", Image.open(files[0])),
        ("", BASE64[3]),
        ("a text", None),
        ("another text", ""),
    ]
    expected = score_pages(
        page_reranker,
        QUESTION,
        (CAPTIONS[0], PNGS[0]),
        (None, PNGS[1]),  # without an empty text beside the image
        (None, PNGS[2]),
        (CAPTIONS[1], PNGS[3]),
        (None, PNGS[4]),
        (CAPTIONS[2], PNGS[5]),
        (None, PNGS[0]),
        (None, PNGS[3]),
        ("a text", None),
        ("another text", None),
    )
    documents = [
        Document(text, id=str(i), metadata={"image": image})
        for i, (text, image) in enumerate(given)
    ]
    documents.append(Document("no metadata", id="10"))
    expected = np.append(expected, score_float64(page_reranker, QUESTION, ["no metadata"]))
    found = await compress_both(make(page_reranker, top_n=None), documents)
    check(found, documents, expected)
    assert len(found) == len(documents)
    assert all(each.metadata["image"] is given[int(each.id)][1] for each in found if each.id < "10")


async def test_another_key_of_the_image(make: Make, page_reranker: Path) -> None:
    metadata = {"image": "the name of an image", "page": URLS[0]}
    document = Document(CAPTIONS[0], id="0", metadata=metadata)
    found = await compress_both(make(page_reranker, image_key="page"), [document])
    check(found, [document], score_pages(page_reranker, QUESTION, (CAPTIONS[0], PNGS[0])))
    with pytest.raises(ImageError, match="input 0"):
        make(page_reranker).compress_documents([document], QUESTION)


async def test_a_text_model_ignores_an_image_beside_a_text(
    make: Make, reranker: Path, scores: np.ndarray
) -> None:
    documents = list_documents()
    for document in documents[::2]:
        document.metadata["image"] = URLS[0] if document.page_content else None
    model = make(reranker, top_n=None)
    check(await compress_both(model, documents), documents, scores)
    for blank in ("", " \n"):
        documents[2] = Document(blank, metadata={"image": URLS[0]})
        for method in (model.compress_documents, model.acompress_documents):
            with pytest.raises(UnsupportedModalityError, match="input 2 is of modality 'image'"):
                await called(method, documents, QUESTION)


async def test_a_broken_image_fails_alone(make: Make, page_reranker: Path) -> None:
    documents = [
        Document(CAPTIONS[0], metadata={"image": URLS[0]}),
        Document(CAPTIONS[1], metadata={"image": PNGS[1][:90]}),
        Document(CAPTIONS[2]),
    ]
    with pytest.raises(PartialResultError, match=r"1 of 3 inputs failed.*input 1") as failed:
        make(page_reranker).compress_documents(documents, QUESTION)
    assert isinstance(failed.value.errors[1], ImageError)
    expected = score_pages(page_reranker, QUESTION, (CAPTIONS[0], PNGS[0]), (CAPTIONS[2], None))
    same(failed.value.scores[[0, 2]], expected)


async def test_the_loop_goes_on_while_the_model_loads_and_an_image_is_decoded(
    page_reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "of its own"  # other tests' engines have another name
    own.symlink_to(page_reranker)
    model = NeMoRetrieverRerank(model=str(own), device="cpu", dtype="float32")
    documents = [Document(CAPTIONS[0], metadata={"image": URLS[0]})]
    await check_that_the_loop_goes_on(
        monkeypatch, lambda: model.acompress_documents(documents, QUESTION)
    )


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("clone", LANGCHAIN_CLONES.values(), ids=LANGCHAIN_CLONES)
def test_clones_rerank_alike(
    make: Make,
    reranker: Path,
    scores: np.ndarray,
    clone: Callable[[NeMoRetrieverRerank], NeMoRetrieverRerank],
    used: bool,
) -> None:
    model, documents = make(reranker, top_n=3, score_threshold=-9), list_documents()
    if used:
        model.compress_documents(documents, QUESTION)
    cloned = clone(model)
    assert type(cloned) is NeMoRetrieverRerank
    assert cloned == model
    found = cloned.compress_documents(documents, QUESTION)
    check(found, documents, scores)
    assert len(found) == 3


def test_a_copy_with_other_options(make: Make, reranker: Path, scores: np.ndarray) -> None:
    model, documents = make(reranker, top_n=None), list_documents()
    same_engine = model.model_copy(update={"top_n": 2})
    assert same_engine.reranker is model.reranker
    assert len(same_engine.compress_documents(documents, QUESTION)) == 2
    probable = model.model_copy(update={"activation": "sigmoid"})
    check(probable.compress_documents(documents, QUESTION), documents, 1 / (1 + np.exp(-scores)))
    check(model.compress_documents(documents, QUESTION), documents, scores)
    assert model != probable


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_dumps_and_loads_keep_the_options_and_not_the_key(monkeypatch: Any) -> None:
    from langchain_core.load import dumps, loads

    given = {
        "base_url": "https://nim.example",
        "api_key": "nvapi-secret",
        "default_headers": {"x-secret": "hidden"},
        "top_n": 7,
        "score_threshold": 0.5,
        "image_key": "page",
        "truncate": "END",
    }
    text = dumps(NeMoRetrieverRerank(**given))
    for secret in ("nvapi-secret", "hidden"):
        assert secret not in text
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-other")
    loaded = loads(
        text,
        valid_namespaces=["langchain_nemoretriever"],
        allowed_objects=[NeMoRetrieverRerank],
        secrets_from_env=True,
    )
    assert loaded.model_dump() == NeMoRetrieverRerank(**given).model_dump()
    assert loaded.model is None
    assert loaded.api_key.get_secret_value() == "nvapi-other"


# --- retrievers ----------------------------------------------------------------------------------


def build_store(checkpoint: Path, texts: Sequence[str]) -> InMemoryVectorStore:
    embeddings = NeMoRetrieverEmbeddings(model=checkpoint, device="cpu", dtype="float32")
    store = InMemoryVectorStore(embeddings)
    store.add_documents(list_documents(texts))
    return store


async def test_a_retriever_of_two_stages(make: Make, reranker: Path, checkpoint: Path) -> None:
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 2)]
    store = build_store(checkpoint, texts)
    retriever = classic.ContextualCompressionRetriever(
        base_compressor=make(reranker, top_n=5),
        base_retriever=store.as_retriever(search_kwargs={"k": 12}),
    )
    for query in (QUESTION, "how many tokens?"):
        candidates = store.similarity_search(query, k=12)
        expected = score_float64(reranker, query, [each.page_content for each in candidates])
        for found in (retriever.invoke(query), await retriever.ainvoke(query)):
            check(found, candidates, expected)
            assert len(found) == 5
    stored = store.get_by_ids([str(i) for i in range(len(texts))])
    assert all("relevance_score" not in each.metadata for each in stored)
    empty = InMemoryVectorStore(store.embeddings)
    none = retriever.model_copy(update={"base_retriever": empty.as_retriever()})
    assert none.invoke(QUESTION) == await none.ainvoke(QUESTION) == []


class TestRetrieverSuite(RetrieversIntegrationTests):
    """LangChain's own; it has none of document compressors."""

    @pytest.fixture(autouse=True)
    def _models(self, reranker: Path, checkpoint: Path) -> None:
        self.model = {"model": reranker, "device": "cpu", "dtype": "float32"}
        self.store = build_store(checkpoint, TEXTS)

    @property
    def retriever_constructor(self) -> Any:
        def construct(k: int = 5) -> Any:
            return classic.ContextualCompressionRetriever(
                base_compressor=NeMoRetrieverRerank(**self.model, top_n=k),
                base_retriever=self.store.as_retriever(search_kwargs={"k": len(TEXTS)}),
            )

        return construct

    @property
    def retriever_query_example(self) -> str:
        return QUESTION
