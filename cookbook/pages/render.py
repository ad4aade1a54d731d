"""Turn a file that somebody sends into pages, each a picture and a text layer, or say why not."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import pypdfium2
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from pypdfium2 import raw

from shared_engine.images.formats import find_pages

PIXELS = 1_754  # of a page's longer side: A4 at 150 dpi
THUMB = 480  # the same of the small picture in lists
MAX_PAGES = 500  # of one file
MAX_PICTURE = 80_000_000  # pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")

_PDFIUM = threading.Lock()  # PDFium is not made for threads
_HYPHEN = re.compile("[\x02\ufffe]\n?")  # as PDFium writes it where a word goes on in the next line
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\uffff]")


class UnusableFileError(ValueError):
    """A file has no page to show; the message says what is wrong with it and what to do."""


class Drawn(NamedTuple):
    """A page as it is kept."""

    picture: Image.Image
    """RGB, at most PIXELS on its longer side."""
    text: str
    """Its text layer; empty where it has none, as in a scan."""


class Source(Protocol):
    """An open file."""

    def __len__(self) -> int:
        """Count its pages."""
        ...

    def draw(self, index: int) -> Drawn:
        """Return a page, counted from 0.

        Raises:
            UnusableFileError: this page is broken.
        """
        ...


@contextmanager
def open_source(path: Path, name: str, max_pages: int = MAX_PAGES) -> Iterator[Source]:
    """Open a PDF or a picture, told by its first bytes and never by its name.

    Raises:
        UnusableFileError: it is neither, or empty, locked, broken or too large.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise UnusableFileError(f"{name} is empty. Was it copied to its end? Send it again.")
    is_pdf = b"%PDF-" in head
    with _open_pdf(path, name) if is_pdf else _open_picture(path, name, max_pages) as source:
        if len(source) > max_pages:
            raise UnusableFileError(
                f"{name} has over {max_pages:,} pages, the most for one file. Split it and send "
                "the parts."
            )
        yield source


@contextmanager
def _open_pdf(path: Path, name: str) -> Iterator[Source]:
    with _PDFIUM:
        try:
            raw.FPDF_LoadMemDocument64(b"", 0, None)  # PDFium keeps its last error: now "format"
            document = pypdfium2.PdfDocument(path)
        except pypdfium2.PdfiumError as exc:
            raise UnusableFileError(_why_closed(name, exc)) from exc
    try:
        yield _Pdf(document, name)
    finally:
        with _PDFIUM:
            document.close()


def _why_closed(name: str, error: pypdfium2.PdfiumError) -> str:
    if error.err_code == raw.FPDF_ERR_PASSWORD:
        return (
            f"{name} is locked with a password. Open it, print or save it as a PDF without one, "
            "and send that."
        )
    if error.err_code == raw.FPDF_ERR_SECURITY:
        return f"{name} is encrypted in a way that cannot be read here. Send it unencrypted."
    return (
        f"{name} is a broken PDF, only part of one, or one without pages. Send it again; if a PDF "
        "viewer can open it, print it to a new PDF there and send that."
    )


class _Pdf:
    def __init__(self, document: pypdfium2.PdfDocument, name: str) -> None:
        self._document = document
        self._name = name

    def __len__(self) -> int:
        return len(self._document)

    def draw(self, index: int) -> Drawn:
        with _PDFIUM:
            try:
                page = self._document[index]
                scale = PIXELS / max(*page.get_size(), 1)
                picture = page.render(scale=scale).to_pil().convert("RGB")
                text = page.get_textpage().get_text_range()
            except (pypdfium2.PdfiumError, ValueError) as exc:  # ValueError: a page of no size
                raise UnusableFileError(
                    f"Page {index + 1} of {self._name} is broken and left out."
                ) from exc
        return Drawn(picture, _clean(text))


def _clean(text: str) -> str:
    r"""Return a text layer with whole words and without control characters.

    >>> _clean("a hy\x02\r\nphen\r\nand\x00 more\r\n")
    'a hyphen\nand more'
    """
    text = text.replace("\r\n", "\n")
    return _CONTROLS.sub("", _HYPHEN.sub("", text)).strip()


@contextmanager
def _open_picture(path: Path, name: str, max_pages: int) -> Iterator[Source]:
    too_large = UnusableFileError(
        f"{name} has more than {MAX_PICTURE // 1_000_000} million pixels. Make it smaller and "
        "send it again."
    )
    try:
        picture = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise too_large from exc
    except (OSError, SyntaxError, ValueError) as exc:
        raise UnusableFileError(
            f"{name} is neither a PDF nor a picture that can be read ({', '.join(FORMATS)}), "
            "or it is broken. Save it as a PDF or PNG and send that."
        ) from exc
    with picture:
        if picture.width * picture.height > MAX_PICTURE:
            raise too_large
        frames = [0]
        if isinstance(picture, TiffImageFile):
            frames = list(find_pages(picture, 2 * max_pages + 1))
        yield _Picture(picture, name, frames)


class _Picture:
    """A picture of one page, or a TIFF of several."""

    def __init__(self, picture: Image.Image, name: str, frames: list[int]) -> None:
        self._picture = picture
        self._name = name
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def draw(self, index: int) -> Drawn:
        try:
            self._picture.seek(self._frames[index])
            if self._picture.width * self._picture.height > MAX_PICTURE:
                raise ValueError("a page of a TIFF is larger than its first")
            upright = _opaque(ImageOps.exif_transpose(self._picture))
            upright.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, ValueError, EOFError) as exc:
            raise UnusableFileError(
                f"Page {index + 1} of {self._name} is broken, or only part of a picture. Open it "
                "in a viewer, save it anew and send that."
            ) from exc
        return Drawn(upright, "")


def _opaque(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer)
    return white
