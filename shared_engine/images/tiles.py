"""From an accepted image to what a model or a NIM takes.

read ............ sources.py   path, file:, data:, http(s): or base64 -> bytes, at most MAX_BYTES
open_image ...... decode.py    the header: a known format, at most LONG_SIDE x SHORT_SIDE pixels
decode .......... decode.py    to the end: 8 bits, transparency over white, upright
├─ cut_tiles         resized to the grid that fits best, cut, a thumbnail of the whole last
├─ decode_picture    its pixels and its grid, for a device that does the same
└─ encode_data_url   the file itself if every reader sees the same in it, else a PNG

Whatever goes wrong is an ImageError that names the input; its cause is the original exception.
Nothing here changes a setting of the process or of Pillow, or writes to a caller's object, and
all of it may run in several threads at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import PIL
import pybase64
from numpy.typing import NDArray
from PIL import Image

from shared_engine.images.decode import OpenedImage, encode, open_image
from shared_engine.images.formats import Jpeg
from shared_engine.images.sources import (
    MAX_BYTES,
    AcceptedImage,
    TooLargeError,
    check_size,
    describe,
    image_errors,
    read,
)

_log = logging.getLogger("shared_engine")

# fmt: off
_GRIDS_OF_4_TO_7 = (
    (1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (4, 1), (1, 4), (2, 2), (1, 5), (5, 1), (6, 1), (2, 3),
    (1, 6), (3, 2), (7, 1), (1, 7),
)
_GRIDS = (
    (1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4), (5, 1), (1, 5), (1, 6), (6, 1),
    (3, 2), (2, 3), (7, 1), (1, 7), (4, 2), (2, 4), (1, 8), (8, 1), (1, 9), (3, 3), (9, 1), (2, 5),
    (5, 2), (10, 1), (1, 10), (11, 1), (1, 11), (12, 1), (3, 4), (4, 3), (1, 12), (6, 2), (2, 6),
)
# fmt: on
"""(cols, rows) in the order that the reference tries them, and the first of equals wins. It takes
the order within a product from a Python set, where 4 to 7 tiles happen to have another one."""

_LARGEST_PICTURE = 2**23
"""Pixels up to which an image waits in memory for a device, 25 MB of it."""
_QUALITIES = range(95, 25, -5)
"""Of a JPEG; below these, fewer pixels show more."""
_SHRINKS = 6
"""Sizes that are tried, each three quarters of the one before; the last is a quarter of a grid."""
_DRAFT = 2
"""A JPEG is decoded at a half, quarter or eighth where that leaves so many times the grid."""


Box: TypeAlias = tuple[float, float, float, float]
"""A part of an image: its left, upper, right and lower end in pixels."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image, and the grid of tiles that fits it best."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), or (H, W) of a grey one."""
    box: Box
    """What of it is shown."""
    cols: int
    rows: int

    def __len__(self) -> int:
        """Return how many tiles it is cut into, with its thumbnail if there are several."""
        cells = self.cols * self.rows
        return cells + (cells > 1)


Tiles: TypeAlias = NDArray[np.uint8] | Picture
"""An image for a model: its tiles (n, size, size, 3), or what they are to be cut from."""


def cut_tiles(
    source: AcceptedImage, max_tiles: int, size: int = 512, urls: bool = False
) -> NDArray[np.uint8]:
    """Return the model's view of an image (n, size, size, 3): its tiles, row by row.

    More than one tile are followed by a thumbnail of the whole, so n is at most `max_tiles` + 1.
    Resizing is bicubic, as Pillow does it. A JPEG far larger than its grid is decoded at a half, a
    quarter or an eighth: about three times as fast, and on pages up to 600 dpi and photographs the
    values, 0 to 255, differ by less than 1 on average and by 20 at most.

    Raises:
        ImageTooLargeError: over MAX_BYTES, or over LONG_SIDE x SHORT_SIDE; nothing was decoded.
        ImageError: not found, not fetched, or not an image that can be decoded to the end.
    """
    with image_errors(source), _fit(_open(read(source, urls), source), max_tiles, size) as fitted:
        return fitted.cut(size)


def decode_picture(
    source: AcceptedImage, max_tiles: int, size: int = 512, urls: bool = False
) -> Tiles:
    """Decode an image for a device that cuts it into its `cut_tiles`; a very large one is cut here.

    Raises:
        As `cut_tiles`.
    """
    with image_errors(source), _fit(_open(read(source, urls), source), max_tiles, size) as fitted:
        image = fitted.image
        if image.width * image.height > _LARGEST_PICTURE:
            return fitted.cut(size)
        return Picture(np.array(image), fitted.box, fitted.cols, fitted.rows)


def choose_grid(width: int, height: int, max_tiles: int, size: int = 512) -> tuple[int, int]:
    """Return (cols, rows) of the tiles of an image: near its aspect, and not far below its area.

    `dynamic_preprocess` of NVlabs/EAGLE, Eagle2_5/eaglevl/train/dataset.py. Not the nearest aspect
    alone: a grid of less than 0.6 of the image's area loses by what it lacks.

    >>> choose_grid(1275, 1650, 2), choose_grid(1275, 1650, 4), choose_grid(1275, 1650, 6)
    ((1, 2), (2, 2), (2, 3))
    """
    aspect, area = width / height, width * height

    def fit(cells: tuple[int, int]) -> float:
        cols, rows = cells
        shape = cols / rows
        return min(cols * rows * size * size / area, 0.6) * min(shape / aspect, aspect / shape)

    grids = _GRIDS_OF_4_TO_7 if 4 <= max_tiles <= 7 else _GRIDS
    return max((cells for cells in grids if cells[0] * cells[1] <= max_tiles), key=fit)


def takes_height_first(width: int, height: int, to_width: int, to_height: int) -> bool:
    """Return which axis Pillow resizes first: numbers are rounded in between, so it shows.

    Pillow 13 begins with the height where that leaves less to do, and those before it never do.
    """
    if int(PIL.__version__.split(".")[0]) < 13:
        return False
    return height - to_height > max(0, 2 * (width - to_width))


def encode_data_url(
    source: AcceptedImage,
    urls: bool = False,
    most_characters: int | None = None,
    max_tiles: int = 6,
    size: int = 512,
) -> str:
    """Return an image for a NIM: a PNG or JPEG in base64, whose tiles are those of the image.

    A file that every reader understands alike goes as it is: a still, opaque, upright PNG or JPEG
    of 8 bits. It is decoded all the same, a JPEG at an eighth of its size, so that a broken file
    is refused here. All else goes as a PNG of its pixels.

    Where that has more than `most_characters`, what a model of `max_tiles` tiles sees of it goes:
    the image at the size of its grid, as a PNG or else as a JPEG of the best quality that fits.

    Raises:
        As `cut_tiles`; ImageTooLargeError also where the PNG has more than MAX_BYTES, and where no
        JPEG fits.
    """
    with image_errors(source):
        content = read(source, urls)
        url = _encode_whole(_open(content, source), most_characters)
        if most_characters is None or len(url) <= most_characters:
            return url
        with _fit(open_image(content), max_tiles, size) as fitted:
            return fitted.shrink(size, most_characters)


def _open(content: bytes | Image.Image, source: AcceptedImage) -> OpenedImage:
    """Do as `open_image` does; say of which source only a part is seen."""
    opened = open_image(content)
    if opened.has_more_pages:
        _log.warning(
            "a TIFF of several pages, %s: only the first is embedded; pass each as an image, by "
            "[page.copy() for page in PIL.ImageSequence.Iterator(PIL.Image.open(...))]",
            describe(source),
        )
    return opened


def _encode_whole(opened: OpenedImage, most_characters: int | None) -> str:
    if opened.is_plain and opened.content is not None:
        opened.picture.draft(None, (1, 1))
        with opened.load():
            return _write_url("jpeg" if isinstance(opened.picture, Jpeg) else "png", opened.content)
    with opened.decode() as image:
        file = encode(image, "PNG", compress_level=1)
    if most_characters is None:
        check_size(file, MAX_BYTES, "as a PNG")
    return _write_url("png", file)


def _write_url(kind: str, file: bytes) -> str:
    return f"data:image/{kind};base64,{pybase64.b64encode_as_string(file)}"


@dataclass(frozen=True, eq=False)
class _FittedImage:
    """A decoded image, RGB or grey of 8 bits, and the grid of tiles that fits it best."""

    image: Image.Image
    box: Box
    cols: int
    rows: int

    def cut(self, size: int) -> NDArray[np.uint8]:
        """Return the tiles (n, size, size, 3) of the box, then its thumbnail if n > 1."""

        def resize(width: int, height: int) -> NDArray[np.uint8]:
            small = self.image.resize((width, height), Image.Resampling.BICUBIC, self.box)
            return np.array(small.convert("RGB"))  # only now: grey is a third of the work

        cells = arrange_tiles(resize(self.cols * size, self.rows * size), size)
        cells = np.ascontiguousarray(cells)
        return cells if len(cells) == 1 else np.concatenate([cells, resize(size, size)[None]])

    def shrink(self, size: int, most_characters: int) -> str:
        """Return the data URL of the sheet that is cut into tiles, or of a smaller one.

        A side that is shorter than the sheet's stays, for nothing is gained by enlarging it.

        Raises:
            TooLargeError: there is none of so few characters.
        """
        left, upper, right, lower = self.box
        width = min(round(right - left), self.cols * size)
        height = min(round(lower - upper), self.rows * size)
        for _ in range(_SHRINKS):
            sheet = self.image.resize((width, height), Image.Resampling.BICUBIC, self.box)
            for kind, file in _encode_ever_smaller(sheet):
                if len(url := _write_url(kind, file)) <= most_characters:
                    return url
            width, height = max(3 * width // 4, 1), max(3 * height // 4, 1)
        raise TooLargeError(f"there is no JPEG of it in {most_characters:,} characters")


def _encode_ever_smaller(sheet: Image.Image) -> Iterator[tuple[str, bytes]]:
    yield "png", encode(sheet, "PNG")
    for quality in _QUALITIES:
        yield "jpeg", encode(sheet, "JPEG", quality=quality)


@contextmanager
def _fit(opened: OpenedImage, max_tiles: int, size: int) -> Iterator[_FittedImage]:
    cols, rows = choose_grid(*opened.upright_size, max_tiles, size)
    drafted = None
    if opened.is_plain:  # else a PNG of every pixel is what a NIM would get
        drafted = opened.picture.draft(None, (_DRAFT * cols * size, _DRAFT * rows * size))
    with opened.decode() as image:
        box = drafted[1] if drafted else (0, 0, *image.size)
        yield _FittedImage(image, box, cols, rows)


def arrange_tiles(sheet: Any, size: int) -> Any:
    """Return the tiles (n, size, size, 3) of an array or tensor (rows * size, cols * size, 3)."""
    height, width, channels = sheet.shape
    cells = sheet.reshape(height // size, size, width // size, size, channels)
    return cells.swapaxes(1, 2).reshape(-1, size, size, channels)
