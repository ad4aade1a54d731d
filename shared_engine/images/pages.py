"""Read PDFs and image files as pages, in a child process: it is ended where a page takes too much.

open_pages ──► an idle child, or a new one: page_reader.py, with PDFium and Pillow
Pages.read ──► a request to it ──► picture and text of the page, or the reason why not
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Literal, NamedTuple, Self

from PIL import Image

from shared_engine._lazy import needs_extra
from shared_engine.errors import EngineClosedError, EngineError, PageError

_log = logging.getLogger("shared_engine")

Layer = Literal["picture", "text", "both"]
"""Part of a page to read: its picture, its text, or both."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
"""Suffixes of image files."""

PIXELS = 1_754
"""Pixels of a page's longer side: A4 at 150 dpi, more than twelve tiles of a model show."""
SECONDS = 60.0
"""Limit of the processor time to open a file or to read a page."""
MEMORY = 2 << 30
"""Limit of the bytes for that, on Linux only."""
OUT_OF_MEMORY = 3
"""Exit code of a child that has reached this limit."""

_MOST_ENDED = 5
"""Pages of a file that may end a child; each can take the whole limit of time."""
_MOST_IDLE = 4
"""Children that wait for the next file; each has about 60 MB."""

Area = tuple[float, float, float, float]
"""Left, top, right and bottom of an area, in widths and heights of a picture."""


class Place(NamedTuple):
    """Position of a page in its file."""

    page: int
    """Number of the page, from 1."""
    part: int = 0
    """Number of the part, from 1, of a very long page; 0 for a whole page."""
    parts: int = 1
    """Number of parts of the page."""

    def __str__(self) -> str:
        return f"page {self.page}" + (f", part {self.part}" if self.part else "")


class Page(NamedTuple):
    """A page, or a part of a very long one."""

    place: Place
    picture: Image.Image | None
    """RGB, at most `PIXELS` on its longer side; None if only the text was read."""
    text: str
    """Visible text and values of form fields; empty for a scan, or if only the picture was read."""


class Pages:
    """The pages of an open file. One thread at a time may read them."""

    def __init__(self, path: str | os.PathLike[str], name: str, max_pages: int) -> None:
        """Open a file; see `open_pages`."""
        self._request = "open", os.path.abspath(os.fsdecode(path)), max_pages
        self._name = name
        self._reader: _Reader | None = None
        self._lock = threading.Lock()
        self._is_stopped = False
        self._ended = 0
        try:
            found = self._ask(name)
            self.places = [Place(*each) for each in found["places"]]
            """Where each page is; known before a page is read."""
            if len(self) > max_pages:
                raise PageError(
                    f"{name} has over {max_pages:,} pages, the most for one file; split it and "
                    "save the parts"
                )
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int, layer: Layer = "both") -> Page:
        """Draw a page and read its text.

        Args:
            index: position in `places`.
            layer: what to read.

        Raises:
            PageError: the page is broken, or takes too much time or memory; other pages may be
                readable.
            EngineClosedError: another thread called `stop`.
        """
        found = self._ask_page(index, "read", layer)
        assert self._reader is not None
        picture = self._reader.read_picture(found["size"]) if found["size"] else None
        return Page(self.places[index], picture, found["text"])

    def find(self, index: int, passage: str) -> list[Area]:
        """Return the areas of a passage in the picture of a page.

        Args:
            index: position in `places`.
            passage: part of the page's text.

        Returns:
            An area for each line; an empty list if the page shows no such text.

        Raises:
            PageError, EngineClosedError: as `read` raises them.
        """
        return [tuple(area) for area in self._ask_page(index, "find", passage)["areas"]]

    def _ask_page(self, index: int, verb: str, *args: Any) -> dict[str, Any]:
        title = f"{self._name}, {self.places[index]},"
        if self._ended == _MOST_ENDED:
            raise PageError(
                f"{title} was not read, because {_MOST_ENDED} pages of the file took too much time "
                "or memory; remove those, and read the file again"
            )
        return self._ask(title, verb, index, *args)

    def stop(self) -> None:
        """End the read that another thread waits for; it and later ones raise EngineClosedError."""
        self._is_stopped = True
        with self._lock:
            if self._reader is not None:
                self._reader.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.release()

    def _ask(self, title: str, *request: Any) -> dict[str, Any]:
        """Return the reply to a request, or to that which opens the file."""
        requests = [request] if request else []
        found: dict[str, Any] = {}
        try:
            if self._reader is None:
                self._reader = _take_reader()
                requests.insert(0, self._request)
            for each in requests:
                if self._is_stopped:
                    raise _EndedError("was not read")
                found = self._reader.ask(*each)
                if "error" in found:
                    if each is self._request:  # the child has no file that a later read could ask
                        self.close()
                    raise PageError(f"{title} {found['error']}")
        except _EndedError as exc:
            self.close()
            if self._is_stopped:
                raise EngineClosedError(f"{title} was not read: the work was stopped") from None
            self._ended += 1
            raise PageError(f"{title} {exc}") from None
        return found


def open_pages(
    path: str | os.PathLike[str], name: str | None = None, max_pages: int = sys.maxsize
) -> Pages:
    """Open a PDF or an image file, recognised by its first bytes; closing it is left to the caller.

    A TIFF may have several pages, another image file has one. A very long page, such as a receipt,
    is cut into parts: one that is as long as two pages of A4, also of two that are as wide as it.

    Args:
        path: the file.
        name: its name in messages; default: the last part of `path`.
        max_pages: the most pages.

    Raises:
        PageError: neither a PDF nor an image; empty, locked, broken or too long; a dynamic XFA
            form, which PDFium cannot draw; it takes too much time or memory.
        MissingExtraError: pypdfium2 is not installed.
    """
    return Pages(path, os.path.basename(path) if name is None else name, max_pages)


def walk(
    folder: str | os.PathLike[str],
    is_hidden: Callable[[str], bool] = lambda name: name[0] == ".",
) -> Iterator[str]:
    """Yield the files below a folder, without hidden ones and those in hidden folders.

    Links to folders are followed; a folder that several paths reach is read once. A warning names
    folders that cannot be read.

    Args:
        folder: where to look.
        is_hidden: whether a name is hidden.
    """
    seen: set[str] = set()
    unread: list[OSError] = []
    for where, folders, files in os.walk(folder, onerror=unread.append, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (os.path.join(where, name) for name in sorted(files) if not is_hidden(name))
    if unread:
        first = f"{unread[0].filename} ({unread[0].strerror})"
        _log.warning("%d folders cannot be read, the first: %s", len(unread), first)


class _EndedError(Exception):
    """The child ended; the message is a predicate of the file or page that it read."""


class _Reader:
    """A child process that reads a file at a time. It ends with this process, however that ends."""

    def __init__(self) -> None:
        with needs_extra("bulk"):
            if find_spec("pypdfium2") is None:
                raise ModuleNotFoundError(name="pypdfium2")
        code = (
            "import sys; sys.path[:] = sys.argv[4:]; from shared_engine.images import page_reader; "
            "page_reader.serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))"
        )
        self._is_asked = False
        self._pixels = _open_memory()
        shared = self._pixels.fileno()
        arguments = shared, SECONDS, MEMORY, *sys.path
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            pass_fds=(shared,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for this process, which ends the child
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        if not self._replies.readline():
            raise EngineError(f"the process that reads pages did not start {_name(self._wait())}")

    def ask(self, *request: Any) -> dict[str, Any]:
        """Send a request and return the reply.

        Raises:
            _EndedError: the child ended.
        """
        self._is_asked = True
        with suppress(BrokenPipeError):
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise _EndedError(_explain(self._wait()))
        self._is_asked = False
        found: dict[str, Any] = json.loads(line)
        return found

    def read_picture(self, size: tuple[int, int]) -> Image.Image:
        """Return the picture of the page that was asked for last."""
        pixels = os.pread(self._pixels.fileno(), 3 * size[0] * size[1], 0)
        return Image.frombytes("RGB", size, pixels)

    def release(self) -> None:
        """Close the file, and let the child wait for the next one."""
        if self._is_asked or len(_idle[os.getpid()]) >= _MOST_IDLE:
            self.end()
            return
        with suppress(BrokenPipeError):
            self._requests.write(b'["close"]\n')
            self._requests.flush()
        _idle[os.getpid()].append(self)

    def kill(self) -> None:
        """Kill the child; safe in any thread."""
        self._is_asked = True  # it is not used again
        self._process.kill()

    def end(self) -> int:
        """Kill the child, unless it has ended, and return its exit code."""
        self.kill()
        code = self._process.wait()
        with suppress(BrokenPipeError):
            self._requests.close()
        self._replies.close()
        self._pixels.close()
        return code

    def _wait(self) -> int:
        """Return the exit code of a child that has closed its pipe."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        return self.end()

    @property
    def is_alive(self) -> bool:
        """Whether the child can be asked."""
        return self._process.poll() is None


_idle: defaultdict[int, list[_Reader]] = defaultdict(list)
"""Children that wait for a file, by their parent: those of a fork's parent are not its own."""


def _open_memory() -> BinaryIO:
    """Return a file for pixels, which cross a pipe in several times the time."""
    if sys.platform == "linux":
        return open(os.memfd_create("pages"), "rb", buffering=0)
    return TemporaryFile(buffering=0)


def _take_reader() -> _Reader:
    """Return an idle child, or a new one."""
    with suppress(IndexError):
        while True:
            reader = _idle[os.getpid()].pop()
            if reader.is_alive:
                return reader
            reader.end()
    return _Reader()


@atexit.register
def _end_idle() -> None:
    for reader in _idle.pop(os.getpid(), ()):
        reader.end()


def _explain(code: int) -> str:
    """Return why a child ended while it read a page, and what to do."""
    memory = f"needs more than {MEMORY / 2**30:g} GB of memory"
    if code == -signal.SIGPROF:
        reason = f"took more than {SECONDS:g} s of processor time, the limit"
    elif code == OUT_OF_MEMORY:
        reason = f"{memory}, the limit"
    else:
        reason = f"is broken, or {memory}: the process that read it ended {_name(code)}"
    return f"{reason}; leave it out, or print it to a new PDF and try that"


def _name(code: int) -> str:
    return f"({signal.Signals(-code).name})" if code < 0 else f"(exit code {code})"
