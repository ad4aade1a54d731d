"""PDFs that are right, and PDFs that are wrong in the ways that people send them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pypdfium2
from PIL import Image, ImageDraw

_LOCK = (
    b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%b> /U <%b> >> /ID [<00> <00>] /Size"
    % (b"3a" * 32, b"c5" * 32)
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
