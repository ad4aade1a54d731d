"""Cut an image into the tiles that a model takes, or resize it as a whole.

open_source ..... decode.py    path, URL, base64, ... -> bytes -> header, all within the limits
decode .......... decode.py    pixels of 8 bits, upright, transparency over white
├─ resize_image .... tiles.py     resized as a whole, to a multiple of the side of a token
├─ cut_tiles ....... tiles.py     resized to its grid and cut, a thumbnail of the whole last
├─ decode_picture .. tiles.py     pixels and grid, for a device that cuts them the same way
└─ encode_data_url . encode.py    the file itself if all readers decode it equally, else a PNG

All failures are an ImageError that names the input; its cause is the original exception.
These functions change no setting of the process or of Pillow and no object of a caller, and may run
in several threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from shared_engine.images.decode import OpenedImage, open_source
from shared_engine.images.sources import AcceptedImage, image_errors

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
"""(cols, rows) in the order of the reference, where the first of equal scores wins. The reference
sorts a Python set by cols * rows; the order of equal products is different for 4 to 7 tiles."""

_LARGEST_PICTURE = 2**23
"""Pixels of an image up to which it waits in memory for a device; 25 MB."""
_DRAFT = 2
"""A JPEG is decoded at a half, quarter or eighth if that is still so many times its grid."""


Box: TypeAlias = tuple[float, float, float, float]
"""A part of an image: its left, upper, right and lower edge in pixels."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image and the grid of tiles that fits it best."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), or (H, W) if grey."""
    box: Box
    """The part of the pixels to cut."""
    cols: int
    rows: int

    def __len__(self) -> int:
        """Return its number of tiles, with the thumbnail if there are several."""
        cells = self.cols * self.rows
        return cells + (cells > 1)


Tiles: TypeAlias = NDArray[np.uint8] | Picture
"""An image for a model: its tiles (n, size, size, 3), or the picture to cut them from."""


def cut_tiles(
    source: AcceptedImage, max_tiles: int, size: int = 512, urls: bool = False
) -> NDArray[np.uint8]:
    """Return the tiles of an image, (n, size, size, 3), row by row.

    Several tiles are followed by a thumbnail of the whole, so n is at most `max_tiles` + 1. Pillow
    resizes, bicubic. A JPEG far larger than its grid is decoded at a half, a quarter or an eighth:
    about three times as fast. On pages up to 600 dpi and photographs the values, 0 to 255, then
    differ by less than 1 on average and by 20 at most.

    Args:
        source: Result of `accept`.
        max_tiles: The most tiles, without the thumbnail.
        size: Side of a tile in pixels.
        urls: Whether an image may be fetched from an http(s) URL.

    Raises:
        ImageTooLargeError: over MAX_BYTES, or over LONG_SIDE x SHORT_SIDE; nothing was decoded.
        ImageError: not found, not fetched, or not an image that decodes completely.
    """
    with image_errors(source):
        opened = open_source(source, urls)
        with fit(opened, max_tiles, size) as fitted:
            return fitted.cut(size)


def decode_picture(
    source: AcceptedImage, max_tiles: int, size: int = 512, urls: bool = False
) -> Tiles:
    """Decode an image for a device that cuts its tiles; a very large one is cut here.

    Arguments and errors are those of `cut_tiles`.
    """
    with image_errors(source):
        opened = open_source(source, urls)
        with fit(opened, max_tiles, size) as fitted:
            if fitted.image.width * fitted.image.height > _LARGEST_PICTURE:
                return fitted.cut(size)
            return Picture(np.array(fitted.image), fitted.box, fitted.cols, fitted.rows)


def resize_image(
    source: AcceptedImage, longest_edge: int, multiple: int, urls: bool = False
) -> NDArray[np.uint8]:
    """Return an image resized as a whole, (1, height, width, 3).

    Pillow resizes, bicubic; a JPEG is decoded as in `cut_tiles`. Errors are those of `cut_tiles`.

    Args:
        source: Result of `accept`.
        longest_edge: Maximum of the longer side in pixels, before both are rounded up.
        multiple: The number of which both sides are multiples.
        urls: Whether an image may be fetched from an http(s) URL.
    """
    with image_errors(source):
        opened = open_source(source, urls)
        size = choose_size(*opened.upright_size, longest_edge, multiple)
        with _decode(opened, *size) as (image, box):
            small = image.resize(size, Image.Resampling.BICUBIC, box)
            return np.array(small.convert("RGB"))[None]


def choose_size(width: int, height: int, longest_edge: int, multiple: int) -> tuple[int, int]:
    """Return the (width, height) to which an image is resized; it is made smaller, then rounded up.

    From `get_resize_output_image_size` of transformers' `image_processing_pixtral.py`, which
    returns a side of 0 for an image of extreme proportions.

    >>> choose_size(1275, 1650, 1540, 28), choose_size(20, 3000, 1540, 28)
    ((1204, 1540), (28, 1540))
    """
    ratio = max(height / longest_edge, width / longest_edge)

    def fit(side: int) -> int:
        side = max(1, math.floor(side / ratio)) if ratio > 1 else side
        return -(-side // multiple) * multiple

    return fit(width), fit(height)


def choose_grid(width: int, height: int, max_tiles: int, size: int = 512) -> tuple[int, int]:
    """Return (cols, rows) of the tiles of an image: near its aspect ratio and its area.

    From `dynamic_preprocess` of NVlabs/EAGLE, Eagle2_5/eaglevl/train/dataset.py. The score of a
    grid is its similarity in aspect ratio, reduced if it has less than 0.6 of the image's area.

    >>> choose_grid(1275, 1650, 2), choose_grid(1275, 1650, 4), choose_grid(1275, 1650, 6)
    ((1, 2), (2, 2), (2, 3))
    """
    aspect, area = width / height, width * height

    def score(cells: tuple[int, int]) -> float:
        cols, rows = cells
        shape = cols / rows
        return min(cols * rows * size * size / area, 0.6) * min(shape / aspect, aspect / shape)

    grids = _GRIDS_OF_4_TO_7 if 4 <= max_tiles <= 7 else _GRIDS
    return max((cells for cells in grids if cells[0] * cells[1] <= max_tiles), key=score)


def takes_height_first(width: int, height: int, to_width: int, to_height: int) -> bool:
    """Return whether Pillow resizes the height first; it rounds in between, so the order matters.

    Pillow 13 begins with the height if that saves work. Earlier versions never do.
    """
    if int(PIL.__version__.split(".")[0]) < 13:
        return False
    return height - to_height > max(0, 2 * (width - to_width))


@dataclass(frozen=True, eq=False)
class FittedImage:
    """A decoded image, RGB or 8-bit grey, and the grid of tiles that fits it best."""

    image: Image.Image
    box: Box
    cols: int
    rows: int

    def cut(self, size: int) -> NDArray[np.uint8]:
        """Return the tiles (n, size, size, 3) of the box, then its thumbnail if n > 1."""

        def resize(width: int, height: int) -> NDArray[np.uint8]:
            small = self.image.resize((width, height), Image.Resampling.BICUBIC, self.box)
            return np.array(small.convert("RGB"))  # after resizing: grey is a third of the work

        cells = arrange_tiles(resize(self.cols * size, self.rows * size), size)
        cells = np.ascontiguousarray(cells)
        return cells if len(cells) == 1 else np.concatenate([cells, resize(size, size)[None]])


@contextmanager
def fit(opened: OpenedImage, max_tiles: int, size: int) -> Iterator[FittedImage]:
    """Choose the grid of an image and decode it, a plain JPEG no larger than its grid needs."""
    cols, rows = choose_grid(*opened.upright_size, max_tiles, size)
    with _decode(opened, cols * size, rows * size) as (image, box):
        yield FittedImage(image, box, cols, rows)


@contextmanager
def _decode(opened: OpenedImage, width: int, height: int) -> Iterator[tuple[Image.Image, Box]]:
    """Decode an image that is to be resized to this size; yield it and the part to resize."""
    # only plain files: a NIM gets every pixel of the others, and must see the same
    draft_size = (_DRAFT * width, _DRAFT * height)
    draft = opened.picture.draft(None, draft_size) if opened.is_plain else None
    with opened.decode() as image:
        yield image, draft[1] if draft else (0, 0, *image.size)


def arrange_tiles(sheet: Any, size: int) -> Any:
    """Return the tiles (n, size, size, 3) of an array or tensor (rows * size, cols * size, 3)."""
    height, width, channels = sheet.shape
    cells = sheet.reshape(height // size, size, width // size, size, channels)
    return cells.swapaxes(1, 2).reshape(-1, size, size, channels)
