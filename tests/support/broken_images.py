"""Image files, whole and broken, made from one small picture."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

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
