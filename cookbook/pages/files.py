"""The files that were sent, in a folder: what came, its pages as pictures, and their texts.

    <id>/name.json   its name and when it came; with `original` from the first moment
    <id>/1.png       a page as it is shown and embedded; 1.webp, small, for lists
    <id>/pages.json  written last: its pages are indexed. Without it, work goes on at the next start
    .gone-<id>/      being deleted

A folder is named for what a file holds, and nothing on disk is ever named as a person named it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from shared_engine.images import pages as reader

THUMB = 480  # pixels of the longer side of the small picture in lists
_CHUNK = 2**20


@dataclass(frozen=True)
class Page:
    """A page that has been drawn."""

    file: str
    number: int
    """From 1."""
    picture: Path
    width: int
    height: int
    text: str
    """Its text layer; empty where it has none, as in a scan."""
    place: str = ""
    """Which page of the file it is, or which part of a very long one; as `title` shows it."""

    @property
    def id(self) -> str:
        """The same as long as the bytes of its file are."""
        return f"{self.file}-{self.number}"

    @property
    def title(self) -> str:
        """How it is called."""
        return self.place or f"page {self.number}"

    @property
    def thumb(self) -> Path:
        """Its small picture."""
        return self.picture.with_suffix(".webp")


@dataclass(frozen=True)
class File:
    """A file that was sent; it has pages once they are indexed."""

    id: str
    name: str
    folder: Path
    added: float
    pages: dict[int, Page] = field(default_factory=dict)
    """By number, which may have gaps where pages are broken."""
    notes: tuple[str, ...] = ()
    """What a reader should know of it."""

    @property
    def original(self) -> Path:
        """What was sent."""
        return self.folder / "original"

    def save_page(self, number: int, read: reader.Page) -> Page:
        """Write a page's pictures."""
        assert read.picture is not None
        path = self.folder / f"{number}.png"
        page = Page(self.id, number, path, *read.picture.size, read.text, str(read.place))
        read.picture.save(path, compress_level=1)
        small = read.picture.copy()
        small.thumbnail((THUMB, THUMB))
        small.save(page.thumb, quality=80)
        return page


class Files:
    """All files in a folder, and what was left unfinished there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder)
        found = [_read(path.parent) for path in folder.glob("*/name.json")]
        self._finished = {file.id: file for file in found if file.pages}
        self.unfinished = sorted((f for f in found if not f.pages), key=lambda file: file.added)

    def __iter__(self) -> Iterator[File]:
        """Yield the finished ones, newest first."""
        return iter(sorted(self._finished.values(), key=lambda file: -file.added))

    def get(self, id_: str) -> File | None:
        """Return a finished file."""
        return self._finished.get(id_)

    def receive(self, name: str, content: IO[bytes]) -> File:
        """Keep what is sent under the name of its content; a file that is here stays as it is."""
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".new-") as scratch:
            digest = hashlib.sha256()
            with Path(scratch, "original").open("wb") as out:
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
            id_ = digest.hexdigest()[:32]
            if known := self.get(id_):
                return known
            folder = self._folder / id_
            _write(Path(scratch, "name.json"), {"name": _clean(name), "added": time.time()})
            if not folder.exists():
                Path(scratch).rename(folder)
                Path(scratch).mkdir()  # for the context to remove
        return _read(folder)

    def finish(self, file: File, pages: list[Page], notes: list[str]) -> None:
        """Write down that the pages of a file are indexed."""
        rows = [[each.number, each.width, each.height, each.text, each.place] for each in pages]
        _write(file.folder / "pages.json", {"pages": rows, "notes": notes})
        self._finished[file.id] = _read(file.folder)

    def remove(self, file: File) -> None:
        """Delete a file and all that was made of it."""
        self._finished.pop(file.id, None)
        gone = file.folder.with_name(f".gone-{file.id}")
        file.folder.rename(gone)  # at once, so that a stop in between leaves no half of a file
        shutil.rmtree(gone)


def _clear_leftovers(folder: Path) -> None:
    """Delete what a stop in the middle of a receipt or a removal left."""
    for path in (*folder.glob(".new-*"), *folder.glob(".gone-*")):
        shutil.rmtree(path)


def _clean(name: str) -> str:
    r"""Return a name that is safe to show: one short line, without folders.

    >>> _clean("C:\\fakepath\\a\x00b.pdf"), _clean("../../etc/passwd"), _clean("/")
    ('ab.pdf', 'passwd', 'unnamed')
    """
    last = re.split(r"[/\\]", name)[-1]
    return "".join(char for char in last if char.isprintable())[:120].strip() or "unnamed"


def _read(folder: Path) -> File:
    named = json.loads((folder / "name.json").read_text(encoding="utf-8"))
    finished = folder / "pages.json"
    found = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else {}
    pages = {
        number: Page(folder.name, number, folder / f"{number}.png", *rest)
        for number, *rest in found.get("pages", ())
    }
    notes = tuple(found.get("notes", ()))
    return File(folder.name, named["name"], folder, named["added"], pages, notes)


def _write(path: Path, content: object) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content), encoding="utf-8")
    os.replace(new, path)
