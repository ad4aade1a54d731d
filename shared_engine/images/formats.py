"""Which files are images that can be read, told by their first bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile


class Jpeg(JpegImageFile):
    """A JPEG whose EXIF is not searched for a resolution, with a warning where it is corrupt."""

    def _read_dpi_from_exif(self) -> None:
        """Leave `info` without one."""


class Tiff(TiffImageFile):
    """A TIFF of a size that `open_image` has allowed, though Pillow warns of the largest."""

    def load_prepare(self) -> None:
        """Make room for the pixels before Pillow does, which would look at its own limit."""
        if self._im is None:
            self.im = Image.new(self.mode, self._tile_size).im
        super().load_prepare()


_SUBFILE, _NO_PAGE = 254, 0b101
"""What a TIFF says of a picture, and its bits for a smaller copy and a mask (TIFF 6.0, p. 36)."""


def find_pages(tiff: TiffImageFile, most: int) -> Iterator[int]:
    """Yield which of the first `most` pictures of a TIFF are pages; each is the one it is at then.

    The first is, and those that do not say that they are a smaller copy or a mask. Looking at all
    of them would take minutes, as Pillow does it, where a file has a hundred thousand.
    """
    yield 0
    for number in range(1, most):
        try:
            tiff.seek(number)
        except Exception:  # there is none, or what Pillow raises of one that is broken
            return
        kind = tiff.tag_v2.get(_SUBFILE, 0)
        if not (isinstance(kind, int) and kind & _NO_PAGE):
            yield number


_FORMATS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    (rb"\xff\xd8\xff", Jpeg),
    (rb"RIFF....WEBP", WebPImageFile),
    (rb"GIF8[79]a", GifImageFile),
    (rb"II[*+]\0|MM\0[*+]", Tiff),
    (rb"BM", BmpImageFile),
)
"""Opened by class, not by `Image.open`: it checks sizes against a global of Pillow's, and has more
formats, of which one runs Ghostscript."""


_OTHERS: tuple[tuple[bytes, str], ...] = (
    (rb"....ftyp(?:avi[fos])", "an AVIF"),
    (rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", "a HEIC"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL"),
)
_NO_IMAGES: tuple[tuple[bytes, str], ...] = (
    (rb"%PDF-", "a PDF; its pages can be images"),
    (rb"\s*<(?:\?xml|svg|!DOCTYPE svg)", "an SVG or another XML file"),
    (rb"\s*<(?:html|!DOCTYPE html)", "a web page"),
)


def find_format(data: bytes) -> type[ImageFile]:
    """Return what opens a file.

    Raises:
        ValueError: it is of no format that is read; nothing of it is quoted.
    """
    for start, plugin in _FORMATS:
        if re.match(start, data, re.DOTALL):
            return plugin
    for start, name in _OTHERS:
        if re.match(start, data, re.DOTALL):
            raise ValueError(
                f"it is {name}, which is not opened here; open it with Pillow, where needed with a "
                "plug-in such as pillow-heif, and pass the PIL image"
            )
    for start, name in _NO_IMAGES:
        if re.match(start, data, re.IGNORECASE):
            raise ValueError(f"it is {name}, no PNG, JPEG, WebP, GIF, TIFF or BMP")
    raise ValueError("it is no PNG, JPEG, WebP, GIF, TIFF or BMP")
