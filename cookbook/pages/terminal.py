"""Ask the pages of PDFs as they look, in a terminal, through both frameworks over one store.

    choose_model ... demo.py: yours, the public one or a stand-in, and why
    read_pages ..... of your PDFs, or of a handbook that is made here (handbook.py)
    ingest ......... LlamaIndex's IngestionPipeline of images ──► Chroma on disk; only what is new
    Search ......... LangChain's and LlamaIndex's image retrieval: by a text, or by another picture;
                     with --rerank, their rerankers order what a text finds

`make pages ARGS=--terminal` sets everything up and runs this; PDF=/path/to/file-or-folder reads
yours.
"""

from __future__ import annotations

import hashlib
import math
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import handbook  # beside this folder, as are `standin` and `demo`
import standin
from demo import (
    Default,
    choose_model,
    is_slow,
    open_collection,
    ordinal,
    rerank_options,
    show,
    show_found,
)
from PIL import Image
from relevance import ELSEWHERE, MIN_LOGIT, NO_ANSWER, find_bound
from tqdm import tqdm

import langchain_nemoretriever
import llamaindex_nemoretriever
from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import PageError, Reranker, RerankOptions
from shared_engine.images.pages import PIXELS, open_pages, walk

if TYPE_CHECKING:
    from chromadb import Collection
    from chromadb.api import ClientAPI
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore

DEFAULT = Default(
    "nvidia/llama-nemotron-embed-vl-1b-v2",
    standin.build_multimodal,
    "It is small and its vision tower is random: it finds a page by a picture of that page, "
    "and in words only by its text layer, in the browser. Judge no model by it.",
    "pages",
)
QUESTIONS = (
    "How do I open a URL and read the response?",
    "How can I read a ZIP archive?",
    "A bar chart whose longest bar is SpooledTemporaryFile",
)
PIXELS_SENT = 1_000  # of the longer side of a picture to search with
BATCH = 16  # pages between two saves
LIMIT, LIMIT_SLOW = 1_000, 8  # pages; the second for a full-size model without a GPU
TOP = 3  # pages that answer a question
CANDIDATES = 40  # pages that a reranker scores


def _turned(picture: Image.Image) -> Image.Image:
    return picture.rotate(2, Image.Resampling.BICUBIC, fillcolor="white")


def _cropped(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    return picture.crop((width // 50, height // 50, width * 49 // 50, height * 49 // 50))


ALTERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "smaller": lambda picture: picture,
    "smaller and turned by 2 degrees": _turned,
    "smaller and without 2 % at each edge": _cropped,
}


@dataclass(frozen=True)
class Page:
    """A page of a PDF."""

    path: Path
    name: str
    """File and number, as shown."""
    id: str
    """The same as long as the name and the bytes of the file are."""
    index: int
    """From 0."""

    def render(self, pixels: int) -> Image.Image:
        """Draw it with so many pixels on its longer side."""
        with open_pages(self.path) as pages:
            picture = pages.read(self.index, "picture", pixels).picture
        assert picture is not None
        return picture


def read_pages(source: Path) -> list[Page]:
    """Return the pages of a PDF, or of all PDFs in a folder; one that cannot be read is named."""
    pages = []
    for path in map(Path, walk(source)) if source.is_dir() else [source]:
        if path != source and path.suffix.lower() != ".pdf":
            continue
        name = path.relative_to(source).as_posix() if source.is_dir() else path.name
        digest = hashlib.sha256(name.encode() + b"\0" + path.read_bytes()).hexdigest()[:24]
        try:
            with open_pages(path, name) as opened:
                places = opened.places
        except PageError as exc:
            show("Skipped", str(exc))
            continue
        pages += [
            Page(path, f"{name}, {place}", f"{digest}-{index + 1}", index)
            for index, place in enumerate(places)
        ]
    return pages


def ingest(
    pages: Sequence[Page], collection: Collection, model: NeMoRetrieverEmbedding, folder: Path
) -> list[Page]:
    """Bring the collection up to date, with pictures in the folder; return the pages that it has.

    A page that cannot be drawn is named and skipped.
    """
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.schema import ImageNode
    from llama_index.vector_stores.chroma import ChromaVectorStore

    def node(page: Page) -> ImageNode | None:
        path = folder / f"{page.id}.png"
        try:
            page.render(PIXELS).save(path, compress_level=1)
        except PageError as exc:
            show("Skipped", str(exc))
            return None
        shown = {"name": page.name, "image": str(path)}
        return ImageNode(id_=page.id, image_path=str(path), metadata=shown)

    folder.mkdir(parents=True, exist_ok=True)
    stored = set(collection.get(include=[])["ids"])
    if gone := stored - {page.id for page in pages}:
        collection.delete(ids=list(gone))
        for id_ in gone:
            (folder / f"{id_}.png").unlink(missing_ok=True)
    pipeline = IngestionPipeline(
        transformations=[model],
        vector_store=ChromaVectorStore(chroma_collection=collection),
        disable_cache=True,  # the ids tell what is there
    )
    new = [page for page in pages if page.id not in stored]
    start = time.perf_counter()
    with tqdm(total=len(new), desc="Embedding", unit=" pages", disable=not new) as bar:
        for first in range(0, len(new), BATCH):
            batch = new[first : first + BATCH]
            nodes = [made for page in batch if (made := node(page))]
            pipeline.run(nodes=nodes)
            stored |= {made.id_ for made in nodes}
            bar.update(len(batch))
    seconds = time.perf_counter() - start
    kept = [page for page in pages if page.id in stored]
    unchanged = len(pages) - len(new)
    added = len(kept) - unchanged
    rate = f" in {seconds:.1f} s ({added / seconds:.1f} a second)" if new else ""
    print(f"{added:,} embedded{rate}, {unchanged:,} unchanged, {len(gone):,} removed")
    return kept


class Found(NamedTuple):
    """What both frameworks find: cosine similarities by name of a page, best first."""

    langchain: dict[str, float]
    llamaindex: dict[str, float]
    seconds: tuple[float, float]
    notes: dict[str, str]
    """The rank of each page before the reranker, in words; empty without one."""
    best: float
    """Score of the first page: its logit after a reranker, else its cosine."""


class Search:
    """One collection behind both frameworks."""

    def __init__(
        self,
        client: ClientAPI,
        collection: Collection,
        options: dict[str, Any],
        rerank: dict[str, Any] | None = None,
    ) -> None:
        """Open it; `rerank` has the options of a reranker for what is asked in words."""
        from langchain_chroma import Chroma
        from llama_index.core.indices import MultiModalVectorStoreIndex
        from llama_index.vector_stores.chroma import ChromaVectorStore

        rerank = {**rerank, "top_n": TOP} if rerank else None
        # LangChain
        self._embeddings = NeMoRetrieverEmbeddings(**options)
        self._store = Chroma(
            client=client, collection_name=collection.name, embedding_function=self._embeddings
        )
        self._compressor = langchain_nemoretriever.NeMoRetrieverRerank(**rerank) if rerank else None
        # LlamaIndex
        model = NeMoRetrieverEmbedding(**options)  # equal options: one loaded model
        vector_store = ChromaVectorStore(chroma_collection=collection)
        index = MultiModalVectorStoreIndex.from_vector_store(
            vector_store,
            embed_model=model,
            image_vector_store=vector_store,
            image_embed_model=model,
        )
        self._retriever = index.as_retriever(image_similarity_top_k=CANDIDATES if rerank else TOP)
        self._postprocessor = (
            llamaindex_nemoretriever.NeMoRetrieverRerank(**rerank) if rerank else None
        )

    def by_text(self, question: str) -> Found:
        """Find pages by what one asks, in the order of the reranker if there is one."""

        def langchain() -> list[Document]:
            asked = CANDIDATES if self._compressor else TOP
            found = _note_documents(self._store.similarity_search_with_score(question, k=asked))
            return (
                self._compressor.compress_documents(found, question) if self._compressor else found
            )

        def llamaindex() -> list[NodeWithScore]:
            found = _note_nodes(self._retriever.text_to_image_retrieve(question))
            if self._postprocessor:
                found = self._postprocessor.postprocess_nodes(found, query_str=question)
            return found

        found = self._found(langchain, llamaindex)
        return found if self._compressor else found._replace(notes={})

    def by_picture(self, path: Path) -> Found:
        """Find pages by what they look like."""
        found = self._found(
            # similarity_search_by_image(path) does the same and keeps the scores back.
            lambda: _note_documents(
                self._store.similarity_search_by_vector_with_relevance_scores(
                    self._embeddings.embed_image([path])[0], k=TOP
                )
            ),
            lambda: _note_nodes(self._retriever.image_to_image_retrieve(str(path))[:TOP]),
        )
        return found._replace(notes={})

    def _found(
        self,
        langchain: Callable[[], list[Document]],
        llamaindex: Callable[[], list[NodeWithScore]],
    ) -> Found:
        start = time.perf_counter()
        left = {document.metadata["name"]: document.metadata for document in langchain()}
        first = next(iter(left.values()))
        between = time.perf_counter()
        right = {node.metadata["name"]: node.metadata for node in llamaindex()}
        end = time.perf_counter()
        return Found(
            {name: known["cosine"] for name, known in left.items()},
            {name: known["cosine"] for name, known in right.items()},
            (between - start, end - between),
            {name: f"was {ordinal(known['rank'])}" for name, known in (right | left).items()},
            first.get("relevance_score", first["cosine"]),
        )

    def find_bound(self) -> float:
        """Return the lowest score of a page that answers a question."""
        if self._compressor:
            return MIN_LOGIT
        found = (self._store.similarity_search_with_score(each, k=1) for each in ELSEWHERE)
        return find_bound([1 - distance for ((_, distance),) in found])


def _note_documents(found: Iterable[tuple[Document, float]]) -> list[Document]:
    """Return documents whose metadata has the rank and the cosine similarity."""
    noted = []
    for rank, (document, distance) in enumerate(found, 1):
        document.metadata.update(rank=rank, cosine=1 - distance)  # the distance is 1 - cosine
        noted.append(document)
    return noted


def _note_nodes(found: list[NodeWithScore]) -> list[NodeWithScore]:
    """Return the nodes after noting the rank and the cosine similarity in their metadata."""
    for rank, node in enumerate(found, 1):
        # Chroma gives 1 - cosine; LlamaIndex makes exp(-(1 - cosine)) of it.
        node.metadata.update(rank=rank, cosine=1 + math.log(node.get_score()))
    return found


def look_up(search: Search, pages: Sequence[Page]) -> None:
    """Search with an altered picture of some pages; print where the right one comes."""
    print("\nPictures of pages, drawn anew, altered and saved as JPEG, and what looks like them:")
    step = len(pages) / len(ALTERATIONS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.jpg")
        for number, (how, alter) in enumerate(ALTERATIONS.items()):
            page = pages[int((number + 0.5) * step)]
            alter(page.render(PIXELS_SENT)).convert("RGB").save(path, quality=40)
            found = search.by_picture(path)
            show_found(f"{page.name}: {how}", *found[:4])
            both = {standing(page.name, scores): None for scores in found[:2]}
            print(" " * 24 + f"the right page: {' and '.join(both)}")


def standing(name: str, found: dict[str, float]) -> str:
    """Say at which rank a page is, and how far it is from the best other one.

    >>> standing("a", {"a": 0.75, "b": 0.5}), standing("b", {"a": 0.75, "b": 0.5})
    ('rank 1, 0.250 ahead of the next', 'rank 2, 0.250 behind the first')
    """
    if name not in found:
        return f"not among the first {TOP}"
    others = [score for other, score in found.items() if other != name]
    if not others:
        return "the only one"
    rank = list(found).index(name) + 1
    distance = abs(found[name] - max(others))
    return f"rank {rank}, {distance:.3f} {'behind the first' if rank > 1 else 'ahead of the next'}"


def choose_pages(args: Namespace, source: Path, slow: bool) -> list[Page]:
    """Return the pages to embed, and say which they are."""
    found = read_pages(source)
    pages = found[: args.limit or (LIMIT_SLOW if slow else LIMIT)]
    files = list(dict.fromkeys(page.path.name for page in pages))
    said = f"{len(pages):,} of {', '.join(files[:6])}"
    if len(files) > 6:
        said += f" and {len(files) - 6:,} more"
    if args.pdf is None:
        said += "\nMade of your Python's docstrings and code; PDF=/file/or/folder takes yours."
    if len(pages) < len(found):
        said += f"\nThere are {len(found):,}; --limit takes more."
    show("Pages", said)
    return pages


class Model(NamedTuple):
    """The model that runs."""

    path: Path
    """Its folder, or its name."""
    embed_model: NeMoRetrieverEmbedding
    options: dict[str, Any]
    is_trained: bool
    is_slow: bool


def load_model(args: Namespace) -> Model:
    """Choose the model, load it, and say which it is and where it runs."""
    chosen, why = choose_model(args.model, DEFAULT)
    path = Path(chosen["model"])
    show("Model", f"{path.name if path.is_dir() else path}: {why}")
    show("Switch", DEFAULT.switch)
    options: dict[str, Any] = {
        **chosen,
        "device": args.device,
        "max_tiles": args.max_tiles,
        "truncate": "END",
    }
    embed_model = NeMoRetrieverEmbedding(**options)
    embedder = embed_model.embedder
    show("Runs", embedder.description.removeprefix(str(path)).strip())
    if "image" not in embedder.modalities:
        sys.exit("\nIt takes texts only; `make demo` is for such a model.")
    slow = is_slow(chosen, embedder, args.device)
    return Model(path, embed_model, options, not standin.is_standin(path), slow)


def load_reranker(args: Namespace) -> Reranker | None:
    """Load the reranker that was asked for, if any, and say which it is and where it runs."""
    if not args.rerank:
        return None
    reranker = Reranker(RerankOptions(**rerank_options(args)))
    show("Rerank", reranker.description)
    return reranker


def find_store(args: Namespace, model: Model) -> Path:
    """Return the folder of what was embedded with a model and options that give equal vectors."""
    key = model.embed_model.embedder.cache_key("document")
    return Path(args.store, model.path.name, key).resolve()


def run(args: Namespace) -> None:
    """Say what runs, bring the store up to date, search."""
    model = load_model(args)
    reranker = load_reranker(args)
    if reranker and "image" not in reranker.modalities:
        sys.exit("\nIt takes texts only, and here are pictures; in the browser it reads texts.")
    rerank = rerank_options(args) if args.rerank else None
    if args.pdf is None:
        handbook.write(args.store / "handbook")
    source = (args.pdf or args.store / "handbook").resolve()
    pages = choose_pages(args, source, model.is_slow)

    from chromadb.errors import ChromaError

    folder = find_store(args, model)
    name = f"pages-{hashlib.sha256(str(source).encode()).hexdigest()[:16]}"
    try:
        client, collection = open_collection(folder, name)
        pages = ingest(pages, collection, model.embed_model, folder / name)
    except ChromaError as exc:
        sys.exit(f"\nThe store does not work ({exc}). Delete its folder to start it anew.")
    if not pages:
        sys.exit(f"\n{source} has no page of a PDF.")

    search = Search(client, collection, model.options, rerank)
    print("\nCosine similarity of the results of each framework, and its time:")
    look_up(search, pages)
    questions = args.question or (QUESTIONS if model.is_trained and not args.pdf else ())
    if not model.is_trained:
        print("\nA text finds no page here, because the vision tower of this model is random.")
    elif not questions:
        print("\nmake pages ... ARGS='--question \"...\"' asks in words.")
    lowest = args.min_score
    for question in questions:
        found = search.by_text(question)
        show_found(question, *found[:4])
        lowest = search.find_bound() if lowest is None else lowest
        if found.best < lowest:
            print(f"{NO_ANSWER} These are the nearest pages.")
