"""Rows of folders of images and of PDF files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pypdfium2

from shared_engine.documents import EmbeddingInput

Layer = Literal["picture", "text", "both"]
"""Part of a PDF page to embed: its rendered image, its text layer, or both as one document."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
"""Suffixes of image files."""

_PIXELS = 1_754
"""Pixels of a page's longer side: A4 at 150 dpi, more than twelve tiles of a model show."""

_pdfium = threading.Lock()
"""PDFium is not thread-safe."""


def count_pages(path: str) -> int:
    """Return the number of pages of a PDF; 1 if it cannot be opened, for a row with the error."""
    try:
        with _pdfium, pypdfium2.PdfDocument(path) as document:
            return len(document)
    except (pypdfium2.PdfiumError, OSError):
        return 1


def read_page(path: str, number: int, layer: Layer) -> EmbeddingInput | str:
    """Return a page by number, from 0, or the reason why it cannot be embedded."""
    try:
        with _pdfium, pypdfium2.PdfDocument(path) as document:
            page = document[number]
            text = page.get_textpage().get_text_bounded() if layer != "picture" else None
            picture: Any = None
            if layer != "text":
                picture = page.render(scale=_PIXELS / max(page.get_size())).to_pil()
    except (pypdfium2.PdfiumError, OSError, ValueError, ZeroDivisionError) as exc:
        return f"has a page that cannot be read: {exc}"
    if picture is None and not (text and text.strip()):
        return "has no text: its text layer is empty"
    return EmbeddingInput(text, picture)


def walk(folder: str) -> Iterator[str]:
    """Yield the files below a folder that are not hidden."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        yield from (os.path.join(where, name) for name in sorted(files) if name[0] not in "._")
