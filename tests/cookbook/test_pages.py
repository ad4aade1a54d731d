"""Pages: one page as PDF, PNG, JPEG and TIFF is one page, for the engine and in stores.

The weights are random, so nothing is said of what the vectors mean; all on the way to them is real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pypdfium2
import pytest
from langchain_chroma import Chroma
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import ImageDocument, QueryBundle
from llama_index.vector_stores.chroma import ChromaVectorStore

from cookbook.handbook import write
from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Embedder, EmbeddingInput, Options
from tests.support.vl_checkpoints import VLShape, build_vl_checkpoint

ONE_PAGE = {f"multimodal_test.{kind}" for kind in ("pdf-1.png", "png", "jpeg", "tiff")}
"""A page of NVIDIA's in four formats; of the handbook's first we make such files."""


@pytest.fixture(
    scope="module",
    params=["handbook", pytest.param("nvidia-pages", marks=pytest.mark.data("nvidia-pages"))],
)
def pages(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Pictures, and each page of each PDF drawn at 108 dpi."""
    drawn = tmp_path_factory.mktemp("pages")
    folder = drawn / "source"
    if request.param == "handbook":
        write(folder)
        _in_four_formats(folder)
    else:
        folder = data / request.param
    paths = sorted(path for path in folder.iterdir() if path.suffix != ".pdf")
    for pdf in sorted(folder.glob("*.pdf")):
        with pypdfium2.PdfDocument(pdf) as document:
            for number, page in enumerate(document, 1):
                paths.append(drawn / f"{pdf.name}-{number}.png")
                page.render(scale=1.5).to_pil().save(paths[-1], compress_level=1)
    assert len(paths) >= 20
    assert {path.name for path in paths} >= ONE_PAGE
    return paths


def _in_four_formats(folder: Path) -> None:
    """Make a PDF's first page a file of its own, and pictures of it at other resolutions."""
    with (
        pypdfium2.PdfDocument(folder / "files.pdf") as source,
        pypdfium2.PdfDocument.new() as single,
    ):
        single.import_pages(source, [0])
        single.save(folder / "multimodal_test.pdf")
        for kind, scale in {"png": 2, "jpeg": 2, "tiff": 3}.items():
            picture = source[0].render(scale=scale).to_pil()
            picture.save(folder / f"multimodal_test.{kind}")
        del source[0]
        source.save(folder / "files.pdf")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that sees tiles of 64 x 64 pixels."""
    folder = build_vl_checkpoint(tmp_path_factory.mktemp("vl") / "vl", VLShape(image_size=64))
    return {"model": str(folder), "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize("max_tiles", [2, 6])
def test_a_page_is_nearest_to_itself_in_other_formats(
    pages: list[Path], options: dict[str, Any], max_tiles: int
) -> None:
    """And by far: no other page is within four times the distance of its farthest format."""
    with Embedder(Options(**options, max_tiles=max_tiles)) as embedder:
        vectors = embedder.embed([EmbeddingInput(image=path) for path in pages])
    cosines = vectors @ vectors.T
    one = np.array([path.name in ONE_PAGE for path in pages])
    farthest, nearest_other = cosines[one][:, one].min(), cosines[one][:, ~one].max()
    print(f"cosines of one page at least {farthest:.4f}, to others at most {nearest_other:.4f}")
    assert 1 - nearest_other > 4 * (1 - farthest)
    assert len(np.unique(vectors[one].round(4), axis=0)) > 1, "the files are not the same"


def test_both_frameworks_find_a_page_in_any_format_in_a_store_on_disk(
    pages: list[Path], options: dict[str, Any], tmp_path: Path
) -> None:
    """Each framework writes half of the pages, and finds those of the other after a restart."""
    names = [str(path) for path in pages]
    asked = [name for name in names if Path(name).name in ONE_PAGE]
    ours, theirs = NeMoRetrieverEmbeddings(**options), NeMoRetrieverEmbedding(**options)

    client = chromadb.PersistentClient(str(tmp_path))
    chroma = Chroma(
        "pages", ours, client=client, collection_configuration={"hnsw": {"space": "cosine"}}
    )
    half = [name for i, name in enumerate(names) if i % 2]
    chroma.add_images(half, metadatas=[{"file_path": name} for name in half])
    rest = [name for name in names if name not in half]
    IngestionPipeline(
        transformations=[theirs],
        vector_store=ChromaVectorStore(chroma_collection=client.get_collection("pages")),
    ).run(documents=[ImageDocument(image_path=n, metadata={"file_path": n}) for n in rest])
    client.close()

    client = chromadb.PersistentClient(str(tmp_path))
    chroma = Chroma("pages", ours, client=client)
    store = ChromaVectorStore(chroma_collection=client.get_collection("pages"))
    index = VectorStoreIndex.from_vector_store(store, embed_model=theirs)
    by_page = index.as_retriever(similarity_top_k=4)
    for name in asked:
        by_ours = [each.metadata for each in chroma.similarity_search_by_image(name, k=4)]
        query = QueryBundle("", embedding=theirs.get_image_embedding(name))
        by_theirs = [each.metadata for each in by_page.retrieve(query)]
        for found in (by_ours, by_theirs):
            assert found[0]["file_path"] == name
            assert {Path(each["file_path"]).name for each in found} == ONE_PAGE
    question = "how much does a hammer cost?"
    by_text = index.as_retriever(similarity_top_k=len(names)).retrieve(question)
    by_ours = [each.metadata for each in chroma.similarity_search(question, k=len(names))]
    by_theirs = [each.metadata for each in by_text]
    assert [each["file_path"] for each in by_ours] == [each["file_path"] for each in by_theirs]
    assert {each["file_path"] for each in by_ours} == set(names)
    client.close()
