"""Images through LangChain: by every method and its async twin, and in stores on disk."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from langchain_chroma import Chroma
from langchain_core.documents import Document as Page
from langchain_core.vectorstores import InMemoryVectorStore
from numpy.typing import NDArray
from PIL import Image

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from shared_engine import (
    Document,
    ImageError,
    InputTypeError,
    Options,
    PartialResultError,
    UnsupportedModalityError,
    images,
)
from shared_engine.local import backend as local
from tests.server.test_app import NAME, running
from tests.support.vl_checkpoints import build_vl_checkpoint, page
from tests.support.vl_oracles import numpy_float64

SIZES = [(90, 60), (50, 120), (64, 64), (200, 100), (31, 97), (70, 80)]
TEXTS = ["a chart of sales", "two cats", "the plan of a house"]
QUESTION = "how much was sold?"
Oracle = Callable[..., NDArray[Any]]


def saved(seed: int, kind: str = "PNG") -> bytes:
    file = BytesIO()
    page(seed, *SIZES[seed % len(SIZES)]).save(file, kind)
    return file.getvalue()


def expected_of(folder: Path, *items: tuple[str | None, bytes | None]) -> NDArray[Any]:
    """Return the oracle's vectors of (text, image) pairs, either of which may be None."""
    seen = [(text, png if png is None else images.cut_tiles(png, 2, 32)) for text, png in items]
    return numpy_float64(folder, seen, "document")


def same(actual: Any, expected: Any, what: str = "") -> None:
    np.testing.assert_allclose(np.array(actual), expected, rtol=0, atol=1e-5, err_msg=what)


async def called(call: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a method or of its async twin."""
    result = call(*args)
    return await result if isinstance(result, Awaitable) else result


async def check_that_the_loop_goes_on(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Awaitable[Any]]
) -> None:
    """Hold the load of a model and the first image until the loop, if it is free, lets them go."""
    entered, free = threading.Semaphore(0), threading.Semaphore(0)

    def accept(function: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any) -> Any:
            entered.release()
            assert free.acquire(timeout=20), "the loop is blocked"
            return function(*args)

        return waiting

    monkeypatch.setattr(local, "resolve", accept(local.resolve))
    monkeypatch.setattr(images, "cut_tiles", accept(images.cut_tiles))
    task = asyncio.ensure_future(call())
    for _ in range(2):
        while not entered.acquire(blocking=False):
            assert not task.done()
            await asyncio.sleep(0.01)
        free.release()
    assert len(await task) == 1


PNGS = [saved(seed) for seed in range(len(SIZES))]
BASE64 = [base64.b64encode(png).decode() for png in PNGS]
URLS = [f"data:image/png;base64,{text}" for text in BASE64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vl_checkpoint(tmp_path_factory.mktemp("vl") / "vl")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with running(Options(model=str(folder), device="cpu", dtype="float32")) as served:
        yield served.url


@pytest.fixture
def model(folder: Path) -> NeMoRetrieverEmbeddings:
    return NeMoRetrieverEmbeddings(model=str(folder), device="cpu", dtype="float32")


@pytest.fixture
def there(address: str) -> NeMoRetrieverEmbeddings:
    return NeMoRetrieverEmbeddings(model=NAME, base_url=address)


@pytest.fixture(params=["model", "there"])
def either(request: pytest.FixtureRequest) -> NeMoRetrieverEmbeddings:
    """The model in this process, or served."""
    made = request.getfixturevalue(request.param)
    assert isinstance(made, NeMoRetrieverEmbeddings)
    return made


@pytest.fixture
def text_model(checkpoint: Path) -> NeMoRetrieverEmbeddings:
    return NeMoRetrieverEmbeddings(model=str(checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"page {seed}.png" for seed in range(len(SIZES))]
    for path, png in zip(paths, PNGS, strict=True):
        path.write_bytes(png)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return partial(expected_of, folder)


@pytest.fixture(scope="module")
def query(folder: Path) -> NDArray[Any]:
    return numpy_float64(folder, [(QUESTION, None)], "query")[0]


# --- vectors -------------------------------------------------------------------------------------


async def test_every_kind_of_image_gives_the_oracles_vector(
    either: NeMoRetrieverEmbeddings, files: list[str], oracle: Oracle
) -> None:
    jpeg = saved(4, "JPEG")
    sources: list[Any] = [
        files[0],
        Path(files[1]),
        Path(files[2]).as_uri(),
        PNGS[3],
        BytesIO(jpeg),
        Image.open(files[5]),
        URLS[0],
        BASE64[1],
    ]
    expected = oracle(*((None, png) for png in [*PNGS[:4], jpeg, PNGS[5], *PNGS[:2]]))
    assert np.unique(expected.round(3), axis=0).shape == (6, expected.shape[1])
    paths = {
        "batch": either.embed_image(sources),
        "as the stores call it": either.embed_image(uris=sources),
        "one by one": [either.embed_image([source])[0] for source in sources],
        "async": await either.aembed_image(uris=sources),
        "a generator": either.embed_image(source for source in sources),
        "mixed": either.embed_mixed([Document(image=source) for source in sources]),
    }
    for path, vectors in paths.items():
        same(vectors, expected, path)
        assert {type(value) for vector in vectors for value in vector} == {float}
    assert either.embed_image([]) == await either.aembed_image([]) == []


async def test_texts_with_images_and_mixtures(
    either: NeMoRetrieverEmbeddings, files: list[str], oracle: Oracle
) -> None:
    pairs = oracle(*zip(TEXTS, PNGS[:3], strict=True))
    same(either.embed_text_image(TEXTS, files[:3]), pairs)
    same(await either.aembed_text_image(texts=TEXTS, images=files[:3]), pairs)
    mixture: list[str | Document] = [
        TEXTS[0],
        Document(image=files[0]),
        Document(TEXTS[1], files[1]),
        Document(TEXTS[2]),
        URLS[0][:90],
    ]
    mixed = oracle(
        (TEXTS[0], None),
        (None, PNGS[0]),
        (TEXTS[1], PNGS[1]),
        (TEXTS[2], None),
        (URLS[0][:90], None),
    )
    same(either.embed_mixed(mixture), mixed)
    same(await either.aembed_mixed(mixture), mixed)


async def test_a_text_that_is_a_data_url_is_its_image(
    either: NeMoRetrieverEmbeddings, oracle: Oracle
) -> None:
    """As in the sample of NVIDIA's model card, whose URL lacks `;base64`."""
    small = BytesIO()
    Image.new("RGB", (2, 2), "red").save(small, "PNG")
    short = "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()
    texts = [
        "a text",
        URLS[0],
        f"data:image/png,{BASE64[1]}",
        f"DATA:image/PNG;base64,{BASE64[2]}",
        short,
        f"see {short}",
        f"{short} is an image",
        f"{short}\nis an image",
        "data:image/png, as a prefix",
        "data: a text",
        "",
    ]
    expected = oracle(
        ("a text", None),
        *((None, png) for png in (*PNGS[:3], small.getvalue())),
        *((text, None) for text in texts[5:]),
    )
    same(either.embed_documents(texts), expected)
    same(await either.aembed_documents(texts), expected)
    same(either.embed_documents(text for text in texts), expected, "a generator")  # type: ignore[arg-type]


async def test_a_model_of_texts_leaves_a_data_url_a_text(
    text_model: NeMoRetrieverEmbeddings,
) -> None:
    texts = ["a text", URLS[0][:200], f"data:image/png,{BASE64[1][:200]}"]
    expected = text_model.embedder.embed(texts)
    same(text_model.embed_documents(texts), expected)
    same(await text_model.aembed_documents(texts), expected)
    with pytest.raises(UnsupportedModalityError, match="'image'"):
        text_model.embed_image(["page.png"])
    with pytest.raises(UnsupportedModalityError, match="'text_image'"):
        await text_model.aembed_text_image(["a text"], ["page.png"])


async def test_one_instead_of_a_list_is_refused(
    model: NeMoRetrieverEmbeddings, files: list[str]
) -> None:
    calls: list[Callable[[Any], Any]] = [
        model.embed_image,
        model.aembed_image,
        model.embed_documents,
        model.aembed_documents,
        model.embed_mixed,
        model.aembed_mixed,
        lambda image: model.embed_text_image(["a text"], image),
        lambda image: model.aembed_text_image(["a text"], image),
    ]
    for call in calls:
        for one in (files[0], URLS[0]):
            with pytest.raises(InputTypeError, match="wrap it in a list"):
                await called(call, one)
    with pytest.raises(InputTypeError, match="2 texts and 1 images"):
        model.embed_text_image(TEXTS[:2], files[:1])


async def test_a_broken_image_is_named(model: NeMoRetrieverEmbeddings, files: list[str]) -> None:
    with pytest.raises(ImageError, match=r"input 0.*no-such\.png"):
        model.embed_image(["no-such.png"])
    with pytest.raises(PartialResultError, match=r"1 of 3 inputs failed.*input 1") as caught:
        await model.aembed_image([files[0], PNGS[1][:90], files[2]])
    assert list(caught.value.errors) == [1]
    with pytest.raises(PartialResultError, match=r"1 of 2 inputs failed.*input 1") as caught:
        model.embed_documents(["a text", "data:image/png;base64,AAAA"])
    same(caught.value.vectors[:1], model.embed_documents(["a text"]))


# --- stores --------------------------------------------------------------------------------------


def check(found: list[tuple[Page, float]], names: list[str], scores: NDArray[Any]) -> None:
    order = np.argsort(-scores)
    assert [each.metadata["name"] for each, _ in found] == [names[i] for i in order]
    same([1 - distance for _, distance in found], scores[order])


async def test_chroma_on_disk_finds_images_when_opened_again(
    model: NeMoRetrieverEmbeddings,
    files: list[str],
    tmp_path: Path,
    oracle: Oracle,
    query: NDArray[Any],
) -> None:
    names = [f"image {seed}" for seed in range(len(files))] + TEXTS
    stored = oracle(*((None, png) for png in PNGS), *((text, None) for text in TEXTS))
    count = len(names)
    for opened in range(3):
        client = chromadb.PersistentClient(str(tmp_path))
        store = Chroma(
            "pages", model, client=client, collection_configuration={"hnsw": {"space": "cosine"}}
        )
        if opened == 0:
            metadata = [{"name": name} for name in names]
            store.add_images(files, metadatas=metadata[: len(files)])
            store.add_texts(TEXTS[:1], metadatas=metadata[-3:-2])
            await store.aadd_texts(TEXTS[1:], metadatas=metadata[-2:])
        check(store.similarity_search_with_score(QUESTION, k=count), names, stored @ query)
        asked = await store.asimilarity_search(QUESTION, k=count)
        assert [each.metadata["name"] for each in asked] == [
            names[i] for i in np.argsort(-(stored @ query))
        ]
        for seed in (2, 4):
            alike = store.similarity_search_by_image(files[seed], k=count)
            scores = stored @ stored[seed]
            assert [each.metadata["name"] for each in alike] == [
                names[i] for i in np.argsort(-scores)
            ]
            assert (alike[0].metadata["name"], alike[0].page_content) == (names[seed], BASE64[seed])
            vector = (await model.aembed_image([files[seed]]))[0]
            found = store.similarity_search_by_vector_with_relevance_scores(vector, k=count)
            check(found, names, scores)
        client.close()


async def test_texts_and_images_in_one_store_in_memory(
    model: NeMoRetrieverEmbeddings, oracle: Oracle, query: NDArray[Any]
) -> None:
    store = InMemoryVectorStore(model)
    pages = [Page(each, metadata={"name": str(i)}) for i, each in enumerate([*TEXTS, *URLS])]
    store.add_documents(pages[:5])
    await store.aadd_documents(pages[5:])
    stored = oracle(*((text, None) for text in TEXTS), *((None, png) for png in PNGS))
    image = model.embed_image([URLS[3]])[0]
    same([image], stored[6:7])
    for scores, found in [
        (stored @ query, store.similarity_search(QUESTION, k=9)),
        (stored @ query, await store.asimilarity_search(QUESTION, k=9)),
        (stored @ stored[6], store.similarity_search_by_vector(image, k=9)),
    ]:
        assert [each.metadata["name"] for each in found] == [str(i) for i in np.argsort(-scores)]


# --- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["images", "texts", "pairs", "mixed"])
async def test_the_loop_goes_on_while_the_model_loads_and_an_image_is_decoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    own = tmp_path / "of its own"  # other tests' engines have another name
    own.symlink_to(folder)
    model = NeMoRetrieverEmbeddings(model=str(own), device="cpu", dtype="float32")
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "images": lambda: model.aembed_image(URLS[:1]),
        "texts": lambda: model.aembed_documents(URLS[:1]),
        "pairs": lambda: model.aembed_text_image(TEXTS[:1], URLS[:1]),
        "mixed": lambda: model.aembed_mixed([Document(image=URLS[0])]),
    }
    await check_that_the_loop_goes_on(monkeypatch, calls[way])
