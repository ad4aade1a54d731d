"""The bytes of an image to upright, opaque pixels of 8 bits."""

from __future__ import annotations

import struct
import threading
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from shared_engine.images.sources import Jpeg, TooLargeError, find_format

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


def open_image(content: bytes | Image.Image) -> Image.Image:
    """An image of our own whose header is read and allowed; a caller's is copied, so decoded."""
    picture = (
        content if isinstance(content, Image.Image) else find_format(content)(BytesIO(content))
    )
    width, height = picture.size
    if not width or not height:
        raise ValueError("it has no pixels")
    if max(width, height) > LONG_SIDE or min(width, height) > SHORT_SIDE:
        raise TooLargeError(
            f"it has {width:,} x {height:,} pixels; expected at most {LONG_SIDE:,} x "
            f"{SHORT_SIDE:,}, either way round"
        )
    if picture is content:
        with _LOADING:  # two threads must not decode one object
            return picture.copy()
    return picture


def is_plain(picture: Image.Image, content: object) -> bool:
    """Whether all readers of a file see the same in it."""
    return (
        isinstance(content, bytes)
        and isinstance(picture, (Jpeg, PngImageFile))
        and picture.mode in ("1", "L", "P", "RGB")
        and not (isinstance(picture, PngImageFile) and content[24] > 8)  # bits of a value
        and not picture.has_transparency_data
        and not getattr(picture, "is_animated", False)
        and _orientation(picture) == 1
    )


def _orientation(picture: Image.Image) -> int:
    """How EXIF says that the image is turned, 1 to 8; 1, upright, where it does not say.

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


def find_upright_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (width, height) if _orientation(picture) <= 4 else (height, width)


def decode(picture: Image.Image) -> Image.Image:
    """Decode an image of our own to the end: upright, opaque, RGB or grey of 8 bits."""
    turn = _TURNS.get(_orientation(picture))
    picture.load()
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = Image.fromarray(_eight_bits(np.asarray(picture)))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGB", layer.size, "white")
        picture.paste(layer, mask=layer)
    if picture.mode not in ("RGB", "L"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    return picture if turn is None else picture.transpose(turn)


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
    rgb = picture.convert("RGB")
    rgb.info = {}  # a colour profile of the source would be wrong now
    buffer = BytesIO()
    rgb.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
