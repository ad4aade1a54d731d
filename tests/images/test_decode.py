"""Files of every format, mode and orientation to pixels, and broken ones to errors."""

from __future__ import annotations

import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageFile, ImageOps, ImageSequence
from PIL.TiffImagePlugin import TiffImageFile

from shared_engine import ImageError, ImageTooLargeError, InputError
from shared_engine.images.encode import encode_data_url
from shared_engine.images.sources import decode_data_url
from shared_engine.images.tiles import choose_grid, cut_tiles, decode_picture
from tests.support.image_files import (
    FORMATS,
    GIF,
    HTML,
    IGNORE_CORRUPT_EXIF,
    JPEG,
    PALETTE,
    PICTURE,
    PNG,
    SECOND,
    SIDE,
    TIFF,
    USES,
    WEBP,
    as_64,
    assert_refused,
    chunk,
    encoded,
    exif,
    opened,
    png,
    reference_tiles,
    seen,
    webp_canvas,
    with_sides,
    write_tiff,
)

pytestmark = IGNORE_CORRUPT_EXIF

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
def test_every_format_decodes_to_the_visible_pixels(name):
    file, expected = FORMATS[name]
    ours, plain = cut_tiles(file, 2, SIDE), reference_tiles(expected, 2)
    off = np.abs(ours.astype(int) - plain).max()
    assert off <= (1 if "alpha" in name or "transparent" in name else 0)  # rounding of the blend


@pytest.mark.parametrize("name", FORMATS)
def test_a_pil_image_has_the_tiles_of_its_file(name):
    file, _ = FORMATS[name]
    with opened(file) as image:
        assert np.array_equal(cut_tiles(image, 2, SIDE), cut_tiles(file, 2, SIDE))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_turns_an_image_upright(kind, order, orientation):
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    stored = seen(encoded(PICTURE, kind, **options))
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


# What cannot be used: (what a caller hands over, its error, words of the message).


def cut(file: bytes, part: float) -> bytes:
    return file[: int(len(file) * part)]


def text_chunks(kind: bytes) -> bytes:
    """A PNG with a compressed text of 9 MB in 9 KB."""
    text = zlib.compress(bytes(9_000_000), 9)
    body = b"key\0\0" + text if kind == b"zTXt" else b"key\0\1\0\0\0" + text
    return PNG[:33] + chunk(kind, body) + PNG[33:]


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n"
_page = ImageError
_big = ImageTooLargeError
_canvas = _big if PIL.__version__ >= "13" else _page  # which looks before it makes a decoder

BROKEN: dict[str, tuple[Any, type[InputError], str]] = {
    "png cut in its signature": (PNG[:6], _page, "not a PNG"),
    "png cut in its header": (PNG[:20], _page, "Truncated File Read"),
    "png cut before its pixels": (PNG[:33], _page, "cannot be used"),
    "png cut in its pixels": (cut(PNG, 0.5), _page, "truncated"),
    "png of 0 width": (with_sides(PNG, 0, 60), _page, "cannot be used"),
    "png with pixels of another": (with_sides(PNG, 900, 900), _page, "truncated"),
    "png with broken pixels": (
        PNG[:60] + bytes(200) + PNG[260:],
        _page,
        "cannot be used",
    ),
    "png bomb": (with_sides(PNG, 30_000, 30_000), _big, "decompression bomb"),
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
        f"gif cut at {at}": (cut(GIF, at), _page, "cannot be used") for at in (0.003, 0.1, 0.5, 0.9)
    },
    **{
        f"webp cut at {at}": (cut(WEBP, at), _page, "cannot be used")
        for at in (0.01, 0.1, 0.5, 0.9)
    },
    **{
        f"bmp cut at {at}": (cut(encoded(PICTURE, "BMP"), at), _page, "cannot be used")
        for at in (0.001, 0.9)
    },
    **{
        f"tiff cut at {at}": (cut(TIFF, at), _page, "cannot be used") for at in (0.0003, 0.001, 0.5)
    },
    "jpeg bomb": (with_sides(JPEG, 65_000, 65_000), _big, "decompression bomb"),
    "gif bomb": (with_sides(GIF, 65_000, 65_000), _big, "decompression bomb"),
    "bmp bomb": (with_sides(encoded(PICTURE, "BMP"), 2**30, 9), _big, "pixels"),
    "tiff bomb": (with_sides(TIFF, 2**31, 2**31), _big, "pixels"),
    "webp bomb": (webp_canvas(2**24, 200), _canvas, "cannot be used"),
    "webp bomb within its own limits": (webp_canvas(16_383, 16_383), _canvas, "cannot be used"),
    "webp canvas that it does not fill": (webp_canvas(16_000, 8_000), _page, "cannot be used"),
    "a magic number only": (b"\xff\xd8\xff", _page, "cannot be used"),
    "BM only": (b"BM", _page, "its header is broken"),
    "html": (HTML, _page, "a web page; expected a PNG"),
    "svg": (SVG, _page, "an SVG"),
    "pdf": (b"%PDF-1.7\n", _page, "a PDF; its pages"),
    "eps": (EPS, _page, "not a PNG"),
    "text": (b"a page about cats", _page, "not a PNG"),
    "avif": (b"\0\0\0\x20ftypavif" + bytes(20), _page, "an AVIF, which is not supported"),
    **{
        f"heic, {brand}": (b"\0\0\0\x18ftyp" + brand.encode(), _page, "pass the PIL image")
        for brand in ("heic", "heix", "hevc", "mif1", "msf1")
    },
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20), _page, "a JPEG 2000, which"),
    "jpeg 2000, bare": (b"\xff\x4f\xff\x51" + bytes(20), _page, "a JPEG 2000, which"),
    "jpeg xl": (b"\xff\x0a" + bytes(20), _page, "a JPEG XL, which"),
    "gimp": (b"gimp xcf v011\0", _page, "not a PNG"),
    "ico": (b"\0\0\1\0\1\0" + bytes(40), _page, "not a PNG"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name, use):
    source, kind, words = BROKEN[name]
    assert_refused(use, source, kind, words)


ODD: dict[str, tuple[Any, tuple[int, int], int]] = {
    "1 x 1": (encoded(Image.new("RGB", (1, 1)), "PNG"), (1, 1), 1),
    "1 x 16384": (encoded(Image.new("L", (1, 16_384)), "PNG"), (1, 2), 3),
    "16384 x 1": (encoded(Image.new("1", (16_384, 1)), "BMP"), (2, 1), 3),
    "jpeg of 16384 x 1": (encoded(Image.new("L", (16_384, 1)), "JPEG"), (2, 1), 3),
    "jpeg with rubbish after it": (JPEG + HTML, (2, 1), 3),
    "png with rubbish after it": (PNG + HTML, (2, 1), 3),
    "png without its end": (PNG[:-12], (2, 1), 3),
    "gif of a frame larger than its screen": (with_sides(GIF, 9, 9), (2, 1), 3),
    "png with text": (PNG[:33] + chunk(b"tEXt", b"key\0" + b"a" * 999) + PNG[33:], (2, 1), 3),
    "png with a corrupt profile": (PNG[:33] + chunk(b"iCCP", b"x\0\0bad") + PNG[33:], (2, 1), 3),
    "png that says it is animated": (
        PNG[:33] + chunk(b"acTL", b"\0\0\0\2" + bytes(4)) + PNG[33:],
        (2, 1),
        3,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_readable_files_are_used(name):
    source, cells, count = ODD[name]
    assert cut_tiles(source, 2, SIDE).shape == (count, SIDE, SIDE, 3)
    with opened(source) as image:
        assert choose_grid(*image.size, 2, SIDE) == cells
    sent = decode_data_url(encode_data_url(source))
    assert np.array_equal(cut_tiles(sent, 2, SIDE), cut_tiles(source, 2, SIDE))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_sides_are_used_and_no_setting_changes():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    bits = Image.new("1", (8_192, 11_000), 1)  # Pillow warns of so many pixels
    file = encoded(bits, "TIFF", compression="group4")
    assert cut_tiles(file, 2, SIDE).min() == 255
    assert before == (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        list(warnings.filters),
    )


@pytest.mark.parametrize("kinds", [(0, 0), (2, 2, 2), (0, 1, 2), (0, 4, 1, 0)])
def test_a_tiff_of_several_pages_is_warned_of(kinds, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    scan = Path("scan.tif")
    scan.write_bytes(write_tiff(*kinds))
    for use in (partial(cut_tiles, max_tiles=6), partial(decode_picture, max_tiles=6),
                encode_data_url, partial(encode_data_url, most_characters=600)):  # fmt: skip
        caplog.clear()
        use(scan)
        (said,) = caplog.messages
        assert "'scan.tif' is a TIFF with several pages" in said
        with Image.open(scan) as opened:  # as it says
            pages = [page.copy() for page in ImageSequence.Iterator(opened)]
        assert len([use(page) for page in pages]) == len(kinds)
        assert len(caplog.messages) == 1


@pytest.mark.parametrize("kinds", [(0,), (2,), (0, 1), (0, 1, 1, 4), (0, *[1] * 50_000, 0)])
def test_smaller_copies_and_masks_of_a_tiff_are_not_pages(kinds, caplog):
    """Nor is what follows a great many of them, which nobody should have to look at."""
    assert cut_tiles(write_tiff(*kinds), 6).shape == (1, 512, 512, 3)
    assert not caplog.messages


def test_a_broken_second_picture_of_a_tiff_is_ignored(caplog):
    file = write_tiff(0, 0)
    begin = TiffImageFile(BytesIO(file)).tag_v2.next
    for broken in (file[: begin + 2], file[:begin] + bytes(len(file) - begin)):
        assert cut_tiles(broken, 6).shape == (1, 512, 512, 3)
    assert not caplog.messages


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


SECRET = b"hunter2"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "file",
    [
        SECRET * 9,
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x07" + SECRET * 9,
        PNG[:33] + b"\0\0\0\x07" + SECRET + PNG[33:],
        b"II*\0" + SECRET * 9,
        b"MM\0*" + SECRET * 9,
        b"BM" + SECRET * 9,
        b"GIF89a" + SECRET * 9,
        b"RIFF" + SECRET[:4] + b"WEBP" + SECRET * 9,
        b"\xff\xd8\xff" + SECRET * 9,
        as_64(SECRET * 99),
        f"data:image/png;base64,{as_64(SECRET * 99)}",
        "data:image/png," + "hunter2" * 9,
        "data:;base64,hunter2*",
    ],
    ids=str,
)
def test_an_error_quotes_nothing_of_a_file(file, use):
    with pytest.raises(ImageError) as caught:
        USES[use](file)
    words = str(caught.value)
    part = as_64(SECRET * 99)[8:16]
    assert not any(word in words for word in ("hunter", "unter", "ter2", part)), words


# Pictures of every mode that Pillow has, and truncated files where the program lets them pass.


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_a_pil_image_of_a_mode_without_8_bits_or_16_is_refused_by_name(mode, use):
    words = f"32-bit grey or LAB (Pillow's mode {mode}), which are not supported; convert it to 8-"
    assert_refused(use, Image.new(mode, (9, 9)), ImageError, words)


@pytest.mark.parametrize("mode", [mode for mode in Image.MODES if mode not in ("I", "F", "LAB")])
@pytest.mark.parametrize("has_info", [False, True])
def test_a_pil_image_of_every_other_mode_is_used(mode, has_info):
    if mode == "La":
        picture = PICTURE.convert("LA").convert("La")
    elif mode in ("LA", "RGBA", "RGBa", "PA"):
        picture = PICTURE.convert("RGBA").convert(mode) if mode != "PA" else PALETTE.convert("PA")
    elif mode.startswith("I;16"):
        values = np.asarray(PICTURE.convert("L")).astype(int) << 8
        values = values.astype(">u2" if mode == "I;16B" else "<u2")
        picture = Image.frombytes(mode, PICTURE.size, values.tobytes())
    else:
        picture = PICTURE.convert(mode)
    assert picture.mode == mode
    if has_info:
        picture.info["transparency"] = 0 if mode != "RGB" else (0, 0, 0)
    before = picture.tobytes()
    ours = cut_tiles(picture, 2, SIDE)
    sent = decode_data_url(encode_data_url(picture))
    assert np.array_equal(cut_tiles(sent, 2, SIDE), ours)
    assert picture.tobytes() == before
    grey = mode in ("1", "L", "LA", "La") or mode.startswith("I")
    plain = PICTURE.convert("1" if mode == "1" else "L" if grey else "RGB").convert("RGB")
    if not has_info:  # a palette is near, all else the same
        off = np.abs(ours.astype(int) - reference_tiles(plain, 2))
        assert off.mean() < (15 if mode in ("P", "PA") else 3)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "progressive", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.5, 0.9, 1])
def test_a_truncated_file_has_the_same_tiles_at_a_nim(name, part, monkeypatch):
    """`LOAD_TRUNCATED_IMAGES` is a setting of the program; a NIM does not know of it."""
    options = {"progressive": True} if name == "progressive" else {}
    file = encoded(SECOND, "JPEG" if name == "progressive" else name, **options)
    file = file[: int(part * len(file))]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    try:
        here = cut_tiles(file, 2, SIDE)
    except ImageError:
        assert part < 1
        with pytest.raises(ImageError):
            encode_data_url(file)
        return
    sent = decode_data_url(encode_data_url(file))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    assert np.array_equal(cut_tiles(sent, 2, SIDE), here)
