"""Encode an image as the data URL that a NIM receives."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Literal

import pybase64
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from shared_engine.images.decode import OpenedImage, open_image, open_source
from shared_engine.images.sources import MAX_BYTES, AcceptedImage, TooLargeError, image_errors
from shared_engine.images.tiles import FittedImage, fit

_MOST_CHARACTERS = 4 * MAX_BYTES // 3 + 64
"""Characters of the data URL of a file of MAX_BYTES."""
_MAX_TILES, _SIDE = 6, 512
"""The grid of the image models at a NIM."""
_QUALITIES = range(95, 25, -5)
"""JPEG qualities to try; below these, a smaller sheet shows more."""
_SHRINKS = 6
"""Sizes to try, each three quarters of the one before; the last is a quarter of the grid."""


def encode_data_url(
    source: AcceptedImage, urls: bool = False, most_characters: int | None = None
) -> str:
    """Return the data URL of an image for a NIM, a PNG or JPEG with the tiles of the image.

    A file that all readers decode equally is sent unchanged: a still, opaque, upright PNG or JPEG
    of 8 bits. It is decoded nevertheless, a JPEG at an eighth of its size, so that a broken file is
    refused here. Any other image is sent as a PNG of its pixels.

    If that is longer than `most_characters`, the image is resized to its grid of tiles and sent as
    a PNG or else as a JPEG of the best quality that fits. So is a PNG of more than MAX_BYTES, as of
    a photograph that its EXIF data turn.

    Raises:
        ImageTooLargeError: as `cut_tiles`, or no JPEG fits.
        ImageError: as `cut_tiles`.
    """
    most = _MOST_CHARACTERS if most_characters is None else most_characters
    with image_errors(source):
        opened = open_source(source, urls)
        url = _encode_whole(opened)
        if len(url) <= most:
            return url
        reopened = open_image(opened.content or opened.picture)  # `opened` is drafted at an eighth
        with fit(reopened, _MAX_TILES, _SIDE) as fitted:
            return _shrink(fitted, most)


def _encode_whole(opened: OpenedImage) -> str:
    if opened.is_plain and opened.content is not None:
        opened.picture.draft(None, (1, 1))
        with opened.load():
            is_jpeg = isinstance(opened.picture, JpegImageFile)
            return _write_url("JPEG" if is_jpeg else "PNG", opened.content)
    with opened.decode() as image:
        return _write_url("PNG", _write_file(image, "PNG", compress_level=1))


def _shrink(fitted: FittedImage, most_characters: int) -> str:
    """Return the data URL of the sheet from which the tiles are cut, or of a smaller one.

    A side of the image that is shorter than the sheet's is kept: enlarging it adds nothing.

    Raises:
        TooLargeError: none has so few characters.
    """
    left, upper, right, lower = fitted.box
    width = min(round(right - left), fitted.cols * _SIDE)
    height = min(round(lower - upper), fitted.rows * _SIDE)
    for _ in range(_SHRINKS):
        sheet = fitted.image.resize((width, height), Image.Resampling.BICUBIC, fitted.box)
        png = _write_url("PNG", _write_file(sheet, "PNG"))
        if len(png) <= most_characters:
            return png
        if jpeg := _encode_jpeg(sheet, most_characters):
            return jpeg
        width, height = max(3 * width // 4, 1), max(3 * height // 4, 1)
    raise TooLargeError(f"no JPEG of it fits in {most_characters:,} characters")


def _encode_jpeg(sheet: Image.Image, most_characters: int) -> str | None:
    """Return the JPEG of the best quality that fits; None if none does."""
    for quality in _QUALITIES:
        url = _write_url("JPEG", _write_file(sheet, "JPEG", quality=quality))
        if len(url) <= most_characters:
            return url
    return None


def _write_file(image: Image.Image, kind: Literal["PNG", "JPEG"], **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _write_url(kind: Literal["PNG", "JPEG"], file: bytes) -> str:
    return f"data:image/{kind.lower()};base64,{pybase64.b64encode_as_string(file)}"
