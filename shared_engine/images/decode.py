"""From the bytes of an image to upright, opaque pixels of 8 bits."""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from shared_engine.images.formats import Jpeg, find_format
from shared_engine.images.sources import TooLargeError

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

_LOADING = threading.Lock()


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """An image whose header is read and allowed, and whose pixels are still to be decoded."""

    picture: Image.Image
    orientation: int
    """How EXIF says that it is turned, 1 to 8; 1 is upright."""
    content: bytes | None
    """Its file; None of a caller's PIL image, which is never written to."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height as a person sees it."""
        width, height = self.picture.size
        return (width, height) if self.orientation <= 4 else (height, width)

    @property
    def is_plain(self) -> bool:
        """Whether all readers of its file see the same in it."""
        picture = self.picture
        return (
            self.content is not None
            and isinstance(picture, (Jpeg, PngImageFile))
            and picture.mode in ("1", "L", "P", "RGB")
            and not (isinstance(picture, PngImageFile) and self.content[24] > 8)  # bits of a value
            and not picture.has_transparency_data
            and not getattr(picture, "is_animated", False)
            and self.orientation == 1
        )

    def decode(self) -> Image.Image:
        """Decode to the end: an image of our own, upright, opaque, RGB or grey of 8 bits."""
        picture = self.picture
        if self.content is None:
            with _LOADING:  # two threads must not decode one object
                picture = picture.copy()
        picture.load()
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            picture = Image.fromarray(_eight_bits(np.asarray(picture)))
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            picture = Image.new("RGB", layer.size, "white")
            picture.paste(layer, mask=layer)
        if picture.mode not in ("RGB", "L"):
            picture = picture.convert("L" if picture.mode == "1" else "RGB")
        turn = _TURNS.get(self.orientation)
        return picture if turn is None else picture.transpose(turn)


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
    return OpenedImage(picture, _find_orientation(picture), file)


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


def _eight_bits(grey: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale grey of 16 or 32 bits down; Pillow would clip it at 255.

    16 bits lose the lower 8, as 16-bit colour does in Pillow. 32 bits do not say what is white: it
    is taken to be 1, 255 or 65535, the first that no value is above, else the largest value.
    """
    if grey.dtype.itemsize == 2:
        return (grey >> 8).astype(np.uint8)
    grey = np.nan_to_num(grey.astype(np.float32), posinf=0.0, neginf=0.0)
    largest = grey.max()
    white = next((white for white in (1, 255, 65_535) if largest <= white), largest)
    scale = 1 / 256 if white == 65_535 else 255 / white
    return np.clip(grey * np.float32(scale), 0, 255).astype(np.uint8)


def encode_png(picture: Image.Image) -> bytes:
    """Return the file of a decoded image; a colour profile of its source would be wrong now."""
    rgb = picture.convert("RGB")
    rgb.info = {}
    buffer = BytesIO()
    rgb.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
