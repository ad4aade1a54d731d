"""Folders of pictures and pages of PDF files, as rows."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pypdfium2

from shared_engine.documents import EmbeddingInput

Layer = Literal["picture", "text", "both"]
"""What of a page of a PDF is embedded: how it looks, its text layer, or the two as one."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
"""Of files that are pictures."""

_PIXELS = 1_754
"""Of the longer side of a page: A4 at 150 dpi, more than twelve tiles of a model show."""

_pdfium = threading.Lock()
"""PDFium may be in one thread at a time only."""


def count_pages(path: str) -> int:
    """Return the number of pages of a PDF; 1 where it cannot be opened, so that a row says so."""
    try:
        with _pdfium, pypdfium2.PdfDocument(path) as document:
            return len(document)
    except (pypdfium2.PdfiumError, OSError):
        return 1


def read_page(path: str, number: int, layer: Layer) -> EmbeddingInput | str:
    """Return a page, from 0, or why there is none."""
    try:
        with _pdfium, pypdfium2.PdfDocument(path) as document:
            page = document[number]
            text = page.get_textpage().get_text_bounded() if layer != "picture" else None
            picture: Any = None
            if layer != "text":
                picture = page.render(scale=_PIXELS / max(page.get_size())).to_pil()
    except (pypdfium2.PdfiumError, OSError, ValueError, ZeroDivisionError) as exc:
        return f"has a page that cannot be used: {exc}"
    if picture is None and not (text and text.strip()):
        return "has no text: its layer of text is empty"
    return EmbeddingInput(text, picture)


def find_pictures(folder: str) -> list[str]:
    """Return the pictures in a folder and its folders, from the folder, in order."""
    return sorted(
        os.path.relpath(path, folder)
        for path in walk(folder)
        if os.path.splitext(path)[1].lower() in SUFFIXES
    )


def walk(folder: str) -> Iterator[str]:
    """Yield the files in a folder and its folders, but for hidden ones."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        yield from (os.path.join(where, name) for name in sorted(files) if name[0] not in "._")
