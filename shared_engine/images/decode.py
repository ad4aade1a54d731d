"""Decode image files to upright, opaque images of 8-bit grey or RGB."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from shared_engine.images.formats import FORMATS, check_format, find_pages
from shared_engine.images.sources import AcceptedImage, TooLargeError, describe, read
from shared_engine.threads import after_fork

LONG_SIDE, SHORT_SIDE = 16_384, 8_192
"""Limits in pixels, whichever side is the longer one; from NVIDIA's model card."""

_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}
"""Bytes of a pixel in Pillow's memory, by mode; 4 in all other modes."""

_MAX_PICTURES = 16
"""Pictures of a TIFF to look at: a file of 25 MB can hold millions that are no pages."""

_log = logging.getLogger("shared_engine")


class MemoryBudget:
    """A number of bytes, lent to threads in the order of their requests.

    A thread that asks for more than the capacity gets all of it, and so works alone. A thread must
    not ask twice: two such threads could wait for each other.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.renew()

    def renew(self) -> None:
        """Forget all holders: the child of a fork does not have their threads."""
        self.free = self.capacity
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free, and hold them until the block ends."""
        size = min(size, self.capacity)
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self.free >= size)
                self.free -= size
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.free += size
                self._changed.notify_all()


_IN_FLIGHT = MemoryBudget(2**30)
_LOADING = threading.Lock()


def _renew() -> None:
    global _LOADING  # noqa: PLW0603
    _LOADING = threading.Lock()
    _IN_FLIGHT.renew()


after_fork(_renew)


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """An image within the limits: its header is read, its pixels are not decoded yet."""

    picture: Image.Image
    content: bytes | None
    """The file; None for a caller's PIL image, which is never modified."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    pixels: int
    """Number of pixels at full size, even if `picture.draft` has made it smaller."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height once the image is turned upright."""
        width, height = self.picture.size
        return (width, height) if self.orientation <= 4 else (height, width)

    @property
    def has_more_pages(self) -> bool:
        """Whether the file is a TIFF with more pages than its first."""
        picture = self.picture
        if self.content is None or not isinstance(picture, TiffImageFile):
            return False
        if not picture.is_animated:
            return False
        other = Image.open(BytesIO(self.content), formats=("TIFF",))  # seeking moves its reader
        assert isinstance(other, TiffImageFile)
        return len(list(islice(find_pages(other, _MAX_PICTURES), 2))) > 1

    @property
    def is_plain(self) -> bool:
        """Whether all readers decode the file equally: a still, opaque, upright PNG or JPEG.

        The additional pictures that cameras put into a JPEG (MPO) are ignored by all readers.
        """
        picture = self.picture
        if self.content is None or self.orientation != 1:
            return False
        if ImageFile.LOAD_TRUNCATED_IMAGES:  # a setting of this process, unknown to other readers
            return False
        if isinstance(picture, PngImageFile):
            bits_per_value = self.content[24]
            if picture.is_animated or bits_per_value > 8 or picture.has_transparency_data:
                return False
        elif not isinstance(picture, JpegImageFile):
            return False
        return picture.mode in ("1", "L", "P", "RGB")

    @property
    def bytes_needed(self) -> int:
        """Estimated peak memory of decoding in Pillow: pixels, reader, and conversion.

        libwebp has two canvases of 4 bytes a pixel and returns a copy. libjpeg keeps 2 bytes a
        value of a progressive file, however small its draft is. A caller's PIL image counts like a
        file, because it may be open without being decoded.
        """
        picture = self.picture
        stored = _BYTES.get(picture.mode[:4], 4)
        converted = 0 if self.is_plain and picture.mode in ("L", "RGB") else 8
        read = 12 if isinstance(picture, WebPImageFile) else 0
        if "progressive" in picture.info:
            read = 2 * len(picture.getbands())
        return math.prod(picture.size) * (stored + converted) + self.pixels * read

    @contextmanager
    def load(self) -> Iterator[None]:
        """Decode the picture; its memory counts as in use until the block ends.

        Raises:
            OSError: the file is broken. Pillow raises other types too.
        """
        with _IN_FLIGHT.hold(self.bytes_needed):
            if self.content is None:
                with _LOADING:  # two threads may have the same image of a caller
                    self.picture.load()
            else:
                self.picture.load()
            yield

    @contextmanager
    def decode(self) -> Iterator[Image.Image]:
        """Decode as `load` does; yield an upright, opaque image of mode "L" or "RGB"."""
        with self.load():
            image = _convert(self.picture)
            if image is self.picture and self.content is None:
                image = image.copy()
            image.info = {}  # the EXIF and colour profile of the file are no longer true
            if self.orientation != 1:
                image.getexif()[ExifTags.Base.Orientation] = self.orientation
                image = ImageOps.exif_transpose(image)
            yield image


def open_source(source: AcceptedImage, urls: bool) -> OpenedImage:
    """Read a source and open it; warn about a TIFF of which only the first page is used."""
    opened = open_image(read(source, urls))
    if opened.has_more_pages:
        _log.warning(
            "%s is a TIFF with several pages: only the first is embedded; to embed all, pass "
            "[page.copy() for page in PIL.ImageSequence.Iterator(PIL.Image.open(...))]",
            describe(source),
        )
    return opened


def open_image(content: bytes | Image.Image) -> OpenedImage:
    """Read the header of a file, or take a caller's PIL image.

    Raises:
        TooLargeError: more than LONG_SIDE x SHORT_SIDE pixels.
        ValueError: no pixels, or a format that is not supported. Pillow raises other types too,
            a DecompressionBombError among them.
    """
    if isinstance(content, Image.Image):
        picture, file = content, None
    else:
        check_format(content)
        try:
            picture, file = Image.open(BytesIO(content), formats=FORMATS), content
        except UnidentifiedImageError as exc:
            raise ValueError("its header is broken") from exc
    width, height = picture.size
    if not width or not height:
        raise ValueError("it has no pixels")
    if max(width, height) > LONG_SIDE or min(width, height) > SHORT_SIDE:
        raise TooLargeError(
            f"it has {width:,} x {height:,} pixels; expected at most {LONG_SIDE:,} x "
            f"{SHORT_SIDE:,} or {SHORT_SIDE:,} x {LONG_SIDE:,}"
        )
    return OpenedImage(picture, file, read_orientation(picture), width * height)


def read_orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if it is missing or its block is corrupt.

    `picture.getexif` would decode a PNG, and write to a caller's image. Pillow itself turns TIFFs.
    """
    exif = Image.Exif()
    with suppress(Exception):  # Pillow raises many types for a corrupt block
        exif.load(picture.info.get("exif", b""))
    orientation = exif.get(ExifTags.Base.Orientation)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _convert(picture: Image.Image) -> Image.Image:
    """Return a picture in mode "L" or "RGB", transparency over white; itself if it is that."""
    if picture.mode.startswith("I;16"):  # convert() would clip it; of 16-bit colour it keeps these
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F", "LAB"):
        raise ValueError(
            f"its pixels are 32-bit grey or LAB (Pillow's mode {picture.mode}), which are not "
            "supported; convert it to 8-bit grey or RGB"
        )
    if picture.has_transparency_data:
        layer = picture.convert("LA") if picture.mode == "La" else picture
        layer = layer if layer.mode == "RGBA" else layer.convert("RGBA")
        opaque = Image.new("RGB", layer.size, "white")
        opaque.paste(layer, mask=layer)
        return opaque
    if picture.mode in ("L", "RGB"):
        return picture
    return picture.convert("L" if picture.mode == "1" else "RGB")
