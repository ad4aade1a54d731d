"""Base classes of the adapters: the options plus an `Embedder` or `Reranker` of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, Field, PrivateAttr

from shared_engine.catalogue import AvailableModel
from shared_engine.documents import EmbeddingInput
from shared_engine.embedder import Embedder
from shared_engine.model import Model
from shared_engine.options import EngineOptions, Options, RerankOptions
from shared_engine.reranker import RankedDocument, Reranker
from shared_engine.threads import run_off_loop


class Adapter(EngineOptions):  # noqa: PLW1641 - unhashable, as every pydantic model
    """Base of the framework classes; pickles, copies and dumps as its options."""

    _engine_type: ClassVar[type[Model[Any]]]
    _engine: Model[Any] = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Create the engine, which loads nothing before its first use."""
        super().model_post_init(context)
        self._engine = self._engine_type(self.replace())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy as `EngineOptions` does; a copy with other options gets another engine."""
        copy = super().model_copy(update=update, deep=deep)
        if any(getattr(copy, name) != getattr(self, name) for name in self.names_of()):
            copy._engine = copy._engine_type(copy.replace())
        return copy

    def __eq__(self, other: object) -> bool:
        """Compare the options; whether either object has been used does not matter."""
        return type(self) is type(other) and vars(self) == vars(other)

    @property
    def available_models(self) -> list[AvailableModel]:
        """The models of the catalogue, or those that the NIM serves (sends a request)."""
        return self._engine.list_models()

    @classmethod
    def get_available_models(cls, **options: Any) -> list[AvailableModel]:
        """Return the models available with these options; see `available_models`."""
        return cls(**options).available_models

    def _drop_images(self, documents: list[EmbeddingInput]) -> list[EmbeddingInput]:
        """Return the inputs without the images of texts if the model takes no images.

        An image without a text stays, and the engine refuses it. Loads the model if there are
        images.
        """
        if all(each.image is None for each in documents) or "image" in self._engine.modalities:
            return documents
        return [
            EmbeddingInput(each.text) if each.modality == "text_image" else each
            for each in documents
        ]


class EmbeddingAdapter(Options, Adapter):
    """Base of the framework classes that embed."""

    _engine_type = Embedder
    _engine: Embedder = PrivateAttr()

    @property
    def embedder(self) -> Embedder:
        """The engine: `embedder.embed(...)` returns float32 arrays instead of lists."""
        return self._engine


class RerankAdapter(RerankOptions, Adapter):
    """Base of the framework classes that rerank."""

    model_config = ConfigDict(validate_assignment=True)  # options are frozen, other fields not

    top_n: int | None = Field(
        default=5, ge=0, description="Number of documents to return. None returns all."
    )

    _engine_type = Reranker
    _engine: Reranker = PrivateAttr()

    @property
    def reranker(self) -> Reranker:
        """The engine: `reranker.score(...)` returns a float32 array, in the caller's order."""
        return self._engine

    def _rank(self, query: str, documents: list[EmbeddingInput]) -> list[RankedDocument]:
        """Return the best `top_n` documents; an empty result loads nothing."""
        if not documents or self.top_n == 0:
            return []
        return self._engine.rank(query, self._drop_images(documents), self.top_n)

    async def _arank(self, query: str, documents: list[EmbeddingInput]) -> list[RankedDocument]:
        if not documents or self.top_n == 0:
            return []
        documents = await run_off_loop(self._drop_images, documents)
        return await self._engine.arank(query, documents, self.top_n)
