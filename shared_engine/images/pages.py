"""Read PDFs and image files as pages: the only module with PDFium."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import groupby
from typing import Any, BinaryIO, Literal, NamedTuple

import pypdfium2
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from pypdfium2 import raw

from shared_engine.errors import PageError, first_line
from shared_engine.images.decode import OpenedImage, read_orientation
from shared_engine.images.formats import FORMATS, find_pages
from shared_engine.images.sources import require_regular

Layer = Literal["picture", "text", "both"]
"""Part of a page to read: its picture, its text, or both."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
"""Suffixes of image files."""

PIXELS = 1_754
"""Pixels of a page's longer side: A4 at 150 dpi, more than twelve tiles of a model show."""
MAX_PIXELS = 80_000_000
"""Limit of the pixels of a page of an image file."""

_A4 = 842
"""Points of A4's longer side."""
_MAX_PARTS = 100
"""A page of more parts is not cut: its size is an error in the file."""
_LINE = 1 / 40
"""Overlap of the pictures of parts, in lengths of A4: a line cut in one is whole in the next."""

Area = tuple[float, float, float, float]
"""Left, top, right and bottom of an area, in widths and heights of a picture."""

_Box = tuple[float, float, float, float]
_Content = tuple[Image.Image | None, str]

_pdfium = threading.RLock()
"""PDFium is not thread-safe. Reentrant: a garbage collection may close a document anywhere."""

# It recommends another build for forms with XFA. Their fields are drawn, or the file is refused.
logging.getLogger("pypdfium2._helpers.document").addFilter(lambda it: "XFA" not in str(it.msg))


class Place(NamedTuple):
    """Position of a page in its file."""

    page: int
    """Number of the page, from 1."""
    part: int = 0
    """Number of the part, from 1, of a very long page; 0 for a whole page."""
    parts: int = 1
    """Number of parts of the page."""

    def __str__(self) -> str:
        return f"page {self.page}" + (f", part {self.part}" if self.part else "")


class Page(NamedTuple):
    """A page, or a part of a very long one."""

    place: Place
    picture: Image.Image | None
    """RGB, at most `PIXELS` on its longer side; None if only the text was read."""
    text: str
    """Visible text and values of form fields; empty for a scan, or if only the picture was read."""


class Pages:
    """The pages of an open file. One thread at a time may read them."""

    def __init__(
        self,
        name: str,
        places: Sequence[Place],
        read: Callable[[Place, Layer, int], _Content],
        find: Callable[[Place, str], list[Area]] = lambda *_: [],
    ) -> None:
        self._name = name
        self._read = read
        self._find = find
        self.places = places
        """Where each page is; known before a page is read."""

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int, layer: Layer = "both", pixels: int = PIXELS) -> Page:
        """Draw a page and read its text.

        Args:
            index: position in `places`.
            layer: what to read.
            pixels: size of the picture's longer side; image files are not enlarged.

        Raises:
            PageError: the page is broken; other pages may be readable.
        """
        place = self.places[index]
        with self._translate(place):
            return Page(place, *self._read(place, layer, pixels))

    def find(self, index: int, passage: str) -> list[Area]:
        """Return the areas of a passage in the picture of a page.

        Args:
            index: position in `places`.
            passage: part of the page's text.

        Returns:
            An area for each line; an empty list if the page shows no such text.

        Raises:
            PageError: the page is broken; other pages may be readable.
        """
        place = self.places[index]
        with self._translate(place):
            return self._find(place, passage)

    @contextmanager
    def _translate(self, place: Place) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # Pillow raises many types
            raise PageError(
                f"{self._name}, {place}, cannot be read: {first_line(exc)}; it is broken, or only "
                "part of a picture: open it in a viewer and save it again"
            ) from exc


@contextmanager
def open_pages(
    path: str | os.PathLike[str], name: str | None = None, max_pages: int = sys.maxsize
) -> Iterator[Pages]:
    """Open a PDF or an image file, recognised by its first bytes, and yield its pages.

    A TIFF may have several pages, another image file has one. A very long page, such as a receipt,
    is cut into parts: one that is as long as two pages of A4, also of two that are as wide as it.

    Args:
        path: the file.
        name: its name in messages; default: the last part of `path`.
        max_pages: the most pages.

    Raises:
        PageError: neither a PDF nor an image; empty, locked, broken or too long; a dynamic XFA
            form, which PDFium cannot draw.
    """
    name = os.path.basename(path) if name is None else name
    with ExitStack() as stack:
        try:
            require_regular(path)
            file = stack.enter_context(open(path, "rb"))
            head = file.read(1024)
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise PageError(f"{name} cannot be read: {reason}") from exc
        if not head:
            raise PageError(f"{name} is empty; copy it again, or save it again")
        opened = _open_pdf(path, name) if b"%PDF-" in head else _open_image(file, name, max_pages)
        pages = stack.enter_context(opened)
        if len(pages) > max_pages:
            raise PageError(
                f"{name} has over {max_pages:,} pages, the most for one file; split it and save "
                "the parts"
            )
        yield pages


def walk(folder: str | os.PathLike[str], hidden: str = ".") -> Iterator[str]:
    """Yield the files below a folder, without hidden ones and those in hidden folders.

    Links to folders are followed; a folder that several paths reach is read once.

    Args:
        folder: where to look.
        hidden: first characters of hidden names.
    """
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] not in hidden)
        yield from (os.path.join(where, name) for name in sorted(files) if name[0] not in hidden)


def _find_places(sizes: Sequence[tuple[float, float]], a4: float) -> list[Place]:
    """Return the places of pages of these sizes, in a unit in which A4 is `a4` long."""
    places = []
    for number, size in enumerate(sizes, 1):
        parts = int(max(size) / max(a4, min(size) * math.sqrt(2)))
        if 1 < parts <= _MAX_PARTS:
            places += [Place(number, part, parts) for part in range(1, parts + 1)]
        else:
            places.append(Place(number))
    return places


def _find_box(size: tuple[float, float], place: Place, overlap: float = 0) -> _Box:
    """Return left, top, right and bottom of a part of a page; of a whole page, all of it."""
    width, height = size
    if not place.part:
        return 0, 0, width, height
    length = max(size) / place.parts
    start = max(0, round(length * (place.part - 1)) - overlap)
    end = round(length * place.part)
    return (0, start, width, end) if height > width else (start, 0, end, height)


@contextmanager
def _open_pdf(path: str | os.PathLike[str], name: str) -> Iterator[Pages]:
    with _pdfium:
        raw.FPDF_LoadMemDocument64(b"", 0, None)  # PDFium keeps its last error: now "format"
        try:
            document = pypdfium2.PdfDocument(path)
        except pypdfium2.PdfiumError as exc:
            raise PageError(f"{name} {_UNOPENED.get(exc.err_code, _BROKEN)}") from exc
    try:
        with _pdfium:
            if document.get_formtype() == raw.FORMTYPE_XFA_FULL:
                raise PageError(
                    f"{name} is a dynamic XFA form, which only Adobe's programs can show; print it "
                    "to a PDF there and save that"
                )
            document.init_forms()  # before the first page is loaded, or fields are not drawn
            sizes = []
            for index in range(len(document)):
                size = raw.FS_SIZEF()  # stays 0 x 0 for a broken page
                raw.FPDF_GetPageSizeByIndexF(document, index, size)
                sizes.append((size.width, size.height))
        places = _find_places(sizes, _A4)
        yield Pages(name, places, partial(_read_pdf, document), partial(_find_in_pdf, document))
    finally:
        with _pdfium:
            document.close()


_UNOPENED = {
    raw.FPDF_ERR_PASSWORD: "is locked with a password; save it as a PDF without one",
    raw.FPDF_ERR_SECURITY: "is encrypted in a way that cannot be read; save it unencrypted",
}
_BROKEN = (
    "is a broken PDF, only part of one, or one without pages; copy it again or, if a PDF viewer "
    "can open it, print it to a new PDF and save that"
)


def _read_pdf(document: Any, place: Place, layer: Layer, pixels: int) -> _Content:
    picture, text = None, ""
    with _pdfium, closing(document[place.page - 1]) as page:
        width, height = size = page.get_size()
        if layer != "text":
            left, top, right, bottom = _find_box(size, place, _A4 * _LINE)
            scale = pixels / max(right - left, bottom - top, 1)
            crop = (left, height - bottom, width - right, top)
            picture = page.render(scale=scale, crop=crop).to_pil()
        if layer != "picture":
            left, top, right, bottom = map(math.ceil, _find_box(size, place))
            canvas = (0, 0, math.ceil(width), math.ceil(height), 0)
            to_page = pypdfium2.PdfPosConv(page, canvas).to_page
            corners = zip(to_page(left, top), to_page(right, bottom), strict=True)
            (left, right), (bottom, top) = map(sorted, corners)
            box = (left, bottom, right, top)
            text = "\n".join([_read_text(page, box), *_read_fields(page, box)])
    return picture, _clean(text)


def _read_text(page: Any, box: _Box) -> str:
    """Return the characters that begin in a box of a page, in the order of PDFium."""
    text = page.get_textpage()
    areas = map(text.get_rect, range(text.count_rects()))
    if all(_is_in(box, *area[:2]) and _is_in(box, *area[2:]) for area in areas):
        return str(text.get_text_range())
    inside = []
    x, y = ctypes.c_double(), ctypes.c_double()
    for number in range(text.count_chars()):
        if not raw.FPDFText_IsGenerated(text, number):  # a line end, at the character before it
            raw.FPDFText_GetCharOrigin(text, number, x, y)
        inside.append(_is_in(box, x.value, y.value))
    runs = (list(run) for _, run in groupby(range(len(inside)), inside.__getitem__))
    return "".join(text.get_text_range(run[0], len(run)) for run in runs if inside[run[0]])


def _find_in_pdf(document: Any, place: Place, passage: str) -> list[Area]:
    with _pdfium, closing(document[place.page - 1]) as page:
        text = page.get_textpage()
        letters = [chr(raw.FPDFText_GetUnicode(text, n)) for n in range(text.count_chars())]
        visible = [n for n, letter in enumerate(letters) if _is_visible(letter)]
        wanted = "".join(filter(_is_visible, passage))
        start = "".join(letters[n] for n in visible).find(wanted)
        if not wanted or start < 0:
            return []
        first, last = visible[start], visible[start + len(wanted) - 1]
        width, height = size = page.get_size()
        left, top, right, bottom = _find_box(size, place, _A4 * _LINE)
        across, down = _FINE / (right - left), _FINE / (bottom - top)
        canvas = (-left * across, -top * down, width * across, height * down)
        to_picture = pypdfium2.PdfPosConv(page, (*map(round, canvas), 0)).to_bitmap
        areas = []
        for number in range(text.count_rects(first, last - first + 1)):
            box = text.get_rect(number)
            corners = zip(to_picture(*box[:2]), to_picture(*box[2:]), strict=True)
            (left, right), (top, bottom) = map(sorted, corners)
            areas.append((left / _FINE, top / _FINE, right / _FINE, bottom / _FINE))
    return areas


_FINE = 10_000
"""Length of a picture where PDFium rounds positions to whole numbers."""


def _is_visible(letter: str) -> bool:
    return letter.isprintable() and not letter.isspace()


def _is_in(box: _Box, x: float, y: float) -> bool:
    left, bottom, right, top = box
    return left <= x < right and bottom <= y < top


def _read_fields(page: Any, box: _Box) -> Iterator[str]:
    """Yield what is filled in within a box of a page: "name: value", or a note on the page."""
    for number in range(raw.FPDFPage_GetAnnotCount(page)):
        field = raw.FPDFPage_GetAnnot(page, number)
        try:
            corners = raw.FS_RECTF()
            raw.FPDFAnnot_GetRect(field, corners)
            middle = (corners.left + corners.right) / 2, (corners.top + corners.bottom) / 2
            if _is_in(box, *middle) and not raw.FPDFAnnot_GetFlags(field) & _HIDDEN:
                yield _read_field(page.formenv, field)
        finally:
            raw.FPDFPage_CloseAnnot(field)


_HIDDEN = raw.FPDF_ANNOT_FLAG_HIDDEN | raw.FPDF_ANNOT_FLAG_NOVIEW


def _read_field(form: Any, field: Any) -> str:
    """Return the visible content of a field or a note; "" if it is empty or not a text."""
    if raw.FPDFAnnot_GetSubtype(field) == raw.FPDF_ANNOT_FREETEXT:
        return _read_string(raw.FPDFAnnot_GetStringValue, field, b"Contents")
    if not form:
        return ""
    value = ""
    kind = raw.FPDFAnnot_GetFormFieldType(form, field)
    if kind in (raw.FPDF_FORMFIELD_CHECKBOX, raw.FPDF_FORMFIELD_RADIOBUTTON):
        if raw.FPDFAnnot_IsChecked(form, field):
            value = _read_string(raw.FPDFAnnot_GetFormFieldExportValue, form, field)
    elif kind in (raw.FPDF_FORMFIELD_COMBOBOX, raw.FPDF_FORMFIELD_LISTBOX):
        value = ", ".join(
            _read_string(raw.FPDFAnnot_GetOptionLabel, form, field, option)
            for option in range(raw.FPDFAnnot_GetOptionCount(form, field))
            if raw.FPDFAnnot_IsOptionSelected(form, field, option)
        ) or _read_string(raw.FPDFAnnot_GetFormFieldValue, form, field)
    elif kind == raw.FPDF_FORMFIELD_TEXTFIELD:
        flags = raw.FPDFAnnot_GetFormFieldFlags(form, field)
        if not flags & raw.FPDF_FORMFLAG_TEXT_PASSWORD:
            value = _read_string(raw.FPDFAnnot_GetFormFieldValue, form, field)
    if not value.strip():
        return ""
    name = _read_string(raw.FPDFAnnot_GetFormFieldAlternateName, form, field)
    name = name or _read_string(raw.FPDFAnnot_GetFormFieldName, form, field).rpartition(".")[2]
    return f"{name}: {value}"


def _read_string(read: Callable[..., int], *args: Any) -> str:
    """Return a string of PDFium, which returns its size first."""
    buffer = (ctypes.c_ushort * (read(*args, None, 0) // 2))()
    read(*args, buffer, len(buffer) * 2)
    text = bytes(buffer).decode("utf-16-le", "replace").rstrip("\0")
    return "\n".join(text.splitlines())


_HYPHEN = re.compile("[\x02\ufffe]\n?|\xad\n")
"""A word continues in the next line; PDFium writes U+FFFE or U+0002 for hyphen and line end."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\uffff]")


def _clean(text: str) -> str:
    r"""Return a text with whole words and without control characters.

    >>> _clean("a hy\ufffephen, a soft\xad\nhyphen\nand\x00 more\n\n")
    'a hyphen, a softhyphen\nand more'
    """
    return _CONTROLS.sub("", _HYPHEN.sub("", text.replace("\r\n", "\n"))).strip()


@contextmanager
def _open_image(file: BinaryIO, name: str, max_pages: int) -> Iterator[Pages]:
    try:
        # Not by its path: Pillow would map it into memory, and read a turned TIFF wrongly.
        picture = Image.open(file, formats=FORMATS)
    except Exception as exc:  # Pillow raises many types
        raise PageError(
            f"{name} is neither a PDF nor a picture that can be read ({', '.join(FORMATS)}), or "
            f"it is broken or too large ({first_line(exc)}); save it as a PDF or PNG"
        ) from exc
    with picture:
        found = [(0, picture.size)]
        if isinstance(picture, TiffImageFile):
            most = min(2 * max_pages + 1, sys.maxsize)  # a copy for each page, and one too many
            found = [(frame, picture.size) for frame in find_pages(picture, most)]
        frames, sizes = zip(*found, strict=True)
        yield Pages(name, _find_places(sizes, PIXELS), partial(_read_image, picture, frames))


def _read_image(
    picture: Image.Image, frames: Sequence[int], place: Place, layer: Layer, pixels: int
) -> _Content:
    if layer == "text":
        return None, ""
    picture.seek(frames[place.page - 1])
    count = math.prod(picture.size)
    if count > MAX_PIXELS:
        raise ValueError(f"it has more than {MAX_PIXELS // 1_000_000} million pixels, the limit")
    with OpenedImage(picture, None, read_orientation(picture), count).decode() as image:
        left, top, right, bottom = map(int, _find_box(image.size, place, PIXELS * _LINE))
        part = image.crop((left, top, right, bottom)).convert("RGB")
    part.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return part, ""
