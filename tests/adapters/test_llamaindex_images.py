"""Images through LlamaIndex: vectors, nodes, stores on disk, and what those who watch are told."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import (
    CallbackManager,
    CBEventType,
    EventPayload,
    TokenCountingHandler,
)
from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from numpy.typing import NDArray

from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import (
    ImageError,
    InputTypeError,
    PartialResultError,
    UnsupportedModalityError,
    images,
)
from shared_engine.pipeline import EmbeddingPipeline
from tests.support.adapters import (
    BASE64,
    CAPTIONS,
    PNGS,
    QUESTION,
    Oracle,
    called,
    check_that_the_loop_goes_on,
    same,
    saved,
)
from tests.support.llamaindex import Callbacks, Recorder
from tests.support.vl_oracles import numpy_float64

URL = f"data:image/png;base64,{BASE64[0][:60]}"


@pytest.fixture(scope="module")
def adapter() -> type[NeMoRetrieverEmbedding]:
    return NeMoRetrieverEmbedding


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder, root = Recorder(), get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


# --- vectors -------------------------------------------------------------------------------------


async def test_every_kind_of_image_by_every_way_gives_the_oracles_vector(
    either: NeMoRetrieverEmbedding, files: list[Path], oracle: Oracle
) -> None:
    jpeg = saved(4, "JPEG")
    sources: list[Any] = [
        str(files[0]),
        files[1].as_uri(),
        BytesIO(PNGS[2]),
        f"data:image/png;base64,{BASE64[3]}",
        f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
        BASE64[5],
    ]
    expected = oracle(*((None, png) for png in [*PNGS[:4], jpeg, PNGS[5]]))
    assert np.unique(expected.round(3), axis=0).shape == expected.shape
    paths = {
        "one": [either.get_image_embedding(source) for source in sources],
        "async one": [await either.aget_image_embedding(source) for source in sources],
        "gathered": await asyncio.gather(*map(either.aget_image_embedding, sources)),
        "batch": either.get_image_embedding_batch(sources),
        "async batch": await either.aget_image_embedding_batch(sources),
        "small batches": either.model_copy(
            update={"embed_batch_size": 2, "num_workers": 2}
        ).get_image_embedding_batch(sources),
    }
    for path, vectors in paths.items():
        same(vectors, expected, path)
        assert {type(value) for vector in vectors for value in vector} == {float}
    assert either.get_image_embedding_batch([]) == await either.aget_image_embedding_batch([]) == []


async def test_the_progress_bar_counts_finished_images(
    model: NeMoRetrieverEmbedding, text_model: NeMoRetrieverEmbedding, capfd: Any
) -> None:
    bar = {"show_progress": True}
    for path in ("get_image_embedding_batch", "aget_image_embedding_batch"):
        await called(partial(getattr(model, path), **bar), BASE64[:3])
        assert "3/3" in capfd.readouterr().err
        with pytest.raises(UnsupportedModalityError):
            await called(partial(getattr(text_model, path), **bar), BASE64[:3])
        assert capfd.readouterr().err == ""


def test_a_bytesio_may_be_read_again_and_need_not_be_at_its_start(
    model: NeMoRetrieverEmbedding, oracle: Oracle
) -> None:
    file = BytesIO(PNGS[0])
    expected = oracle((None, PNGS[0]))
    same([model.get_image_embedding(file)], expected)
    same([model.get_image_embedding(file)], expected, "again")
    file.seek(7)
    same(model.get_image_embedding_batch([file, file]), expected.repeat(2, axis=0), "from byte 7")


async def test_one_image_instead_of_a_list_is_refused(
    model: NeMoRetrieverEmbedding, files: list[Path]
) -> None:
    for one in (str(files[0]), PNGS[0]):
        with pytest.raises(InputTypeError, match="wrap it in a list"):
            model.get_image_embedding_batch(one)  # type: ignore[arg-type]
        with pytest.raises(InputTypeError, match="wrap it in a list"):
            await model.aget_image_embedding_batch(one)  # type: ignore[arg-type]


async def test_a_broken_image_is_named(model: NeMoRetrieverEmbedding, files: list[Path]) -> None:
    with pytest.raises(ImageError, match=r"input 0.*no-such\.png"):
        model.get_image_embedding("no-such.png")
    broken = [str(files[0]), BytesIO(PNGS[1][:90]), str(files[2])]
    with pytest.raises(PartialResultError, match=r"1 of 3 inputs failed.*input 1") as sync:
        model.get_image_embedding_batch(broken)
    with pytest.raises(PartialResultError) as by_loop:
        await model.aget_image_embedding_batch(broken)
    assert list(sync.value.errors) == list(by_loop.value.errors) == [1]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of documents of each call of the engine."""
    calls: list[int] = []
    submit = EmbeddingPipeline.submit

    def counting(self: EmbeddingPipeline, documents: Any, *args: Any) -> Any:
        calls.append(len(documents))
        return submit(self, documents, *args)

    monkeypatch.setattr(EmbeddingPipeline, "submit", counting)
    return calls


async def test_a_batch_is_one_call_of_the_engine(
    model: NeMoRetrieverEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    model.get_image_embedding_batch(BASE64 * 3)
    await model.aget_image_embedding_batch(BASE64 * 3)
    nodes = [ImageNode(image=image) for image in BASE64] + [TextNode(text="a text")]
    model(nodes)
    await model.acall(nodes)
    assert calls == [18, 18, 7, 7]


# --- nodes ---------------------------------------------------------------------------------------


def mixture(files: list[Path]) -> tuple[list[BaseNode], list[tuple[str | None, bytes | None]]]:
    """Nodes of every kind, shuffled, and what each of them holds."""
    nodes: list[tuple[BaseNode, str | None, bytes | None]] = [
        (TextNode(text="a text"), "a text", None),
        (ImageNode(image=BASE64[0]), None, PNGS[0]),
        (ImageNode(image_path=str(files[1])), None, PNGS[1]),
        (ImageNode(image=BASE64[2], text="a caption"), "a caption", PNGS[2]),
        (
            ImageNode(image_path=str(files[3]), text="another", metadata={"page": 7}),
            "page: 7\n\nanother",
            PNGS[3],
        ),
        (
            ImageNode(
                image=BASE64[4],
                text="a third",
                metadata={"page": 7, "file": "secret.pdf"},
                excluded_embed_metadata_keys=["file"],
            ),
            "page: 7\n\na third",
            PNGS[4],
        ),
        (ImageNode(image=BASE64[5], text=" \n", metadata={"page": 7}), None, PNGS[5]),
        (TextNode(text="with metadata", metadata={"page": 8}), "page: 8\n\nwith metadata", None),
        (ImageDocument(image_path=str(files[0])), None, PNGS[0]),
        (ImageDocument(image=BASE64[1], text="a document"), "a document", PNGS[1]),
        (Document(text="no image"), "no image", None),
        (Document(image_resource=MediaResource(data=PNGS[2])), None, PNGS[2]),
        (
            Node(
                image_resource=MediaResource(path=files[3]),
                text_resource=MediaResource(text="a node"),
            ),
            "a node",
            PNGS[3],
        ),
        (ImageDocument(image=BASE64[4], metadata={"page": 9}), None, PNGS[4]),
        (ImageNode(image=f"data:image/png;base64,{BASE64[5]}"), None, PNGS[5]),
        (TextNode(text=""), "", None),
        (TextNode(text=URL), URL, None),  # a text here, whatever it holds
    ]
    order = np.random.default_rng(0).permutation(len(nodes))
    return [nodes[i][0] for i in order], [nodes[i][1:] for i in order]


async def test_a_pipeline_embeds_text_image_and_both(
    either: NeMoRetrieverEmbedding, files: list[Path], oracle: Oracle
) -> None:
    nodes, items = mixture(files)
    expected = oracle(*items)
    pipeline = IngestionPipeline(transformations=[either], disable_cache=True)
    for run in (pipeline.run, pipeline.arun):
        for node in nodes:
            node.embedding = None
        embedded = await called(partial(run, nodes=nodes))
        assert [node.node_id for node in embedded] == [node.node_id for node in nodes]
        same([node.embedding for node in embedded], expected)


def test_chunks_of_a_document_with_an_image_keep_it(
    model: NeMoRetrieverEmbedding, oracle: Oracle
) -> None:
    document = ImageDocument(image=BASE64[0], text="one two three. " * 40)
    splitter = TokenTextSplitter(chunk_size=16, chunk_overlap=0, tokenizer=str.split)
    chunks = IngestionPipeline(transformations=[splitter, model]).run(documents=[document])
    assert len(chunks) > 2
    texts = [chunk.get_content(MetadataMode.EMBED) for chunk in chunks]
    same([chunk.embedding for chunk in chunks], oracle(*((text, PNGS[0]) for text in texts)))


def test_a_pipeline_with_worker_processes(
    there: NeMoRetrieverEmbedding, files: list[Path], oracle: Oracle
) -> None:
    nodes, items = mixture(files)
    pipeline = IngestionPipeline(transformations=[there], disable_cache=True)
    embedded = pipeline.run(nodes=nodes, num_workers=2)
    assert [node.node_id for node in embedded] == [node.node_id for node in nodes]
    same([node.embedding for node in embedded], oracle(*items))


async def test_a_model_of_texts_goes_by_the_caption(
    text_model: NeMoRetrieverEmbedding, model: NeMoRetrieverEmbedding
) -> None:
    nodes: list[BaseNode] = [
        ImageNode(image=BASE64[0], text="a caption", metadata={"page": 7}),
        TextNode(text="a text"),
        ImageDocument(image=BASE64[1], text="a document"),
    ]
    expected = text_model.embedder.embed(["page: 7\n\na caption", "a text", "a document"])
    same([node.embedding for node in text_model(nodes)], expected)
    same([node.embedding for node in await text_model.acall(nodes)], expected)
    nodes.append(ImageNode(image=BASE64[2], metadata={"page": 7}))
    with pytest.raises(UnsupportedModalityError, match=r"'image'.*only text") as sync:
        text_model(nodes)
    with pytest.raises(UnsupportedModalityError) as by_loop:
        await text_model.acall(nodes)
    assert (sync.value.index, by_loop.value.index) == (3, 3)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (lambda: ImageNode(image_path="no-such.png"), "no-such.png"),
        (lambda: ImageNode(image=BASE64[0][:400]), "cannot be used"),
        (
            lambda: ImageNode(image_url="https://example.com/a.png?key=hush"),
            "allow_image_urls=True",
        ),
        (
            lambda: ImageDocument(image_resource=MediaResource(url="https://a.b/c")),
            "allow_image_urls=",
        ),
        # LlamaIndex drops the bytes here, and again when such a node is dumped
        (lambda: ImageNode(image_resource=MediaResource(data=PNGS[0]), text="a text"), "empty"),
        (ImageNode, "empty"),
    ],
)
async def test_a_node_without_a_usable_image_is_named(
    model: NeMoRetrieverEmbedding, node: Callable[[], BaseNode], said: str
) -> None:
    nodes = [TextNode(text="a text"), ImageNode(image=BASE64[0]), node()]
    with pytest.raises(PartialResultError, match=r"1 of 3 inputs failed.*input 2") as sync:
        model(nodes)
    with pytest.raises(PartialResultError) as by_loop:
        await model.acall(nodes)
    for caught in (sync, by_loop):
        assert list(caught.value.errors) == [2]
        assert said in str(caught.value.errors[2])
        assert "hush" not in str(caught.value)
    assert [each.embedding for each in nodes] == [None, None, None]


def test_addresses_are_fetched_where_that_is_allowed(options: dict[str, Any]) -> None:
    model = NeMoRetrieverEmbedding(**options, allow_image_urls=True)
    with pytest.raises(ImageError, match="not on the public internet"):
        model([ImageNode(image_url="http://127.0.0.1:9/a.png")])


# --- those who watch -----------------------------------------------------------------------------


async def test_events_and_callbacks_come_once_and_hold_no_image(
    options: dict[str, Any], recorder: Recorder, files: list[Path]
) -> None:
    hidden = "https://user:hush@example.com/a.png?key=hush"
    model = NeMoRetrieverEmbedding(**options, api_key=None, default_headers={"x": "hush"})
    callbacks = Callbacks()
    counter = TokenCountingHandler(tokenizer=str.split)
    model.callback_manager = CallbackManager([callbacks, counter])
    url = f"data:image/png;base64,{BASE64[1]}"
    sources: list[Any] = [str(files[0]), url, BytesIO(PNGS[2]), BASE64[3]]
    nodes: list[BaseNode] = [
        ImageNode(image=BASE64[0], text="a caption"),
        TextNode(text=""),
        ImageNode(image_path=str(files[0])),
    ]
    shown = [
        f"<image {images.describe(str(files[0]))}>",
        "<image 'data:image/png;base64,...'>",
        "<image of type BytesIO>",
        f"<image of {len(BASE64[3]):,} characters>",
    ]
    calls: list[tuple[Callable[[], Any], list[str]]] = [
        (lambda: model.get_image_embedding(url), shown[1:2]),
        (lambda: model.aget_image_embedding(url), shown[1:2]),
        (lambda: model.get_image_embedding_batch(sources), shown),
        (lambda: model.aget_image_embedding_batch(sources), shown),
        (lambda: model(nodes), ["a caption", "", shown[0]]),
        (lambda: model.acall(nodes), ["a caption", "", shown[0]]),
    ]
    payload = {
        "class_name": "NeMoRetrieverEmbedding",
        "model_name": model.model,
        "embed_batch_size": 2048,
    }
    for call, chunks in calls:
        result = await called(call)
        vectors = result if isinstance(result[0], list) else [result]
        vectors = [node.embedding for node in nodes] if result is nodes else vectors
        start, end = callbacks.seen
        assert start == ("start", CBEventType.EMBEDDING, {EventPayload.SERIALIZED: payload})
        assert end[:2] == ("end", CBEventType.EMBEDDING)
        assert end[2] == {EventPayload.CHUNKS: chunks, EventPayload.EMBEDDINGS: vectors}
        callbacks.seen.clear()
        began, ended = recorder.events
        assert isinstance(began, EmbeddingStartEvent)
        assert isinstance(ended, EmbeddingEndEvent)
        assert (began.model_dict, ended.chunks, ended.embeddings) == (payload, chunks, vectors)
        assert began.span_id == ended.span_id
        assert "embed-" in str(began.span_id)
        recorder.events.clear()
    assert len(counter.embedding_token_counts) == 16

    with pytest.raises(ImageError):
        model.get_image_embedding(hidden)
    (_, (_, _, told)) = callbacks.seen
    assert isinstance(told[EventPayload.EXCEPTION], ImageError)
    assert "hush" not in f"{callbacks.seen} {recorder.events}"


class _Limiter:
    """Counts who asks it."""

    def __init__(self) -> None:
        self.asked = ""

    def acquire(self) -> None:
        self.asked += "s"

    async def async_acquire(self) -> None:
        self.asked += "a"


@pytest.mark.skipif(
    "rate_limiter" not in BaseEmbedding.model_fields, reason="LlamaIndex has them since 0.14.16"
)
async def test_a_rate_limiter_is_asked_once_a_batch(model: NeMoRetrieverEmbedding) -> None:
    limiter = model.rate_limiter = _Limiter()
    nodes = [ImageNode(image=BASE64[0]), TextNode(text="a text")]
    model.get_image_embedding(BASE64[0])
    await model.aget_image_embedding(BASE64[0])
    model.get_image_embedding_batch(BASE64)
    await model.aget_image_embedding_batch(BASE64)
    model(nodes)
    await model.acall(nodes)
    assert limiter.asked == "sasasa"


async def test_a_cache_of_texts_holds_no_image(options: dict[str, Any], oracle: Oracle) -> None:
    cache = SimpleKVStore()
    model = NeMoRetrieverEmbedding(**options, embeddings_cache=cache)
    nodes = [
        ImageNode(image=BASE64[0], text="one"),
        TextNode(text="one"),
        ImageNode(image=BASE64[0]),
    ]
    model.get_image_embedding(BASE64[0])
    model.get_image_embedding_batch(BASE64)
    await model.aget_image_embedding(BASE64[0])
    model(nodes)
    await model.acall(nodes)
    assert not cache.get_all("embeddings")
    cache.put("one", {"id": [0.5] * 4}, "embeddings")
    expected = oracle(("one", PNGS[0]), ("one", None), (None, PNGS[0]))
    same([node.embedding for node in model(nodes)], expected)
    assert model(nodes[1:2])[0].embedding == [0.5] * 4


# --- stores on disk ------------------------------------------------------------------------------

SPACE = {"hnsw": {"space": "cosine"}}


def collection(client: Any, name: str) -> ChromaVectorStore:
    made = client.get_or_create_collection(name, embedding_function=None, configuration=SPACE)
    return ChromaVectorStore(chroma_collection=made)


def check(found: Sequence[NodeWithScore], ids: list[str], scores: NDArray[Any]) -> None:
    """LlamaIndex's Chroma store gives exp(-distance) as score."""
    order = np.argsort(-scores)
    assert [each.node.node_id for each in found] == [ids[i] for i in order]
    same([each.score for each in found], np.exp(scores[order] - 1))


async def test_text_and_images_find_images_in_a_multimodal_index_opened_again(
    model: NeMoRetrieverEmbedding,
    folder: Path,
    files: list[Path],
    tmp_path: Path,
    oracle: Oracle,
) -> None:
    ids = [f"image {seed}" for seed in range(len(files))]
    nodes: list[BaseNode] = [
        ImageNode(id_=id_, image_path=str(file), metadata={"file": file.name})  # else it is skipped
        for id_, file in zip(ids, files, strict=True)
    ]
    texts = [TextNode(id_=text, text=text) for text in CAPTIONS]
    pictured = oracle(*((None, png) for png in PNGS))
    query = numpy_float64(folder, [(QUESTION, None)], "query")[0]

    for opened in range(3):
        client = chromadb.PersistentClient(str(tmp_path))
        stores = collection(client, "texts"), collection(client, "images")
        index = MultiModalVectorStoreIndex(
            nodes=[*nodes[:4], texts[0]] if opened == 0 else [],
            storage_context=StorageContext.from_defaults(
                vector_store=stores[0], image_store=stores[1]
            ),
            embed_model=model,
            image_embed_model=model,
        )
        if opened == 0:
            index.insert_nodes([nodes[4], texts[1]])
            await index.ainsert_nodes([nodes[5], texts[2]])
        retriever = index.as_retriever(similarity_top_k=3, image_similarity_top_k=6)
        check(retriever.text_to_image_retrieve(QUESTION), ids, pictured @ query)
        check(await retriever.atext_to_image_retrieve(QUESTION), ids, pictured @ query)
        for both in (retriever.retrieve(QUESTION), await retriever.aretrieve(QUESTION)):
            assert {each.node.node_id for each in both} == {*ids, *CAPTIONS}
        for seed, source in [(2, str(files[2])), (3, BASE64[3])]:
            scores = pictured @ pictured[seed]
            assert scores.argmax() == seed
            check(retriever.image_to_image_retrieve(source), ids, scores)
            asked = QueryBundle(query_str="", image_path=source)
            check(await retriever.aimage_to_image_retrieve(asked), ids, scores)
        client.close()


async def test_what_a_pipeline_stored_is_found_by_an_index_opened_again(
    model: NeMoRetrieverEmbedding, folder: Path, tmp_path: Path, oracle: Oracle
) -> None:
    """The first time from the nodes in memory, then from disk alone."""
    ids = ["both", "image", "text", "document", "late"]
    nodes: list[BaseNode] = [
        ImageNode(id_="both", image=BASE64[0], text=CAPTIONS[0]),
        ImageNode(id_="image", image=BASE64[1], metadata={"page": 7}),  # else an index skips it
        TextNode(id_="text", text=CAPTIONS[1]),
        ImageDocument(id_="document", image=BASE64[2], text=CAPTIONS[2]),
        ImageNode(id_="late", image=BASE64[3]),
    ]
    stored = oracle(
        (CAPTIONS[0], PNGS[0]),
        (None, PNGS[1]),
        (CAPTIONS[1], None),
        (CAPTIONS[2], PNGS[2]),
        (None, PNGS[3]),
    )
    query = numpy_float64(folder, [(QUESTION, None)], "query")[0]
    for opened in range(2):
        client = chromadb.PersistentClient(str(tmp_path))
        store = collection(client, "nodes")
        pipeline = IngestionPipeline(transformations=[model], vector_store=store)
        if opened == 0:
            embedded = pipeline.run(nodes=nodes[:4])
            await pipeline.arun(nodes=nodes[4:])
            in_memory = VectorStoreIndex(embedded, embed_model=model)
            in_memory.insert_nodes(nodes[4:])
            found = in_memory.as_retriever(similarity_top_k=5).retrieve(QUESTION)
            order = np.argsort(-(stored @ query))
            assert [each.node.node_id for each in found] == [ids[i] for i in order]
        index = VectorStoreIndex.from_vector_store(store, embed_model=model)
        retriever = index.as_retriever(similarity_top_k=5)
        check(retriever.retrieve(QUESTION), ids, stored @ query)
        check(await retriever.aretrieve(QUESTION), ids, stored @ query)
        vector = model.get_image_embedding(BASE64[1])
        check(retriever.retrieve(QueryBundle("", embedding=vector)), ids, stored @ stored[1])
        client.close()


def test_a_multimodal_index_keeps_the_vectors_of_a_pipeline(
    model: NeMoRetrieverEmbedding, oracle: Oracle
) -> None:
    """So an image and its caption as one can be in it, which it cannot embed itself."""
    node = ImageNode(image=BASE64[0], text=CAPTIONS[0])
    (embedded,) = model([node])
    index = MultiModalVectorStoreIndex(
        nodes=[embedded], embed_model=MockEmbedding(64), image_embed_model=model
    )
    (stored,) = index.image_vector_store.data.embedding_dict.values()  # type: ignore[attr-defined]
    same([stored], oracle((CAPTIONS[0], PNGS[0])))


# --- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["batch", "nodes"])
async def test_the_loop_goes_on_while_the_model_loads_and_an_image_is_decoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    own = tmp_path / "of its own"  # other tests' engines have another name
    own.symlink_to(folder)
    model = NeMoRetrieverEmbedding(model=str(own), device="cpu", dtype="float32")
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "batch": lambda: model.aget_image_embedding_batch(BASE64[:1]),
        "nodes": lambda: model.acall([ImageNode(image=BASE64[0])]),
    }
    await check_that_the_loop_goes_on(monkeypatch, calls[way])
