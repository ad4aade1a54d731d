"""The models of a server: their names in the API, and whether they can compute."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, Generic, TypeVar

from shared_engine import images
from shared_engine.backend import Backend
from shared_engine.catalogue import lookup
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import ConfigurationError
from shared_engine.reranker import Reranker
from shared_engine.routing import select_backend
from shared_engine.server.errors import refuse_for_now
from shared_engine.wire import ROLE

ModelT = TypeVar("ModelT", bound=Embedder | Reranker)


class ServedModel(Generic[ModelT]):
    """A model in this process, loaded in the background."""

    def __init__(self, model: ModelT, served_name: str | None) -> None:
        """Store the model; loads nothing.

        Args:
            served_name: Its name in the API. None: its catalogue name or folder name.

        Raises:
            ConfigurationError: the options, or NVIDIA_BASE_URL, select a NIM.
        """
        self.model = model
        options = model.options
        if (selected := select_backend(options)).base_url is not None:
            raise ConfigurationError(
                f"a server runs its model in this process, but {selected.reason}; remove that "
                "setting"
            )
        self.task = options.task
        self.suffixes = ["", *(f"-{word}" for word in ROLE)] if self.task == "embed" else [""]
        """Endings of the names under which it is listed."""
        given = options.local_model
        spec = lookup(given)
        own_name = spec.name if spec else Path(given).name if Path(given).is_dir() else given
        self.name = served_name or own_name
        names = {self.name, *(spec.names if spec else ())}
        names |= {name.removeprefix("nvidia/") for name in names}
        self.names = frozenset(name.lower() for name in names)
        """The names that requests may have, in lower case."""
        self.failure: Exception | None = None
        self.backend: Backend | None = None
        """None until the model has computed an input."""
        self._root = spec.name if spec else self.name
        self._created = int(time.time())

    async def load(self) -> Backend:
        """Load the model and compute samples, as the first call of a kernel is slow.

        Raises:
            Exception: the model cannot be loaded; `failure` has it, too.
        """
        try:
            backend = await asyncio.to_thread(self.model.load)
            await self._compute(EmbeddingInput("ready"))
            if "image" in backend.modalities:
                await self._compute(EmbeddingInput(image=images.draw_sample(512, 512)))
        except Exception as exc:
            self.failure = exc
            raise
        self.backend = backend
        return backend

    async def _compute(self, document: EmbeddingInput) -> None:
        if isinstance(self.model, Embedder):
            role: Role = "query" if document.image is None else "document"
            await self.model.aembed([document], role)
        else:
            await self.model.ascore("ready", [document])

    def require_backend(self) -> Backend:
        """Return the backend of the loaded model.

        Raises:
            HTTPRefusal: the model is loading, or could not be loaded.
        """
        if self.backend is None:
            raise refuse_for_now(
                f"the model cannot be served: {self.failure}"
                if self.failure
                else "the model is loading",
                5,
            )
        return self.backend

    @property
    def state(self) -> str:
        """Whether it can compute: "ready", or the reason that a readiness probe gets."""
        if self.backend is None:
            return "failed to load" if self.failure else "loading"
        if self.backend.failure is not None:
            return "the device has failed; restart the process"
        return "ready"

    def find_suffix(self, name: str) -> str | None:
        """Return the suffix of one of its names; None for the name of another model."""
        ends = (end for end in self.suffixes if name.lower() in {own + end for own in self.names})
        return next(ends, None)

    def describe(self, suffix: str) -> dict[str, Any]:
        """Return an item of /v1/models."""
        return {
            "id": self.name + suffix,
            "object": "model",
            "created": self._created,
            "owned_by": "nemoretriever",
            "root": self._root,
        }

    async def read_facts(self) -> dict[str, Any]:
        """Return its inputs and outputs; empty until it is loaded."""
        if (backend := self.backend) is None:
            return {}
        facts: dict[str, Any] = {"modalities": sorted(backend.modalities)}
        if self.task == "embed":
            facts["dimensions"] = list(backend.dimensions)
        facts["fingerprint"] = await asyncio.to_thread(lambda: backend.fingerprint)
        return facts
