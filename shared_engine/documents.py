"""What goes in: documents and their role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from shared_engine import images
from shared_engine.errors import InputError, InputTypeError, UnsupportedModalityError

Role = Literal["query", "document"]
"""Which side of the search a text is on. The models are asymmetric: the role chooses the prefix.
On the wire and in the prompt a document is called "passage"."""

Modality = Literal["text", "image", "text_image"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """A text, an image, or both as one. A plain `str` anywhere means `EmbeddingInput(text=...)`."""

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


def wrap_images(images: Iterable[Any]) -> list[EmbeddingInput]:
    """Return a document for each image.

    Raises:
        InputTypeError: one image instead of several, or nothing that holds images.
    """
    return [EmbeddingInput(image=image) for image in require_list(images, "images")]


def pair_with_images(texts: Iterable[str], images: Iterable[Any]) -> list[EmbeddingInput]:
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
    return [
        EmbeddingInput(text, beside.image) for text, beside in zip(texts, pictured, strict=True)
    ]


def validate(
    documents: Iterable[str | EmbeddingInput],
    role: Role,
    modalities: frozenset[Modality],
    data_urls: bool = False,
) -> list[EmbeddingInput]:
    """Return the inputs as documents, or raise the error of the first invalid one.

    Images are not opened yet, but an open file is read.

    Args:
        data_urls: Take a text that is the data URL of an image for that image, if the model takes
            images.

    Raises:
        InputTypeError: not a `str` or `EmbeddingInput`, a text that is not valid Unicode, or an
            image of an unsupported type.
        UnsupportedModalityError: a kind of input that is not among `modalities`, or an image as a
            query.
        ImageError: an open file cannot be read, or is too large.
    """
    accepted: list[EmbeddingInput] = []
    data_urls = data_urls and "image" in modalities
    for index, item in enumerate(require_list(documents)):
        is_image = data_urls and is_data_url(item)
        document = EmbeddingInput(image=item) if is_image else item
        try:
            accepted.append(validate_document(document, role, modalities))
        except InputError as exc:
            raise exc.at(index) from exc.__cause__
    return accepted


def require_list(items: _T, kind: Literal["documents", "images"] = "documents") -> _T:
    """Return what was given, unless it is one document or image alone, or cannot hold any.

    Raises:
        InputTypeError: a string would be a list of its characters, a dict or a table of its keys.
    """
    is_one = (
        isinstance(items, (EmbeddingInput, bytes, bytearray, memoryview))
        or _read_text(items) is not None
        or _find_hint(items) != ""
        or (kind == "images" and hasattr(items, "read"))
        or not any(hasattr(items, way) for way in ("__iter__", "__aiter__", "__getitem__"))
    )
    if is_one:
        raise InputTypeError(
            f"expected a list of {kind}, got one {_name_type(items)}; wrap it in a list: [...]"
        )
    if isinstance(items, Mapping) or getattr(items, "ndim", 1) != 1:
        raise InputTypeError(
            f"expected a list of {kind}, got a {_name_type(items)}; pass one column or its values"
        )
    return items


def _read_text(item: object) -> str | None:
    """Return a text as a plain `str`: also one of a subclass of it, or of a column of Arrow."""
    if isinstance(item, str):
        return item if type(item) is str else str.__str__(item)
    value = item.as_py() if hasattr(item, "as_py") else None
    return value if isinstance(value, str) else None


def _name_type(item: object) -> str:
    """Return the full name of a type, as it is imported: there are several called Document."""
    kind = type(item)
    public = [part for part in kind.__module__.split(".") if not part.startswith("_")]
    return ".".join([*public, kind.__qualname__]).removeprefix("builtins.")


def _find_hint(item: object) -> str:
    """Return what of an item to embed, or an empty text."""
    if hasattr(item, "page_content"):
        return "; embed its `page_content`"
    if hasattr(item, "get_content"):
        return "; embed its `get_content()`"
    return ""


def validate_document(item: object, role: Role, modalities: frozenset[Modality]) -> EmbeddingInput:
    """Do as `validate` does with one input."""
    document = (
        item if isinstance(item, EmbeddingInput) else EmbeddingInput(text=_require_text(item))
    )
    text, image = document.text, document.image
    if text is not None and (text := _read_text(text)) is None:
        raise InputTypeError(f"has a text of type {_name_type(document.text)}; expected a str")
    if text is None and image is None:
        raise InputTypeError("has neither text nor image")
    if document.modality not in modalities:
        raise UnsupportedModalityError(
            f"is of modality {document.modality!r}, but this model takes only "
            f"{', '.join(sorted(modalities))}"
        )
    if text is not None:
        _check_encodable(text)
    if image is not None:
        image = _accept(image, role)
        text = None if document.modality == "image" else text  # a blank one
    return EmbeddingInput(text, image)


def _require_text(item: object) -> str:
    if (text := _read_text(item)) is not None:
        return text
    hint = _find_hint(item)
    if isinstance(item, (bytes, bytearray, memoryview)):
        hint = "; decode it if it is a text, or use EmbeddingInput(image=...)"
    elif _is_missing(item):
        hint = "; leave out what is missing"
    raise InputTypeError(
        f"is of type {_name_type(item)}; expected a str or a shared_engine.EmbeddingInput{hint}"
    )


def _is_missing(item: object) -> bool:
    """Return whether it is what a column has in its gaps: None, NaN, Arrow's null or pandas' NA."""
    if hasattr(item, "as_py"):
        return item.as_py() is None
    return item is None or isinstance(item, float) or type(item).__name__ in ("NAType", "NaTType")


def _check_encodable(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InputTypeError(
            f"holds a lone surrogate (U+{ord(text[exc.start]):04X}) at character "
            f"{exc.start}, which no encoding can carry; decode its source again, or use "
            'text.encode("utf-8", "replace").decode()'
        ) from None


def _accept(image: object, role: Role) -> object:
    if role == "query":
        raise UnsupportedModalityError(
            "has an image, and these models take queries as text only; to search by image, embed "
            'it with role="document"'
        )
    return images.accept(image)
