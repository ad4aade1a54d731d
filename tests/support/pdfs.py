"""PDFs that are right, and PDFs that are wrong in the ways that people send them."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import psutil
import pypdfium2
import pytest
from PIL import Image, ImageDraw

from shared_engine.images import pages

_LOCK = (
    b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%b> /U <%b> >> /ID [<00> <00>] /Size"
    % (b"3a" * 32, b"c5" * 32)
)


class Leaf(NamedTuple):
    """A page."""

    content: str
    """What to draw; the font F1 is Helvetica."""
    box: str = "0 0 300 200"
    """Left, bottom, right and top in points."""
    fields: tuple[str, ...] = ()
    """Entries of form fields, or of other annotations."""
    more: str = ""
    """More entries of the page."""
    drawing: str = ""
    """What to draw by "/X Do", also within itself."""
    is_compressed: bool = False


ENDLESS = Leaf("/X Do", drawing="0 0 9 9 re f /X Do /X Do /X Do")
"""A page that draws a form three times in itself, which PDFium does until memory is full."""
HUGE = Leaf("0 0 1 1 re f\n" * 2_000_000, is_compressed=True)
"""A page of some 50 kB that takes over 500 MB of memory."""


def write(*leaves: Leaf, form: str = "", more: str = "") -> bytes:
    """Return a PDF; PDFium finds its objects without a table of them.

    Args:
        leaves: its pages.
        form: more entries of its form.
        more: more entries of its catalogue.
    """
    fonts = "<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>"
    bodies, kids, fields = ["", ""], [], []
    for leaf in leaves:
        own = [
            f"{number} 0 R" for number in range(len(bodies) + 1, len(bodies) + 1 + len(leaf.fields))
        ]
        bodies += [f"<</Type/Annot/F 4{entries}>>" for entries in leaf.fields]
        fields += own
        number = len(bodies) + 1
        kids.append(f"{number} 0 R")
        resources = f"/Resources<</Font{fonts}/XObject<</X {number + 2} 0 R>>>>"
        entries = f"/Type/XObject/Subtype/Form/BBox[0 0 300 200]{resources}"
        bodies += [
            f"<</Type/Page/Parent 2 0 R/MediaBox[{leaf.box}]{resources}"
            f"/Contents {number + 1} 0 R/Annots[{' '.join(own)}]{leaf.more}>>",
            _stream(leaf.content, is_compressed=leaf.is_compressed),
            *([_stream(leaf.drawing, entries)] if leaf.drawing else []),
        ]
    if fields or form:
        more += (
            f"/AcroForm<</Fields[{' '.join(fields)}]/DA(/F1 12 Tf 0 g)/DR<</Font{fonts}>>{form}>>"
        )
    bodies[0] = f"<</Type/Catalog/Pages 2 0 R{more}>>"
    bodies[1] = f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(kids)}>>"
    objects = [f"{number} 0 obj {body} endobj" for number, body in enumerate(bodies, 1)]
    trailer = "trailer <</Root 1 0 R>>\n%%EOF"
    return "\n".join(["%PDF-1.7", *objects, trailer]).encode("latin-1")


def limit_pages(
    monkeypatch: pytest.MonkeyPatch, seconds: float = 60, memory: int = 2 << 30
) -> None:
    """Set limits of the pages that a test reads, by readers that no other test uses."""
    monkeypatch.setattr(pages, "SECONDS", seconds)
    monkeypatch.setattr(pages, "MEMORY", memory)
    monkeypatch.setattr(pages, "_MOST_IDLE", 0)
    pages._end_idle()


def find_reader(pid: int) -> psutil.Process:
    """Return the process that reads ENDLESS for another one: it takes more and more memory."""
    process, end = psutil.Process(pid), time.monotonic() + 60
    while time.monotonic() < end:
        for child in process.children():
            if child.memory_info().rss > 150_000_000:
                return child
        time.sleep(0.01)
    raise TimeoutError


def _stream(content: str, entries: str = "", is_compressed: bool = False) -> str:
    if is_compressed:
        content, entries = zlib.compress(content.encode()).decode("latin-1"), "/Filter/FlateDecode"
    return f"<</Length {len(content)}{entries}>> stream\n{content}\nendstream"


def xfa(is_dynamic: bool) -> bytes:
    """Return a form for Adobe's programs; a static one has fields that other programs show."""
    field = "/Subtype/Widget/FT/Tx/T(name)/V(A. Example)/Rect[20 100 200 120]"
    leaf = Leaf("BT /F1 12 Tf 20 150 Td (Please wait...) Tj ET", fields=(field,))
    return write(
        leaf, form="/XFA[(template)(<template/>)]", more="/NeedsRendering true" * is_dynamic
    )


def lock(pdf: bytes) -> bytes:
    """Return a PDF that asks for a password, which nobody knows."""
    head, _, trailer = pdf.rpartition(b"/Size")
    return head + _LOCK + trailer


def without_pages() -> bytes:
    """Return a PDF that is whole and has no page."""
    with pypdfium2.PdfDocument.new() as document:
        out = io.BytesIO()
        document.save(out)
    return out.getvalue()


def scan(*texts: str) -> bytes:
    """Return a PDF of pictures of texts."""
    drawn = [Image.new("RGB", (420, 594), "white") for _ in texts]
    for row, (page, text) in enumerate(zip(drawn, texts, strict=True)):
        ImageDraw.Draw(page).text((40, 60 + 90 * row), text, "black", font_size=30)
    out = io.BytesIO()
    drawn[0].save(out, "PDF", save_all=True, append_images=drawn[1:])
    return out.getvalue()


def claim_size(png: bytes, width: int, height: int) -> bytes:
    """Return a PNG whose header says that it is larger than it is."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def rephotograph(path: Path) -> bytes:
    """Return a page's picture turned by 3 degrees, as a JPEG of quality 40."""
    out = io.BytesIO()
    with Image.open(path) as picture:
        turned = picture.convert("RGB").rotate(3, Image.Resampling.BICUBIC, fillcolor="white")
    turned.save(out, "JPEG", quality=40)
    return out.getvalue()
