"""Everything that stands for an image, and everything that does not."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared_engine import ImageError, ImageTooLargeError, InputError, InputTypeError
from shared_engine.images.encode import encode_data_url
from shared_engine.images.sources import accept, decode_data_url
from shared_engine.images.tiles import cut_tiles
from tests.support.image_files import (
    HTML,
    PICTURE,
    PNG,
    PNG64,
    SIDE,
    USES,
    as_64,
    assert_refused,
    reference_tiles,
)


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


def test_only_file_objects_are_read_by_accept(tmp_path):
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


_page = ImageError
_big = ImageTooLargeError
_type = InputTypeError

BROKEN: dict[str, tuple[Any, type[InputError], str]] = {
    "bytes over the limit": (PNG + bytes(25_000_000), _big, "25,000,000 bytes"),
    "base64 over the limit": (as_64(PNG + bytes(25_000_000)), _big, "25,000,000 bytes"),
    "a file object over the limit": (lambda _: BytesIO(bytes(25_000_001)), _big, "25,000,000"),
    "empty bytes": (b"", _page, "empty"),
    "empty str": ("", _page, "neither an existing file"),
    "empty file object": (lambda _: BytesIO(), _page, "empty"),
    "missing file": ("no/such/file.png", _page, "neither an existing file"),
    "missing path": (Path("no/such/file.png"), _page, "No such file"),
    "NUL in a path": ("page\0.png", _page, "neither an existing file"),
    "NUL in a Path": (Path("page\0.png"), _page, "null"),
    "a long text": ("What is on the page? " * 9999, _page, "neither an existing file"),
    "a lone surrogate": ("\ud800.png", _page, "neither an existing file"),
    "base64 with bad padding": (PNG64[:-3], _page, "neither an existing file"),
    "base64 of something else": (as_64(b"a page about cats"), _page, "neither an existing file"),
    "url-safe base64": (
        as_64(b"BM" + b"\xff" * 40).replace("/", "_"),
        _page,
        "neither an existing file",
    ),
    "data URL without data": ("data:image/png;base64,", _page, "empty"),
    "data URL without comma": ("data:image/png;base64", _page, "not a data URL"),
    "data URL, no base64": ("data:image/png;base64,****", _page, "base64 is invalid"),
    "data URL, bad padding": (f"data:image/png;base64,{PNG64[:-3]}", _page, "base64 is invalid"),
    "data URL, padding within": ("data:image/png;base64,iVBORw==iVBO", _page, "base64 is invalid"),
    "data URL, not ASCII": ("data:image/png;base64,iVBÖRw==", _page, "base64 is invalid"),
    "data URL of html": (f"data:image/png;base64,{as_64(HTML)}", _page, "a web page; expected"),
    "data URL of a path": ("data:image/png,/etc/hostname", _page, "not a PNG"),
    "data URL of percents": ("data:image/png," + "%41" * 1_000_001, _big, "characters"),
    "file URL of another host": ("file://server/share/a.png", _page, "another host"),
    "file URL of nothing": ("file:///no/such/file.png", _page, "No such file"),
    "file URL with NUL": ("file:///tmp/a%00b", _page, "null"),
    "http": ("http://example.com/a.png", _page, "allow_image_urls=True"),
    "https": ("HTTPS://user:secret@example.com/a.png?key=secret", _page, "allow_image_urls=True"),
    "ftp": ("ftp://example.com/a.png", _page, "neither an existing file"),
    "a directory": (lambda folder: folder, _page, "is a directory"),
    "a directory as str": (lambda folder: f"{folder}/", _page, "is a directory"),
    "an empty file": (lambda folder: made(folder / "a.png", b""), _page, "empty"),
    "a large file": (lambda folder: made(folder / "a.png", bytes(25_000_001)), _big, "25,000,000"),
    "a device": ("/dev/zero", _page, "not a regular file"),
    "a pipe": (lambda folder: fifo(folder / "pipe"), _page, "not a regular file"),
    "a dangling link": (lambda folder: link(folder, "nowhere"), _page, "No such file"),
    "a link to itself": (lambda folder: link(folder, "link"), _page, "symbolic links"),
    "a path through a file": (lambda folder: made(folder / "a", b"x") / "b", _page, "directory"),
    "PIL without pixels": (Image.new("RGB", (0, 9)), _page, "no pixels"),
    "PIL over the long side": (Image.new("1", (16_385, 1)), _big, "16,385 x 1"),
    "PIL over the short side": (Image.new("1", (8_193, 8_193)), _big, "8,193 x 8,193"),
    "PIL, closed": (lambda _: lazily_closed(), _page, "cannot be used"),
    "PIL, broken": (lambda _: Image.open(BytesIO(PNG[: len(PNG) // 2])), _page, "truncated"),
    "closed file object": (lambda _: closed_file(), _page, "closed file"),
    "text file object": (lambda _: StringIO("a page"), _type, "opened as text"),
    "int": (7, _type, "type int"),
    "None": (None, _type, "type NoneType"),
    "list": ([PNG], _type, "type list"),
    "dict": ({"url": "a.png"}, _type, "type dict"),
    "array": (np.zeros((9, 9, 3), np.uint8), _type, "Image.fromarray"),
    "class": (Image.Image, _type, "type type"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", BROKEN)
def test_an_invalid_source_is_refused(name, use, tmp_path):
    source, kind, words = BROKEN[name]
    if callable(source) and not isinstance(source, type):
        source = source(tmp_path)
    assert_refused(use, source, kind, words)


@pytest.mark.parametrize(
    "name",
    [
        "a b.png",
        "100%.png",
        "50%25.png",
        "a#b.png",
        "a?b.png",
        "a%23b.png",
        "a%3Fb?c#d.png",
        "ä%.png",
    ],
)
def test_a_file_url_needs_no_escapes(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(PNG)
    other = tmp_path / name.partition("#")[0].partition("?")[0]
    if other != path:
        other.write_bytes(HTML)  # what a browser would open
    for url in (path.as_uri(), f"file://{path}", f"FILE://localhost{path}"):
        assert np.array_equal(cut_tiles(url, 2, SIDE), cut_tiles(PNG, 2, SIDE))
