"""PDFs that are right, and PDFs that are wrong in the ways that people send them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import pypdfium2
from PIL import Image, ImageDraw

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
        bodies += [
            f"<</Type/Page/Parent 2 0 R/MediaBox[{leaf.box}]/Resources<</Font{fonts}>>"
            f"/Contents {number + 1} 0 R/Annots[{' '.join(own)}]{leaf.more}>>",
            f"<</Length {len(leaf.content)}>> stream\n{leaf.content}\nendstream",
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
    pages = [Image.new("RGB", (420, 594), "white") for _ in texts]
    for row, (page, text) in enumerate(zip(pages, texts, strict=True)):
        ImageDraw.Draw(page).text((40, 60 + 90 * row), text, "black", font_size=30)
    out = io.BytesIO()
    pages[0].save(out, "PDF", save_all=True, append_images=pages[1:])
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
