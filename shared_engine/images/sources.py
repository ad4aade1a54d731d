"""From anything that stands for an image to the bytes of its file.

`accept` looks at the type only, and reads an open file before its owner closes it; `read` opens
what an accepted source names. What goes wrong between the two and the last pixel becomes an error
of the input in `image_errors`.
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
from shared_engine.images.formats import find_format

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image
)
"""A path, a file:, data: or http(s): URL, base64, the bytes of a file, a file, or a PIL image."""

AcceptedImage: TypeAlias = str | os.PathLike[str] | bytes | Image.Image
"""An `ImageSource` that `accept` gave; it can be read any number of times."""


MAX_BYTES = 25_000_000
"""Of a file. NVIDIA's card says "less than 25MB" and not which MB; this is the smaller one."""


_ESCAPES = 1_000_000
"""The most %XX in a data URL: decoding one takes some 80 bytes for a while."""


def accept(image: object) -> AcceptedImage:
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
            f"has an image of type {type(image).__name__}; expected a path, a URL, "
            "base64, bytes, a file opened in binary mode, or a PIL image (of an array: "
            "PIL.Image.fromarray(...))"
        )
    with image_errors(image):
        return _read(image)


def decode_data_url(text: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a data URL that holds an image; no path or address is ever opened.

    The format is told by the bytes; the MIME type may be wrong or missing. `data:image/png,` with
    base64 that does not say so, as on NVIDIA's card, is taken too.

    Raises:
        ImageTooLargeError: it holds more than `max_bytes`.
        ImageError: no data URL, bad base64, or not an image.
    """
    with image_errors(text):
        data = check_size(_from_data_url(text, max_bytes), max_bytes)
        find_format(data)
        return data


class TooLargeError(ValueError):
    """Becomes an ImageTooLargeError in `image_errors`."""


_TOO_LARGE = (TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning)


_QUOTED = re.compile(r"""\bb'(?:[^'\\]|\\.)*+'?|\bb"(?:[^"\\]|\\.)*+"?""")
"""Bytes as Python prints them: some messages of Pillow's quote a file."""
_LONG_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]{81}")
"""What no path is, more likely than not."""


@contextmanager
def image_errors(source: object) -> Iterator[None]:
    """Turn whatever Pillow, the file system or the network raise into an error of this input."""
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
    elif _LONG_BASE64.match(text):
        return f"of {len(text):,} characters"
    return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)")


def _scheme(text: str) -> str:
    found = re.match(r"(data):|(file|https?)://", text, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def check_size(data: bytes, limit: int, kind: str = "") -> bytes:
    """Return what was given, unless it has more bytes than `limit`: a TooLargeError."""
    if len(data) > limit:
        raise TooLargeError(f"{kind} it has over {limit:,} bytes, the most there may be".lstrip())
    return data


def _read(file: Any) -> bytes:
    if not isinstance(file.read(0), bytes):
        raise InputTypeError("has an image file that was opened as text; use open(path, 'rb')")
    if hasattr(file, "seekable") and file.seekable():
        file.seek(0)
    return _join(iter(partial(file.read, 1 << 20), b""))  # raw files give less than asked for


def _join(parts: Iterable[bytes]) -> bytes:
    data = bytearray()
    for part in parts:
        data += part
        if len(data) > MAX_BYTES:
            break
    return check_size(bytes(data), MAX_BYTES)


def read(source: AcceptedImage, urls: bool) -> bytes | Image.Image:
    """The bytes of the file that a source stands for; a PIL image stands for itself."""
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
                raise ValueError("it is an address; allow_image_urls=True lets images be fetched")
            from shared_engine.images.fetch import fetch

            return _join(fetch(text))
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
    """Read what a file: URL names, or what one names that was put together without escapes."""
    host, slash, path = url.partition("://")[2].partition("/")
    if host.lower() not in ("", "localhost"):
        raise ValueError("it is on another host; a file: URL names a file of this one")
    path = slash + path
    escaped = url2pathname(re.split(r"[?#]", path, maxsplit=1)[0])
    names = (url2pathname(path), path, escaped)
    return _from_path(next(filter(os.path.lexists, names), escaped))


def _from_data_url(url: str, limit: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or _scheme(head) != "data":
        raise ValueError("it is no data URL; expected data:image/png;base64,...")
    if len(body) > 2 * limit or body.count("%") > _ESCAPES:
        raise TooLargeError(f"it has {len(body):,} characters, more than {limit:,} bytes take")
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
        find_format(data)
    except ValueError:
        return None
    return data
