"""From any image that a caller hands over to what a model, or a NIM, takes.

held              accepted: the type is right, and a file object is read
└─ _content       path, file:, data:, http(s): or base64 -> bytes, at most MAX_BYTES
   └─ _opened     the header is read: a known format, at most LONG_SIDE x SHORT_SIDE
      └─ _decoded to the end: 8 bits, transparency over white, upright
         ├─ tiles     resized to the grid that fits best, cut, a thumbnail of the whole last
         ├─ picture   its pixels and its grid, for a device that does the same
         └─ data_url  the file itself if every reader sees the same in it, else a PNG

Whatever goes wrong is an ImageError that names the input; its cause is the original exception.
Nothing here changes a setting of the process or of Pillow, or writes to a caller's object, and
all of it may run in several threads at once.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import pybase64
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from shared_engine.errors import ImageError, ImageTooLargeError, InputError, InputTypeError

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image
)
"""A path, a file:, data: or http(s): URL, base64, the bytes of a file, a file, or a PIL image."""

MAX_BYTES = 25_000_000
"""Of a file. NVIDIA's card says "less than 25MB" and not which MB; this is the smaller one."""
LONG_SIDE, SHORT_SIDE = 16_384, 8_192
"""Pixels, either way round, of the same card."""

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
_DATA_URL = re.compile(r"data:image/[\w.+-]+(;[^;,\s]+)*,", re.IGNORECASE)
_ESCAPES = 1_000_000
"""The most %XX in a data URL: decoding one takes some 80 bytes for a while."""
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


def held(image: object, index: int) -> ImageSource:
    """Accept an image: check its type, and read a file object before its owner closes it.

    Raises:
        InputTypeError: not an `ImageSource`, or a file that was opened as text.
        ImageError: the file object cannot be read, or has more than MAX_BYTES.
    """
    if isinstance(image, (str, bytes, os.PathLike, Image.Image)):
        return image
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if not callable(getattr(image, "read", None)):
        raise InputTypeError(
            f"input {index} has an image of type {type(image).__name__}; expected a path, a URL, "
            "base64, bytes, a file opened in binary mode, or a PIL image (of an array: "
            "PIL.Image.fromarray(...))",
            index=index,
        )
    with _blamed(image, index):
        return _read(image, index)


def tiles(
    image: object, index: int, max_tiles: int, size: int = 512, urls: bool = False
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
    source = held(image, index)
    with _blamed(source, index):
        return _cut(*_fitted(source, max_tiles, size, urls), size)


def picture(
    image: object, index: int, max_tiles: int, size: int = 512, urls: bool = False
) -> Tiles:
    """Decode an image for a device that cuts it into its `tiles`; a very large one is cut here.

    Raises:
        As `tiles`.
    """
    source = held(image, index)
    with _blamed(source, index):
        decoded, cols, rows, box = _fitted(source, max_tiles, size, urls)
        if decoded.width * decoded.height > _LARGEST_PICTURE:
            return _cut(decoded, cols, rows, box, size)
        return Picture(np.array(decoded), box or (0, 0, *decoded.size), cols, rows)


def grid(width: int, height: int, max_tiles: int, size: int = 512) -> tuple[int, int]:
    """Return (cols, rows) of the tiles of an image: near its aspect, and not far below its area.

    `dynamic_preprocess` of NVlabs/EAGLE, Eagle2_5/eaglevl/train/dataset.py. Not the nearest aspect
    alone: a grid of less than 0.6 of the image's area loses by what it lacks.

    >>> grid(1275, 1650, 2), grid(1275, 1650, 4), grid(1275, 1650, 6)
    ((1, 2), (2, 2), (2, 3))
    """
    aspect, area = width / height, width * height

    def fit(cells: tuple[int, int]) -> float:
        cols, rows = cells
        shape = cols / rows
        return min(cols * rows * size * size / area, 0.6) * min(shape / aspect, aspect / shape)

    grids = _GRIDS_OF_4_TO_7 if 4 <= max_tiles <= 7 else _GRIDS
    return max((cells for cells in grids if cells[0] * cells[1] <= max_tiles), key=fit)


def data_url(image: object, index: int, urls: bool = False) -> str:
    """Return an image for a NIM: a PNG or JPEG in base64, whose `tiles` are those of the image.

    A file that every reader understands alike goes as it is: a still, opaque, upright PNG or JPEG
    of 8 bits. It is decoded all the same, a JPEG at an eighth of its size, so that a broken file
    is refused here with its index. All else goes as an RGB PNG.

    Raises:
        As `tiles`; ImageTooLargeError also where the PNG has more than MAX_BYTES.
    """
    source = held(image, index)
    with _blamed(source, index):
        content = _content(source, urls)
        picture = _opened(content)
        if isinstance(content, bytes) and _is_plain(picture, content):
            picture.draft(None, (1, 1))
            picture.load()
            kind = "jpeg" if isinstance(picture, _Jpeg) else "png"
        else:
            kind, content = "png", _within(_png(_decoded(picture)), MAX_BYTES, "as a PNG")
        return f"data:image/{kind};base64,{pybase64.b64encode_as_string(content)}"


def is_data_url(text: str) -> bool:
    """Whether a text is nothing but an image as a data URL. Looks at its two ends only.

    >>> is_data_url("data:image/png;base64,iVBORw0KGgo="), is_data_url("data:image/png, a prefix")
    (True, False)
    """
    return (
        _DATA_URL.match(text, 0, 256) is not None
        and " " not in text[:256]
        and " " not in text[-256:]
    )


def decoded_data_url(text: str, index: int, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a data URL that holds an image; no path or address is ever opened.

    The format is told by the bytes; the MIME type may be wrong or missing. `data:image/png,` with
    base64 that does not say so, as on NVIDIA's card, is taken too.

    Raises:
        ImageTooLargeError: it holds more than `max_bytes`.
        ImageError: no data URL, bad base64, or not an image.
    """
    with _blamed(text, index):
        data = _within(_from_data_url(text, max_bytes), max_bytes)
        _plugin(data)
        return data


class _TooLargeError(ValueError):
    """Becomes an ImageTooLargeError in `_blamed`, which knows the index."""


_TOO_LARGE = (_TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning)


@contextmanager
def _blamed(source: object, index: int) -> Iterator[None]:
    """Turn whatever Pillow, the file system or the network raise into an error of this input."""
    try:
        yield
    except InputError:
        raise
    except Exception as exc:
        kind = ImageTooLargeError if isinstance(exc, _TOO_LARGE) else ImageError
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        raise kind(
            f"input {index}: the image {shown(source)} cannot be used: {reason[:300]}", index=index
        ) from exc


def shown(source: object) -> str:
    """An input in a few words, without base64, passwords or the query of a URL."""
    if isinstance(source, bytes):
        return f"of {len(source):,} bytes"
    if not isinstance(source, (str, os.PathLike)):
        return f"of type {type(source).__name__}"
    text = os.fsdecode(source)
    if _scheme(text) == "data":
        text = text[:80].partition(",")[0] + ",..."
    elif _scheme(text) in ("http", "https"):
        text = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", text, maxsplit=1)[0])
    return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)")


def _scheme(text: str) -> str:
    found = re.match(r"(data):|(file|https?)://", text, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def _within(data: bytes, limit: int, kind: str = "") -> bytes:
    if len(data) > limit:
        raise _TooLargeError(f"{kind} it has over {limit:,} bytes, the most there may be".lstrip())
    return data


def _read(file: Any, index: int) -> bytes:
    if not isinstance(file.read(0), bytes):
        raise InputTypeError(
            f"input {index} has an image file that was opened as text; use open(path, 'rb')",
            index=index,
        )
    if hasattr(file, "seekable") and file.seekable():
        file.seek(0)
    return _joined(iter(partial(file.read, 1 << 20), b""))  # raw files give less than asked for


def _joined(parts: Iterable[bytes]) -> bytes:
    data = bytearray()
    for part in parts:
        data += part
        if len(data) > MAX_BYTES:
            break
    return _within(bytes(data), MAX_BYTES)


def _content(source: Any, urls: bool) -> bytes | Image.Image:
    """The bytes of the file that a source stands for; a PIL image stands for itself."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, os.PathLike):
        source = _from_path(source)
    elif isinstance(source, str):
        source = _from_text(source, urls)
    if not source:
        raise ValueError("it is empty")
    return _within(source, MAX_BYTES)


def _from_text(text: str, urls: bool) -> bytes:
    match _scheme(text):
        case "data":
            return _from_data_url(text, MAX_BYTES)
        case "file":
            return _from_file_url(text)
        case "http" | "https":
            if not urls:
                raise ValueError("it is an address; image_urls=True lets images be fetched")
            from shared_engine.image_urls import fetched

            return _joined(fetched(text))
    if os.path.lexists(text):
        return _from_path(text)
    if (data := _image_in_base64(text.encode("ascii", "replace"))) is None:
        raise ValueError("there is no such file, nor is it an image in base64")
    return data


def _from_path(path: str | os.PathLike[str]) -> bytes:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # a pipe or a device could be read for ever
        raise ValueError("it is a directory" if stat.S_ISDIR(mode) else "it is no regular file")
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _from_file_url(url: str) -> bytes:
    parts = urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError("it is on another host; a file: URL names a file of this one")
    return _from_path(url2pathname(parts.path))


def _from_data_url(url: str, limit: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or _scheme(head) != "data":
        raise ValueError("it is no data URL; expected data:image/png;base64,...")
    if len(body) > 2 * limit or body.count("%") > _ESCAPES:
        raise _TooLargeError(f"it has {len(body):,} characters, more than {limit:,} bytes take")
    raw = unquote_to_bytes(body)
    if re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        return _base64(raw)
    return _image_in_base64(raw) or raw


def _base64(text: bytes) -> bytes:
    try:
        return pybase64.b64decode(b"".join(text.split()), validate=True)
    except ValueError as exc:
        raise ValueError(f"its base64 is broken: {exc}") from exc


def _image_in_base64(text: bytes) -> bytes | None:
    try:
        data = _base64(text)
        _plugin(data)
    except ValueError:
        return None
    return data


class _Jpeg(JpegImageFile):
    """A JPEG whose EXIF is not searched for a resolution, with a warning where it is corrupt."""

    def _read_dpi_from_exif(self) -> None:
        """Leave `info` without one."""


class _Tiff(TiffImageFile):
    """A TIFF of a size that `_opened` has allowed, though Pillow warns of the largest."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.new(self.mode, self._tile_size).im
        super().load_prepare()


_FORMATS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    (rb"\xff\xd8\xff", _Jpeg),
    (rb"RIFF....WEBP", WebPImageFile),
    (rb"GIF8[79]a", GifImageFile),
    (rb"II[*+]\0|MM\0[*+]", _Tiff),
    (rb"BM", BmpImageFile),
)
"""Opened by class, not by `Image.open`: it checks sizes against a global of Pillow's, and has more
formats, of which one runs Ghostscript."""


def _plugin(data: bytes) -> type[ImageFile]:
    for start, plugin in _FORMATS:
        if re.match(start, data, re.DOTALL):
            return plugin
    raise ValueError(f"it is no PNG, JPEG, WebP, GIF, TIFF or BMP: it begins {data[:12]!r}")


def _fitted(
    source: Any, max_tiles: int, size: int, urls: bool
) -> tuple[Image.Image, int, int, Any]:
    """Decode an image; return it with the columns and rows of its grid, and its box, or None."""
    content = _content(source, urls)
    opened = _opened(content)
    cols, rows = grid(*_upright_size(opened), max_tiles, size)
    box = None
    if _is_plain(opened, content):  # else a PNG of every pixel is what a NIM would get
        drafted = opened.draft(None, (_DRAFT * cols * size, _DRAFT * rows * size))
        box = drafted and drafted[1]
    return _decoded(opened), cols, rows, box


def _opened(content: bytes | Image.Image) -> Image.Image:
    """An image of our own whose header is read and allowed; a caller's is copied, so decoded."""
    picture = content if isinstance(content, Image.Image) else _plugin(content)(BytesIO(content))
    width, height = picture.size
    if not width or not height:
        raise ValueError("it has no pixels")
    if max(width, height) > LONG_SIDE or min(width, height) > SHORT_SIDE:
        raise _TooLargeError(
            f"it has {width:,} x {height:,} pixels; expected at most {LONG_SIDE:,} x "
            f"{SHORT_SIDE:,}, either way round"
        )
    if picture is content:
        with _LOADING:  # two threads must not decode one object
            return picture.copy()
    return picture


def _is_plain(picture: Image.Image, content: object) -> bool:
    """Whether all readers of a file see the same in it."""
    return (
        isinstance(content, bytes)
        and isinstance(picture, (_Jpeg, PngImageFile))
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


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (width, height) if _orientation(picture) <= 4 else (height, width)


def _decoded(picture: Image.Image) -> Image.Image:
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


def _cut(decoded: Image.Image, cols: int, rows: int, box: Any, size: int) -> NDArray[np.uint8]:
    """Tiles (n, size, size, 3) of the box of an image, then its thumbnail if n > 1."""

    def resized(width: int, height: int) -> NDArray[np.uint8]:  # then RGB: grey has a third to do
        small = decoded.resize((width, height), Image.Resampling.BICUBIC, box)
        return np.array(small.convert("RGB"))

    cut = np.ascontiguousarray(arranged(resized(cols * size, rows * size), size))
    return cut if len(cut) == 1 else np.concatenate([cut, resized(size, size)[None]])


def arranged(sheet: Any, size: int) -> Any:
    """Return the tiles (n, size, size, 3) of an array or tensor (rows * size, cols * size, 3)."""
    height, width, channels = sheet.shape
    cells = sheet.reshape(height // size, size, width // size, size, channels)
    return cells.swapaxes(1, 2).reshape(-1, size, size, channels)


def _png(picture: Image.Image) -> bytes:
    rgb = picture.convert("RGB")
    rgb.info = {}  # a colour profile of the source would be wrong now
    buffer = BytesIO()
    rgb.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
