"""The child process of `pages`: the only module with PDFium."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import re
import resource
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pypdfium2
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from pypdfium2 import raw

from shared_engine.errors import first_line
from shared_engine.images.decode import OpenedImage, read_orientation
from shared_engine.images.formats import FORMATS, check_format, find_pages
from shared_engine.images.pages import OUT_OF_MEMORY, PIXELS, Area, Layer, Place
from shared_engine.images.sources import require_regular

MAX_PIXELS = 80_000_000
"""Limit of the pixels of a page of an image file."""

_A4 = 842
"""Points of A4's longer side."""
_MAX_PARTS = 100
"""A page of more parts is not cut: its size is an error in the file."""
_LINE = 1 / 40
"""Overlap of the pictures of parts, in lengths of A4: a line cut in one is whole in the next."""

_Box = tuple[float, float, float, float]

# It recommends another build for forms with XFA. Their fields are drawn, or the file is refused.
logging.getLogger("pypdfium2._helpers.document").addFilter(lambda it: "XFA" not in str(it.msg))


class _Content(NamedTuple):
    """What was read of a page."""

    size: tuple[int, int] | None = None
    """Width and height of the picture; None if only the text was read."""
    pixels: Any = b""
    """The picture as a buffer of RGB."""
    text: str = ""


class _Document(NamedTuple):
    """An open file."""

    places: Sequence[Place]
    read: Callable[[Place, Layer], _Content]
    find: Callable[[Place, str], list[Area]] = lambda *_: []


class _UnreadableError(Exception):
    """A file or a page cannot be read; the message is a predicate of it."""


def serve(shared: int, seconds: float, memory: int) -> None:
    """Answer the requests of `pages` on the standard streams, until the parent process ends.

    Requests and replies are lines of JSON.

    Args:
        shared: descriptor of the file for the pixels of a picture, three bytes for each.
        seconds: limit of a request's processor time; the kernel ends the process then.
        memory: limit of the bytes to allocate, on Linux only.
    """
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the standard output of libraries is not part of a reply
    warnings.simplefilter("ignore")  # of Pillow, about files
    Image.MAX_IMAGE_PIXELS = None  # a page of more than MAX_PIXELS is refused with what to do
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit_memory(memory)
    try:
        for reply in _answer(os.fdopen(shared, "wb"), seconds):
            replies.write(json.dumps(reply).encode() + b"\n")
            replies.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _end_with_parent() -> None:
    """End the process when the parent closes its end of the pipe, also while PDFium computes."""
    parent = select.poll()
    parent.register(sys.stdin, 0)  # a hang-up is always reported
    parent.poll()
    os._exit(0)


def _limit_memory(size: int) -> None:
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size += pages * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or size < hard:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def _answer(shared: BinaryIO, seconds: float) -> Iterator[dict[str, Any]]:
    document = _Document((), lambda *_: _Content())
    yield {}  # the process has started
    with ExitStack() as stack:
        for line in sys.stdin.buffer:
            verb, *args = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                if verb == "read":
                    with _errors_of_page():
                        size, pixels, text = document.read(document.places[args[0]], *args[1:])
                    shared.seek(0)
                    shared.write(pixels)
                    shared.flush()
                    yield {"size": size, "text": text}
                elif verb == "find":
                    with _errors_of_page():
                        areas = document.find(document.places[args[0]], *args[1:])
                    yield {"areas": areas}
                else:
                    stack.close()
                    if verb == "open":
                        document = stack.enter_context(_open(*args))
                        yield {"places": document.places}
            except _UnreadableError as exc:
                yield {"error": str(exc)}


@contextmanager
def _errors_of_page() -> Iterator[None]:
    try:
        yield
    except (MemoryError, _UnreadableError):
        raise
    except Exception as exc:  # Pillow raises many types
        raise _UnreadableError(
            f"cannot be read: {first_line(exc)}; open it in a viewer and save it again"
        ) from exc


@contextmanager
def _open(path: str, max_pages: int) -> Iterator[_Document]:
    with ExitStack() as stack:
        try:
            require_regular(path)
            file = stack.enter_context(open(path, "rb"))
            head = file.read(1024)
        except (OSError, ValueError) as exc:
            raise _UnreadableError(
                f"cannot be read: {getattr(exc, 'strerror', None) or exc}"
            ) from exc
        if not head:
            raise _UnreadableError("is empty; copy it again, or save it again")
        opened = _open_pdf(path) if b"%PDF-" in head else _open_image(file, head, max_pages)
        yield stack.enter_context(opened)


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
def _open_pdf(path: str) -> Iterator[_Document]:
    raw.FPDF_LoadMemDocument64(b"", 0, None)  # PDFium keeps its last error: now "format"
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as exc:
        raise _UnreadableError(_UNOPENED.get(exc.err_code, _BROKEN)) from exc
    with closing(document):
        if document.get_formtype() == raw.FORMTYPE_XFA_FULL:
            raise _UnreadableError(
                "is a dynamic XFA form, which only Adobe's programs can show; print it to a PDF "
                "there and save that"
            )
        document.init_forms()  # before the first page is loaded, or fields are not drawn
        sizes = []
        for index in range(len(document)):
            size = raw.FS_SIZEF()  # stays 0 x 0 for a broken page
            raw.FPDF_GetPageSizeByIndexF(document, index, size)
            sizes.append((size.width, size.height))
        places = _find_places(sizes, _A4)
        yield _Document(places, partial(_read_pdf, document), partial(_find_in_pdf, document))


_UNOPENED = {
    raw.FPDF_ERR_PASSWORD: "is locked with a password; save it as a PDF without one",
    raw.FPDF_ERR_SECURITY: "is encrypted in a way that cannot be read; save it unencrypted",
}
_BROKEN = (
    "is a broken PDF, only part of one, or one without pages; copy it again or, if a PDF viewer "
    "can open it, print it to a new PDF and save that"
)


def _read_pdf(document: Any, place: Place, layer: Layer) -> _Content:
    content = _Content()
    with closing(document[place.page - 1]) as page:
        width, height = size = page.get_size()
        if layer != "text":
            left, top, right, bottom = _find_box(size, place, _A4 * _LINE)
            scale = PIXELS / max(right - left, bottom - top, 1)
            crop = (left, height - bottom, width - right, top)
            drawn = page.render(scale=scale, crop=crop, rev_byteorder=True)  # RGB
            content = _Content((drawn.width, drawn.height), drawn.buffer)
        if layer != "picture":
            left, top, right, bottom = map(math.ceil, _find_box(size, place))
            canvas = (0, 0, math.ceil(width), math.ceil(height), 0)
            to_page = pypdfium2.PdfPosConv(page, canvas).to_page
            corners = zip(to_page(left, top), to_page(right, bottom), strict=True)
            (left, right), (bottom, top) = map(sorted, corners)
            box = (left, bottom, right, top)
            text = "\n".join([_read_text(page, box), *_read_fields(page, box)])
            content = content._replace(text=_clean(text))
    return content


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
    with closing(document[place.page - 1]) as page:
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
    return letter.isprintable() and not letter.isspace() and letter != "\u2010"


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


_HYPHEN = re.compile("[\x02\ufffe]\n?|[\xad\u2010]\n")
"""A word continues in the next line; PDFium writes U+FFFE or U+0002 for hyphen and line end.

It keeps U+2010, which browsers print for a soft hyphen.
"""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\uffff]")


def _clean(text: str) -> str:
    r"""Return a text with whole words and without control characters.

    >>> _clean("a hy\ufffephen, a soft\u2010\nhyphen\nand\x00 more\n\n")
    'a hyphen, a softhyphen\nand more'
    """
    return _CONTROLS.sub("", _HYPHEN.sub("", text.replace("\r\n", "\n"))).strip()


@contextmanager
def _open_image(file: BinaryIO, head: bytes, max_pages: int) -> Iterator[_Document]:
    try:
        check_format(head)
        # Not by its path: Pillow would map it into memory, and read a turned TIFF wrongly.
        picture = Image.open(file, formats=FORMATS)
    except MemoryError:
        raise
    except Exception as exc:  # Pillow raises many types
        # Pillow's message for a broken header is the file object, ours also has advice for callers
        is_broken = isinstance(exc, UnidentifiedImageError)
        reason = "its header is broken" if is_broken else first_line(exc).partition(";")[0]
        raise _UnreadableError(
            f"is neither a PDF nor a picture that can be read: {reason}; save it as a PDF or PNG"
        ) from exc
    with picture:
        found = [(0, picture.size)]
        if isinstance(picture, TiffImageFile):
            most = min(2 * max_pages + 1, sys.maxsize)  # a copy for each page, and one too many
            found = [(frame, picture.size) for frame in find_pages(picture, most)]
        frames, sizes = zip(*found, strict=True)
        yield _Document(_find_places(sizes, PIXELS), partial(_read_image, picture, frames))


def _read_image(
    picture: Image.Image, frames: Sequence[int], place: Place, layer: Layer
) -> _Content:
    if layer == "text":
        return _Content()
    picture.seek(frames[place.page - 1])
    count = math.prod(picture.size)
    if count > MAX_PIXELS:
        limit = f"{MAX_PIXELS // 1_000_000} million pixels"
        raise _UnreadableError(f"has more than {limit}, the limit; save a smaller picture")
    with OpenedImage(picture, None, read_orientation(picture), count).decode() as image:
        left, top, right, bottom = map(int, _find_box(image.size, place, PIXELS * _LINE))
        part = image.crop((left, top, right, bottom))
    part.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    return _Content(part.size, part.convert("RGB").tobytes())  # grey is a third of the work
