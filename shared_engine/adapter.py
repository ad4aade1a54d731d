"""Base class of both adapters: the options plus an `Embedder` of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import PrivateAttr

from shared_engine.catalogue import AvailableModel
from shared_engine.embedder import Embedder
from shared_engine.options import Options


class Adapter(Options):  # noqa: PLW1641 - unhashable, as every pydantic model
    """Base of the framework classes; pickles, copies and dumps as its options."""

    _embedder: Embedder = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Create the embedder, which loads nothing before its first use."""
        super().model_post_init(context)
        self._embedder = Embedder(self.replace())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy as pydantic does; a copy with other options gets another embedder."""
        copy = super().model_copy(update=update, deep=deep)
        if update and update.keys() & Options.model_fields.keys():
            copy._embedder = Embedder(copy.replace())
        return copy

    def __eq__(self, other: object) -> bool:
        """Compare the options; whether either object has been used does not matter."""
        return type(self) is type(other) and vars(self) == vars(other)

    @property
    def embedder(self) -> Embedder:
        """The engine: `embedder.embed(...)` returns float32 arrays instead of lists."""
        return self._embedder

    @property
    def available_models(self) -> list[AvailableModel]:
        """The models of the catalogue, or those that the NIM serves (sends a request)."""
        return self._embedder.list_models()

    @classmethod
    def get_available_models(cls, **options: Any) -> list[AvailableModel]:
        """Return the models available with these options; see `available_models`."""
        return cls(**options).available_models
