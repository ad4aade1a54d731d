"""The files that were sent, in a folder: what came, its pages as pictures, and their texts.

    <id>/name.json   its name and when it came; with `original` from the first moment
    <id>/1.png       a page as it is shown and embedded; 1.webp, small, for lists
    <id>/pages.json  written last: its pages are indexed. Without it, work goes on at the next start
    .gone-*/         being deleted

A folder is named for what a file holds, and nothing on disk is ever named as a person named it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from demo import show  # beside this folder

from shared_engine import PageError
from shared_engine.images import pages as reader

THUMB = 480  # pixels of the longer side of the small picture in lists
_CHUNK = 2**20
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # what JSON of another shape raises


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
    title: str
    """Which page of the file it is, or which part of a very long one: "page 1, part 2"."""

    @property
    def id(self) -> str:
        """The same as long as the bytes of its file are."""
        return f"{self.file}-{self.number}"

    @property
    def source(self) -> int:
        """The number of the page in the original, of which this may be a part."""
        return int(re.findall("[0-9]+", self.title)[0])

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

    def find(self, page: Page, passage: str) -> list[reader.Area]:
        """Return the areas of a passage in a page's picture; none where they cannot be found."""
        if not passage:
            return []
        try:
            with reader.open_pages(self.original) as pages:
                return pages.find(page.number - 1, passage)
        except PageError:
            return []


class Files:
    """All files in a folder, and what was left unfinished there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder)
        found = []
        for path in folder.glob("*/name.json"):
            try:
                found.append(_read(path.parent))
            except _UNREADABLE:
                show("Skipped", f"{path} is damaged; send the file again, or delete its folder")
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
            _write(Path(scratch, "name.json"), {"name": clean(name), "added": time.time()})
            with self._lock:
                try:
                    return _read(folder)
                except _UNREADABLE:  # it is not there, or was skipped at the start
                    self._delete(folder)
                Path(scratch).rename(folder)
            Path(scratch).mkdir()  # for the context to remove
        return _read(folder)

    def finish(self, file: File, pages: list[Page], notes: list[str]) -> None:
        """Write down that the pages of a file are indexed."""
        rows = [[each.number, each.width, each.height, each.text, each.title] for each in pages]
        _write(file.folder / "pages.json", {"pages": rows, "notes": notes})
        self._finished[file.id] = _read(file.folder)

    def reopen(self, file: File) -> None:
        """Make a finished file unfinished, as its pages are no longer indexed."""
        (file.folder / "pages.json").unlink()
        del self._finished[file.id]
        self.unfinished.append(replace(file, pages={}, notes=()))

    def remove(self, file: File) -> None:
        """Delete a file and all that was made of it; do nothing where that was done."""
        self._finished.pop(file.id, None)
        self._delete(file.folder)

    def _delete(self, folder: Path) -> None:
        scratch = tempfile.TemporaryDirectory(dir=self._folder, prefix=".gone-")
        with scratch as gone, suppress(FileNotFoundError):  # it was deleted already
            # in one step, so that a stop in between leaves no half of a file
            folder.rename(Path(gone, folder.name))


def _clear_leftovers(folder: Path) -> None:
    """Delete what a stop in the middle of a receipt or a removal left."""
    for path in (*folder.glob(".new-*"), *folder.glob(".gone-*")):
        shutil.rmtree(path)


def clean(name: str) -> str:
    r"""Return a name that is safe to show: one short line, without folders.

    >>> clean("C:\\fakepath\\a\x00b.pdf"), clean("../../etc/passwd"), clean("/")
    ('ab.pdf', 'passwd', 'unnamed')
    """
    last = re.split(r"[/\\]", name)[-1]
    return "".join(char for char in last if char.isprintable())[:120].strip() or "unnamed"


def _read(folder: Path) -> File:
    named = json.loads((folder / "name.json").read_text(encoding="utf-8"))
    file = File(folder.name, str(named["name"]), folder, float(named["added"]))
    try:
        found = json.loads((folder / "pages.json").read_text(encoding="utf-8"))
        pages = {
            number: Page(folder.name, number, folder / f"{number}.png", *rest)
            for number, *rest in found["pages"]
        }
        return replace(file, pages=pages, notes=tuple(found["notes"]))
    except _UNREADABLE:  # not finished, or cut by a fault of the disk: its pages are made anew
        return file


def _write(path: Path, content: object) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content), encoding="utf-8")
    os.replace(new, path)
