"""NVIDIA NeMo Retriever models for LangChain, loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["NeMoRetrieverEmbeddings", "NeMoRetrieverRerank"]

if TYPE_CHECKING:
    from langchain_nemoretriever.embeddings import NeMoRetrieverEmbeddings
    from langchain_nemoretriever.rerank import NeMoRetrieverRerank
else:
    _MODULES = {"NeMoRetrieverEmbeddings": "embeddings", "NeMoRetrieverRerank": "rerank"}

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return getattr(import_module(f"langchain_nemoretriever.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
