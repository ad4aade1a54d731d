"""Reranking through LlamaIndex: scores against an independent model, alone and in query engines."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import (
    BaseNode,
    ImageDocument,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from pydantic import ValidationError

from llamaindex_nemoretriever import NeMoRetrieverEmbedding, NeMoRetrieverRerank
from shared_engine import (
    ImageError,
    InputTooLongError,
    InputTypeError,
    PartialResultError,
    UnsupportedModalityError,
)
from tests.support.adapters import (
    BASE64,
    CAPTIONS,
    LLAMAINDEX_CLONES,
    PNGS,
    QUESTION,
    TEXTS,
    URLS,
    called,
    check_that_the_loop_goes_on,
    same,
)
from tests.support.llamaindex import Callbacks, Recorder
from tests.support.rerankers import score_float64, score_pages

Make = Callable[..., NeMoRetrieverRerank]


@pytest.fixture(scope="module")
def adapter() -> type[NeMoRetrieverRerank]:
    return NeMoRetrieverRerank


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder, root = Recorder(), get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


def list_nodes(texts: Sequence[str] = TEXTS) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=str(i), text=text, metadata={"chapter": i}), score=i / 10)
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def scores(reranker: Path) -> np.ndarray:
    """The scores of `list_nodes()` for `QUESTION`."""
    return score_nodes(reranker, list_nodes())


def score_nodes(folder: Path, nodes: list[NodeWithScore], query: str = QUESTION) -> np.ndarray:
    texts = [each.node.get_content(MetadataMode.EMBED) for each in nodes]
    return score_float64(folder, query, texts)


def check(found: list[NodeWithScore], nodes: list[NodeWithScore], scores: np.ndarray) -> None:
    """Check that nodes are the best of all, in order, with their scores."""
    order = np.argsort(-scores)[: len(found)]
    assert (np.diff(np.sort(scores)) > 1e-5).all(), "the order is by chance"
    assert [each.node_id for each in found] == [nodes[i].node_id for i in order]
    same([each.score for each in found], scores[order])
    assert {type(each.score) for each in found} <= {float}


async def rerank_both(
    model: NeMoRetrieverRerank, nodes: list[NodeWithScore], query: str = QUESTION
) -> list[NodeWithScore]:
    """Return the result of both methods, which agree."""
    found = model.postprocess_nodes(nodes, query_str=query)
    again = await model.apostprocess_nodes(nodes, query_bundle=QueryBundle(query))
    assert [each.node_id for each in found] == [each.node_id for each in again]
    same([each.score for each in found], [each.score for each in again])
    return found


# --- order and scores ----------------------------------------------------------------------------


async def test_nodes_come_by_descending_score_as_new_objects(
    make: Make, reranker: Path, scores: np.ndarray
) -> None:
    nodes = list_nodes()
    before = copy.deepcopy(nodes)
    found = await rerank_both(make(reranker, top_n=None), nodes)
    check(found, nodes, scores)
    assert len(found) == len(nodes)
    assert nodes == before
    assert all(each.node is nodes[int(each.node_id)].node for each in found)


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (3, 3), (8, 8), (100, 8), (None, 8), (0, 0)])
async def test_top_n(
    make: Make, reranker: Path, scores: np.ndarray, top_n: int | None, count: int
) -> None:
    nodes, model = list_nodes(), make(reranker)
    assert len(await rerank_both(model, nodes)) == model.top_n == 5
    model.top_n = top_n
    found = await rerank_both(model, nodes)
    check(found, nodes, scores)
    assert len(found) == count
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        model.top_n = -1


async def test_the_score_of_the_retriever_is_kept_on_copies(
    make: Make, reranker: Path, scores: np.ndarray
) -> None:
    nodes = list_nodes()
    nodes[3].score = None
    before = copy.deepcopy(nodes)
    model = make(reranker, top_n=None, keep_retrieval_score=True)
    found = await rerank_both(model, nodes)
    check(found, nodes, scores)
    assert nodes == before
    for each in found:
        original = nodes[int(each.node_id)]
        kept = {**original.node.metadata, "retrieval_score": original.score}
        assert each.node.metadata == kept
        for mode in (MetadataMode.EMBED, MetadataMode.LLM):
            assert each.node.get_content(mode) == original.node.get_content(mode)
    check(await rerank_both(model, found), nodes, scores)  # the kept score changes none


async def test_no_nodes_load_nothing(make: Make) -> None:
    assert await rerank_both(make(Path("/no/such/folder")), []) == []
    assert await rerank_both(make(Path("/no/such/folder"), top_n=0), list_nodes()) == []


async def test_a_score_does_not_depend_on_other_nodes(make: Make, reranker: Path) -> None:
    model, nodes = make(reranker, top_n=None), list_nodes()
    together = {each.node_id: each.score for each in await rerank_both(model, nodes)}
    for node in nodes:
        (alone,) = await rerank_both(model, [node])
        same(alone.score, together[node.node_id])


async def test_concurrent_calls_on_one_loop(make: Make, reranker: Path) -> None:
    model, nodes = make(reranker, top_n=None), list_nodes()
    queries = [f"question {i}?" for i in range(12)]
    results = await asyncio.gather(
        *(model.apostprocess_nodes(nodes, query_str=query) for query in queries)
    )
    for query, found in zip(queries, results, strict=True):
        check(found, nodes, score_nodes(reranker, nodes, query))
        assert len(found) == len(nodes)


@pytest.mark.parametrize("nodes", [[], list_nodes()], ids=["no nodes", "nodes"])
async def test_a_missing_query_is_an_error(
    make: Make, reranker: Path, nodes: list[NodeWithScore]
) -> None:
    model = make(reranker)
    for method in (model.postprocess_nodes, model.apostprocess_nodes):
        with pytest.raises(InputTypeError, match=r"got None; pass query_str= or query_bundle="):
            await called(method, nodes)


async def test_errors_name_the_node_and_keep_the_other_scores(make: Make, reranker: Path) -> None:
    nodes = list_nodes(["one", "word " * 80, "two"])
    model = make(reranker, max_tokens=80)
    for method in (model.postprocess_nodes, model.apostprocess_nodes):
        with pytest.raises(PartialResultError, match=r"1 of 3 inputs failed.*input 1") as failed:
            await called(method, nodes, QueryBundle(QUESTION))
        errors = failed.value.errors
        assert {row: type(each) for row, each in errors.items()} == {1: InputTooLongError}
        same(failed.value.scores[[0, 2]], score_nodes(reranker, [nodes[0], nodes[2]]))
    assert len(await rerank_both(make(reranker, max_tokens=80, truncate="END"), nodes)) == 3
    with pytest.raises(InputTypeError, match="expected a query, got a blank text"):
        model.postprocess_nodes(nodes, query_str=" ")


# --- images --------------------------------------------------------------------------------------


async def test_images_of_every_kind_of_node(
    make: Make, page_reranker: Path, files: list[Path]
) -> None:
    inner: list[BaseNode] = [
        ImageNode(id_="0", image=BASE64[0], text=CAPTIONS[0]),
        ImageNode(id_="1", image=BASE64[1], metadata={"page": 7}),  # no caption
        ImageNode(id_="2", image_path=str(files[2])),
        ImageNode(id_="3", image_url=URLS[3], text=CAPTIONS[1], metadata={"page": 8}),
        ImageDocument(id_="4", image=BASE64[4]),
        Node(id_="5", image_resource=MediaResource(data=BASE64[5].encode())),
        Node(
            id_="6",
            image_resource=MediaResource(path=files[0]),
            text_resource=MediaResource(text=CAPTIONS[2]),
        ),
        TextNode(id_="7", text="a text", metadata={"page": 9}),
    ]
    expected = score_pages(
        page_reranker,
        QUESTION,
        (CAPTIONS[0], PNGS[0]),
        (None, PNGS[1]),
        (None, PNGS[2]),
        (f"page: 8\n\n{CAPTIONS[1]}", PNGS[3]),
        (None, PNGS[4]),
        (None, PNGS[5]),
        (CAPTIONS[2], PNGS[0]),
        ("page: 9\n\na text", None),
    )
    nodes = [NodeWithScore(node=node) for node in inner]
    found = await rerank_both(make(page_reranker, top_n=None), nodes)
    check(found, nodes, expected)
    assert len(found) == len(nodes)


async def test_a_text_model_ignores_an_image_beside_a_text(make: Make, reranker: Path) -> None:
    nodes = [
        NodeWithScore(node=ImageNode(id_="0", image=BASE64[0], text=CAPTIONS[0])),
        NodeWithScore(node=TextNode(id_="1", text=CAPTIONS[1])),
    ]
    model = make(reranker)
    check(await rerank_both(model, nodes), nodes, score_float64(reranker, QUESTION, CAPTIONS[:2]))
    nodes.append(NodeWithScore(node=ImageNode(image=BASE64[0])))
    for method in (model.postprocess_nodes, model.apostprocess_nodes):
        with pytest.raises(UnsupportedModalityError, match="input 2 is of modality 'image'"):
            await called(method, nodes, QueryBundle(QUESTION))


async def test_a_broken_image_fails_alone(make: Make, page_reranker: Path) -> None:
    nodes = [
        NodeWithScore(node=node)
        for node in (
            ImageNode(image=BASE64[0], text=CAPTIONS[0]),
            ImageNode(image=BASE64[1][:100], text=CAPTIONS[1]),
            ImageNode(text=CAPTIONS[2]),
        )
    ]
    with pytest.raises(PartialResultError, match=r"2 of 3 inputs failed.*input 1") as failed:
        make(page_reranker).postprocess_nodes(nodes, query_str=QUESTION)
    assert {row: type(error) for row, error in failed.value.errors.items()} == {
        1: ImageError,
        2: ImageError,
    }
    same(failed.value.scores[:1], score_pages(page_reranker, QUESTION, (CAPTIONS[0], PNGS[0])))


async def test_the_loop_goes_on_while_the_model_loads_and_an_image_is_decoded(
    page_reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "of its own"  # other tests' engines have another name
    own.symlink_to(page_reranker)
    model = NeMoRetrieverRerank(model=str(own), device="cpu", dtype="float32")
    nodes = [NodeWithScore(node=ImageNode(image=BASE64[0], text=CAPTIONS[0]))]
    await check_that_the_loop_goes_on(
        monkeypatch, lambda: model.apostprocess_nodes(nodes, query_str=QUESTION)
    )


# --- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_n", "announced"), [(2, 2), (None, 8)])
async def test_callbacks_and_events_come_once_around_a_call(
    make: Make, reranker: Path, recorder: Recorder, top_n: int | None, announced: int
) -> None:
    model, nodes, callbacks = make(reranker, top_n=top_n), list_nodes(), Callbacks()
    model.callback_manager = CallbackManager([callbacks])
    for method in (model.postprocess_nodes, model.apostprocess_nodes):
        found = await called(method, nodes, QueryBundle(QUESTION))
        assert callbacks.seen == [
            (
                "start",
                CBEventType.RERANKING,
                {
                    EventPayload.NODES: nodes,
                    EventPayload.MODEL_NAME: model.model,
                    EventPayload.QUERY_STR: QUESTION,
                    EventPayload.TOP_K: announced,
                },
            ),
            ("end", CBEventType.RERANKING, {EventPayload.NODES: found}),
        ]
        callbacks.seen.clear()
        began, ended = recorder.events
        assert isinstance(began, ReRankStartEvent)
        assert isinstance(ended, ReRankEndEvent)
        assert began.query == QueryBundle(QUESTION)
        assert (began.top_n, began.model_name) == (announced, model.model)
        assert [each.score for each in began.nodes] == [i / 10 for i in range(8)]
        assert ended.nodes == found
        recorder.events.clear()


async def test_a_failure_ends_the_callback_with_its_error(
    make: Make, reranker: Path, recorder: Recorder
) -> None:
    model, callbacks = make(reranker, max_tokens=80), Callbacks()
    model.callback_manager = CallbackManager([callbacks])
    for method in (model.postprocess_nodes, model.apostprocess_nodes):
        with pytest.raises(InputTooLongError) as failed:
            await called(method, list_nodes(["word " * 80]), QueryBundle(QUESTION))
        assert [each[0] for each in callbacks.seen] == ["start", "end"]
        assert callbacks.seen[1][2] == {EventPayload.EXCEPTION: failed.value}
        callbacks.seen.clear()
    assert not any(isinstance(event, ReRankEndEvent) for event in recorder.events)


async def test_both_methods_are_spans(make: Make, reranker: Path) -> None:
    handler, root = SimpleSpanHandler(), get_dispatcher()
    root.add_span_handler(handler)
    try:
        await rerank_both(make(reranker), list_nodes())
    finally:
        root.span_handlers.remove(handler)
    names = [span.id_.partition("-")[0] for span in handler.completed_spans]
    assert names == [f"NeMoRetrieverRerank.{way}postprocess_nodes" for way in ("_", "_a")]


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("clone", LLAMAINDEX_CLONES.values(), ids=LLAMAINDEX_CLONES)
def test_clones_rerank_alike(
    make: Make,
    reranker: Path,
    scores: np.ndarray,
    clone: Callable[[NeMoRetrieverRerank], NeMoRetrieverRerank],
    used: bool,
) -> None:
    model, nodes = make(reranker, top_n=3, keep_retrieval_score=True), list_nodes()
    if used:
        model.postprocess_nodes(nodes, query_str=QUESTION)
    cloned = clone(model)
    assert type(cloned) is NeMoRetrieverRerank
    assert cloned.to_dict() == model.to_dict()
    found = cloned.postprocess_nodes(nodes, query_str=QUESTION)
    check(found, nodes, scores)
    assert len(found) == 3
    assert all("retrieval_score" in each.node.metadata for each in found)


def test_the_dictionary_names_the_class_and_has_no_key() -> None:
    dumped = NeMoRetrieverRerank(api_key="nvapi-secret", base_url="https://nim.example").to_dict()
    assert dumped["class_name"] == NeMoRetrieverRerank.class_name() == "NeMoRetrieverRerank"
    assert "nvapi-secret" not in str(dumped)


# --- query engines -------------------------------------------------------------------------------


async def test_a_query_engine_reranks_what_its_retriever_found(
    make: Make, reranker: Path, checkpoint: Path
) -> None:
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 2)]
    embedding = NeMoRetrieverEmbedding(model=checkpoint, device="cpu", dtype="float32")
    index = VectorStoreIndex([each.node for each in list_nodes(texts)], embed_model=embedding)
    model = make(reranker, top_n=4, keep_retrieval_score=True)
    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=12, node_postprocessors=[model])
    for query in (QUESTION, "how many tokens?"):
        candidates = index.as_retriever(similarity_top_k=12).retrieve(query)
        expected = score_nodes(reranker, candidates, query)
        for answer in (engine.query(query), await engine.aquery(query)):
            check(answer.source_nodes, candidates, expected)
            assert len(answer.source_nodes) == 4
            kept = {each.node_id: each.score for each in candidates}
            for each in answer.source_nodes:
                assert each.node.metadata["retrieval_score"] == pytest.approx(kept[each.node_id])
                assert each.text in str(answer)  # MockLLM returns its prompt
            assert "retrieval_score" not in str(answer)
    stored = index.docstore.get_nodes([str(i) for i in range(len(texts))])
    assert all("retrieval_score" not in node.metadata for node in stored)


async def test_a_minimum_score_by_llamaindexs_own_postprocessor(
    make: Make, reranker: Path, scores: np.ndarray
) -> None:
    nodes = list_nodes()
    middle = float(np.sort(scores)[3:5].mean())

    class Fixed(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return nodes

    engine = RetrieverQueryEngine.from_args(
        Fixed(),
        llm=MockLLM(),
        node_postprocessors=[
            make(reranker, top_n=None),
            SimilarityPostprocessor(similarity_cutoff=middle),
        ],
    )
    found = engine.query(QUESTION).source_nodes
    check(found, nodes, scores)
    assert len(found) == 4


async def test_a_query_engine_reranks_images(make: Make, page_reranker: Path) -> None:
    nodes: list[BaseNode] = [
        ImageNode(id_=str(i), image=BASE64[i], text=caption) for i, caption in enumerate(CAPTIONS)
    ]
    for node in nodes:
        node.embedding = [1.0, 0.0]
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(2))
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=3, node_postprocessors=[make(page_reranker)]
    )
    expected = score_pages(page_reranker, QUESTION, *zip(CAPTIONS, PNGS[:3], strict=True))
    for answer in (engine.query(QUESTION), await engine.aquery(QUESTION)):
        check(answer.source_nodes, [NodeWithScore(node=node) for node in nodes], expected)
        assert len(answer.source_nodes) == 3
