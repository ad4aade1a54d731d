"""What both adapters have in common: they are their options, and carry an embedder of them."""

from __future__ import annotations

from pydantic import PrivateAttr

from shared_engine.embedder import Embedder
from shared_engine.options import Options


class Adapter(Options):  # noqa: PLW1641 - unhashable, as every pydantic model
    """Base of the framework classes; pickles, copies and dumps as its options."""

    _embedder: Embedder | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Compare the options: whether one of them was used already makes no difference."""
        return type(self) is type(other) and vars(self) == vars(other)

    @property
    def embedder(self) -> Embedder:
        """The engine's door, for float32 arrays instead of lists: `embedder.embed(...)`."""
        options = Options(**{name: getattr(self, name) for name in Options.model_fields})
        if self._embedder is None or self._embedder.options != options:  # after model_copy(update=)
            self._embedder = Embedder(options)
        return self._embedder
