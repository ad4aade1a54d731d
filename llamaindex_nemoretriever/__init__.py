"""NVIDIA NeMo Retriever models for LlamaIndex, loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["NeMoRetrieverEmbedding", "NeMoRetrieverRerank"]

if TYPE_CHECKING:
    from llamaindex_nemoretriever.embedding import NeMoRetrieverEmbedding
    from llamaindex_nemoretriever.rerank import NeMoRetrieverRerank
else:
    _MODULES = {"NeMoRetrieverEmbedding": "embedding", "NeMoRetrieverRerank": "rerank"}

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return getattr(import_module(f"llamaindex_nemoretriever.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
