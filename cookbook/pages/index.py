"""Each page as three documents of the model, in three collections: LlamaIndex over Chroma on disk.

text ...... the passages of its text layer
picture ... what it looks like
both ...... the picture and the text layer as one
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chromadb
import numpy as np
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.schema import BaseNode, ImageNode, TextNode, TransformComponent
from llama_index.core.vector_stores import VectorStoreQuery
from llama_index.vector_stores.chroma import ChromaVectorStore
from pages.files import Page
from pages.passages import drop_furniture, is_passage

from llamaindex_nemoretriever import NeMoRetrieverEmbedding

KINDS = ("text", "picture", "both")
PASSAGE, OVERLAP = 64, 16  # tokens
PER_PAGE = 48  # passages, about; so many are asked for to find one page more


class Hit(NamedTuple):
    """A page that was found."""

    file: str
    number: int
    score: float
    """Cosine similarity."""
    passage: str
    """What of its text layer was found; empty where its picture was."""


class _KeepPassages(TransformComponent):
    """Drops what a splitter made of dots and numbers."""

    def __call__(self, nodes: Sequence[BaseNode], **_: Any) -> list[BaseNode]:
        """Return the nodes that are pictures or have a word."""
        return [
            node for node in nodes if isinstance(node, ImageNode) or is_passage(node.get_content())
        ]


class Index:
    """The vectors of all pages."""

    def __init__(self, folder: Path, model: NeMoRetrieverEmbedding) -> None:
        self._model = model
        settings = chromadb.config.Settings(anonymized_telemetry=False)
        self._client = chromadb.PersistentClient(folder, settings)
        self._collections = {
            kind: self._client.get_or_create_collection(
                kind, configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
            )
            for kind in KINDS
        }
        self._stores = {
            kind: ChromaVectorStore(chroma_collection=collection)
            for kind, collection in self._collections.items()
        }
        splitters = [  # for what is asked, and for a sentence that is remembered
            SentenceSplitter(
                chunk_size=PASSAGE,
                chunk_overlap=OVERLAP,
                id_func=lambda i, node: f"{node.node_id}#{i}",  # stable ids
            ),
            SentenceWindowNodeParser.from_defaults(
                window_size=1, id_func=lambda i, node: f"{node.node_id}#sentence-{i}"
            ),
        ]
        self._pipelines = {
            kind: [
                IngestionPipeline(
                    transformations=[*before, _KeepPassages(), model],
                    vector_store=store,
                    disable_cache=True,  # the ids tell what is there
                )
                for before in ([[one] for one in splitters] if kind == "text" else [[]])
            ]
            for kind, store in self._stores.items()
        }

    def add(self, pages: Sequence[Page]) -> None:
        """Embed the pages that are not there yet."""
        new = self.lacks(pages)
        for kind in KINDS:
            if nodes := [node for page in new if (node := _node(page, kind))]:
                for pipeline in self._pipelines[kind]:
                    pipeline.run(nodes=nodes)

    def lacks(self, pages: Iterable[Page]) -> list[Page]:
        """Return the pages that are not there."""
        known = {page.id: page for page in pages}
        stored = self._collections["both"].get(list(known), include=[])["ids"]  # added last
        return [page for id_, page in known.items() if id_ not in set(stored)]

    def remove(self, file: str) -> None:
        """Forget the pages of a file."""
        for collection in self._collections.values():
            collection.delete(where={"file": file})

    def forget_others(self, files: Iterable[str]) -> None:
        """Forget the pages of all files but these."""
        known = set(files)
        for collection in self._collections.values():
            stored = collection.get(include=["metadatas"])["metadatas"]
            for file in {row["file"] for row in stored} - known:
                collection.delete(where={"file": file})

    def embed_words(self, words: str) -> list[float]:
        """Return the vector of a question."""
        return self._model.get_query_embedding(words)

    def embed_picture(self, path: Path) -> list[float]:
        """Return the vector of a picture to search with."""
        return self._model.get_image_embedding(str(path))

    def read_vector(self, page: Page, kind: str) -> list[float] | None:
        """Return the vector of a page; of its passages the mean; None where it has no text."""
        where = {"page": page.id}
        found = self._collections[kind].get(where=where, include=["embeddings"])["embeddings"]
        if not len(found):
            return None
        mean: list[float] = np.asarray(found).mean(axis=0).tolist()
        return mean

    def measure(self, vectors: list[list[float]], kind: str) -> list[float]:
        """Return the cosine of each vector and the page or passage that is nearest to it."""
        found = self._collections[kind].query(
            query_embeddings=vectors, n_results=1, include=["distances"]
        )
        return [1 - distance for (distance,) in found["distances"] or ()]

    def search(self, vector: list[float], kind: str, top: int) -> list[Hit]:
        """Return the pages nearest to a vector, best first."""
        asked = top * PER_PAGE if kind == "text" else top
        query = VectorStoreQuery(query_embedding=vector, similarity_top_k=asked)
        result = self._stores[kind].query(query)
        hits: dict[str, Hit] = {}
        for node, similarity in zip(result.nodes or (), result.similarities or (), strict=True):
            data = node.metadata
            # Chroma gives 1 - cosine; LlamaIndex makes exp(-(1 - cosine)) of it.
            score = 1 + float(np.log(similarity))
            passage = node.get_content() if kind == "text" else ""
            hits.setdefault(data["page"], Hit(data["file"], data["number"], score, passage))
        return list(hits.values())[:top]


def _node(page: Page, kind: str) -> BaseNode | None:
    """Return a page as LlamaIndex takes it; None where it has no text to be found by."""
    metadata = {"page": page.id, "file": page.file, "number": page.number}
    keep_out = {"excluded_embed_metadata_keys": list(metadata)}
    if kind == "text":
        text = drop_furniture(page.text)
        if not is_passage(text):
            return None
        # The splitter counts what a language model would be shown, too.
        keep_out["excluded_llm_metadata_keys"] = list(metadata)
        return TextNode(id_=page.id, text=text, metadata=metadata, **keep_out)
    text = page.text if kind == "both" else ""
    path = str(page.picture)
    return ImageNode(id_=page.id, text=text, image_path=path, metadata=metadata, **keep_out)
