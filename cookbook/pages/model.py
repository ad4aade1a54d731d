"""The models that run: choose, load, and show which they are and where they run."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import standin  # beside this folder, as is `demo`
from demo import Default, choose_model, rerank_options, show

from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Reranker, RerankOptions

DEFAULT = Default(
    "nvidia/llama-nemotron-embed-vl-1b-v2",
    standin.build_multimodal,
    "It is small and its vision tower is random: it finds a page by a picture of that page, "
    "and in words only by its text layer. Judge no model by it.",
    "pages",
)


class Model(NamedTuple):
    """The model that runs."""

    path: Path
    """Its folder, or its name."""
    embed_model: NeMoRetrieverEmbedding
    is_trained: bool


def load_model(args: Namespace) -> Model:
    """Choose the model, load it, and show which it is and where it runs."""
    chosen, why = choose_model(args.model, DEFAULT)
    path = Path(chosen["model"])
    show("Model", f"{path.name if path.is_dir() else path}: {why}")
    show("Switch", DEFAULT.switch)
    embed_model = NeMoRetrieverEmbedding(
        **chosen, device=args.device, max_tiles=args.max_tiles, truncate="END"
    )
    embedder = embed_model.embedder
    show("Runs", embedder.description.removeprefix(str(path)).strip())
    if "image" not in embedder.modalities:
        sys.exit("\nIt takes texts only; `make demo` is for such a model.")
    return Model(path, embed_model, not standin.is_standin(path))


def load_reranker(args: Namespace) -> Reranker | None:
    """Load the reranker that was asked for, if any, and show which it is and where it runs."""
    if not args.rerank:
        return None
    reranker = Reranker(RerankOptions(**rerank_options(args)))
    show("Rerank", reranker.description)
    return reranker


def find_store(args: Namespace, model: Model) -> Path:
    """Return the folder of what was embedded with a model and options that give equal vectors."""
    key = model.embed_model.embedder.cache_key("document")
    return Path(args.store, model.path.name, key).resolve()
