"""What goes in: documents and their role."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from shared_engine.errors import InputTypeError, UnsupportedModalityError

Role = Literal["query", "document"]
"""Which side of the search a text is on. The models are asymmetric: the role chooses the prefix.
On the wire and in the prompt a document is called "passage"."""

Modality = Literal["text", "image", "text_image"]


@dataclass(frozen=True, slots=True)
class Document:
    """A text, an image, or both as one. A plain `str` anywhere means `Document(text=...)`."""

    text: str | None = None
    image: Any = None

    @property
    def modality(self) -> Modality:
        """The kind of input, in the words of a NIM."""
        if self.image is None:
            return "text"
        return "text_image" if self.text else "image"


def checked(documents: Iterable[str | Document], modalities: frozenset[Modality]) -> list[Document]:
    """Return the inputs as documents, or raise the error of the first that cannot be embedded.

    Raises:
        InputTypeError: not a `str` or `Document`, or a text that no UTF-8 can carry.
        UnsupportedModalityError: a kind of input that is not among `modalities`.
    """
    if isinstance(documents, (str, Document)):
        raise InputTypeError(
            f"expected a list of documents, got one {type(documents).__name__}; "
            "wrap it in a list: embed([...])"
        )
    return [_checked(item, index, modalities) for index, item in enumerate(documents)]


def _checked(item: object, index: int, modalities: frozenset[Modality]) -> Document:
    document = Document(text=item) if isinstance(item, str) else item
    if not isinstance(document, Document):
        raise InputTypeError(
            f"input {index} is of type {type(item).__name__}; expected a str or a Document",
            index=index,
        )
    if document.modality not in modalities:
        raise UnsupportedModalityError(
            f"input {index} is of modality {document.modality!r}, but this model takes only "
            f"{', '.join(sorted(modalities))}",
            index=index,
        )
    text = document.text
    if text is None and document.image is None:
        raise InputTypeError(f"input {index} has neither text nor image", index=index)
    if text is not None and not isinstance(text, str):
        raise InputTypeError(
            f"input {index} has a text of type {type(text).__name__}; expected a str", index=index
        )
    if text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InputTypeError(
                f"input {index} holds a lone surrogate (U+{ord(text[exc.start]):04X}) at character "
                f"{exc.start}, which no encoding can carry; decode its source again, or use "
                'text.encode("utf-8", "replace").decode()',
                index=index,
            ) from None
    return document
