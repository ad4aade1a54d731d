"""Image files of every format and mode, whole and broken, made from one small picture."""

from __future__ import annotations

import base64
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile

from shared_engine import InputError, InputTypeError
from shared_engine.images.encode import encode_data_url
from shared_engine.images.sources import accept
from shared_engine.images.tiles import choose_grid, cut_tiles

SIDE = 64
"""Of a tile in most tests: the arithmetic is that of 512."""

_y, _x = np.mgrid[:60, :90]
PICTURE = Image.fromarray(np.stack([_x * 2, _y * 4, (_x + _y) % 256], -1).astype(np.uint8))
"""90 x 60, RGB, a gradient with strokes: no two turns of it are alike."""
ImageDraw.Draw(PICTURE).line([(5, 5), (60, 20), (30, 50)], fill="white", width=3)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, bits: int, colour: int, rows: bytes, *chunks: bytes, interlace: int = 0
) -> bytes:
    """A PNG by hand: its rows, each after a filter byte, and chunks to go before them."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *chunks,
            chunk(b"IDAT", zlib.compress(rows, 9)),
            chunk(b"IEND", b""),
        )
    )


def interlaced(image: Image.Image) -> bytes:
    """An RGB image as an interlaced PNG, which Pillow reads and does not write."""
    pixels = np.asarray(image)
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    passes = [pixels[y::dy, x::dx] for y, x, dy, dx in (*starts, (1, 0, 2, 1))]
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in part)
    return png(*image.size, 8, 2, rows, interlace=1)


def exif(orientation: int, order: str = "<") -> bytes:
    """An EXIF block with nothing but an orientation."""
    mark = b"II" if order == "<" else b"MM"
    return b"Exif\0\0" + struct.pack(
        f"{order}2sHIHHHIHHI", mark, 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0
    )


def corrupt_exif(orientation: int) -> bytes:
    """An EXIF block whose first tag points out of it, and whose second is the orientation."""
    entries = struct.pack("<HHII", 0x010F, 2, 999, 50_000)
    entries += struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + entries + struct.pack("<I", 0)


def with_sides(file: bytes, width: int, height: int) -> bytes:
    """The same file with other sides in its header, and the pixels it had."""
    data = bytearray(file)
    if data.startswith(b"\x89PNG"):
        data[8:33] = chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29])
    elif data.startswith(b"GIF8"):
        data[6:10] = struct.pack("<HH", width, height)
    elif data.startswith(b"BM"):
        data[18:26] = struct.pack("<ii", width, height)
    elif data.startswith(b"\xff\xd8"):
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    elif data.startswith(b"II"):
        (first,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, first)
        for at in range(first + 2, first + 2 + 12 * count, 12):
            (tag,) = struct.unpack_from("<H", data, at)
            if tag in (256, 257):
                data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, (width, height)[tag - 256])
    else:
        raise AssertionError("no such header")
    return bytes(data)


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP whose canvas is said to be so large; it holds the picture."""
    still = encoded(PICTURE, "WEBP")[12:]
    extended = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little")
    extended += (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(extended)) + extended + still
    return b"RIFF" + struct.pack("<I", len(body)) + body


def as_64(file: bytes) -> str:
    return base64.b64encode(file).decode()


PNG, JPEG, TIFF = (encoded(PICTURE, kind) for kind in ("PNG", "JPEG", "TIFF"))
PNG64 = as_64(PNG)
HTML = b"<!DOCTYPE html><title>Not found</title>"


# The RGB that a person would see, and the tiles of it by plain Pillow.


def reference_tiles(rgb: Image.Image, max_tiles: int, size: int = SIDE) -> np.ndarray:
    """Resize, crop and thumbnail by plain Pillow."""
    cols, rows = choose_grid(*rgb.size, max_tiles, size)
    sheet = rgb.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
    cut = [
        sheet.crop((col * size, row * size, (col + 1) * size, (row + 1) * size))
        for row in range(rows)
        for col in range(cols)
    ]
    if len(cut) > 1:
        cut.append(rgb.resize((size, size), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile) for tile in cut])


def over_white(rgba: Image.Image) -> Image.Image:
    colour, alpha = np.asarray(rgba)[..., :3].astype(float), np.asarray(rgba)[..., 3:] / 255
    return Image.fromarray(np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8))


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(values.astype(np.uint8)[..., None], 3, -1))


def opened(file: bytes) -> ImageFile.ImageFile:
    """Open a file as a caller may have done."""
    with warnings.catch_warnings(action="ignore"):
        return Image.open(BytesIO(file))


def seen(file: bytes) -> Image.Image:
    with opened(file) as image:
        return image.convert("RGB")


_ALPHA = np.linspace(0, 255, 90).astype(np.uint8)[None].repeat(60, 0)
RGBA = Image.fromarray(np.dstack([np.asarray(PICTURE), _ALPHA]))
L = PICTURE.convert("L")
LA = Image.merge("LA", (L, Image.fromarray(_ALPHA)))
BITS = PICTURE.convert("1")
WIDE = np.asarray(L).astype(np.uint16) * 256 + 77
PALETTE = PICTURE.quantize(16)
CMYK = PICTURE.convert("CMYK")
_one_clear = PALETTE.convert("RGBA")
_one_clear.putalpha(Image.fromarray(np.where(np.asarray(PALETTE) == 3, 0, 255).astype(np.uint8)))
_half_clear = PALETTE.convert("RGBA")
_half_clear.putalpha(Image.fromarray((np.asarray(PALETTE) * 17).astype(np.uint8)))
SECOND = PICTURE.transpose(Image.Transpose.ROTATE_180)
ANIMATED: dict[str, Any] = {"save_all": True, "append_images": [SECOND]}


GIF = encoded(PALETTE, "GIF")
WEBP = encoded(PICTURE, "WEBP", lossless=True)
CMYK_JPEG = encoded(CMYK, "JPEG", quality=95)
_RGB16 = (np.asarray(PICTURE).astype(int) * 256 + 200).astype(">u2")

FORMATS: dict[str, tuple[bytes, Image.Image]] = {
    "png": (PNG, PICTURE),
    "png interlaced": (interlaced(PICTURE), PICTURE),
    "png 1 bit": (encoded(BITS, "PNG"), BITS.convert("RGB")),
    "png grey": (encoded(L, "PNG"), L.convert("RGB")),
    "png grey, alpha": (encoded(LA, "PNG"), over_white(LA.convert("RGBA"))),
    "png grey, one shade transparent": (
        encoded(L, "PNG", transparency=100),
        grey(np.where(np.asarray(L) == 100, 255, np.asarray(L))),
    ),
    "png 16-bit grey": (encoded(Image.fromarray(WIDE), "PNG"), L.convert("RGB")),
    "png 16-bit colour": (
        png(90, 60, 16, 2, b"".join(b"\0" + row.tobytes() for row in _RGB16)),
        PICTURE,
    ),
    "png alpha": (encoded(RGBA, "PNG"), over_white(RGBA)),
    "png one colour transparent": (
        encoded(PICTURE, "PNG", transparency=(255, 255, 255)),
        PICTURE,
    ),
    "png palette": (encoded(PALETTE, "PNG"), PALETTE.convert("RGB")),
    "png palette, one transparent": (
        encoded(PALETTE, "PNG", transparency=3),
        over_white(_one_clear),
    ),
    "png palette, half transparent": (
        encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 17))),
        over_white(_half_clear),
    ),
    "png animated": (encoded(PICTURE, "PNG", **ANIMATED), PICTURE),
    "png upside down by exif": (encoded(PICTURE, "PNG", exif=exif(3)), SECOND),
    "jpeg": (JPEG, seen(JPEG)),
    "jpeg progressive": (encoded(PICTURE, "JPEG", progressive=True), seen(JPEG)),
    "jpeg with a second picture": (
        encoded(PICTURE, "MPO", save_all=True, append_images=[SECOND.copy()]),
        seen(JPEG),
    ),
    "jpeg grey": (encoded(L, "JPEG"), seen(encoded(L, "JPEG"))),
    "jpeg cmyk": (CMYK_JPEG, seen(CMYK_JPEG)),
    "jpeg corrupt exif": (encoded(PICTURE, "JPEG", exif=corrupt_exif(1)), seen(JPEG)),
    "jpeg corrupt exif, but turned": (
        encoded(PICTURE, "JPEG", exif=corrupt_exif(3)),
        seen(JPEG).transpose(Image.Transpose.ROTATE_180),
    ),
    "jpeg exif cut short": (encoded(PICTURE, "JPEG", exif=exif(6)[:17]), seen(JPEG)),
    "jpeg exif orientation 9": (encoded(PICTURE, "JPEG", exif=exif(9)), seen(JPEG)),
    "jpeg corrupt icc": (encoded(PICTURE, "JPEG", icc_profile=b"nonsense"), seen(JPEG)),
    "gif": (GIF, PALETTE.convert("RGB")),
    "gif animated": (
        encoded(PALETTE, "GIF", save_all=True, append_images=[SECOND.quantize(16)]),
        PALETTE.convert("RGB"),
    ),
    "gif transparent": (encoded(PALETTE, "GIF", transparency=3), over_white(_one_clear)),
    "webp": (WEBP, PICTURE),
    "webp alpha": (
        encoded(RGBA, "WEBP", lossless=True, exact=True),
        over_white(RGBA),
    ),
    "webp animated": (encoded(PICTURE, "WEBP", lossless=True, **ANIMATED), PICTURE),
    "bmp": (encoded(PICTURE, "BMP"), PICTURE),
    "bmp 1 bit": (encoded(BITS, "BMP"), BITS.convert("RGB")),
    "bmp palette": (encoded(PALETTE, "BMP"), PALETTE.convert("RGB")),
    "tiff": (TIFF, PICTURE),
    "tiff deflate": (encoded(PICTURE, "TIFF", compression="tiff_adobe_deflate"), PICTURE),
    "tiff two pages": (encoded(PICTURE, "TIFF", **ANIMATED), PICTURE),
    "tiff 1 bit fax": (encoded(BITS, "TIFF", compression="group4"), BITS.convert("RGB")),
    "tiff 16-bit": (encoded(Image.fromarray(WIDE), "TIFF"), L.convert("RGB")),
    "tiff 16-bit big-endian": (
        encoded(Image.frombytes("I;16B", (90, 60), WIDE.astype(">u2").tobytes()), "TIFF"),
        L.convert("RGB"),
    ),
    "tiff alpha": (encoded(RGBA, "TIFF"), over_white(RGBA)),
    "tiff cmyk": (encoded(CMYK, "TIFF"), CMYK.convert("RGB")),
}


IGNORE_CORRUPT_EXIF = pytest.mark.filterwarnings(
    "ignore:(Tag data larger|Truncated File Read|Corrupt EXIF):UserWarning"
)
"""For the files of FORMATS with corrupt EXIF, which Pillow reads with a warning."""

USES: dict[str, Callable[[Any], Any]] = {
    "tiles": lambda source: cut_tiles(accept(source), 2),
    "data URL": lambda source: encode_data_url(accept(source)),
}
"""Uses of an image: by a model in this process, or by a NIM."""


def assert_refused(use: str, source: Any, kind: type[InputError], words: str) -> None:
    """Use an image that cannot be used, and check the error."""
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        USES[use](source)
    assert type(caught.value) is kind
    assert len(str(caught.value)) < 450
    assert "secret" not in str(caught.value)
    if kind is not InputTypeError:
        assert caught.value.__cause__ is not None


def write_tiff(*kinds: int) -> bytes:
    """A TIFF of as many grey pictures of 9 x 9, which say what they are (tag 254).

    0 and 2 are pages, 1 is a smaller copy, 4 a mask. All show the same 81 bytes.
    """
    begin, size = 8 + 82, 2 + 12 * 9 + 4
    file = bytearray(struct.pack("<2sHI", b"II", 42, begin) + b"\x60" * 82)
    for number, kind in enumerate(kinds, 1):
        tags = ((254, kind), (256, 9), (257, 9), (258, 8), (259, 1), (262, 1), (273, 8), (278, 9),
                (279, 81))  # fmt: skip
        file += struct.pack("<H", len(tags))
        file += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        file += struct.pack("<I", begin + size * number if number < len(kinds) else 0)
    return bytes(file)
