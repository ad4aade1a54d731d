"""What both adapters have in common: they are their options, and carry an embedder of them."""

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
        """Make the embedder, which loads nothing before it is used."""
        super().model_post_init(context)
        self._embedder = Embedder(self.replace())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy as pydantic does; a copy with other options has an embedder of its own."""
        copy = super().model_copy(update=update, deep=deep)
        if update and update.keys() & Options.model_fields.keys():
            copy._embedder = Embedder(copy.replace())
        return copy

    def __eq__(self, other: object) -> bool:
        """Compare the options: whether one of them was used already makes no difference."""
        return type(self) is type(other) and vars(self) == vars(other)

    @property
    def embedder(self) -> Embedder:
        """The engine itself, for float32 arrays instead of lists: `embedder.embed(...)`."""
        return self._embedder

    @property
    def available_models(self) -> list[AvailableModel]:
        """The models that can be asked for: the catalogue's, or what the NIM serves; asks it."""
        return self._embedder.list_models()

    @classmethod
    def get_available_models(cls, **options: Any) -> list[AvailableModel]:
        """Return `available_models` of an object with these options."""
        return cls(**options).available_models
