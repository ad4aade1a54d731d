"""Sources, formats, limits and tiles of images; most inputs are broken on purpose."""

from __future__ import annotations

import base64
import os
import re
import socket
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import httpcore
import numpy as np
import PIL
import pytest
from PIL import Image, ImageDraw, ImageFile, ImageOps

from shared_engine import (
    ImageError,
    ImageTooLargeError,
    InputError,
    InputTypeError,
)
from shared_engine.images import fetch as image_urls
from shared_engine.images import sources
from shared_engine.images import tiles as image_tiles
from shared_engine.images.sources import accept, decode_data_url, is_data_url
from shared_engine.images.tiles import choose_grid, cut_tiles, encode_data_url
from tests.conftest import ROOT
from tests.support.broken_images import (
    PICTURE,
    chunk,
    corrupt_exif,
    encoded,
    exif,
    interlaced,
    png,
    webp_canvas,
    with_sides,
)

PAGES = ROOT.parent / "shared" / "data" / "nvidia-pages"
SIDE = 64
"""Of a tile in most tests: the arithmetic is that of 512."""
PNG, JPEG, TIFF = (encoded(PICTURE, kind) for kind in ("PNG", "JPEG", "TIFF"))


def as_64(file: bytes) -> str:
    return base64.b64encode(file).decode()


PNG64 = as_64(PNG)


# The rule of the reference, written once more and straight from its description.

ORDERS: dict[range, str] = {
    range(1, 4): "11 12 21 31 13",
    range(4, 8): "11 12 21 31 13 41 14 22 15 51 61 23 16 32 71 17",
    range(8, 10): "11 12 21 31 13 22 41 14 51 15 16 61 32 23 71 17 42 24 18 81 19 33 91",
}


def reference_order(max_tiles: int) -> list[tuple[int, int]]:
    """The candidates as the reference makes them, from a set."""
    sides = range(1, max_tiles + 1)
    cells = {
        (i, j)
        for n in sides
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= max_tiles
    }
    return sorted(cells, key=lambda cell: cell[0] * cell[1])


def reference_grid(width: int, height: int, cells: list[tuple[int, int]]) -> tuple[int, int]:
    best, best_score = (1, 1), float("-inf")
    for cols, rows in cells:
        shape, aspect = cols / rows, width / height
        covered = (cols * rows * 512 * 512) / (width * height)
        score = min(covered, 0.6) * min(shape / aspect, aspect / shape)
        if score > best_score:
            best, best_score = (cols, rows), score
    return best


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


def sizes() -> list[tuple[int, int]]:
    random = np.random.default_rng(0)
    drawn = np.exp(random.uniform(0, np.log(16_384), (300, 2))).astype(int)
    plain = [(512 * i, 512 * j) for i in range(1, 9) for j in range(1, 9)]
    return [(int(w), int(h)) for w, h in drawn] + plain + [(1, 1), (1, 16_384), (16_384, 8_192)]


@pytest.mark.parametrize("max_tiles", range(1, 13))
def test_grids_are_those_of_the_reference(max_tiles):
    for width, height in sizes():
        expected = reference_grid(width, height, reference_order(max_tiles))
        assert choose_grid(width, height, max_tiles) == expected, (width, height)


@pytest.mark.parametrize("max_tiles", range(1, 10))
def test_the_order_of_grids_is_pinned(max_tiles):
    pinned = next(text for tiles, text in ORDERS.items() if max_tiles in tiles)
    cells = [(int(cell[0]), int(cell[1])) for cell in pinned.split()]
    cells = [cell for cell in cells if cell[0] * cell[1] <= max_tiles]
    for width, height in sizes():
        assert choose_grid(width, height, max_tiles) == reference_grid(width, height, cells)


@pytest.mark.parametrize(
    ("sides", "two", "four", "six"),
    [
        ((1275, 1650), (1, 2), (2, 2), (2, 3)),
        ((1920, 1080), (2, 1), (2, 2), (3, 2)),
        ((300, 200), (2, 1), (2, 1), (3, 2)),
        ((512, 512), (1, 1), (1, 1), (1, 1)),
        ((200, 2000), (1, 2), (1, 4), (1, 6)),
        ((8192, 16384), (1, 2), (1, 2), (2, 3)),
    ],
)
def test_grids_measured_on_the_reference(sides, two, four, six):
    assert [choose_grid(*sides, most) for most in (2, 4, 6)] == [two, four, six]


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("sides", [(90, 60), (60, 90), (64, 64), (255, 330), (1, 1), (700, 30)])
def test_tiles_are_a_plain_resize_and_crop(sides, max_tiles):
    picture = PICTURE.resize(sides)
    ours = cut_tiles(picture, max_tiles, SIDE)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert ours.flags.writeable
    assert np.array_equal(ours, reference_tiles(picture, max_tiles))


def test_tiles_of_a_page_at_the_size_of_the_model():
    page = PICTURE.resize((1275, 1650))
    assert np.array_equal(cut_tiles(page, 6), reference_tiles(page, 6, 512))
    assert cut_tiles(page, 6).shape == (7, 512, 512, 3)
    assert cut_tiles(page, 1).shape == (1, 512, 512, 3)


# Formats and modes: what is in the file, and the RGB that a person would see.


def over_white(rgba: Image.Image) -> Image.Image:
    colour, alpha = np.asarray(rgba)[..., :3].astype(float), np.asarray(rgba)[..., 3:] / 255
    return Image.fromarray(np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8))


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(values.astype(np.uint8)[..., None], 3, -1))


def opened(file: bytes) -> ImageFile.ImageFile:
    """What a caller may have: `Image.open` warns of corrupt EXIF, which `tiles` must not."""
    with warnings.catch_warnings(action="ignore"):
        return Image.open(BytesIO(file))


def describe(file: bytes) -> Image.Image:
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
_seen = PALETTE.convert("RGBA")
_seen.putalpha(Image.fromarray(np.where(np.asarray(PALETTE) == 3, 0, 255).astype(np.uint8)))
_some = PALETTE.convert("RGBA")
_some.putalpha(Image.fromarray((np.asarray(PALETTE) * 17).astype(np.uint8)))
SECOND = PICTURE.transpose(Image.Transpose.ROTATE_180)
_animated: dict[str, Any] = {"save_all": True, "append_images": [SECOND]}


_gif = encoded(PALETTE, "GIF")
_webp = encoded(PICTURE, "WEBP", lossless=True)
_cmyk = encoded(CMYK, "JPEG", quality=95)
_rgb16 = (np.asarray(PICTURE).astype(int) * 256 + 200).astype(">u2")

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
        png(90, 60, 16, 2, b"".join(b"\0" + row.tobytes() for row in _rgb16)),
        PICTURE,
    ),
    "png alpha": (encoded(RGBA, "PNG"), over_white(RGBA)),
    "png one colour transparent": (
        encoded(PICTURE, "PNG", transparency=(255, 255, 255)),
        PICTURE,
    ),
    "png palette": (encoded(PALETTE, "PNG"), PALETTE.convert("RGB")),
    "png palette, one transparent": (encoded(PALETTE, "PNG", transparency=3), over_white(_seen)),
    "png palette, half transparent": (
        encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 17))),
        over_white(_some),
    ),
    "png animated": (encoded(PICTURE, "PNG", **_animated), PICTURE),
    "png upside down by exif": (encoded(PICTURE, "PNG", exif=exif(3)), SECOND),
    "jpeg": (JPEG, describe(JPEG)),
    "jpeg progressive": (encoded(PICTURE, "JPEG", progressive=True), describe(JPEG)),
    "jpeg grey": (encoded(L, "JPEG"), describe(encoded(L, "JPEG"))),
    "jpeg cmyk": (_cmyk, describe(_cmyk)),
    "jpeg corrupt exif": (encoded(PICTURE, "JPEG", exif=corrupt_exif(1)), describe(JPEG)),
    "jpeg corrupt exif, but turned": (
        encoded(PICTURE, "JPEG", exif=corrupt_exif(3)),
        describe(JPEG).transpose(Image.Transpose.ROTATE_180),
    ),
    "jpeg exif cut short": (encoded(PICTURE, "JPEG", exif=exif(6)[:17]), describe(JPEG)),
    "jpeg exif orientation 9": (encoded(PICTURE, "JPEG", exif=exif(9)), describe(JPEG)),
    "jpeg corrupt icc": (encoded(PICTURE, "JPEG", icc_profile=b"nonsense"), describe(JPEG)),
    "gif": (_gif, PALETTE.convert("RGB")),
    "gif animated": (
        encoded(PALETTE, "GIF", save_all=True, append_images=[SECOND.quantize(16)]),
        PALETTE.convert("RGB"),
    ),
    "gif transparent": (encoded(PALETTE, "GIF", transparency=3), over_white(_seen)),
    "webp": (_webp, PICTURE),
    "webp alpha": (
        encoded(RGBA, "WEBP", lossless=True, exact=True),
        over_white(RGBA),
    ),
    "webp animated": (encoded(PICTURE, "WEBP", lossless=True, **_animated), PICTURE),
    "bmp": (encoded(PICTURE, "BMP"), PICTURE),
    "bmp 1 bit": (encoded(BITS, "BMP"), BITS.convert("RGB")),
    "bmp palette": (encoded(PALETTE, "BMP"), PALETTE.convert("RGB")),
    "tiff": (TIFF, PICTURE),
    "tiff deflate": (encoded(PICTURE, "TIFF", compression="tiff_adobe_deflate"), PICTURE),
    "tiff two pages": (encoded(PICTURE, "TIFF", **_animated), PICTURE),
    "tiff 1 bit fax": (encoded(BITS, "TIFF", compression="group4"), BITS.convert("RGB")),
    "tiff 16-bit": (encoded(Image.fromarray(WIDE), "TIFF"), L.convert("RGB")),
    "tiff 16-bit big-endian": (
        encoded(Image.frombytes("I;16B", (90, 60), WIDE.astype(">u2").tobytes()), "TIFF"),
        L.convert("RGB"),
    ),
    "tiff 32-bit": (encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), L.convert("RGB")),
    "tiff float to 1": (
        encoded(Image.fromarray((np.asarray(L) / 255).astype(np.float32)), "TIFF"),
        L.convert("RGB"),
    ),
    "tiff float to 255, nan": (
        encoded(Image.fromarray(np.where(_ALPHA < 9, np.nan, _ALPHA).astype(np.float32)), "TIFF"),
        grey(np.where(_ALPHA < 9, 0, _ALPHA)),
    ),
    "tiff alpha": (encoded(RGBA, "TIFF"), over_white(RGBA)),
    "tiff cmyk": (encoded(CMYK, "TIFF"), CMYK.convert("RGB")),
}

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_seen_as_a_person_sees_it(name):
    file, expected = FORMATS[name]
    ours, plain = cut_tiles(file, 2, SIDE), reference_tiles(expected, 2)
    off = np.abs(ours.astype(int) - plain).max()
    assert off <= (1 if "alpha" in name or "transparent" in name else 0)  # rounding of the blend


@pytest.mark.parametrize("name", FORMATS)
def test_a_pil_image_is_seen_as_its_file(name):
    file, _ = FORMATS[name]
    with opened(file) as image:
        assert np.array_equal(cut_tiles(image, 2, SIDE), cut_tiles(file, 2, SIDE))


@pytest.mark.parametrize("name", FORMATS)
def test_what_goes_to_a_nim_has_the_same_tiles(name):
    file, _ = FORMATS[name]
    sent = decode_data_url(encode_data_url(file))
    for size in (8, SIDE):  # at 8, JPEGs are decoded at an eighth
        assert np.array_equal(cut_tiles(sent, 2, size), cut_tiles(file, 2, size))
    with opened(sent) as image:
        assert image.format in ("PNG", "JPEG")
        assert not image.has_transparency_data
        assert not getattr(image, "is_animated", False)


def test_only_a_file_that_all_readers_understand_alike_goes_as_it_is():
    same = {
        name for name, (file, _) in FORMATS.items() if encode_data_url(file).endswith(as_64(file))
    }
    assert same == {
        *("png", "png interlaced", "png 1 bit", "png grey", "png palette"),
        *("jpeg", "jpeg progressive", "jpeg grey", "jpeg corrupt exif", "jpeg exif cut short"),
        *("jpeg exif orientation 9", "jpeg corrupt icc"),
    }
    assert encode_data_url(PNG).startswith("data:image/png;base64,")
    assert encode_data_url(JPEG).startswith("data:image/jpeg;base64,")
    assert encode_data_url(_webp).startswith("data:image/png;base64,")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_turns_an_image_upright(kind, order, orientation):
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    stored = describe(encoded(PICTURE, kind, **options))
    if kind == "TIFF":
        file = encoded(PICTURE, kind, tiffinfo={0x0112: orientation})
    else:
        file = encoded(PICTURE, kind, exif=exif(orientation, order), **options)
    turn = ORIENTATIONS.get(orientation)
    upright = stored if turn is None else stored.transpose(turn)
    for source in (file, Image.open(BytesIO(file)), decode_data_url(encode_data_url(file))):
        assert np.array_equal(cut_tiles(source, 6, SIDE), reference_tiles(upright, 6))


def test_a_pil_image_that_its_caller_has_turned_is_not_turned_again():
    turned = ImageOps.exif_transpose(Image.open(BytesIO(encoded(PICTURE, "PNG", exif=exif(6)))))
    upright = PICTURE.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(cut_tiles(turned, 2, SIDE), reference_tiles(upright, 2))


# Sources.


def at(file: BytesIO, position: int) -> BytesIO:
    file.seek(position)
    return file


class Pipe:
    """An unseekable file of short reads, with nothing but `read`."""

    def __init__(self, data: bytes) -> None:
        self._left = data

    def read(self, most: int) -> bytes:
        part, self._left = self._left[: min(most, 100)], self._left[min(most, 100) :]
        return part


def linked(path: Path) -> Path:
    link = path.with_name("link")
    link.symlink_to(path)
    return link


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path as str": str,
    "path": lambda path: path,
    "file URL": lambda path: path.as_uri(),
    "file URL, localhost": lambda path: "FILE://localhost" + path.as_uri()[7:],
    "data URL": lambda path: f"data:image/png;base64,{PNG64}",
    "data URL, no MIME": lambda path: f"data:;base64,{PNG64}",
    "data URL, wrong MIME": lambda path: f"DATA:image/webp;base64,{PNG64}",
    "data URL of the card": lambda path: f"data:image/png,{PNG64}",
    "data URL in lines": lambda path: "data:image/png;base64," + base64.encodebytes(PNG).decode(),
    "data URL in percent": lambda path: "data:image/png," + "".join(f"%{b:02x}" for b in PNG),
    "data URL, percent in base64": lambda path: "data:,%69" + PNG64[1:].replace("+", "%2B"),
    "base64": lambda path: PNG64,
    "base64 in lines": lambda path: base64.encodebytes(PNG).decode(),
    "bytes": lambda path: PNG,
    "bytearray": lambda path: bytearray(PNG),
    "memoryview": lambda path: memoryview(PNG),
    "BytesIO, half read": lambda path: at(BytesIO(PNG), 99),
    "pipe": lambda path: Pipe(PNG),
    "PIL": lambda path: PICTURE,
    "PIL, lazy": lambda path: Image.open(BytesIO(PNG)),
    "symlink": linked,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_tiles(name, tmp_path):
    path = tmp_path / "100% näme #1.jpg"  # the wrong ending too
    path.write_bytes(PNG)
    source = accept(SOURCES[name](path))
    for _ in range(2):
        assert np.array_equal(cut_tiles(source, 2, SIDE), reference_tiles(PICTURE, 2))
    if name not in ("PIL", "PIL, lazy"):
        assert decode_data_url(encode_data_url(source)) == PNG


def test_a_file_object_is_read_at_once_and_only_a_file_object(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    with open(tmp_path / "a.png", "rb") as file:
        assert [accept(file), accept(file)] == [PNG, PNG]
        assert not file.closed
    for untouched in ("no/such/file", Path("no/such/file"), "https://example.com/a.png", b""):
        assert accept(untouched) is untouched


def test_a_path_wins_over_base64(tmp_path, monkeypatch):
    name = base64.b64encode(b"BM" + bytes(10)).decode()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match="cannot be used"):
        cut_tiles(name, 2)
    Path(name).write_bytes(PNG)
    assert np.array_equal(cut_tiles(name, 2, SIDE), cut_tiles(PNG, 2, SIDE))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"data:image/png;base64,{PNG64}", True),
        (f"DATA:Image/PNG,{PNG64}", True),
        ("data:image/svg+xml;charset=utf-8,%3Csvg/%3E", True),
        ("data:image/png;base64," + base64.encodebytes(PNG * 9).decode(), True),
        ("data:image/png;base64,", True),
        ("data:image/png;base64", False),
        ("data:image/png, and then", False),
        (f"data:image/png;base64,{PNG64} is how it begins", False),
        (f"see data:image/png;base64,{PNG64}", False),
        ("data:text/plain,hello", False),
        ("data: image/png,x", False),
        ("image/png", False),
        ("", False),
    ],
)
def test_a_data_url_is_told_from_a_text(text, answer):
    assert is_data_url(text) is answer


def test_telling_a_data_url_reads_no_megabytes():
    long = "data:image/png" + ";x" * 10_000_000
    start = time.perf_counter()
    for _ in range(1000):
        assert not is_data_url(long)
    assert time.perf_counter() - start < 0.5


# What cannot be used: (what a caller hands over, its error, words of the message).


def cut(file: bytes, part: float) -> bytes:
    return file[: int(len(file) * part)]


def lazily_closed() -> Image.Image:
    image = Image.open(BytesIO(PNG))
    image.close()
    return image


def closed_file() -> BytesIO:
    file = BytesIO(PNG)
    file.close()
    return file


def made(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(folder: Path, to: str) -> Path:
    (folder / "link").symlink_to(folder / to)
    return folder / "link"


def text_chunks(kind: bytes) -> bytes:
    """A PNG with a compressed text of 9 MB in 9 KB."""
    text = zlib.compress(bytes(9_000_000), 9)
    body = b"key\0\0" + text if kind == b"zTXt" else b"key\0\1\0\0\0" + text
    return PNG[:33] + chunk(kind, body) + PNG[33:]


HTML = b"<!DOCTYPE html><title>Not found</title>"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n"
_page = ImageError
_big = ImageTooLargeError
_type = InputTypeError
_canvas = _big if PIL.__version__ >= "13" else _page  # which looks before it makes a decoder

BROKEN: dict[str, tuple[Any, type[InputError], str]] = {
    "png cut in its signature": (PNG[:6], _page, "no PNG"),
    "png cut in its header": (PNG[:20], _page, "cannot be used"),
    "png cut before its pixels": (PNG[:33], _page, "cannot be used"),
    "png cut in its pixels": (cut(PNG, 0.5), _page, "truncated"),
    "png of 0 width": (with_sides(PNG, 0, 60), _page, "cannot be used"),
    "png with pixels of another": (with_sides(PNG, 900, 900), _page, "truncated"),
    "png with broken pixels": (
        PNG[:60] + bytes(200) + PNG[260:],
        _page,
        "cannot be used",
    ),
    "png bomb": (with_sides(PNG, 30_000, 30_000), _big, "30,000 x 30,000"),
    "png bomb of bits": (png(16_385, 1, 1, 0, bytes(2050)), _big, "16,385 x 1"),
    "png square over the short side": (with_sides(PNG, 8_193, 8_193), _big, "8,193"),
    "png zTXt bomb": (text_chunks(b"zTXt"), _page, "too large"),
    "png iTXt bomb": (text_chunks(b"iTXt"), _page, "too large"),
    "png of a bad colour type": (png(9, 9, 8, 5, bytes(99)), _page, "cannot be used"),
    **{
        f"jpeg cut at {at}": (cut(JPEG, at), _page, "cannot be used")
        for at in (0.01, 0.1, 0.5, 0.9, 0.99)
    },
    "jpeg without its end": (JPEG[:-2], _page, "truncated"),
    **{
        f"gif cut at {at}": (cut(_gif, at), _page, "cannot be used")
        for at in (0.003, 0.1, 0.5, 0.9)
    },
    **{
        f"webp cut at {at}": (cut(_webp, at), _page, "cannot be used")
        for at in (0.01, 0.1, 0.5, 0.9)
    },
    **{
        f"bmp cut at {at}": (cut(encoded(PICTURE, "BMP"), at), _page, "cannot be used")
        for at in (0.001, 0.9)
    },
    **{
        f"tiff cut at {at}": (cut(TIFF, at), _page, "cannot be used") for at in (0.0003, 0.001, 0.5)
    },
    "jpeg bomb": (with_sides(JPEG, 65_000, 65_000), _big, "65,000"),
    "gif bomb": (with_sides(_gif, 65_000, 65_000), _big, "65,000"),
    "bmp bomb": (with_sides(encoded(PICTURE, "BMP"), 2**30, 9), _big, "pixels"),
    "tiff bomb": (with_sides(TIFF, 2**31, 2**31), _big, "pixels"),
    "webp bomb": (webp_canvas(2**24, 200), _canvas, "cannot be used"),
    "webp bomb within its own limits": (webp_canvas(16_383, 16_383), _canvas, "cannot be used"),
    "webp canvas that it does not fill": (webp_canvas(16_000, 8_000), _page, "cannot be used"),
    "bytes over the limit": (PNG + bytes(25_000_000), _big, "25,000,000 bytes"),
    "base64 over the limit": (as_64(PNG + bytes(25_000_000)), _big, "25,000,000 bytes"),
    "a file object over the limit": (lambda _: BytesIO(bytes(25_000_001)), _big, "25,000,000"),
    "empty bytes": (b"", _page, "empty"),
    "empty str": ("", _page, "no such file"),
    "empty file object": (lambda _: BytesIO(), _page, "empty"),
    "a magic number only": (b"\xff\xd8\xff", _page, "cannot be used"),
    "BM only": (b"BM", _page, "cannot be used"),
    "html": (HTML, _page, "no PNG, JPEG"),
    "svg": (SVG, _page, "begins b'<"),
    "pdf": (b"%PDF-1.7\n", _page, "b'%PDF-1.7"),
    "eps": (EPS, _page, "b'%!PS"),
    "text": (b"a page about cats", _page, "no PNG"),
    "avif": (b"\0\0\0\x20ftypavif" + bytes(20), _page, "no PNG"),
    "ico": (b"\0\0\1\0\1\0" + bytes(40), _page, "no PNG"),
    "missing file": ("no/such/file.png", _page, "no such file"),
    "missing path": (Path("no/such/file.png"), _page, "No such file"),
    "NUL in a path": ("page\0.png", _page, "no such file"),
    "NUL in a Path": (Path("page\0.png"), _page, "null"),
    "a long text": ("What is on the page? " * 9999, _page, "no such file"),
    "a lone surrogate": ("\ud800.png", _page, "no such file"),
    "base64 with bad padding": (PNG64[:-3], _page, "no such file"),
    "base64 of something else": (as_64(b"a page about cats"), _page, "no such file"),
    "url-safe base64": (as_64(b"BM" + b"\xff" * 40).replace("/", "_"), _page, "no such file"),
    "data URL without data": ("data:image/png;base64,", _page, "empty"),
    "data URL without comma": ("data:image/png;base64", _page, "no data URL"),
    "data URL, no base64": ("data:image/png;base64,****", _page, "base64 is broken"),
    "data URL, bad padding": (f"data:image/png;base64,{PNG64[:-3]}", _page, "base64 is broken"),
    "data URL, padding within": ("data:image/png;base64,iVBORw==iVBO", _page, "base64 is broken"),
    "data URL, not ASCII": ("data:image/png;base64,iVBÖRw==", _page, "base64 is broken"),
    "data URL of html": (f"data:image/png;base64,{as_64(HTML)}", _page, "no PNG"),
    "data URL of a path": ("data:image/png,/etc/hostname", _page, "no PNG"),
    "data URL of percents": ("data:image/png," + "%41" * 1_000_001, _big, "characters"),
    "file URL of another host": ("file://server/share/a.png", _page, "another host"),
    "file URL of nothing": ("file:///no/such/file.png", _page, "No such file"),
    "file URL with NUL": ("file:///tmp/a%00b", _page, "null"),
    "http": ("http://example.com/a.png", _page, "image_urls=True"),
    "https": ("HTTPS://user:secret@example.com/a.png?key=secret", _page, "image_urls=True"),
    "ftp": ("ftp://example.com/a.png", _page, "no such file"),
    "a directory": (lambda folder: folder, _page, "is a directory"),
    "a directory as str": (lambda folder: f"{folder}/", _page, "is a directory"),
    "an empty file": (lambda folder: made(folder / "a.png", b""), _page, "empty"),
    "a large file": (lambda folder: made(folder / "a.png", bytes(25_000_001)), _big, "25,000,000"),
    "a device": ("/dev/zero", _page, "no regular file"),
    "a pipe": (lambda folder: fifo(folder / "pipe"), _page, "no regular file"),
    "a dangling link": (lambda folder: link(folder, "nowhere"), _page, "No such file"),
    "a link to itself": (lambda folder: link(folder, "link"), _page, "symbolic links"),
    "a path through a file": (lambda folder: made(folder / "a", b"x") / "b", _page, "directory"),
    "PIL without pixels": (Image.new("RGB", (0, 9)), _page, "no pixels"),
    "PIL over the long side": (Image.new("1", (16_385, 1)), _big, "16,385 x 1"),
    "PIL over the short side": (Image.new("1", (8_193, 8_193)), _big, "8,193 x 8,193"),
    "PIL, closed": (lambda _: lazily_closed(), _page, "cannot be used"),
    "PIL, broken": (lambda _: Image.open(BytesIO(cut(PNG, 0.5))), _page, "truncated"),
    "closed file object": (lambda _: closed_file(), _page, "closed file"),
    "text file object": (lambda _: StringIO("a page"), _type, "opened as text"),
    "int": (7, _type, "type int"),
    "None": (None, _type, "type NoneType"),
    "list": ([PNG], _type, "type list"),
    "dict": ({"url": "a.png"}, _type, "type dict"),
    "array": (np.zeros((9, 9, 3), np.uint8), _type, "Image.fromarray"),
    "class": (Image.Image, _type, "type type"),
}


@pytest.mark.parametrize("use", [cut_tiles, encode_data_url])
@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_is_refused_by_index(name, use, tmp_path):
    source, kind, words = BROKEN[name]
    if callable(source) and not isinstance(source, type):
        source = source(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        use(source, **({"max_tiles": 2} if use is cut_tiles else {}))
    assert type(caught.value) is kind
    assert len(str(caught.value)) < 450
    assert "secret" not in str(caught.value)
    if kind is not InputTypeError:
        assert caught.value.__cause__ is not None


ODD: dict[str, tuple[Any, tuple[int, int], int]] = {
    "1 x 1": (encoded(Image.new("RGB", (1, 1)), "PNG"), (1, 1), 1),
    "1 x 16384": (encoded(Image.new("L", (1, 16_384)), "PNG"), (1, 2), 3),
    "16384 x 1": (encoded(Image.new("1", (16_384, 1)), "BMP"), (2, 1), 3),
    "jpeg of 16384 x 1": (encoded(Image.new("L", (16_384, 1)), "JPEG"), (2, 1), 3),
    "jpeg with rubbish after it": (JPEG + HTML, (2, 1), 3),
    "png with rubbish after it": (PNG + HTML, (2, 1), 3),
    "png without its end": (PNG[:-12], (2, 1), 3),
    "gif of a frame larger than its screen": (with_sides(_gif, 9, 9), (2, 1), 3),
    "png with text": (PNG[:33] + chunk(b"tEXt", b"key\0" + b"a" * 999) + PNG[33:], (2, 1), 3),
    "png with a corrupt profile": (PNG[:33] + chunk(b"iCCP", b"x\0\0bad") + PNG[33:], (2, 1), 3),
    "png that says it is animated": (
        PNG[:33] + chunk(b"acTL", b"\0\0\0\2" + bytes(4)) + PNG[33:],
        (2, 1),
        3,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_only_odd_is_used(name):
    source, cells, count = ODD[name]
    assert cut_tiles(source, 2, SIDE).shape == (count, SIDE, SIDE, 3)
    with opened(source) as image:
        assert choose_grid(*image.size, 2, SIDE) == cells
    sent = decode_data_url(encode_data_url(source))
    assert np.array_equal(cut_tiles(sent, 2, SIDE), cut_tiles(source, 2, SIDE))


def test_large_sides_are_used_in_silence_and_no_setting_changes():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    bits = Image.new("1", (8_192, 11_000), 1)  # more pixels than Pillow takes in silence
    file = encoded(bits, "TIFF", compression="group4")
    assert cut_tiles(file, 2, SIDE).min() == 255
    assert before == (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        list(warnings.filters),
    )


# JPEGs decoded at a fraction.


def fine_print() -> Image.Image:
    """A page with sharp strokes of one to nine pixels at every angle, the worst case of a draft."""
    page = Image.new("RGB", (2_000, 2_600), "white")
    draw, random = ImageDraw.Draw(page), np.random.default_rng(0)
    for _ in range(4_000):
        x, y, dx, dy = random.uniform((0, 0, -20, -20), (2_000, 2_600, 20, 20))
        draw.line([(x, y), (x + dx, y + dy)], fill="black", width=int(random.integers(1, 10)))
    return page


@pytest.mark.parametrize("sides", [(2_000, 2_600), (1_999, 2_593)])
def test_a_draft_differs_little_from_the_whole(sides, monkeypatch):
    file = encoded(fine_print().resize(sides), "JPEG", quality=90)
    drafted = cut_tiles(file, 2, 256)
    monkeypatch.setattr(image_tiles, "_DRAFT", 10**6)
    whole = cut_tiles(file, 2, 256)
    assert np.array_equal(whole, reference_tiles(describe(file), 2, 256))
    off = np.abs(drafted.astype(int) - whole)
    assert 0 < off.mean() < 1
    assert off.max() <= 24


def test_drafts_are_only_of_files_that_go_to_a_nim_as_they_are():
    large = PICTURE.resize((1_800, 1_200))
    turned = encoded(large, "JPEG", exif=exif(6))
    upright = describe(turned).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(cut_tiles(turned, 2, SIDE), reference_tiles(upright, 2))
    lazy = Image.open(BytesIO(encoded(large, "JPEG")))
    cut_tiles(lazy, 2, SIDE)
    assert lazy.size == large.size


# Pages of NVIDIA's, threads.


@pytest.mark.parametrize("max_tiles", [2, 6])
def test_one_page_in_four_formats(max_tiles):
    if not PAGES.is_dir():
        pytest.skip(f"{PAGES} is not there")
    png, jpeg, tiff = (
        cut_tiles(PAGES / f"multimodal_test.{kind}", max_tiles).astype(int)
        for kind in ("png", "jpeg", "tiff")
    )
    webp = encoded(Image.open(PAGES / "multimodal_test.png"), "WEBP", lossless=True)
    assert np.array_equal(cut_tiles(webp, max_tiles), png)
    assert np.abs(tiff - png).mean() < 1
    assert np.abs(jpeg - png).mean() < 5


@pytest.mark.parametrize("name", ["png palette, half transparent", "jpeg", "webp", "tiff"])
def test_threads_share_a_lazy_pil_image(name):
    file, _ = FORMATS[name]
    expected = cut_tiles(file, 6, SIDE)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            image, start = Image.open(BytesIO(file)), threading.Barrier(8)

            def work(image: Image.Image = image, start: threading.Barrier = start) -> np.ndarray:
                start.wait()
                return cut_tiles(image, 6, SIDE)

            for done in [threads.submit(work) for _ in range(8)]:
                assert np.array_equal(done.result(), expected)
            assert image.size == PICTURE.size
            image.copy()  # still the caller's, and open


# Addresses: a real server, whose private address is allowed by name.


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, _, rest = self.path[1:].partition("?")
        getattr(self, f"_{path}", lambda rest: self.send_error(404))(rest)

    def _png(self, rest: str) -> None:
        self._send(200, PNG, "image/png")

    def _html(self, rest: str) -> None:
        self._send(200, HTML, "image/png")

    def _to(self, rest: str) -> None:
        self.send_response(302)
        self.send_header("Location", rest)
        self.end_headers()

    def _loop(self, rest: str) -> None:
        self._to("/loop")

    def _large(self, rest: str) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 20))

    def _drip(self, rest: str) -> None:
        """Headers without end, a few bytes at a time, none of them late."""
        with suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                self.wfile.write(b"X: 1\r\n")
                time.sleep(0.02)

    def _headers(self, rest: str) -> None:
        self._send(200, f"{self.requestline}\n{self.headers}".encode(), "text/plain")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as pages:
        thread = threading.Thread(target=pages.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{pages.server_port}"
        pages.shutdown()
        thread.join()


def fetched(url: str, seconds: float = 10.0) -> bytes:
    """Fetch as `cut_tiles(urls=True)` does, but from this machine's own 127.0.0.1 as well."""

    def allowed(address: image_urls.Address) -> bool:
        return image_urls.is_public(address) or str(address) == "127.0.0.1"

    return sources._join(image_urls.fetch(url, allowed, seconds))


def test_an_address_is_fetched(server):
    assert fetched(f"{server}/png") == PNG
    assert fetched(f"{server}/to?png#x") == PNG
    assert fetched(f"{server}/to?{server}/to?/to?/png") == PNG


def test_an_address_is_asked_for_without_credentials(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    asked = fetched(server.replace("//", "//user:secret@") + "/headers?q=a b&ä").decode()
    assert asked.startswith("GET /headers?q=a%20b&%C3%A4 HTTP/1.1\n")
    assert f"Host: {server[7:]}" in asked
    assert "uthorization" not in asked
    assert "ookie" not in asked


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nothing", "status 404"),
        ("/loop", "more than 3 times"),
        ("/to?/to?/to?/to?/png", "more than 3 times"),
        ("/to?file:///etc/hostname", "redirected to file"),
        ("/to?http://127.0.0.2/", "127.0.0.2, which is not on the public"),
        ("/to?http://169.254.169.254/latest/meta-data", "169.254.169.254"),
        ("/large", "25,000,000 bytes"),
    ],
)
def test_an_answer_that_is_refused(server, path, words):
    with pytest.raises(ValueError, match=words):
        fetched(server + path)


def test_a_server_that_drips_is_left_in_time(server):
    start = time.monotonic()
    with pytest.raises(httpcore.ReadTimeout):
        fetched(f"{server}/drip", seconds=0.3)
    assert time.monotonic() - start < 2


def test_what_is_fetched_must_be_an_image(server):
    with pytest.raises(ImageError, match="no PNG"):
        cut_tiles(fetched(f"{server}/html"), 0, 2)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0"),
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "localhost"),
        *("[::1]", "[::]", "[fe80::1]", "[fd00::1]", "[ff02::1]", "[::ffff:127.0.0.1]"),
        *("[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]"),
    ],
)
def test_private_addresses_are_never_connected_to(host, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    for use in (
        lambda url: cut_tiles(url, 2, urls=True),
        lambda url: encode_data_url(url, urls=True),
    ):
        with pytest.raises(ImageError, match=r"not on the public internet|Invalid IPv4") as caught:
            use(f"http://{host}/latest/meta-data?key=secret")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("found", [["93.184.215.14", "10.0.0.1"], ["2606:4700::1", "::1"]])
def test_a_name_with_any_private_address_is_refused(found, monkeypatch):
    rows = [(0, 0, 0, "", (address, 443)) for address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
    with pytest.raises(ImageError, match=r"is at (10\.0\.0\.1|::1), which"):
        cut_tiles("https://pages.example/a.png", 2, urls=True)


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
    """A second look-up, which could answer otherwise, never happens."""
    answers = iter([[(0, 0, 0, "", ("93.184.215.14", 80))]])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: next(answers))
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ImageError, match="no network in tests"):
        cut_tiles("http://pages.example/a.png", 2, urls=True)
    assert asked == [("93.184.215.14", 80)]


@pytest.mark.parametrize(
    "url", ["http://", "http://[", "http://a..b/", "http://a:99999/", "http:///a"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(ImageError) as caught:
        cut_tiles(url, 2, urls=True)
