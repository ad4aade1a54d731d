"""From the bytes of an image to upright, opaque pixels of 8 bits."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from shared_engine.images.budget import MemoryBudget
from shared_engine.images.formats import Jpeg, Tiff, find_format, find_pages
from shared_engine.images.sources import TooLargeError
from shared_engine.threads import after_fork

LONG_SIDE, SHORT_SIDE = 16_384, 8_192
"""Pixels, either way round, of the same card."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation; 1 is upright."""

_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
"""Turns after which rows are columns."""
_BACKWARDS = (
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
)
"""Turns after which the first row is the last row or column."""

_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}
"""Of a pixel as Pillow stores it; 4 in all other modes."""

_BAND = 2**18
"""Pixels that are converted at once, so that what comes between takes no memory to speak of."""

_DIRECTORIES = 16
"""Pictures of a TIFF that are looked at: a file of 25 MB can hold millions that are no page."""

_IN_FLIGHT = MemoryBudget(2**30)
_LOADING = threading.Lock()


def _renew() -> None:
    global _LOADING  # noqa: PLW0603
    _LOADING = threading.Lock()
    _IN_FLIGHT.renew()


after_fork(_renew)


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """An image whose header is read and allowed, and whose pixels are still to be decoded."""

    picture: Image.Image
    orientation: int
    """How EXIF says that it is turned, 1 to 8; 1 is upright."""
    pixels: int
    """Of the whole, also where a draft of it is decoded."""
    content: bytes | None
    """Its file; None of a caller's PIL image, which is never written to."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height as a person sees it."""
        width, height = self.picture.size
        return (width, height) if self.orientation <= 4 else (height, width)

    @property
    def has_more_pages(self) -> bool:
        """Whether its file is a TIFF of several pages, of which this is the first."""
        if not (self.content and isinstance(self.picture, Tiff) and self.picture.is_animated):
            return False
        pages = find_pages(Tiff(BytesIO(self.content)), _DIRECTORIES)
        return len(list(islice(pages, 2))) > 1

    @property
    def is_plain(self) -> bool:
        """Whether all readers of its file see the same in it."""
        picture = self.picture
        return (
            self.content is not None
            and isinstance(picture, (Jpeg, PngImageFile))
            and not ImageFile.LOAD_TRUNCATED_IMAGES  # by which the others may not go
            and picture.mode in ("1", "L", "P", "RGB")
            and not (isinstance(picture, PngImageFile) and self.content[24] > 8)  # bits of a value
            and not picture.has_transparency_data
            and not getattr(picture, "is_animated", False)
            and self.orientation == 1
        )

    @property
    def bytes_needed(self) -> int:
        """About the memory that decoding takes at its peak: what is stored and what is made.

        libwebp has two canvases of 4 bytes a pixel and gives a copy. libjpeg keeps what it has read
        of a progressive file, 2 bytes a value, however small it is drafted. A caller's PIL image
        counts like a file: it may be open only, and is decoded now.
        """
        picture = self.picture
        stored = _BYTES.get(picture.mode[:4], 4)
        made = 0 if self.is_plain and picture.mode in ("L", "RGB") else 4
        read = 12 if isinstance(picture, WebPImageFile) else 0
        if "progressive" in picture.info:
            read = 2 * len(picture.getbands())
        return math.prod(picture.size) * (stored + made) + self.pixels * read

    @contextmanager
    def load(self) -> Iterator[None]:
        """Decode to the end; until the end of the context its memory counts as in use.

        Raises:
            OSError: the file is broken. Pillow raises others.
        """
        with _IN_FLIGHT.hold(self.bytes_needed):
            if self.content is None:
                with _LOADING:  # two threads must not decode one object
                    self.picture.load()
            else:
                self.picture.load()
            yield

    @contextmanager
    def decode(self) -> Iterator[Image.Image]:
        """Do as `load` does; give an image of our own, upright, opaque, RGB or grey of 8 bits."""
        with self.load():
            picture, turn = self.picture, _TURNS.get(self.orientation)
            mode, convert = _find_conversion(picture)
            if self.content is None or convert or turn is not None:
                picture = _convert(picture, mode, convert, turn)
            yield picture


def open_image(content: bytes | Image.Image) -> OpenedImage:
    """Read the header of a file, or look at a caller's PIL image.

    Raises:
        TooLargeError: it has more than LONG_SIDE x SHORT_SIDE pixels.
        ValueError: it has none, or is of no format that is read. Pillow raises others.
    """
    if isinstance(content, Image.Image):
        picture, file = content, None
    else:
        picture, file = find_format(content)(BytesIO(content)), content
    width, height = picture.size
    if not width or not height:
        raise ValueError("it has no pixels")
    if max(width, height) > LONG_SIDE or min(width, height) > SHORT_SIDE:
        raise TooLargeError(
            f"it has {width:,} x {height:,} pixels; expected at most {LONG_SIDE:,} x "
            f"{SHORT_SIDE:,}, either way round"
        )
    return OpenedImage(picture, _find_orientation(picture), width * height, file)


def _find_orientation(picture: Image.Image) -> int:
    """Return how EXIF says that the image is turned, 1 to 8; 1, upright, where it does not say.

    Not by `getexif`, which reads all tags and warns of corrupt ones. Pillow turns TIFFs itself.
    """
    exif = bytes(picture.info.get("exif") or b"").removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "<")
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * entry)
            if tag == ExifTags.Base.Orientation:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


Conversion: TypeAlias = Callable[[Image.Image], Image.Image]
"""Of a band of a picture, pixel by pixel."""


def _find_conversion(picture: Image.Image) -> tuple[str, Conversion | None]:
    """Return "RGB" or "L", and what makes a picture one of that; None if it is one."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return "L", _find_scale(picture)
    if picture.has_transparency_data:
        return "RGB", _lay_over_white
    if picture.mode in ("L", "RGB"):
        return picture.mode, None
    if picture.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return "RGB", ImageCms.buildTransform(lab, rgb, "LAB", "RGB").apply
    mode = "L" if picture.mode == "1" else "RGB"
    return mode, lambda band: band.convert(mode)


def _convert(
    picture: Image.Image, mode: str, convert: Conversion | None, turn: Image.Transpose | None
) -> Image.Image:
    """Return a picture converted and turned, band by band."""
    width, height = picture.size
    is_sideways = turn in _SIDEWAYS
    made = Image.new(mode, (height, width) if is_sideways else (width, height))
    for top, bottom, band in _cut_bands(picture):
        converted = convert(band) if convert else band
        if turn is not None:
            converted = converted.transpose(turn)
        start = height - bottom if turn in _BACKWARDS else top
        made.paste(converted, (start, 0) if is_sideways else (0, start))
    return made


def _cut_bands(picture: Image.Image) -> Iterator[tuple[int, int, Image.Image]]:
    """Yield the first row, the row after the last, and the picture between them."""
    width, height = picture.size
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield top, bottom, picture.crop((0, top, width, bottom))


def _lay_over_white(band: Image.Image) -> Image.Image:
    layer = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
    made = Image.new("RGB", layer.size, "white")
    made.paste(layer, mask=layer)
    return made


def _find_scale(picture: Image.Image) -> Conversion:
    """Return what scales grey of 16 or 32 bits down; Pillow would clip it at 255.

    16 bits lose the lower 8, as 16-bit colour does in Pillow. 32 bits do not say what is white: it
    is taken to be 1, 255 or 65535, the first that no value is above, else the largest value.
    """
    if picture.mode.startswith("I;16"):
        return lambda band: Image.fromarray((np.asarray(band) >> 8).astype(np.uint8))
    largest = max(_read_grey(band).max() for _, _, band in _cut_bands(picture))
    white = next((white for white in (1, 255, 65_535) if largest <= white), largest)
    scale = np.float32(1 / 256 if white == 65_535 else 255 / white)

    def convert(band: Image.Image) -> Image.Image:
        return Image.fromarray(np.clip(_read_grey(band) * scale, 0, 255).astype(np.uint8))

    return convert


def _read_grey(band: Image.Image) -> NDArray[np.float32]:
    grey = np.asarray(band).astype(np.float32)
    return np.nan_to_num(grey, copy=False, posinf=0.0, neginf=0.0)


def encode(picture: Image.Image, kind: Literal["PNG", "JPEG"], **options: Any) -> bytes:
    """Return the file of a decoded image; a colour profile of its source would be wrong now."""
    buffer = BytesIO()
    picture.save(buffer, kind, icc_profile=None, **options)
    return buffer.getvalue()
