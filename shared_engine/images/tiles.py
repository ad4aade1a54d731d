"""From any image that a caller hands over to what a model, or a NIM, takes.

held              accepted: the type is right, and a file object is read
└─ read       path, file:, data:, http(s): or base64 -> bytes, at most MAX_BYTES
   └─ open_image     the header is read: a known format, at most LONG_SIDE x SHORT_SIDE
      └─ decode to the end: 8 bits, transparency over white, upright
         ├─ tiles     resized to the grid that fits best, cut, a thumbnail of the whole last
         ├─ picture   its pixels and its grid, for a device that does the same
         └─ data_url  the file itself if every reader sees the same in it, else a PNG

Whatever goes wrong is an ImageError that names the input; its cause is the original exception.
Nothing here changes a setting of the process or of Pillow, or writes to a caller's object, and
all of it may run in several threads at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pybase64
from numpy.typing import NDArray
from PIL import Image

from shared_engine.images.decode import decode, encode_png, find_upright_size, is_plain, open_image
from shared_engine.images.sources import MAX_BYTES, Jpeg, accept, check_size, image_errors, read

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
_DRAFT = 2
"""A JPEG is decoded at a half, quarter or eighth where that leaves so many times the grid."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image, and the grid of tiles that fits it best."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), or (H, W) of a grey one."""
    box: tuple[float, float, float, float]
    """What of it is shown: left, upper, right and lower end."""
    cols: int
    rows: int

    def __len__(self) -> int:
        """Return how many tiles it is cut into, with its thumbnail if there are several."""
        cells = self.cols * self.rows
        return cells + (cells > 1)


Tiles: TypeAlias = NDArray[np.uint8] | Picture
"""An image for a model: its tiles (n, size, size, 3), or what they are to be cut from."""


def cut_tiles(
    image: object, max_tiles: int, size: int = 512, urls: bool = False
) -> NDArray[np.uint8]:
    """Return the model's view of an image (n, size, size, 3): its tiles, row by row.

    More than one tile are followed by a thumbnail of the whole, so n is at most `max_tiles` + 1.
    Resizing is bicubic, as Pillow does it. A JPEG far larger than its grid is decoded at a half, a
    quarter or an eighth: about three times as fast, and on pages up to 600 dpi and photographs the
    values, 0 to 255, differ by less than 1 on average and by 20 at most.

    Raises:
        InputTypeError: not an `ImageSource`.
        ImageTooLargeError: over MAX_BYTES, or over LONG_SIDE x SHORT_SIDE; nothing was decoded.
        ImageError: not found, not fetched, or not an image that can be decoded to the end.
    """
    source = accept(image)
    with image_errors(source):
        return _cut(*_fitted(source, max_tiles, size, urls), size)


def decode_picture(image: object, max_tiles: int, size: int = 512, urls: bool = False) -> Tiles:
    """Decode an image for a device that cuts it into its `cut_tiles`; a very large one is cut here.

    Raises:
        As `cut_tiles`.
    """
    source = accept(image)
    with image_errors(source):
        decoded, cols, rows, box = _fitted(source, max_tiles, size, urls)
        if decoded.width * decoded.height > _LARGEST_PICTURE:
            return _cut(decoded, cols, rows, box, size)
        return Picture(np.array(decoded), box or (0, 0, *decoded.size), cols, rows)


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


def encode_data_url(image: object, urls: bool = False) -> str:
    """Return an image for a NIM: a PNG or JPEG in base64, whose `tiles` are those of the image.

    A file that every reader understands alike goes as it is: a still, opaque, upright PNG or JPEG
    of 8 bits. It is decoded all the same, a JPEG at an eighth of its size, so that a broken file
    is refused here. All else goes as an RGB PNG.

    Raises:
        As `cut_tiles`; ImageTooLargeError also where the PNG has more than MAX_BYTES.
    """
    source = accept(image)
    with image_errors(source):
        content = read(source, urls)
        picture = open_image(content)
        if isinstance(content, bytes) and is_plain(picture, content):
            picture.draft(None, (1, 1))
            picture.load()
            kind = "jpeg" if isinstance(picture, Jpeg) else "png"
        else:
            kind, content = "png", check_size(encode_png(decode(picture)), MAX_BYTES, "as a PNG")
        return f"data:image/{kind};base64,{pybase64.b64encode_as_string(content)}"


def _fitted(
    source: Any, max_tiles: int, size: int, urls: bool
) -> tuple[Image.Image, int, int, Any]:
    """Decode an image; return it with the columns and rows of its grid, and its box, or None."""
    content = read(source, urls)
    opened = open_image(content)
    cols, rows = choose_grid(*find_upright_size(opened), max_tiles, size)
    box = None
    if is_plain(opened, content):  # else a PNG of every pixel is what a NIM would get
        drafted = opened.draft(None, (_DRAFT * cols * size, _DRAFT * rows * size))
        box = drafted and drafted[1]
    return decode(opened), cols, rows, box


def _cut(decoded: Image.Image, cols: int, rows: int, box: Any, size: int) -> NDArray[np.uint8]:
    """Tiles (n, size, size, 3) of the box of an image, then its thumbnail if n > 1."""

    def resized(width: int, height: int) -> NDArray[np.uint8]:  # then RGB: grey has a third to do
        small = decoded.resize((width, height), Image.Resampling.BICUBIC, box)
        return np.array(small.convert("RGB"))

    cut = np.ascontiguousarray(arrange_tiles(resized(cols * size, rows * size), size))
    return cut if len(cut) == 1 else np.concatenate([cut, resized(size, size)[None]])


def arrange_tiles(sheet: Any, size: int) -> Any:
    """Return the tiles (n, size, size, 3) of an array or tensor (rows * size, cols * size, 3)."""
    height, width, channels = sheet.shape
    cells = sheet.reshape(height // size, size, width // size, size, channels)
    return cells.swapaxes(1, 2).reshape(-1, size, size, channels)
