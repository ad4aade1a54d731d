"""What goes in: documents and their role."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, TypeVar

from shared_engine import images
from shared_engine.errors import InputError, InputTypeError, UnsupportedModalityError

Role = Literal["query", "document"]
"""Which side of the search a text is on. The models are asymmetric: the role chooses the prefix.
On the wire and in the prompt a document is called "passage"."""

Modality = Literal["text", "image", "text_image"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Document:
    """A text, an image, or both as one. A plain `str` anywhere means `Document(text=...)`."""

    text: str | None = None
    image: Any = None
    """A path, a file:// or data: URL, base64, bytes of a file, a binary file, or a Pillow image."""

    @property
    def modality(self) -> Modality:
        """The kind of input, in the words of a NIM, which refuses a blank text with an image."""
        if self.image is None:
            return "text"
        return "text_image" if self.text and not str(self.text).isspace() else "image"


_HEAD = re.compile(r"data:image/[\w.+-]+(;[^;,\s]+)*,", re.ASCII | re.IGNORECASE)
_LONGEST_HEAD = 256
_BASE64 = re.compile(
    r"(?:(?:[A-Za-z0-9+/]++|%[0-9A-F]{2})*+"  # in one line, or in lines as in an e-mail
    r"|(?:[A-Za-z0-9+/]{1,76}+\r?\n)++[A-Za-z0-9+/]{0,76}+)"
    r"(?:=|%3D){0,2}[\r\n]*+",
    re.IGNORECASE,
)
_ESCAPED = re.compile(
    r"[\w.~/+-]*+(?:%[0-9A-F]{2}[\w.~/+=-]*+)++[\r\n]*+", re.ASCII | re.IGNORECASE
)


def is_data_url(text: object) -> bool:
    """Tell whether a text is nothing but an image as a data URL, from its first to its last letter.

    The body is base64, in one line or in lines of at most 76, or bytes as URLs escape them. Where
    one letter of it could not be, the whole is a text.

    >>> is_data_url("data:image/png;base64,iVBORw0KGgo=")
    True
    >>> is_data_url("data:image/png;base64,iVBORw0KGgo=) shows"), is_data_url("data:image/png, a")
    (False, False)
    """
    if not isinstance(text, str) or text[:5].lower() != "data:":
        return False
    head = _HEAD.match(text, 0, _LONGEST_HEAD)
    if head is None:
        return False
    if _BASE64.fullmatch(text, head.end()):
        return True
    return not head[0].lower().endswith(";base64,") and bool(_ESCAPED.fullmatch(text, head.end()))


def wrap_images(images: Iterable[Any]) -> list[Document]:
    """Return a document for each image.

    Raises:
        InputTypeError: one image instead of several.
    """
    one = isinstance(images, (str, bytes, bytearray, PathLike)) or hasattr(images, "read")
    if one or not isinstance(images, Iterable):
        raise InputTypeError(
            f"expected a list of images, got one {type(images).__name__}; wrap it in a list"
        )
    return [Document(image=image) for image in images]


def pair_with_images(texts: Iterable[str], images: Iterable[Any]) -> list[Document]:
    """Return a document for each text with the image beside it.

    Raises:
        InputTypeError: one text or image instead of several, or not as many of both.
    """
    texts, pictured = list(require_list(texts)), wrap_images(images)
    if len(texts) != len(pictured):
        raise InputTypeError(
            f"has no partner: got {len(texts)} texts and {len(pictured)} images",
            index=min(len(texts), len(pictured)),
        )
    return [replace(document, text=text) for text, document in zip(texts, pictured, strict=True)]


def validate(
    documents: Iterable[str | Document], role: Role, modalities: frozenset[Modality]
) -> list[Document]:
    """Return the inputs as documents, or raise the error of the first that cannot be embedded.

    Images are not opened yet, but an open file is read.

    Raises:
        InputTypeError: not a `str` or `Document`, a text that no UTF-8 can carry, or an image of a
            type that none comes in.
        UnsupportedModalityError: a kind of input that is not among `modalities`, or an image as a
            query.
        ImageError: an open file cannot be read, or is too large.
    """
    accepted = []
    for index, item in enumerate(require_list(documents)):
        try:
            accepted.append(validate_document(item, role, modalities))
        except InputError as exc:
            raise exc.at(index) from exc.__cause__
    return accepted


def require_list(documents: _T) -> _T:
    """Return what was given, unless it is one document alone.

    Raises:
        InputTypeError: it is; a string would be taken for a list of its characters.
    """
    if isinstance(documents, (str, Document)):
        raise InputTypeError(
            f"expected a list of documents, got one {type(documents).__name__}; "
            "wrap it in a list: embed([...])"
        )
    return documents


def validate_document(item: object, role: Role, modalities: frozenset[Modality]) -> Document:
    """Do as `validate` does with one input."""
    document = Document(text=item) if isinstance(item, str) else item
    if not isinstance(document, Document):
        raise InputTypeError(f"is of type {type(item).__name__}; expected a str or a Document")
    if document.modality not in modalities:
        raise UnsupportedModalityError(
            f"is of modality {document.modality!r}, but this model takes only "
            f"{', '.join(sorted(modalities))}"
        )
    text = document.text
    if document.image is not None:
        blank = isinstance(text, str) and document.modality == "image"
        image = _accept(document.image, role)
        document = replace(document, text=None if blank else text, image=image)
    elif text is None:
        raise InputTypeError("has neither text nor image")
    if text is not None and not isinstance(text, str):
        raise InputTypeError(f"has a text of type {type(text).__name__}; expected a str")
    if text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InputTypeError(
                f"holds a lone surrogate (U+{ord(text[exc.start]):04X}) at character "
                f"{exc.start}, which no encoding can carry; decode its source again, or use "
                'text.encode("utf-8", "replace").decode()'
            ) from None
    return document


def _accept(image: object, role: Role) -> object:
    if role == "query":
        raise UnsupportedModalityError(
            "has an image, and these models take queries as text only; to search by image, embed "
            'it with role="document"'
        )
    return images.accept(image)
