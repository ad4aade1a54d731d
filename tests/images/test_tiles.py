"""The grid of an image, its tiles, and what of it goes to a NIM."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

from shared_engine import ImageTooLargeError
from shared_engine.images import encode as image_encode
from shared_engine.images import tiles as image_tiles
from shared_engine.images.encode import encode_data_url
from shared_engine.images.sources import decode_data_url
from shared_engine.images.tiles import choose_grid, cut_tiles
from tests.support.image_files import (
    FORMATS,
    IGNORE_CORRUPT_EXIF,
    JPEG,
    PICTURE,
    PNG,
    SIDE,
    WEBP,
    as_64,
    encoded,
    exif,
    opened,
    reference_tiles,
    seen,
)
from tests.support.vl_checkpoints import page

pytestmark = IGNORE_CORRUPT_EXIF

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


# What goes to a NIM.


@pytest.mark.parametrize("name", FORMATS)
def test_the_data_url_has_the_same_tiles(name):
    file, _ = FORMATS[name]
    sent = decode_data_url(encode_data_url(file))
    for size in (8, SIDE):  # at 8, JPEGs are decoded at an eighth
        assert np.array_equal(cut_tiles(sent, 2, size), cut_tiles(file, 2, size))
    with opened(sent) as image:
        assert image.format in ("PNG", "JPEG", "MPO")  # readers see the first picture of an MPO
        assert not image.has_transparency_data
        assert image.format == "MPO" or not getattr(image, "is_animated", False)


def test_only_plain_files_are_sent_unchanged():
    same = {
        name for name, (file, _) in FORMATS.items() if encode_data_url(file).endswith(as_64(file))
    }
    assert same == {
        *("png", "png interlaced", "png 1 bit", "png grey", "png palette"),
        *("jpeg", "jpeg progressive", "jpeg grey", "jpeg corrupt exif", "jpeg exif cut short"),
        *("jpeg exif orientation 9", "jpeg corrupt icc", "jpeg with a second picture"),
    }
    assert encode_data_url(PNG).startswith("data:image/png;base64,")
    assert encode_data_url(JPEG).startswith("data:image/jpeg;base64,")
    assert encode_data_url(WEBP).startswith("data:image/png;base64,")


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
    assert np.array_equal(whole, reference_tiles(seen(file), 2, 256))
    off = np.abs(drafted.astype(int) - whole)
    assert 0 < off.mean() < 1
    assert off.max() <= 24


def test_only_plain_files_are_drafted():
    large = PICTURE.resize((1_800, 1_200))
    turned = encoded(large, "JPEG", exif=exif(6))
    upright = seen(turned).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(cut_tiles(turned, 2, SIDE), reference_tiles(upright, 2))
    lazy = Image.open(BytesIO(encoded(large, "JPEG")))
    cut_tiles(lazy, 2, SIDE)
    assert lazy.size == large.size


@pytest.mark.parametrize("max_tiles", [2, 6])
def test_one_page_in_four_formats(max_tiles):
    drawn = page(0, 1275, 1650)
    plain = reference_tiles(drawn, max_tiles, 512).astype(int)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(cut_tiles(encoded(drawn, kind, **options), max_tiles), plain)
    jpeg = cut_tiles(encoded(drawn, "JPEG", quality=75), max_tiles)
    assert np.abs(jpeg - plain).mean() < 5


# What goes to a NIM that takes only so many characters of an image.

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1400, 3), dtype=np.uint8))
_wide = Image.new("RGBA", (3_000, 200), (9, 99, 199, 99))
LARGE: dict[str, bytes] = {
    "page": encoded(page(0, 1275, 1650), "PNG"),
    "page, jpeg": encoded(page(1, 2550, 3300), "JPEG", quality=97, subsampling=0),
    "page, turned": encoded(page(2, 900, 700), "PNG", exif=exif(6)),
    "page, grey": encoded(page(3, 1275, 1650).convert("L"), "PNG"),
    "noise": encoded(NOISE, "PNG"),
    "noise, alpha": encoded(NOISE.convert("RGBA"), "WEBP", lossless=True),
    "noise, 16 bits": encoded(NOISE.convert("I;16"), "PNG"),
    "wide": encoded(_wide, "PNG"),
    "small": encoded(NOISE.resize((90, 40)), "PNG"),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("most", [180_000, 40_000, 5_000])
def test_an_image_is_encoded_within_the_limit(name, most, monkeypatch):
    monkeypatch.setattr(image_encode, "_MAX_TILES", 2)
    monkeypatch.setattr(image_encode, "_SIDE", 256)
    file = LARGE[name]
    url = encode_data_url(file, most_characters=most)
    assert len(url) <= most
    whole = encode_data_url(file)
    if len(whole) <= most:
        assert url == whole
        return
    with opened(decode_data_url(url)) as sent:
        assert sent.format in ("PNG", "JPEG")
        assert max(sent.size) <= 512
        assert choose_grid(*sent.size, 2, 256) == choose_grid(*opened_size(whole), 2, 256)
    here, there = (cut_tiles(seen_by, 2, 256).astype(int) for seen_by in (file, url))
    if "noise" not in name and most == 180_000:
        assert np.abs(here - there).mean() < 2


def opened_size(url: str) -> tuple[int, int]:
    with opened(decode_data_url(url)) as image:
        return image.size


def test_a_png_at_the_size_of_the_grid_has_the_same_tiles(monkeypatch):
    monkeypatch.setattr(image_encode, "_MAX_TILES", 2)
    drawn = page(0, 1275, 1650)
    file = encoded(drawn, "PNG")
    url = encode_data_url(file, most_characters=150_000)
    assert url.startswith("data:image/png")
    assert opened_size(url) == (512, 1024)
    assert np.array_equal(cut_tiles(url, 2)[:2], cut_tiles(file, 2)[:2])
    thumbnails = [cut_tiles(image, 2)[2].astype(int) for image in (file, url)]
    assert np.abs(thumbnails[0] - thumbnails[1]).mean() < 1


@pytest.mark.parametrize("most", [15_000, 30_000, 45_000, 60_000])
def test_the_best_jpeg_is_found(most, monkeypatch):
    monkeypatch.setattr(image_encode, "_MAX_TILES", 1)
    monkeypatch.setattr(image_encode, "_SIDE", 256)
    sheet = NOISE.resize((256, 256), Image.Resampling.BICUBIC)
    files = [encoded(sheet, "JPEG", quality=quality) for quality in range(30, 100, 5)]
    urls = [f"data:image/jpeg;base64,{as_64(file)}" for file in files]
    best = max((url for url in urls if len(url) <= most), key=len)
    assert encode_data_url(LARGE["noise"], most_characters=most) == best


@pytest.mark.parametrize("most", [0, 20, 300])
def test_a_limit_too_small_for_any_image_is_an_error(most):
    with pytest.raises(ImageTooLargeError, match=f"no JPEG of it fits in {most} characters"):
        encode_data_url(LARGE["page"], most_characters=most)


def test_a_photograph_that_is_too_large_as_a_png_has_the_same_tiles(monkeypatch):
    """A phone stores an upright photograph as a JPEG that its EXIF data turn."""
    monkeypatch.setattr(image_encode, "_MOST_CHARACTERS", 9_000_000)
    photograph = Image.fromarray(np.tile(np.asarray(NOISE), (2, 2, 1)))
    file = encoded(photograph, "JPEG", exif=exif(6))
    here, there = cut_tiles(file, 6), cut_tiles(encode_data_url(file), 6)
    assert np.array_equal(here[:-1], there[:-1])
    assert np.abs(here[-1].astype(int) - there[-1]).mean() < 3  # the thumbnail


def test_a_file_of_the_largest_size_is_sent_unchanged():
    file = PNG + bytes(image_encode.MAX_BYTES - len(PNG))
    assert encode_data_url(file).endswith(as_64(file))
