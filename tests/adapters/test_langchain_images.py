"""Images through LangChain: by every method and its async twin, and in stores on disk."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
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
    EmbeddingInput,
    ImageError,
    InputTypeError,
    PartialResultError,
    UnsupportedModalityError,
)
from tests.support.adapters import (
    BASE64,
    CAPTIONS,
    PNGS,
    QUESTION,
    URLS,
    Oracle,
    called,
    check_that_the_loop_goes_on,
    same,
    saved,
)
from tests.support.vl_oracles import numpy_float64


@pytest.fixture(scope="module")
def adapter() -> type[NeMoRetrieverEmbeddings]:
    return NeMoRetrieverEmbeddings


@pytest.fixture(scope="module")
def files(files: list[Path]) -> list[str]:
    """By name, as LangChain's stores take them."""
    return [str(path) for path in files]


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
        "mixed": either.embed_mixed([EmbeddingInput(image=source) for source in sources]),
    }
    for path, vectors in paths.items():
        same(vectors, expected, path)
        assert {type(value) for vector in vectors for value in vector} == {float}
    assert either.embed_image([]) == await either.aembed_image([]) == []


async def test_texts_with_images_and_mixtures(
    either: NeMoRetrieverEmbeddings, files: list[str], oracle: Oracle
) -> None:
    pairs = oracle(*zip(CAPTIONS, PNGS[:3], strict=True))
    same(either.embed_text_image(CAPTIONS, files[:3]), pairs)
    same(await either.aembed_text_image(texts=CAPTIONS, images=files[:3]), pairs)
    mixture: list[str | EmbeddingInput] = [
        CAPTIONS[0],
        EmbeddingInput(image=files[0]),
        EmbeddingInput(CAPTIONS[1], files[1]),
        EmbeddingInput(CAPTIONS[2]),
        URLS[0][:90],
    ]
    mixed = oracle(
        (CAPTIONS[0], None),
        (None, PNGS[0]),
        (CAPTIONS[1], PNGS[1]),
        (CAPTIONS[2], None),
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
        model.embed_text_image(CAPTIONS[:2], files[:1])


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
    names = [f"image {seed}" for seed in range(len(files))] + CAPTIONS
    stored = oracle(*((None, png) for png in PNGS), *((text, None) for text in CAPTIONS))
    count = len(names)
    for opened in range(3):
        client = chromadb.PersistentClient(str(tmp_path))
        store = Chroma(
            "pages", model, client=client, collection_configuration={"hnsw": {"space": "cosine"}}
        )
        if opened == 0:
            metadata = [{"name": name} for name in names]
            store.add_images(files, metadatas=metadata[: len(files)])
            store.add_texts(CAPTIONS[:1], metadatas=metadata[-3:-2])
            await store.aadd_texts(CAPTIONS[1:], metadatas=metadata[-2:])
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
    pages = [Page(each, metadata={"name": str(i)}) for i, each in enumerate([*CAPTIONS, *URLS])]
    store.add_documents(pages[:5])
    await store.aadd_documents(pages[5:])
    stored = oracle(*((text, None) for text in CAPTIONS), *((None, png) for png in PNGS))
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
        "pairs": lambda: model.aembed_text_image(CAPTIONS[:1], URLS[:1]),
        "mixed": lambda: model.aembed_mixed([EmbeddingInput(image=URLS[0])]),
    }
    await check_that_the_loop_goes_on(monkeypatch, calls[way])
