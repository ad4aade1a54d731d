"""Read the file of an image from any kind of source.

`accept` checks the type, and reads a file object before its owner closes it. `read` opens the file
or URL of an accepted source. `image_errors` turns all failures until the last pixel into errors of
the input.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

import pybase64
from PIL import Image

from shared_engine.errors import ImageError, ImageTooLargeError, InputError, InputTypeError
from shared_engine.images.formats import check_format

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image
)
"""A path, a file:, data: or http(s): URL, base64, bytes, a file object or a PIL image."""

AcceptedImage: TypeAlias = str | os.PathLike[str] | bytes | Image.Image
"""An `ImageSource` that `accept` returned; it can be read any number of times."""

MAX_BYTES = 25_000_000
"""Limit of a file: "less than 25MB" on NVIDIA's model card, read as the smaller kind of MB."""

_MAX_ESCAPES = 1_000_000
"""The most %XX in a data URL: decoding one takes about 80 bytes."""


def accept(image: object) -> AcceptedImage:
    """Check the type of an image, and read a file object before its owner closes it.

    Raises:
        InputTypeError: not an `ImageSource`, or a file that was opened as text.
        ImageError: the file object cannot be read.
        ImageTooLargeError: the file object has more than MAX_BYTES.
    """
    if isinstance(image, (str, bytes, os.PathLike, Image.Image)):
        return image
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if not callable(getattr(image, "read", None)):
        raise InputTypeError(
            f"has an image of type {type(image).__name__}; expected a path, a URL, base64, bytes, "
            "a file opened in binary mode, or a PIL image (for an array use "
            "PIL.Image.fromarray(...))"
        )
    with image_errors(image):
        return _read(image)


def decode_data_url(text: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of an image in a data URL; no path or other URL is ever opened.

    The bytes decide the format; the MIME type may be wrong or missing. Base64 after
    `data:image/png,`, without `;base64`, is accepted: NVIDIA's model card has it.

    Raises:
        ImageTooLargeError: more than `max_bytes`.
        ImageError: not a data URL, invalid base64, or not an image.
    """
    with image_errors(text):
        data = check_size(_from_data_url(text, max_bytes), max_bytes)
        check_format(data)
        return data


def draw_sample(width: int = 700, height: int = 500) -> Image.Image:
    """Draw a grey disc that fades to its rim, to try a model with an image."""
    return Image.radial_gradient("L").resize((width, height))


class TooLargeError(ValueError):
    """A limit is exceeded; `image_errors` turns it into an ImageTooLargeError."""


_TOO_LARGE = (TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning)

_QUOTED = re.compile(r"""\bb'(?:[^'\\]|\\.)*+'?|\bb"(?:[^"\\]|\\.)*+"?""")
"""Bytes as Python prints them: some of Pillow's messages quote the file."""
_LONG_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]{81}")
"""A text that is unlikely to be a path."""


@contextmanager
def image_errors(source: object) -> Iterator[None]:
    """Turn errors of Pillow, the file system and the network into an ImageError of this input."""
    try:
        yield
    except InputError:
        raise
    except Exception as exc:
        kind = ImageTooLargeError if isinstance(exc, _TOO_LARGE) else ImageError
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        reason = _QUOTED.sub("...", reason)[:300]
        raise kind(f"has an image that cannot be used, {describe(source)}: {reason}") from exc


def describe(source: object) -> str:
    """Describe a source in a few words, without base64, passwords or the query of a URL."""
    if isinstance(source, bytes):
        return f"of {len(source):,} bytes"
    if not isinstance(source, (str, os.PathLike)):
        return f"of type {type(source).__name__}"
    text = os.fsdecode(source)
    if _scheme(text) == "data":
        text = text[:80].partition(",")[0] + ",..."
    elif _scheme(text) in ("http", "https"):
        text = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", text, maxsplit=1)[0])
    elif _LONG_BASE64.match(text):
        return f"of {len(text):,} characters"
    return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)")


def _scheme(text: str) -> str:
    found = re.match(r"(data):|(file|https?)://", text, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def check_size(data: bytes, limit: int) -> bytes:
    """Return the data unchanged.

    Raises:
        TooLargeError: it has more than `limit` bytes.
    """
    if len(data) > limit:
        raise TooLargeError(f"it has more than {limit:,} bytes, the limit")
    return data


def _read(file: Any) -> bytes:
    if not isinstance(file.read(0), bytes):
        raise InputTypeError("has an image file that was opened as text; use open(path, 'rb')")
    if hasattr(file, "seekable") and file.seekable():
        file.seek(0)
    return _join(iter(partial(file.read, 1 << 20), b""))  # raw files may return less


def _join(parts: Iterable[bytes]) -> bytes:
    data = bytearray()
    for part in parts:
        data += part
        if len(data) > MAX_BYTES:
            break
    return check_size(bytes(data), MAX_BYTES)


def read(source: AcceptedImage, urls: bool) -> bytes | Image.Image:
    """Return the bytes of the file of a source; a PIL image is returned unchanged.

    Args:
        source: Result of `accept`.
        urls: Whether an http(s) URL may be fetched.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, os.PathLike):
        source = _from_path(source)
    elif isinstance(source, str):
        source = _from_text(source, urls)
    if not source:
        raise ValueError("it is empty")
    return check_size(source, MAX_BYTES)


def _from_text(text: str, urls: bool) -> bytes:
    match _scheme(text):
        case "data":
            return _from_data_url(text, MAX_BYTES)
        case "file":
            return _from_file_url(text)
        case "http" | "https":
            if not urls:
                raise ValueError("it is a URL; allow_image_urls=True allows fetching images")
            from shared_engine.images.fetch import fetch

            return _join(fetch(text))
    if os.path.lexists(text):
        return _from_path(text)
    if (data := _image_in_base64(text.encode("ascii", "replace"))) is None:
        raise ValueError("it is neither an existing file nor an image in base64")
    return data


def require_regular(path: str | os.PathLike[str]) -> None:
    """Check that a path is a regular file: a pipe or a device may never end.

    Raises:
        ValueError: it is not.
        OSError: there is no such file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file")


def _from_path(path: str | os.PathLike[str]) -> bytes:
    require_regular(path)
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _from_file_url(url: str) -> bytes:
    """Read the file of a file: URL, also of one whose path was not percent-encoded."""
    host, slash, path = url.partition("://")[2].partition("/")
    if host.lower() not in ("", "localhost"):
        raise ValueError("its file: URL names another host; expected a file on this host")
    path = slash + path
    names = url2pathname(path), path
    return _from_path(next(filter(os.path.lexists, names), names[0]))


def _from_data_url(url: str, limit: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or _scheme(head) != "data":
        raise ValueError("it is not a data URL; expected data:image/png;base64,...")
    if len(body) > 2 * limit or body.count("%") > _MAX_ESCAPES:
        raise TooLargeError(f"it has {len(body):,} characters, more than {limit:,} bytes need")
    raw = unquote_to_bytes(body)
    if re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        return _base64(raw)
    return _image_in_base64(raw) or raw


def _base64(text: bytes) -> bytes:
    try:
        return pybase64.b64decode(b"".join(text.split()), validate=True)
    except ValueError as exc:
        raise ValueError(f"its base64 is invalid: {exc}") from exc


def _image_in_base64(text: bytes) -> bytes | None:
    try:
        data = _base64(text)
        check_format(data)
    except ValueError:
        return None
    return data
