"""Supported image formats, recognised by the first bytes of a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
"""Names for `PIL.Image.open`, which tries no other: one of Pillow's formats runs Ghostscript."""

_SUPPORTED = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|II[*+]\0|MM\0[*+]|BM", re.DOTALL
)
_NEEDS_PLUGIN: tuple[tuple[bytes, str], ...] = (
    (rb"....ftyp(?:avi[fos])", "an AVIF"),
    (rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", "a HEIC"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL"),
)
_NO_IMAGE: tuple[tuple[bytes, str], ...] = (
    (rb"%PDF-", "a PDF; its pages can be images"),
    (rb"\s*<(?:\?xml|svg|!DOCTYPE svg)", "an SVG or another XML file"),
    (rb"\s*<(?:html|!DOCTYPE html)", "a web page"),
)


def check_format(data: bytes) -> None:
    """Check that a file begins like one of a supported format.

    Raises:
        ValueError: it does not; the message quotes nothing of the file.
    """
    if _SUPPORTED.match(data):
        return
    for start, name in _NEEDS_PLUGIN:
        if re.match(start, data, re.DOTALL):
            raise ValueError(
                f"it is {name}, which is not supported; open it with Pillow (some formats need a "
                "plug-in such as pillow-heif) and pass the PIL image"
            )
    for start, name in _NO_IMAGE:
        if re.match(start, data, re.IGNORECASE):
            raise ValueError(f"it is {name}; expected a PNG, JPEG, WebP, GIF, TIFF or BMP")
    raise ValueError("it is not a PNG, JPEG, WebP, GIF, TIFF or BMP")


_SUBFILE_TYPE, _NO_PAGE = 254, 0b101
"""TIFF tag for the kind of a picture; its bits for a smaller copy and a mask (TIFF 6.0, p. 36)."""


def find_pages(tiff: TiffImageFile, most: int) -> Iterator[int]:
    """Yield the numbers of the pages among the first `most` pictures of a TIFF.

    The first picture is a page, and so are those that are not marked as a smaller copy or a mask.
    When a number is yielded, the file is positioned at that page. `most` is needed because Pillow
    takes minutes to visit 100,000 pictures.
    """
    yield 0
    for number in range(1, most):
        try:
            tiff.seek(number)
        except Exception:  # the end, or one of the many errors of Pillow for a broken picture
            return
        kind = tiff.tag_v2.get(_SUBFILE_TYPE, 0)
        if not (isinstance(kind, int) and kind & _NO_PAGE):
            yield number
