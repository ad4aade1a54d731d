"""NVIDIA NeMo Retriever embeddings for LlamaIndex, loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["NeMoRetrieverEmbedding"]

if TYPE_CHECKING:
    from llamaindex_nemoretriever.embedding import NeMoRetrieverEmbedding
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(import_module("llamaindex_nemoretriever.embedding"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
