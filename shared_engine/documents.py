"""Inputs of an embedding request: texts and images, their role, and their validation."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from shared_engine import images
from shared_engine.errors import InputError, InputTypeError, UnsupportedModalityError
from shared_engine.images.data_urls import is_data_url

Role = Literal["query", "document"]
"""Side of the search. The models are asymmetric: the role selects the prefix of a text. On the wire
and in the prompt a document is called "passage"."""

Modality = Literal["text", "image", "text_image"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """A text, an image, or both in one vector. A plain `str` means `EmbeddingInput(text=...)`."""

    text: str | None = None
    image: Any = None
    """A path, a file:// or data: URL, base64, bytes of a file, a binary file, or a PIL image."""

    @property
    def modality(self) -> Modality:
        """Kind of input; a blank text with an image counts as an image, as a NIM requires."""
        if self.image is None:
            return "text"
        return "text_image" if self.text and not str(self.text).isspace() else "image"


def join_title(title: str | None, text: str | None) -> str:
    r"""Return the text to embed for a document, joined as BEIR's and MTEB's own models join it.

    >>> join_title("Paris", "The capital of France."), join_title(None, "No title.\n")
    ('Paris The capital of France.', 'No title.')
    """
    return f"{title or ''} {text or ''}".strip()


def wrap_images(images: Iterable[Any]) -> list[EmbeddingInput]:
    """Return an input for each image.

    Raises:
        InputTypeError: a single image, or not an iterable.
    """
    return [EmbeddingInput(image=image) for image in require_list(images, "images")]


def pair_with_images(texts: Iterable[str], images: Iterable[Any]) -> list[EmbeddingInput]:
    """Return an input for each pair of a text and an image.

    Raises:
        InputTypeError: a single text or image, or different numbers of texts and images.
    """
    texts, images = list(require_list(texts)), list(require_list(images, "images"))
    if len(texts) != len(images):
        raise InputTypeError(
            f"has no partner: got {len(texts)} texts and {len(images)} images",
            index=min(len(texts), len(images)),
        )
    return [EmbeddingInput(text, image) for text, image in zip(texts, images, strict=True)]


def validate(
    documents: Iterable[str | EmbeddingInput],
    role: Role,
    modalities: frozenset[Modality],
    data_urls: bool = False,
) -> list[EmbeddingInput]:
    """Return the inputs in their final form, or raise the error of the first invalid one.

    Images are not opened yet, except that file objects are read.

    Args:
        documents: Texts and inputs, in any iterable.
        role: The role of all of them.
        modalities: The kinds of input that the model accepts.
        data_urls: If the model accepts images, embed a text that is the data URL of an image as
            that image.

    Raises:
        InputTypeError: not a `str` or `EmbeddingInput`, a text that is not valid Unicode, or an
            image of an unsupported type.
        UnsupportedModalityError: a kind of input that is not among `modalities`, or an image as a
            query.
        ImageError: a file object cannot be read, or is too large.
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


def validate_query(query: object) -> str:
    """Return the query of a reranker as a plain `str`.

    Raises:
        InputTypeError: not a `str`, not valid Unicode, or blank.
    """
    text = _read_text(query)
    if text is None:
        raise InputTypeError(f"expected a query as a str, got one {_name_type(query)}")
    if not text or text.isspace():
        raise InputTypeError("expected a query, got a blank text")
    _check_encodable(text)
    return text


def require_list(items: _T, kind: Literal["documents", "images"] = "documents") -> _T:
    """Return the items unchanged if they are a one-dimensional collection.

    Raises:
        InputTypeError: a single document or image (a string would be a list of its characters), a
            mapping or table (it would be a list of its keys), or not a collection.
    """
    # BaseModel: a framework's document, which is an iterable of its fields
    is_one = (
        isinstance(items, (str, bytes, bytearray, memoryview, EmbeddingInput, BaseModel))
        or (kind == "images" and hasattr(items, "read"))
        or not isinstance(items, (Iterable, AsyncIterable))
    )
    if is_one:
        advice = _find_hint(items) or "; wrap it in a list: [...]"
        raise InputTypeError(f"expected a list of {kind}, got one {_name_type(items)}{advice}")
    if isinstance(items, Mapping) or getattr(items, "ndim", 1) != 1:
        raise InputTypeError(
            f"expected a list of {kind}, got a {_name_type(items)}; pass one column or its values"
        )
    return items


def _read_text(item: object) -> str | None:
    """Return a text as a plain `str`; subclasses of it and scalars of Arrow are texts too."""
    if isinstance(item, str):
        return item if type(item) is str else str.__str__(item)
    value = item.as_py() if hasattr(item, "as_py") else None
    return value if isinstance(value, str) else None


def _name_type(item: object) -> str:
    """Return the full name of a type as users import it: several are called Document."""
    kind = type(item)
    public = [part for part in kind.__module__.split(".") if not part.startswith("_")]
    return ".".join([*public, kind.__qualname__]).removeprefix("builtins.")


def _find_hint(item: object) -> str:
    """Return which part of a document of LangChain or LlamaIndex to embed; "" for other types."""
    if hasattr(item, "page_content"):
        return "; embed its `page_content`"
    if hasattr(item, "get_content"):
        return "; embed its `get_content()`"
    return ""


def validate_document(item: object, role: Role, modalities: frozenset[Modality]) -> EmbeddingInput:
    """Validate one input; see `validate`."""
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
            f"is of modality {document.modality!r}, but this model accepts only "
            f"{', '.join(sorted(modalities))}"
        )
    if text is not None:
        _check_encodable(text)
    if image is not None:
        if role == "query":
            raise UnsupportedModalityError(
                "has an image, but queries are text only; to search by image, embed it with "
                'role="document"'
            )
        image = images.accept(image)
        text = None if document.modality == "image" else text  # a blank one
    return EmbeddingInput(text, image)


def _require_text(item: object) -> str:
    if (text := _read_text(item)) is not None:
        return text
    hint = _find_hint(item)
    if isinstance(item, (bytes, bytearray, memoryview)):
        hint = "; decode it if it is a text, or use EmbeddingInput(image=...)"
    elif _is_missing(item):
        hint = "; remove missing values first"
    raise InputTypeError(
        f"is of type {_name_type(item)}; expected a str or a shared_engine.EmbeddingInput{hint}"
    )


def _is_missing(item: object) -> bool:
    """Return whether it is a missing value of a column: None, NaN, Arrow's null or pandas' NA."""
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
            f"{exc.start}, which cannot be encoded; decode its source again, or use "
            'text.encode("utf-8", "replace").decode()'
        ) from None
