"""NVIDIA NeMo Retriever embeddings: one engine for Python, LangChain and LlamaIndex."""

from shared_engine.backend import Backend, Request
from shared_engine.catalogue import CATALOGUE, ModelSpec
from shared_engine.documents import Document, Modality, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import (
    CheckpointError,
    ConfigurationError,
    DeviceMemoryError,
    EngineClosedError,
    EngineError,
    InputError,
    InputTooLongError,
    InputTypeError,
    MissingExtraError,
    NeMoRetrieverError,
    NonFiniteVectorError,
    PartialResultError,
    UnsupportedDimensionsError,
    UnsupportedModalityError,
)
from shared_engine.options import Options
from shared_engine.vectors import EmbeddingType, quantize

__version__ = "0.1.0"

__all__ = [
    "CATALOGUE",
    "Backend",
    "CheckpointError",
    "ConfigurationError",
    "DeviceMemoryError",
    "Document",
    "Embedder",
    "EmbeddingType",
    "EngineClosedError",
    "EngineError",
    "InputError",
    "InputTooLongError",
    "InputTypeError",
    "MissingExtraError",
    "Modality",
    "ModelSpec",
    "NeMoRetrieverError",
    "NonFiniteVectorError",
    "Options",
    "PartialResultError",
    "Request",
    "Role",
    "UnsupportedDimensionsError",
    "UnsupportedModalityError",
    "quantize",
]
