"""NVIDIA NeMo Retriever embeddings: one engine for Python, LangChain and LlamaIndex."""

from shared_engine.backend import Backend, Request
from shared_engine.catalogue import CATALOGUE, ModelSpec
from shared_engine.documents import Document, Modality, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import (
    AuthenticationError,
    CheckpointError,
    ConfigurationError,
    ConnectionFailedError,
    DeviceMemoryError,
    EngineClosedError,
    EngineError,
    ImageError,
    ImageTooLargeError,
    InputError,
    InputTooLongError,
    InputTypeError,
    InvalidRequestError,
    MalformedResponseError,
    MissingExtraError,
    ModelNotFoundError,
    NeMoRetrieverError,
    NonFiniteVectorError,
    PartialResultError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    RemoteError,
    RequestTimeoutError,
    ServerError,
    UnsupportedDimensionsError,
    UnsupportedModalityError,
)
from shared_engine.options import Options
from shared_engine.stream import AsyncStream, Stream
from shared_engine.usage import TokenCount, count_tokens
from shared_engine.vectors import EmbeddingType, quantize

__version__ = "0.1.0"

__all__ = [
    "CATALOGUE",
    "AsyncStream",
    "AuthenticationError",
    "Backend",
    "CheckpointError",
    "ConfigurationError",
    "ConnectionFailedError",
    "DeviceMemoryError",
    "Document",
    "Embedder",
    "EmbeddingType",
    "EngineClosedError",
    "EngineError",
    "ImageError",
    "ImageTooLargeError",
    "InputError",
    "InputTooLongError",
    "InputTypeError",
    "InvalidRequestError",
    "MalformedResponseError",
    "MissingExtraError",
    "Modality",
    "ModelNotFoundError",
    "ModelSpec",
    "NeMoRetrieverError",
    "NonFiniteVectorError",
    "Options",
    "PartialResultError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "RateLimitError",
    "RemoteError",
    "Request",
    "RequestTimeoutError",
    "Role",
    "ServerError",
    "Stream",
    "TokenCount",
    "UnsupportedDimensionsError",
    "UnsupportedModalityError",
    "count_tokens",
    "quantize",
]
