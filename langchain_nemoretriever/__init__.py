"""NVIDIA NeMo Retriever embeddings for LangChain, loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["NeMoRetrieverEmbeddings"]

if TYPE_CHECKING:
    from langchain_nemoretriever.embeddings import NeMoRetrieverEmbeddings
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(import_module("langchain_nemoretriever.embeddings"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
