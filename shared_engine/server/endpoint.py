"""The interface of the paths of POST requests, which `app.py` calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

from numpy.typing import NDArray

from shared_engine.backend import Backend
from shared_engine.documents import EmbeddingInput
from shared_engine.embedder import Embedder
from shared_engine.reranker import Reranker
from shared_engine.server.errors import refuse_model
from shared_engine.server.models import ServedModel
from shared_engine.server.protocol import BodyT


@dataclass(frozen=True)
class Work:
    """A valid request: its inputs, and how they are computed and written."""

    inputs: list[EmbeddingInput]
    """An image is still the data URL from the request."""
    label: str
    """Value of `input_type` in the metrics."""
    model: Embedder | Reranker
    """Computes them, and counts the tokens of this request alone."""
    compute: Callable[[list[EmbeddingInput]], Coroutine[Any, Any, NDArray[Any]]]
    """Returns the values of the inputs with their images decoded."""
    write: Callable[[NDArray[Any]], bytes]
    """Returns the body of the response."""


class Endpoint(ABC, Generic[BodyT]):
    """A path, the form of its requests, and the model that computes them."""

    path: ClassVar[str]
    body: type[BodyT]
    max_inputs: ClassVar[int | None] = None
    """The most inputs of a request, where the protocol limits them."""
    too_long_status: ClassVar[int] = 400
    """Status of an input that is too long."""

    def __init__(self, served: ServedModel[Any]) -> None:
        self.served = served

    def check_model(self, name: str) -> str:
        """Return the suffix of the model's name; refuse the name of another model."""
        if (suffix := self.served.find_suffix(name)) is None:
            raise refuse_model(name, f" at {self.path}, which serves {self.served.name!r}")
        return suffix

    @abstractmethod
    def prepare(self, body: BodyT, backend: Backend) -> Work:
        """Return the work of a request.

        Raises:
            HTTPRefusal: it is for another model, or not valid for this one.
        """
